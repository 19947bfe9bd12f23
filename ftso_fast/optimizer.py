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
        self.tensors, self.momentum, self.weight_decay, self.nesterov = list(tensors), momentum, weight_decay, nesterov
        self.velocity: list[Tensor] | None = None

    @torch.no_grad()
    def directions(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """What a step of plain momentum would subtract, times its rate; nothing is moved or remembered."""
        own = self._decayed(grads)
        if self.velocity is None:
            return own
        return [self.momentum * v + d for v, d in zip(self.velocity, own, strict=True)]

    def _decayed(self, grads: Sequence[Tensor]) -> list[Tensor]:
        found = list(torch._foreach_mul(self.tensors, self.weight_decay))
        torch._foreach_add_(found, list(grads))
        return found

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], lr: float) -> None:
        directions = self._decayed(grads)
        if self.velocity is None:
            self.velocity = [d.clone() for d in directions] if self.nesterov else directions
        else:
            torch._foreach_mul_(self.velocity, self.momentum)
            torch._foreach_add_(self.velocity, directions)
        moves = self.velocity
        if self.nesterov:
            torch._foreach_add_(directions, self.velocity, alpha=self.momentum)
            moves = directions
        torch._foreach_add_(self.tensors, moves, alpha=-lr)


def clip_norm(grads: Sequence[Tensor], limit: float) -> Tensor:
    """Scale `grads` in place so that their common 2-norm is at most `limit`; returns the norm before."""
    every = list(grads)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(every)))
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(every, scale)
    return norm
