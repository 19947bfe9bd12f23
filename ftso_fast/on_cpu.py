"""The skip-only network's search steps on the cpu backend: no autograd, and few calls of PyTorch behind a pass."""

import math

import torch
from torch import Tensor

from . import kernels
from .data import Batch
from .run import Run
from .supernet import SuperNet


class CpuRun(Run):
    """`Run`, whose steps on batches that the cpu backend takes are calls of its own."""

    net: SuperNet
    gradient_by_weights: list[Tensor] | None = None
    taken = False  # of the last architecture gradient: whether it was the backend's

    def architecture_gradient(self, batch: Batch) -> tuple[float, list[Tensor]]:
        """`Run.architecture_gradient`."""
        self.taken = self._takes(batch)
        return self._loss_and_gradient(batch) if self.taken else super().architecture_gradient(batch)

    def move_architecture(self, grads: list[Tensor]) -> None:
        """`Run.move_architecture`."""
        adam = self.adam
        if not self.taken:
            super().move_architecture(grads)
            return
        adam.steps += 1
        moments = adam.first, adam.second
        kernels.move_architecture(
            self.arch, grads, moments, adam.lr, adam.betas, adam.eps, adam.weight_decay, adam.steps
        )

    def move_weights(self, batch: Batch, lr: float) -> tuple[float, bool]:
        """`Run.move_weights`."""
        if not self._takes(batch):
            return super().move_weights(batch, lr)
        sgd = self.sgd
        if self.gradient_by_weights is None:
            self.gradient_by_weights = _zeros_like(self.weights)
        if sgd.velocity is None:
            sgd.velocity = _zeros_like(self.weights)
        loss, gradient = self._loss_and_gradient(batch, self.gradient_by_weights)
        limit = self.config.grad_clip
        norm = kernels.move_weights(
            self.weights, sgd.velocity, gradient, lr, limit, sgd.momentum, sgd.weight_decay, sgd.nesterov
        )
        return loss, math.isfinite(norm)

    def _loss_and_gradient(self, batch: Batch, into: list[Tensor] | None = None) -> tuple[float, list[Tensor]]:
        net = self.net
        return kernels.loss_and_gradient(
            batch.images, batch.labels, net.betas(), self.weights, net.spec, net.precision, into
        )

    def _takes(self, batch: Batch) -> bool:
        return self.net.kernels_for(batch.images) == "cpu" and all(w.is_contiguous() for w in self.weights)


def _zeros_like(tensors: list[Tensor]) -> list[Tensor]:
    """Contiguous, in one piece."""
    flat = torch.zeros(sum(t.numel() for t in tensors), dtype=tensors[0].dtype)
    pieces = flat.split([t.numel() for t in tensors])
    return [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)]
