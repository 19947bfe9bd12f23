"""Every benchmark case of every operation: forward, and forward with backward, on each backend."""

from functools import cache

import peer
import pytest
from ftso_fast.kernels import testing

from ftso_fast import kernels

ARMS = (*(f"cpu/{isa}" for isa in kernels.available_isas()), "reference")
DIRECTIONS = ("forward", "forward+backward")
TOLERANCE = {"": 1e-5}
"""Largest difference between two float32 arms; each case is also held against the float64 reference."""


@cache
def tensors_of(case):
    return testing.OPERATIONS[case.op].inputs(case)


@cache
def checked(case, arm) -> None:
    testing.check(case, tensors_of(case))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", testing.BENCHMARKS, ids=str)
def test_operation(benchmark, lab, threads, case, direction, arm):
    piece = f"{case} {direction}"
    with peer.running(arm):
        checked(case, arm)
        call = peer.operation_calls(arm, case, tensors_of(case))[direction]
        lab.gate("operations", piece, arm, threads, peer.sample(call()), TOLERANCE)
        benchmark.pedantic(call, rounds=peer.rounds(peer.seconds_of(call)))
    moved = testing.OPERATIONS[case.op].bytes_moved(case)[DIRECTIONS.index(direction)]
    lab.record(benchmark, "operations", piece, arm, threads, moved, "GB/s")
