"""The two optimizers of the search, each equal to its namesake in torch.optim (a test compares them).

Written out because constructing any torch.optim optimizer imports torch._dynamo and triton: over a second in a
fresh process, several times a whole one-iteration search.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Adam:
    """Adam with coupled weight decay on a few small tensors (Kingma & Ba, 2015; algorithm 1)."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.tensors, self.lr, self.betas, self.eps, self.weight_decay = tensors, lr, betas, eps, weight_decay
        self.first = [torch.zeros_like(t, requires_grad=False) for t in tensors]
        self.second = [torch.zeros_like(t, requires_grad=False) for t in tensors]
        self.steps = 0

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor]) -> None:
        self.steps += 1
        decay_1, decay_2 = self.betas
        size = self.lr / (1 - decay_1**self.steps)
        unbias = math.sqrt(1 - decay_2**self.steps)
        for t, g, m, v in zip(self.tensors, grads, self.first, self.second, strict=True):
            g = g + self.weight_decay * t
            m.lerp_(g, 1 - decay_1)
            v.mul_(decay_2).addcmul_(g, g, value=1 - decay_2)
            t.addcdiv_(m, v.sqrt() / unbias + self.eps, value=-size)


class SGD:
    """Stochastic gradient descent with momentum (Nesterov's where asked for) and coupled weight decay."""

    def __init__(self, tensors: Sequence[Tensor], momentum: float, weight_decay: float, nesterov: bool = False) -> None:
        self.tensors, self.momentum, self.weight_decay, self.nesterov = tensors, momentum, weight_decay, nesterov
        self.velocity: list[Tensor] | None = None

    @torch.no_grad()
    def directions(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """What a step of plain momentum would subtract, times its rate; nothing is moved or remembered."""
        own = self._decayed(grads)
        if self.velocity is None:
            return own
        return [self.momentum * v + d for v, d in zip(self.velocity, own, strict=True)]

    def _decayed(self, grads: Sequence[Tensor]) -> list[Tensor]:
        return [g + self.weight_decay * t for t, g in zip(self.tensors, grads, strict=True)]

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], lr: float) -> None:
        directions = self._decayed(grads)
        if self.velocity is None:
            self.velocity = [d.clone() for d in directions] if self.nesterov else directions
        else:
            for v, d in zip(self.velocity, directions, strict=True):
                v.mul_(self.momentum).add_(d)
        moves: Sequence[Tensor] = self.velocity
        if self.nesterov:
            moves = [d.add_(v, alpha=self.momentum) for d, v in zip(directions, self.velocity, strict=True)]
        for t, move in zip(self.tensors, moves, strict=True):
            t.sub_(move, alpha=lr)


def clip_norm(grads: Sequence[Tensor], limit: float) -> Tensor:
    """Scale `grads` in place so that their common 2-norm is at most `limit`; returns the norm before."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(scale)
    return norm
