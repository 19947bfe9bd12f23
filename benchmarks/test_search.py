"""A search iteration, its two steps, and a one-iteration search from a fresh process."""

import peer
import pytest

from ftso_fast import kernels

ARM = f"cpu/{kernels.isa()}"
TOLERANCE = {"loss": 2e-6, "betas": 1e-2, "weight": 5e-2}
"""Largest difference between two float32 networks, as a part of the largest value: of the losses, of a beta vector's
gradient, of a tensor's update. ReLU and max-pool masks that flip, not rounding, set the last two."""


@pytest.mark.parametrize("piece", ["iteration", "architecture step", "weight step"])
def test_iteration(benchmark, lab, threads, piece):
    with peer.running(ARM):
        state = peer.Iteration(ARM)
        lab.gate("iteration", piece, ARM, threads, state.first(), TOLERANCE)
        call = (state.steps | {"iteration": state.both})[piece]
        benchmark.pedantic(call, rounds=peer.rounds(peer.seconds_of(call)))
    flops = lab.measured("flops", "eager", "default", threads)
    lab.record(benchmark, "iteration", piece, ARM, threads, flops[piece], "GFLOP/s")


clock = [0.0]
"""Seconds that fresh processes say they searched for; start and import are not among them."""


@pytest.mark.benchmark(timer=lambda: clock[0])
def test_fresh_search(benchmark, lab, threads):
    work, piece = "search", "search 1it"
    found = lab.measured(work, ARM, "default", threads)[piece]
    lab.gate(work, piece, ARM, threads, found["values"], TOLERANCE)
    seconds = iter(found["seconds"])

    def one_process() -> None:
        clock[0] += next(seconds)

    benchmark.pedantic(one_process, rounds=len(found["seconds"]))
    flops = lab.measured("flops", "eager", "default", threads)
    lab.record(benchmark, work, piece, ARM, threads, flops[piece], "GFLOP/s", found["peak_mb"])
