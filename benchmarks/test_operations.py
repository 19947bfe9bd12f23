"""Every benchmark case of every operation: forward, and forward with backward, on each instruction set."""

import lab as laboratory
import pytest
from ftso_fast.kernels import testing

from ftso_fast import kernels

pytestmark = pytest.mark.benchmark(timer=laboratory.clock)
DIRECTIONS = ("forward", "forward+backward")


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", testing.BENCHMARKS, ids=str)
def test_operation(benchmark, lab, threads, case, direction, isa):
    moved = testing.OPERATIONS[case.op].bytes_moved(case)[DIRECTIONS.index(direction)]
    lab.compare(benchmark, "operations", f"{case} {direction}", f"cpu/{isa}", threads, moved, "GB/s")
