"""The steps of a skip-only network's search on the cpu without autograd: a loss, its gradient, and the move along it.

The passes are `skip_net`'s. What is around them, a softmax, a loss, an update, takes no time by itself; but behind a
pass everything small finds its code and data out of the caches, and hundreds of PyTorch's operations and checks took as
long as a stage. So tensors are checked once, and a step is two calls of the core.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._backend import core, record
from .skip_net import Lease, NetSpec, check_images, check_tensors

N_EDGES = 14


class SearchStep:
    """What a search moves, in place, and how: gradients by betas and Adam, gradients by weights and SGD.

    betas: of normal and of reduction cells, (14,) float64; moments: Adam's first and second, like them, zeros before
    the first step; weights: as `skip_net` takes them; velocity: like them, zeros before the first step. All contiguous
    and on the cpu. Raises ValueError or TypeError naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        betas: Sequence[Tensor],
        moments: tuple[Sequence[Tensor], Sequence[Tensor]],
        weights: Sequence[Tensor],
        velocity: Sequence[Tensor],
        spec: NetSpec,
    ) -> None:
        if len(betas) != 2:
            raise ValueError(f"search_step: betas: expected two tensors, got {len(betas)}")
        for name, tensors in (("betas", betas), ("first", moments[0]), ("second", moments[1])):
            _check_all(name, tensors, [(N_EDGES,)] * 2, torch.float64)
        in_channels = weights[0].shape[1] if weights and weights[0].dim() == 4 else 3
        check_tensors(in_channels, {}, weights, spec, torch.device("cpu"))
        for name, tensors in (("weights", weights), ("velocity", velocity)):
            _check_all(name, tensors, [w.shape for w in weights], torch.float32)
        self.betas, self.moments, self.weights, self.spec = list(betas), moments, list(weights), spec
        self.in_channels, self.classes = in_channels, weights[-1].shape[0]
        self.gradient = zeros_in_one_piece(weights)
        """By the weights, of the last step."""
        self.velocity = list(velocity)
        self._addresses = self._where()
        rows = zip(self.weights, self.velocity, self.gradient, strict=True)
        self._core = core().Searched(
            *(own.data_ptr() for own in betas), [(w.numel(), *(t.data_ptr() for t in (w, v, g))) for w, v, g in rows]
        )

    def in_place(self) -> bool:
        """Whether betas and weights lie where they did: who gave one of them other memory needs another SearchStep."""
        return self._addresses == self._where()

    def _where(self) -> list[int]:
        return [t.data_ptr() for t in (*self.betas, *self.weights)]

    def gradient_by_betas(
        self, images: Tensor, labels: Tensor, into: Sequence[Tensor], precision: str = "float32"
    ) -> tuple[float, float]:  # fmt: skip
        """Mean cross entropy (nats), and the sum of its absolute gradients by both betas, which go to `into`.

        images: (B, 1 or 3, H, W) float32; labels: (B,) int64 below `classes`; into: like the betas; precision: one of
        `PRECISIONS`. The sum is not finite where one of them is not. Raises ValueError or TypeError naming the
        argument, what was expected and what came. Source: FTSO, section 3.2.
        """
        _check_all("into", into, [(N_EDGES,)] * 2, torch.float64)
        return self._pass(images, labels, precision, [d.data_ptr() for d in into])

    def gradient_by_weights(self, images: Tensor, labels: Tensor, precision: str = "float32") -> float:
        """The same loss; its gradient by the weights is `gradient` from then on."""
        return self._pass(images, labels, precision, [0, 0])[0]

    def _pass(self, images: Tensor, labels: Tensor, precision: str, d_betas: list[int]) -> tuple[float, float]:
        check_images(images, self.spec, precision, "cpu")
        if images.shape[1] != self.in_channels:
            raise ValueError(f"search_step: images: expected {self.in_channels} channels, got {images.shape[1]}")
        _check("labels", labels, images.shape[:1], torch.int64)
        at = core().first_outside(labels.shape[0], self.classes, labels.data_ptr())
        if at >= 0:
            raise ValueError(f"search_step: labels[{at}]: expected 0 to {self.classes - 1}, got {labels[at]}")
        if not self.in_place():
            raise ValueError("search_step: weights: expected them where they were checked, got other memory")
        images = images.contiguous()
        by_betas = d_betas[0] != 0
        lease = Lease(images, self.spec, self.classes, precision, (by_betas, by_betas, not by_betas))
        workspace = lease.workspace  # ours as long as the lease
        addresses = [t.data_ptr() for t in (workspace.arena, images, labels)] + d_betas
        loss, size = workspace.net.loss_and_gradient(self._core, *addresses, torch.get_num_threads())
        record(workspace.net)
        return loss, size

    def move_betas(
        self, gradient: Sequence[Tensor], rate: float, decays: tuple[float, float], eps: float, decay: float, steps: int
    ) -> None:
        """A step of Adam with coupled weight decay. decays: the moments'; steps: how many there are with this one, at
        least 1. Raises ValueError naming the argument."""
        if steps < 1:
            raise ValueError(f"search_step: steps: expected at least 1, got {steps}")
        _check_all("gradient", gradient, [(N_EDGES,)] * 2, torch.float64)
        for each in zip(self.betas, gradient, *self.moments, strict=True):
            core().adam(N_EDGES, *(t.data_ptr() for t in each), rate, *decays, eps, decay, steps)

    def move_weights(self, rate: float, limit: float | None, momentum: float, decay: float, nesterov: bool) -> float:
        """A step of SGD with momentum and coupled weight decay along `gradient`, clipped to the 2-norm `limit`.

        Returns the norm before it was clipped; where that is not finite nothing is moved.
        """
        return float(self._core.sgd(rate, momentum, decay, math.inf if limit is None else limit, nesterov))


def zeros_in_one_piece(like: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous zeros of the shapes and the type of `like`, one behind the other."""
    flat = torch.zeros(sum(t.numel() for t in like), dtype=like[0].dtype)
    pieces = flat.split([t.numel() for t in like])
    return [piece.view(t.shape) for piece, t in zip(pieces, like, strict=True)]


def _check(name: str, t: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if t.dtype != dtype or t.shape != tuple(shape) or t.device.type != "cpu" or not t.is_contiguous():
        raise ValueError(
            f"search_step: {name}: expected contiguous {dtype} of shape {tuple(shape)} on the cpu, got {t.dtype} of "
            f"shape {tuple(t.shape)} and strides {t.stride()} on {t.device}"
        )


def _check_all(name: str, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
    if len(tensors) != len(shapes):
        raise ValueError(f"search_step: {name}: expected {len(shapes)} tensors, got {len(tensors)}")
    for i, (t, shape) in enumerate(zip(tensors, shapes, strict=True)):
        _check(f"{name}[{i}]", t, shape, dtype)
