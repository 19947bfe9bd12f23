"""The curvature of the validation loss by the architecture: its Hessian on one batch, and the largest eigenvalue.

    H = d2 L_val(w, a) / da da,      a: all betas and alphas, L_val: the batch's mean cross entropy, batch statistics

A flat loss at the found architecture goes with networks that keep their accuracy when it is made discrete. Exact: a
derivative of the gradient, on the reference path, which alone has second derivatives. Differences of gradients,

    H e_i ~ (g(a + h e_i) - g(a - h e_i)) / 2h,

agree with it in float64 at steps h of 1e-6 or less. A longer step, which float32 needs, crosses kinks of ReLUs and
maxima: that is another quantity, and `Curvature` does not call it the eigenvalue. Source: Zela et al., Understanding
and Robustifying DARTS, 2020; FTSO, Fig. 3 (g), (h).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .data import Batch
from .errors import NumericalError, UsageError
from .unrolled import Searchable, loss_of

LARGEST_STEP = 1e-6
"""Of differences that still are the derivative, in float64."""
_NULL = 1e-6


@dataclass(frozen=True)
class Curvature:
    """eigenvalues: ascending. step: of the differences; None: exact. dtype: what the network computed in. null: how
    many are below 1e-6 of the largest in size; the decay on the diagonal is left out for that count."""

    eigenvalues: tuple[float, ...]
    step: float | None
    dtype: str
    weight_decay: float
    null: int

    @property
    def largest(self) -> float:
        """The largest eigenvalue of the matrix at hand; the Hessian's where `is_hessian`."""
        return self.eigenvalues[-1]

    @property
    def is_hessian(self) -> bool:
        """False for differences in float32, or over a step above 1e-6."""
        return self.step is None or (self.dtype == "float64" and self.step <= LARGEST_STEP)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "is_hessian": self.is_hessian}

    def __str__(self) -> str:
        how = "double backward" if self.step is None else f"differences with step {self.step:g}"
        n = len(self.eigenvalues)
        if not self.is_hessian:
            return (
                f"largest eigenvalue of a matrix of gradient differences in {self.dtype}, step {self.step:g}: "
                f"{self.largest:.4g}; through kinks this is not the Hessian's"
            )
        return f"dominant eigenvalue {self.largest:.4g} ({how}, {self.dtype}); {self.null} null directions of {n}"


def curvature(net: Searchable, batch: Batch, step: float | None = None, weight_decay: float = 0.0) -> Curvature:
    """All eigenvalues on one batch. step: None for the exact matrix, else that of central differences, on whatever
    backend is chosen. weight_decay: the architecture optimizer's, added to the diagonal as DARTS-ES does. Images are
    taken in the type of the network's weights. Raises UsageError, NumericalError."""
    if step is not None and not 0 < step < float("inf"):
        raise UsageError(f"step: expected a positive number or None, got {step!r}")
    matrix = hessian(net, batch) if step is None else differences(net, batch, step)
    if not bool(matrix.isfinite().all()):
        raise NumericalError("curvature: the second derivatives are not finite: check the images and the weights")
    found = torch.linalg.eigvalsh(matrix)
    null = int((found.abs() <= _NULL * found.abs().max()).sum())
    dtype = str(net.weights()[0].dtype).removeprefix("torch.")
    return Curvature(tuple((found + weight_decay).tolist()), step, dtype, weight_decay, null)


def hessian(net: Searchable, batch: Batch) -> Tensor:
    """The exact matrix (n, n), float64 where the architecture is: one backward pass for each of its n columns."""
    with _products(net, batch) as (product, n):
        columns = [product(column) for column in torch.eye(n, dtype=torch.float64)]
    return _symmetric(torch.stack(columns))


def differences(net: Searchable, batch: Batch, step: float) -> Tensor:
    """The same matrix by central differences of gradients, 2n of them."""
    arch, batch = net.arch_parameters(), _typed(net, batch)
    columns = []
    for t in arch:
        flat = t.detach().view(-1)
        for i in range(len(flat)):
            kept, ends = float(flat[i]), []
            for side in (step, -step):
                flat[i] = kept + side
                with net.only_arch():
                    ends.append(_flat(torch.autograd.grad(loss_of(net, batch), arch)))
                flat[i] = kept
            columns.append((ends[0] - ends[1]) / (2 * step))
    return _symmetric(torch.stack(columns))


def largest(net: Searchable, batch: Batch, steps: int = 30) -> float:
    """The largest eigenvalue of the exact matrix by Lanczos' method, for architectures of hundreds of numbers.

    Fully orthogonalised, from a fixed start; after n steps it is exact.
    """
    with _products(net, batch) as (product, n):
        v = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        basis, rows = [v / v.norm()], []
        for _ in range(min(steps, n)):
            w = product(basis[-1])
            q = torch.stack(basis)
            rows.append(q @ w)
            for _ in range(2):
                w = w - q.T @ (q @ w)
            if float(w.norm()) <= 1e-12 * float(rows[0].norm()):
                break
            basis.append(w / w.norm())
    m = len(rows)
    small = torch.zeros(m, m, dtype=torch.float64)
    for j, row in enumerate(rows):
        small[: j + 1, j] = row
        small[j, : j + 1] = row
    return float(torch.linalg.eigvalsh(small)[-1])


def null_directions(net: Searchable) -> Tensor:
    """What every softmax ignores, (m, n): the same number added to all edges of a node, or all operators of an edge."""
    sizes = [[len(node) for node in net.topology[cell]] for cell, _ in zip(net.space.cells, net.betas(), strict=False)]
    groups = [size for nodes in sizes for size in nodes]
    for alphas in net.arch_parameters()[len(net.betas()) :]:
        groups += [alphas.shape[1]] * alphas.shape[0]
    return torch.block_diag(*(torch.ones(1, size, dtype=torch.float64) for size in groups))


class _products:
    """Within the block: v -> H v, and n, from one graph of the gradient on the reference path."""

    def __init__(self, net: Searchable, batch: Batch) -> None:
        self.net, self.batch = net, _typed(net, batch)
        self.inside = [kernels.use_backend("reference"), net.only_arch()]

    def __enter__(self) -> tuple[Callable[[Tensor], Tensor], int]:
        for context in self.inside:
            context.__enter__()
        arch = self.net.arch_parameters()
        precision, self.net.precision = self.net.precision, "float32"
        gradient = torch.autograd.grad(loss_of(self.net, self.batch), arch, create_graph=True)
        self.net.precision = precision
        flat = torch.cat([g.reshape(-1) for g in gradient])

        def product(v: Tensor) -> Tensor:
            return _flat(torch.autograd.grad(flat, arch, v.to(flat.dtype), retain_graph=True))

        return product, len(flat)

    def __exit__(self, *exception: Any) -> None:
        for context in reversed(self.inside):
            context.__exit__(*exception)


def _typed(net: Searchable, batch: Batch) -> Batch:
    return Batch(batch.images.to(net.weights()[0].dtype), batch.labels)


def _flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
