"""Every benchmark case of every operation on a GPU, where there is one: our backends and the reference, eager,
channels_last and compiled; equality before the stopwatch. Written without a GPU at hand."""

import pytest
import torch
from ftso_fast.kernels import testing

from ftso_fast import kernels

DIRECTIONS = ("forward", "forward+backward")
ARMS = ("cuda", "triton", "eager", "channels_last", "compile")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.benchmark(warmup=False),
]


@pytest.fixture(scope="module")
def copy_rate():
    """Bytes a second that a copy of 256 MB moves on this card."""
    source = torch.empty(1 << 26, device="cuda")
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        target.copy_(source)
    start.record()
    for _ in range(20):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 20 * 2 * 4 * source.numel() / (start.elapsed_time(end) * 1e-3)


def calls_of(arm, case):
    """The two timed calls, which wait for the GPU; for ours equality with float64 comes first."""
    operation = testing.OPERATIONS[case.op]
    tensors = [t.cuda() for t in operation.inputs(case, 0)]
    function, backend = operation.reference, "reference"
    if arm in ("cuda", "triton"):
        if reason := kernels.backends()[arm]:
            pytest.skip(reason)
        function, backend = operation.function, arm
        with kernels.use_backend(arm):
            testing.check(case, tensors)
    elif arm == "channels_last":
        tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    elif arm == "compile":
        function = torch.compile(function, dynamic=False)
    leaves = [t.detach().requires_grad_() for t in tensors]
    grad = torch.ones_like(operation.call(operation.reference, case, tensors))

    def forward():
        with torch.no_grad(), kernels.use_backend(backend):
            operation.call(function, case, tensors)
        torch.cuda.synchronize()

    def both():
        with kernels.use_backend(backend):
            torch.autograd.grad(operation.call(function, case, leaves), leaves, grad)
        torch.cuda.synchronize()

    return forward, both


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", testing.BENCHMARKS, ids=str)
def test_operation_on_a_gpu(benchmark, copy_rate, case, direction, arm):
    which = DIRECTIONS.index(direction)
    call = calls_of(arm, case)[which]
    benchmark.group = f"{torch.cuda.get_device_name()} {case} {direction}"
    benchmark.pedantic(call, rounds=30, warmup_rounds=5)
    if stats := benchmark.stats:
        moved = testing.OPERATIONS[case.op].bytes_moved(case)[which]
        rate = moved / stats["median"]
        benchmark.extra_info |= {"GB/s": round(rate / 1e9), "of a copy": round(rate / copy_rate, 3)}
