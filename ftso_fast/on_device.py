"""A search's steps on a GPU: few launches, batches and records that stay there, an iteration as two CUDA graphs.

Not run on a GPU yet: the graphs' capture is tested with a stand-in only, the steps themselves on the cpu. A step is the
plain one of `run` with torch's fused optimizers over lists of tensors; what changes between steps (the rate, Adam's
count) is read from tensors, so that a graph can be replayed. The host waits once a step, for its loss.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import kernels
from .config import SearchConfig
from .data import Batch
from .optimizer import SGD, Adam
from .run import Run
from .supernet import SuperNet

WARM_UP = 2
"""Steps of a shape that run by themselves before they are captured: kernels compile, memory is laid out."""


class Replayed:
    """`work` on tensors of one shape: `WARM_UP` calls by themselves, then one CUDA graph. Its results are the graph's
    own memory, which the next call overwrites."""

    def __init__(self, work: Callable[..., Sequence[Tensor]]) -> None:
        self.work, self.calls = work, 0
        self.inputs: list[Tensor] = []
        self.graph: Any = None
        self.results: Sequence[Tensor] = ()

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        self.calls += 1
        if self.calls <= WARM_UP:
            self.inputs = self.inputs or [torch.empty_like(t) for t in inputs]
            self._fill(inputs)
            return self._aside()
        self._fill(inputs)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.results = self.work(*self.inputs)
        self.graph.replay()
        return self.results

    def _fill(self, inputs: Sequence[Tensor]) -> None:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)

    def _aside(self) -> Sequence[Tensor]:
        """On a stream of its own, as a capture will be."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = self.work(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return results


class DeviceRun(Run):
    """`Run` for a network on a device. replayed: whether steps become graphs."""

    net: SuperNet

    def __init__(self, net: SuperNet, config: SearchConfig, order: int, device: torch.device, replayed: bool) -> None:
        super().__init__(net, config, order)
        self.device, self.replayed = device, replayed
        self.steps: dict[tuple[Any, ...], Callable[..., Sequence[Tensor]]] = {}
        self.rate = torch.zeros((), dtype=self.weights[0].dtype, device=device)
        self.flat: Any = None
        self.counts = [torch.zeros((), device=device) for _ in self.arch]

    def architecture_step(self, batch: Batch) -> None:
        """`Run.architecture_step`."""
        with self.timed("architecture"), self.net.only_arch():
            self.adam.steps += 1
            report, *self.gradient = self._step("architecture", self._architecture, batch)
            loss, norm = report.tolist()
            self._record(0, loss, math.isfinite(norm))
            if not norm:
                raise self._nothing_to_follow()

    def unrolled_step(self, valid: Batch, train: Batch, lr: float) -> None:
        """`Run.unrolled_step`, by itself."""
        super().unrolled_step(self._there(valid), self._there(train), lr)

    def weight_step(self, batch: Batch, lr: float) -> None:
        """`Run.weight_step`."""
        with self.timed("weights"), self.net.only_weights():
            self.rate.fill_(lr)
            (report,) = self._step("weights", self._weights, batch)
            loss, norm = report.tolist()
            self._record(1, loss, math.isfinite(norm))

    def _there(self, batch: Batch) -> Batch:
        return Batch(*(t.to(self.device, non_blocking=True) for t in (batch.images, batch.labels)))

    def _step(self, name: str, work: Callable[..., Sequence[Tensor]], batch: Batch) -> Sequence[Tensor]:
        there = self._there(batch)
        key = name, tuple(there.images.shape)
        if key not in self.steps:
            self.steps[key] = Replayed(work) if self.replayed else work
        return self.steps[key](there.images, there.labels)

    def _architecture(self, images: Tensor, labels: Tensor) -> Sequence[Tensor]:
        loss = F.cross_entropy(self.net(images), labels)
        grads = list(torch.autograd.grad(loss, self.arch))
        norm, limit = norm_of(grads), self.config.arch_grad_clip
        if limit is not None:
            torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
        adam_step(self.adam, grads, self.counts)
        return [torch.stack([loss.detach().to(norm.dtype), norm]), *grads]

    def _weights(self, images: Tensor, labels: Tensor) -> Sequence[Tensor]:
        if (backend := self.net.kernels_for(images)) in ("cuda", "triton"):
            self.flat = self.flat or kernels.flat_weights(self.weights, self.net.spec)
            sgd = self.sgd
            clip = self.config.grad_clip
            return [
                self.flat.step(
                    images, labels, self.net.betas(), self.rate, clip, sgd.momentum, sgd.weight_decay, backend
                )
            ]
        loss = F.cross_entropy(self.net(images), labels)
        grads = list(torch.autograd.grad(loss, self.weights))
        norm, limit = norm_of(grads), self.config.grad_clip
        divisor = None if limit is None else ((norm.float() + 1e-6) / limit).clamp(min=1.0)
        sgd_step(self.sgd, grads, self.rate, divisor)
        return [torch.stack([loss.detach(), norm])]


@torch.no_grad()
def norm_of(grads: list[Tensor]) -> Tensor:
    """The common 2-norm."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))


@torch.no_grad()
def adam_step(adam: Adam, grads: list[Tensor], steps: list[Tensor]) -> None:
    """`Adam.step` in one launch; steps: a count for each tensor."""
    tensors = list(adam.tensors)
    torch._foreach_add_(steps, 1)
    torch._fused_adam_(
        tensors,
        grads,
        adam.first,
        adam.second,
        [],
        steps,
        lr=adam.lr,
        beta1=adam.betas[0],
        beta2=adam.betas[1],
        weight_decay=adam.weight_decay,
        eps=adam.eps,
        amsgrad=False,
        maximize=False,
    )


@torch.no_grad()
def sgd_step(sgd: SGD, grads: list[Tensor], rate: Tensor, divisor: Tensor | None) -> None:
    """`SGD.step` in one launch, at the rate of a tensor, with gradients over `divisor`."""
    first = sgd.velocity is None
    if sgd.velocity is None:
        sgd.velocity = [torch.empty_like(t) for t in sgd.tensors]
    torch._fused_sgd_(
        list(sgd.tensors),
        grads,
        sgd.velocity,
        weight_decay=sgd.weight_decay,
        momentum=sgd.momentum,
        lr=rate,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=first,
        grad_scale=divisor,
    )
