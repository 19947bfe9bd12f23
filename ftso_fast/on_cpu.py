"""The skip-only network's search steps on the cpu backend: no autograd, and few calls of PyTorch behind a pass."""

import math
from collections import deque

import torch
from torch import Tensor

from . import kernels
from .config import SearchConfig
from .data import Batch
from .run import Run
from .supernet import SuperNet


class CpuRun(Run):
    """`Run`, whose steps on batches that the cpu backend takes are calls of its own."""

    net: SuperNet
    gradients: deque[list[Tensor]]
    """By the betas: the last one, and room for the next."""
    step: kernels.SearchStep | None = None
    found: tuple[list[Tensor] | None, float] = (None, 0.0)
    """The backend's last gradient by the betas, and its size."""

    def __init__(self, net: SuperNet, config: SearchConfig, order: int = 1) -> None:
        super().__init__(net, config, order)
        self.gradients = deque([torch.zeros_like(t) for t in self.before] for _ in range(2))

    def architecture_gradient(self, batch: Batch) -> tuple[float, list[Tensor]]:
        """`Run.architecture_gradient`."""
        step = self._step_for(batch)
        if step is None:
            return super().architecture_gradient(batch)
        into = self.gradients.popleft()
        self.gradients.append(into)
        loss, size = step.gradient_by_betas(batch.images, batch.labels, into, self.net.precision)
        self.found = into, size
        return loss, into

    def size_of(self, grads: list[Tensor]) -> float:
        """`Run.size_of`."""
        own, size = self.found
        return size if grads is own else super().size_of(grads)

    def move_architecture(self, grads: list[Tensor]) -> None:
        """`Run.move_architecture`."""
        adam = self.adam
        if self.step is None or grads is not self.found[0]:
            super().move_architecture(grads)
            return
        adam.steps += 1
        self.step.move_betas(grads, adam.lr, adam.betas, adam.eps, adam.weight_decay, adam.steps)

    def move_weights(self, batch: Batch, lr: float) -> tuple[float, bool]:
        """`Run.move_weights`."""
        step, sgd = self._step_for(batch), self.sgd
        if step is None:
            return super().move_weights(batch, lr)
        loss = step.gradient_by_weights(batch.images, batch.labels, self.net.precision)
        norm = step.move_weights(lr, self.config.grad_clip, sgd.momentum, sgd.weight_decay, sgd.nesterov)
        return loss, math.isfinite(norm)

    def _step_for(self, batch: Batch) -> kernels.SearchStep | None:
        """What makes steps on such a batch; None where the backend does not take it."""
        if self.net.kernels_for(batch.images) != "cpu":
            return None
        if self.step is None or not self.step.in_place():
            adam, sgd = self.adam, self.sgd
            if sgd.velocity is None:
                sgd.velocity = kernels.zeros_in_one_piece(self.weights)
            if not all(t.is_contiguous() for t in (*self.weights, *sgd.velocity)):
                return None
            self.step = kernels.SearchStep(
                self.arch, (adam.first, adam.second), self.weights, sgd.velocity, self.net.spec
            )
        return self.step
