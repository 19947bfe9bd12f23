"""The whole network with its normal cells on the emulated CUDA kernels, beside the same on Triton's interpreter.

A process of its own: TRITON_INTERPRET must be set before triton is imported. Argument: the emulated module.
"""

import importlib.util
import sys

import torch
from ftso_fast.kernels import cell_step_cuda, skip_net_gpu
from ftso_fast.kernels.skip_net import NetSpec, weight_shapes

from ftso_fast import kernels

torch.set_num_threads(1)
loader = importlib.util.spec_from_file_location("_cuda_emulated", sys.argv[1])
module = importlib.util.module_from_spec(loader)
loader.loader.exec_module(module)
cell_step_cuda.module = lambda: module
cell_step_cuda._where = lambda x: (0, 0)


def run(backend, spec, images, edges, weights):
    leaves = [t.clone().requires_grad_() for t in (*edges, *weights)]
    with kernels.use_backend("triton"):
        out = skip_net_gpu.pooled(images, *leaves[:2], leaves[2:], spec, backend)
        direction = torch.arange(out.numel(), dtype=torch.float32).mul(0.7548).frac().sub(0.4).view(out.shape)
        return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


spec, shape = NetSpec(16, 5, 4), (2, 3, 8, 12)
generator = torch.Generator().manual_seed(sum(shape))


def draw(size):
    return torch.randn(size, generator=generator) / max(1.0, torch.Size(size).numel() / size[0]) ** 0.5


images = torch.randn(shape, generator=generator)
edges = [torch.cat([draw((n,)).softmax(0) for n in (2, 3, 4, 5)]) for _ in range(2)]
weights = [draw(size) for size in weight_shapes(shape[1], 3, spec)[:-2]]
weights[1] = weights[1].abs() + 0.5
before = kernels.calls()
found, wanted = (run(backend, spec, images, edges, weights) for backend in ("cuda", "triton"))
ran = {name for name, n in kernels.calls().items() if n != before.get(name, 0)}
assert {"cell_fwd/cuda", "cell_bwd/cuda", "cell_pool_fwd/cuda", "cell_fwd/triton"} <= ran, ran
worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))
assert worst < 1e-4, worst
print(f"{spec}: {worst:.1e}")
