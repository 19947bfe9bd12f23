"""Every benchmark case of every operation, forward and forward with backward: on the fastest instruction set, in the
long form on all."""

import lab as laboratory
import pytest
from ftso_fast.kernels import testing

from ftso_fast import kernels

pytestmark = pytest.mark.benchmark(timer=laboratory.clock)
DIRECTIONS = ("forward", "forward+backward")


@pytest.mark.parametrize("isa", kernels.available_isas() if laboratory.LONG else kernels.available_isas()[:1])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", testing.BENCHMARKS, ids=str)
def test_operation(benchmark, lab, threads, case, direction, isa):
    operation, which = testing.OPERATIONS[case.op], DIRECTIONS.index(direction)
    flops, moved = operation.flops(case)[which], operation.bytes_moved(case)[which]
    work = (flops, "GFLOP/s") if flops else (moved, "GB/s")
    lab.compare(benchmark, "operations", f"{case} {direction}", f"cpu/{isa}", threads, *work)
