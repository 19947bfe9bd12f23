"""A weight step of the skip-only network on a GPU in few launches: no autograd, all weights in one tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._last_cell_triton import Head, classify, fits
from ._net_plan import plan
from .skip_net import NetSpec
from .skip_net_gpu import Backward, Partial, forward
from .weight_step_triton import edges_of, move


class FlatWeights:
    """The network's weights, moved into one tensor of which they become views, with their velocity.

    weights: as `skip_net` takes them, leaves on one device.
    """

    def __init__(self, weights: Sequence[Tensor], spec: NetSpec) -> None:
        self.plan, self.spec = plan(weights[0].shape[1], spec), spec
        self.weights = weights
        order = (*self.plan.order, 1, 2, len(weights) - 2, len(weights) - 1)
        self.flat = torch.cat([weights[i].detach().reshape(-1) for i in order])
        self.velocity = torch.zeros_like(self.flat)
        for i, piece in zip(order, self.flat.split([weights[i].numel() for i in order]), strict=True):
            weights[i].data = piece.view(weights[i].shape)

    @torch.no_grad()
    def step(
        self, images: Tensor, labels: Tensor, betas: Sequence[Tensor], rate: Tensor, limit: float | None,
        momentum: float, decay: float, backend: str,
    ) -> Tensor:  # fmt: skip
        """Move the weights along the mean cross entropy's gradient, clipped to the norm `limit`; rate: (), a tensor.
        Returns (the loss, the norm). The first velocity is the first direction, as torch.optim.SGD has it."""
        gamma, beta, w, bias = (self.weights[i].detach() for i in (1, 2, -2, -1))
        edges = edges_of(betas[0].detach(), betas[1].detach()).unbind(0)
        B, k = images.shape[0], self.spec.k
        within = fits(len(bias), w.shape[1] // 4)
        parts = B if within else 1
        more = [(1, len(gamma)), (1, len(beta)), (parts, w.numel()), (parts, len(bias)), (parts, 1)]
        partial = Partial(self.plan, images, self._pixels(images), more)
        d_mean = images.new_empty(B, w.shape[1])
        head = Head(labels, w, bias, d_mean, *partial.more[2:])
        mean, kept = forward(self.plan, images, edges, self.flat, gamma, beta, k, backend, head if within else None)
        if not within:
            classify(mean, head)
        run = Backward(self.plan, kept, images, edges, self.flat, k, backend, False, partial)
        run.cells(d_mean)
        gradient, squares = run.stem(gamma)
        squares = squares.narrow(0, 0, len(squares) - 1)  # the last is the loss's
        return move(self.flat, self.velocity, gradient, squares, rate, limit, momentum, decay)

    def _pixels(self, images: Tensor) -> list[int]:
        """Of every tensor of the plan."""
        pixels = images.numel() // images.shape[1]
        found = [pixels]
        for cell in self.plan.cells:
            pixels //= 4 if cell.reduction else 1
            found += [pixels] if cell.product is not None else []
            found += [pixels // 4] if cell.strided is not None else []
        return found
