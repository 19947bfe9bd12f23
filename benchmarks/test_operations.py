"""Every benchmark case of every operation, forward, forward with backward, and inference where it has a form of its
own: on the fastest instruction set, in the long form on all that have kernels of their own for operations."""

import lab as laboratory
import pytest
from ftso_fast.kernels import _backend, testing
from operations import directions

from ftso_fast import kernels

pytestmark = pytest.mark.benchmark(timer=laboratory.clock)
FIRST, *REST = kernels.available_isas()
ISAS = [FIRST, *(isa for isa in REST if isa not in (*_backend.OTHERS, _backend.OTHERS.get(FIRST)))]
CALLS = [(case, direction) for case in testing.BENCHMARKS for direction in directions(case)]


@pytest.mark.parametrize("isa", ISAS if laboratory.LONG else ISAS[:1])
@pytest.mark.parametrize(("case", "direction"), CALLS, ids=str)
def test_operation(benchmark, lab, threads, case, direction, isa):
    operation, which = testing.OPERATIONS[case.op], int(direction == "forward+backward")
    flops, moved = operation.flops(case)[which], operation.bytes_moved(case)[which]
    work = (flops, "GFLOP/s") if flops else (moved, "GB/s")
    lab.compare(benchmark, "operations", f"{case} {direction}", f"cpu/{isa}", threads, *work)
