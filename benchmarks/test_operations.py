"""Every benchmark case of every operation, forward, forward with backward, and inference where it has a form of its
own: on the fastest instruction set, in the long form on all."""

import lab as laboratory
import pytest
from ftso_fast.kernels import testing
from operations import directions

from ftso_fast import kernels

pytestmark = pytest.mark.benchmark(timer=laboratory.clock)
CALLS = [(case, direction) for case in testing.BENCHMARKS for direction in directions(case)]


@pytest.mark.parametrize("isa", kernels.available_isas() if laboratory.LONG else kernels.available_isas()[:1])
@pytest.mark.parametrize(("case", "direction"), CALLS, ids=str)
def test_operation(benchmark, lab, threads, case, direction, isa):
    operation, which = testing.OPERATIONS[case.op], int(direction == "forward+backward")
    flops, moved = operation.flops(case)[which], operation.bytes_moved(case)[which]
    work = (flops, "GFLOP/s") if flops else (moved, "GB/s")
    lab.compare(benchmark, "operations", f"{case} {direction}", f"cpu/{isa}", threads, *work)
