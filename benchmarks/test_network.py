"""The network that is trained with a genotype: a step of training, warm and from cold, and inference. Long form."""

import lab as laboratory
import pytest
from lab import OURS

pytestmark = [
    pytest.mark.benchmark(timer=laboratory.clock),
    pytest.mark.skipif(not laboratory.LONG, reason="FTSO_BENCH=long only"),
]


@pytest.mark.parametrize("piece", ["training step", "first training step"])
def test_training(benchmark, lab, threads, piece):
    lab.compare(benchmark, "training", piece, OURS, threads, laboratory.network_flops()[piece], "GFLOP/s")


def test_inference(benchmark, lab, threads):
    piece = "network inference"
    lab.compare(benchmark, "inference", piece, OURS, threads, laboratory.network_flops()[piece], "GFLOP/s")
