"""The skip-only super-network from images to logits, as a chain of stages between batch norms.

Its definition is `SuperNet`'s plain PyTorch path (FTSO section 3.2): stem, cells of skip connections, mean over the
image. The cpu backend computes the same, forward and backward, one launch between two batch norms: a stage reads the
raw outputs z of the convolutions before it and their statistics, normalises on load (x = (z - mean) / std), mixes a
cell's four nodes in registers, applies ReLU, multiplies by the 1x1 weights of both later readers, and sums the
statistics of what it writes. With g = dL/dx and n pixels, what flows back through a batch norm is

    dz = g / std - mean(g) / std - x mean(g x) / std ,

formed on load by the producer's backward stage from the two sums that the reader's has taken. A reduction cell reads
windows of 2x2 pixels, their maximum and two pixels of the processed channels: the producer writes those beside z, and
spreads their gradients over the image while it reads z again. Kept for backward: the raw outputs, the windows and the
statistics, nothing else. On a GPU the same stages are kernels of their own (`skip_net_gpu`).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._backend import core, on_first_call, record, unfit
from ._memory import fresh, release

MAX_CHANNELS = 1024
PRECISIONS = ("float32", "bf16_backward", "bf16")
"""What the 1x1 convolutions of the cells multiply: float32; bfloat16 on the way back to activations, so that every
ReLU and maximum chooses as in float32; bfloat16 there and forward. Sums, statistics and weight gradients are float32
or better in all of them."""
BRIEF = 4  # passes: two iterations; who makes more of them may make thousands


class NetSpec(NamedTuple):
    """`channels` of the first cells, doubled at cells//3 and 2*cells//3; 1/k of a cell's channels are processed."""

    channels: int
    cells: int
    k: int


def cpu_cannot(images: Tensor, spec: NetSpec) -> str | None:
    """Why the cpu backend does not take this network, or None."""
    if spec.cells < 3:
        return f"expected at least 3 cells, got {spec.cells}"
    if 4 * spec.channels > MAX_CHANNELS:
        return f"expected at most {MAX_CHANNELS // 4} channels, got {spec.channels}"
    if images.requires_grad:
        return "it has no gradient for the images"
    return None


def gpu_cannot(images: Tensor, spec: NetSpec) -> str | None:
    """Why the kernels for GPUs do not take this network, or None."""
    if spec.cells < 3:
        return f"expected at least 3 cells, got {spec.cells}"
    if spec.channels & (spec.channels - 1) or spec.channels < 16 or 4 * spec.channels > MAX_CHANNELS:
        return f"expected 16, 32, 64, 128 or 256 channels, got {spec.channels}"
    if spec.k & (spec.k - 1):
        return f"expected k to be a power of two, got {spec.k}"
    if images.requires_grad:
        return "it has no gradient for the images"
    return None


def cannot(images: Tensor, spec: NetSpec) -> dict[str, str | None]:
    """By backend, why it does not take this network, or None."""
    on_gpu = gpu_cannot(images, spec)
    wide = None if spec.channels <= 32 else f"expected 16 or 32 channels, got {spec.channels}"
    return {"cuda": on_gpu or wide, "triton": on_gpu, "cpu": cpu_cannot(images, spec)}


def skip_net(
    images: Tensor,
    edges_normal: Tensor,
    edges_reduce: Tensor,
    weights: Sequence[Tensor],
    spec: NetSpec,
    precision: str = "float32",
    backend: str = "cpu",
) -> Tensor:
    """Logits (B, classes) on a compiled backend: "cpu", "triton" or "cuda".

    images: (B, 1 or 3, H, W), H and W divisible by 4; edges_*: (14,) softmaxed edge weights; weights: the network's
    parameters in the order of `SuperNet.parameters()`; all float32 on one device. precision: one of `PRECISIONS`, on a
    GPU float32. First derivatives for edges and weights; what does not require a gradient costs none. On the cpu the
    memory is one arena, kept from call to call (`release_memory` gives it back).

    Raises ValueError or TypeError naming the argument, what was expected and what came.
    """
    check(images, edges_normal, edges_reduce, weights, spec, precision, backend)
    if backend != "cpu":
        pooled = _pooled(images, edges_normal, edges_reduce, weights[:-2], spec, backend)
        return F.linear(pooled, weights[-2], weights[-1])
    return _SkipNet.apply(images, edges_normal, edges_reduce, spec, precision, *weights)


def weight_shapes(in_channels: int, classes: int, spec: NetSpec) -> list[tuple[int, ...]]:
    """The shapes of `weights`: stem convolution, its batch norm, then per cell preprocess0, preprocess1 and, in a
    reduction cell, the eight FactorizedReduce of its edges; classifier (the order of PC-DARTS' parameters)."""
    C, stem = spec.channels, 3 * spec.channels
    shapes: list[tuple[int, ...]] = [(stem, in_channels, 3, 3), (stem,), (stem,)]
    before, last, reduced = stem, stem, False
    for cell in range(spec.cells):
        reduction = cell in (spec.cells // 3, 2 * spec.cells // 3)
        C *= 1 + reduction
        shapes += [(C // 2, before, 1, 1)] * 2 if reduced else [(C, before, 1, 1)]
        shapes.append((C, last, 1, 1))
        if reduction:
            shapes += [(C // spec.k // 2, C // spec.k, 1, 1)] * 16
        before, last, reduced = last, 4 * C, reduction
    return [*shapes, (classes, last), (classes,)]


_pooled = on_first_call("skip_net_gpu", "pooled")


def check(
    images: Tensor,
    edges_normal: Tensor,
    edges_reduce: Tensor,
    weights: Sequence[Tensor],
    spec: NetSpec,
    precision: str,
    backend: str,
) -> None:
    """`skip_net`'s arguments. Raises what it raises."""
    check_images(images, spec, precision, backend)
    device = torch.device("cpu") if backend == "cpu" else images.device
    check_tensors(images.shape[1], {"edges_normal": edges_normal, "edges_reduce": edges_reduce}, weights, spec, device)


def check_images(images: Tensor, spec: NetSpec, precision: str, backend: str) -> None:
    """Of `skip_net`'s arguments those that say what is to be done on which images."""
    for name, value in spec._asdict().items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"skip_net: {name}: expected a positive whole number, got {value!r}")
    if spec.channels % spec.k:
        raise ValueError(f"skip_net: k: expected a divisor of the {spec.channels} channels, got {spec.k}")
    if images.dim() != 4 or images.shape[1] not in (1, 3) or images.shape[2] % 4 or images.shape[3] % 4:
        raise ValueError(
            f"skip_net: images: expected shape (B, 1 or 3, H, W) with H and W divisible by 4, got {tuple(images.shape)}"
        )
    if not images.numel():
        raise ValueError(f"skip_net: images: expected at least one image, got shape {tuple(images.shape)}")
    if backend not in ("cuda", "triton", "cpu"):
        raise ValueError(f"skip_net: backend: expected one of cuda, triton, cpu, got {backend!r}")
    reason = cannot(images, spec)[backend] or (unfit(images.device) if backend == "cuda" else None)
    if reason:
        raise ValueError(f"skip_net: the {backend} backend cannot: {reason}")
    known = PRECISIONS if backend == "cpu" else PRECISIONS[:1]
    if precision not in known:
        raise ValueError(f"skip_net: precision: expected one of {', '.join(known)}, got {precision!r}")
    _check_tensor("images", images, tuple(images.shape), torch.device("cpu") if backend == "cpu" else images.device)


def check_tensors(
    in_channels: int, edges: Mapping[str, Tensor], weights: Sequence[Tensor], spec: NetSpec, device: torch.device
) -> None:
    """The network's own tensors: `edges`, (14,) by name, and `weights`."""
    classes = weights[-1].shape[0] if weights and weights[-1].dim() else 0
    shapes = weight_shapes(in_channels, classes, spec)
    if len(weights) != len(shapes):
        raise ValueError(f"skip_net: weights: expected {len(shapes)} tensors, got {len(weights)}")
    for name, own in edges.items():
        _check_tensor(name, own, (14,), device)
    for i, (w, shape) in enumerate(zip(weights, shapes, strict=True)):
        _check_tensor(f"weights[{i}]", w, shape, device)


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"skip_net: {name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != torch.float32 or tensor.device != device:
        where = "the cpu" if device.type == "cpu" else str(device)
        raise TypeError(f"skip_net: {name}: expected float32 on {where}, got {tensor.dtype} on {tensor.device}")


class _Workspace:
    """A planned network and its arena; back in `_free` when its last user is gone. An arena that was not given huge
    pages moves to them once they are worth their first touch."""

    def __init__(self, key: tuple[int, ...]) -> None:
        self.key = key
        self.net = core().SkipNet(*key)
        self.arena, self.huge = fresh(self.net.arena_floats(), brief=True)
        self.passes = 0

    def begin_pass(self) -> None:
        if self.passes == BRIEF and not self.huge:
            del self.arena  # before its successor, not beside it
            self.arena, self.huge = fresh(self.net.arena_floats(), brief=False)
        self.passes += 1


_free: list[_Workspace] = []


def release_memory() -> None:
    """Give back the memory that kernels have worked in."""
    _free.clear()
    release()


class Lease:
    """The use of a workspace by one forward pass and its backward, either of which wants what `wanted` says: gradients
    by the normal cells' edges, by the reduction cells', by the weights."""

    def __init__(
        self, images: Tensor, spec: NetSpec, classes: int, precision: str, wanted: tuple[bool, bool, bool]
    ) -> None:
        B, channels, H, W = images.shape
        key = (B, H, W, channels, *spec, classes, PRECISIONS.index(precision))
        fitting = [w for w in _free if w.key == key]
        _free.clear()  # one arena at most waits for its next use
        self.workspace = fitting[0] if fitting else _Workspace(key)
        self.workspace.begin_pass()
        self.wanted, self.intact = wanted, False

    def __del__(self) -> None:
        if hasattr(self, "workspace") and not _free:
            _free.append(self.workspace)

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Logits, for images, both kinds of edges and weights."""
        images, normal, reduce, *weights = (t.contiguous() for t in tensors)
        logits = images.new_empty(images.shape[0], weights[-1].shape[0])
        self.workspace.net.forward(
            self.workspace.arena.data_ptr(),
            self.wanted[2],
            images.data_ptr(),
            [w.data_ptr() for w in weights],
            normal.data_ptr(),
            reduce.data_ptr(),
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        record(self.workspace.net)
        self.intact = True
        return logits

    def backward(self, grad: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The wanted gradients, by both kinds of edges and by each weight, from the logits'."""
        if not self.intact:  # a second backward pass: the first has used up what forward left
            self.forward(tensors)
        self.intact = False
        images, normal, reduce, *weights = (t.contiguous() for t in tensors)
        grad = grad.contiguous()
        edges = [torch.empty_like(e) if want else None for e, want in zip((normal, reduce), self.wanted, strict=False)]
        d_weights = [torch.empty_like(w) for w in weights] if self.wanted[2] else []
        self.workspace.net.backward(
            self.workspace.arena.data_ptr(),
            images.data_ptr(),
            [w.data_ptr() for w in weights],
            normal.data_ptr(),
            reduce.data_ptr(),
            grad.data_ptr(),
            *(0 if e is None else e.data_ptr() for e in edges),
            [d.data_ptr() for d in d_weights],
            torch.get_num_threads(),
        )
        record(self.workspace.net)
        return *edges, *(d_weights if self.wanted[2] else itertools.repeat(None, len(weights)))


class _SkipNet(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        edges_normal: Tensor,
        edges_reduce: Tensor,
        spec: NetSpec,
        precision: str,
        *weights: Tensor,
    ) -> Tensor:
        wanted = (*ctx.needs_input_grad[1:3], any(ctx.needs_input_grad[5:]))
        ctx.lease = Lease(images, spec, weights[-1].shape[0], precision, wanted)
        tensors = (images, edges_normal, edges_reduce, *weights)
        ctx.save_for_backward(*tensors)
        return ctx.lease.forward(tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # somebody may differentiate the gradient
        tensors = ctx.saved_tensors
        found = _SkipNetBackward.apply(ctx.lease, grad, *tensors) if again else ctx.lease.backward(grad, tensors)
        normal, reduce, *weights = found
        wanted = zip(weights, ctx.needs_input_grad[5:], strict=True)
        return None, normal, reduce, None, None, *(g if need else None for g, need in wanted)


class _SkipNetBackward(torch.autograd.Function):
    """The backward pass as an operation of its own, so that a second derivative meets a sentence."""

    @staticmethod
    def forward(ctx: Any, lease: Lease, grad: Tensor, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        return lease.backward(grad, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "skip_net: the cpu backend has first derivatives only; for second ones run the network within "
            "`with ftso_fast.kernels.use_backend('reference'):`"
        )


flat_weights = on_first_call("weight_step_gpu", "FlatWeights")
"""`weight_step_gpu.FlatWeights`, which only a GPU's search imports."""
