"""The alternating steps of one super-network's search: which batch goes where, at which rate, and what is recorded."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import kernels
from .config import Mode, SearchConfig
from .data import Batch, SearchData, ended_early
from .errors import NumericalError, UsageError
from .optimizer import SGD, Adam, clip_norm
from .phase import Alphas, Betas, Phase, Rounding
from .unrolled import Searchable, loss_of, unrolled_gradient

if TYPE_CHECKING:
    from .early_stop import EarlyStop

Progress = Callable[[int, int | None], None]


class Stream:
    """The batches of a whole search, whose phases take them one after the other: no phase sees a pass again."""

    def __init__(self, data: SearchData) -> None:
        self.iterations_per_epoch = data.iterations_per_epoch
        self.architecture = data.architecture_batches()
        self._data, self._begun = data, 0

    def weights(self) -> Iterator[Batch]:
        """The next pass over the weight half."""
        self._begun += 1
        return self._data.weight_batches(self._begun - 1)


class Run:
    """One search under way: the network, its optimizers, and what is recorded."""

    def __init__(self, net: Searchable, config: SearchConfig, order: int = 1) -> None:
        self.net, self.config, self.order = net, config, order
        self.arch = net.arch_parameters()
        self.adam = Adam(self.arch, config.arch_lr, config.arch_betas, config.arch_eps, config.arch_weight_decay)
        self.weights = net.weights()
        self.sgd = SGD(self.weights, config.momentum, config.weight_decay, config.nesterov)
        self.before = [t.detach().clone() for t in self.arch]
        self.gradient: list[Tensor] = [torch.zeros_like(t) for t in self.before]
        self.rounding: Rounding | None = None
        self.early_stop: EarlyStop | None = None
        self.losses: tuple[list[float], list[float]] = ([], [])
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls = Counter(kernels.calls())

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def all(self, data: Stream, length: Mode, progress: Progress | None) -> int:
        """Every iteration, as a rule in PC-DARTS' order: architecture step, then weight step. Returns their number."""
        per_epoch = data.iterations_per_epoch  # None: known only when the pass ends
        total = length.iterations(per_epoch)
        epochs = length.count if length.unit == "ep" else -(-length.count // per_epoch) if per_epoch else None
        weights = data.weights()
        done = epoch = begun = 0
        while done != total:
            searching = epoch >= self.config.warmup_epochs
            stepping = done + 1 != total or self.config.final_weight_step or self.config.weights_first
            looking = stepping or (searching and self.order == 2)
            with self.timed("data"):
                first = next(data.architecture, None) if searching else None
                second = next(weights, None) if looking and (first or not searching) else None
            if (searching and not first) or (looking and not second):
                if done == begun or (length.unit == "ep" and epoch + 1 == length.count):
                    break
            else:
                self._iteration(first, second, stepping, self.config.lr(epoch, epochs or epoch + 2))
                done += 1
                if progress:
                    progress(done, total)
                if per_epoch is None or done != (epoch + 1) * per_epoch:
                    continue
            epoch, begun = epoch + 1, done
            if self.early_stop and first and self.early_stop.epoch(self.net, first):
                return done
            if done != total:
                weights = data.weights()
        if done != total and (total or epoch + 1 < length.count or not done):
            raise ended_early(total or length.count, done)
        return done

    def _iteration(self, first: Batch | None, second: Batch | None, stepping: bool, lr: float) -> None:
        if second and stepping and self.config.weights_first:
            self.weight_step(second, lr)
        if first and second and self.order == 2:
            self.unrolled_step(first, second, lr)
        elif first:
            self.architecture_step(first)
        if second and stepping and not self.config.weights_first:
            self.weight_step(second, lr)
        first_iteration = len(self.losses[0]) + len(self.losses[1]) <= 2
        if first_iteration and kernels.requested() == "cpu" and kernels.calls() == self.calls:
            raise UsageError(
                f"backend: 'cpu' was asked for, and no kernel computes {', '.join(self.net.space.operators)}"
            )

    def gradient_of(self, batch: Batch, wanted: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The batch's loss, and its gradient by `wanted`."""
        loss = loss_of(self.net, batch)
        return loss, list(torch.autograd.grad(loss, wanted))

    def architecture_step(self, batch: Batch) -> None:
        """One Adam step on betas and alphas; no weight gradient is computed."""
        with self.timed("architecture"):
            self._move(*self.architecture_gradient(batch), batch)

    def architecture_gradient(self, batch: Batch) -> tuple[float, list[Tensor]]:
        """The batch's loss, and its gradient by betas and alphas."""
        with self.net.only_arch():
            loss, grads = self.gradient_of(batch, self.arch)
        return float(loss.detach()), grads

    def unrolled_step(self, valid: Batch, train: Batch, lr: float) -> None:
        """The same along DARTS' second-order gradient; `train` and `lr` are those of the weight step that follows."""
        with self.timed("architecture"):
            loss, grads = unrolled_gradient(self.net, valid, train, self.sgd, lr)
            self._move(float(loss), grads, valid)

    def _move(self, loss: float, grads: list[Tensor], batch: Batch) -> None:
        if self.config.arch_grad_clip is not None:
            clip_norm(grads, self.config.arch_grad_clip)
        size = self.size_of(grads)
        self._record(0, loss, math.isfinite(size))
        if not size:
            raise self._nothing_to_follow()
        if not self.adam.steps and self.net.precision != "float32":
            self.rounding = self._rounding(batch, grads)
        self.gradient = grads
        self.move_architecture(grads)

    def size_of(self, grads: list[Tensor]) -> float:
        """The sum of the absolute gradients by betas and alphas; not finite where one of them is not."""
        return sum(abs(value) for g in grads for value in g.flatten().tolist())

    def move_architecture(self, grads: list[Tensor]) -> None:
        """Adam's step."""
        self.adam.step(grads)

    def _nothing_to_follow(self) -> NumericalError:
        return NumericalError(
            f"architecture step {len(self.losses[0])}: the gradient is exactly zero, so there is nothing to "
            "follow: the images are all alike or too large for float32; check and normalise them"
        )

    def _rounding(self, batch: Batch, grads: list[Tensor]) -> Rounding:
        """The first architecture step's gradients against those in float32."""
        precision, self.net.precision = self.net.precision, "float32"
        try:
            _, exact = self.architecture_gradient(batch)
        finally:
            self.net.precision = precision
        if self.config.arch_grad_clip is not None:
            clip_norm(exact, self.config.arch_grad_clip)
        found, wanted = torch.cat(grads), torch.cat(exact)
        error = (found - wanted).abs().max() / wanted.abs().max()
        return Rounding(float(error), int((found.sign() != wanted.sign()).sum()))

    def weight_step(self, batch: Batch, lr: float) -> None:
        """One SGD step on the weights, under the architecture of now; it gets no gradient."""
        with self.timed("weights"):
            self._record(1, *self.move_weights(batch, lr))

    def move_weights(self, batch: Batch, lr: float) -> tuple[float, bool]:
        """The batch's loss, and whether its gradient is finite, in which case the weights have moved along it."""
        with self.net.only_weights():
            loss, grads = self.gradient_of(batch, self.weights)
        finite = bool(clip_norm(grads, self.config.grad_clip or float("inf")).isfinite())
        if finite:
            self.sgd.step(grads, lr)
        return float(loss.detach()), finite

    def _record(self, which: int, loss: float, finite: bool) -> None:
        if not finite or loss != loss:
            step = ("architecture", "weight")[which]
            raise NumericalError(
                f"{step} step {len(self.losses[which]) + 1}: the loss ({loss}) or its gradient is not finite; "
                "lower the learning rate or normalise the images"
            )
        self.losses[which].append(loss)

    def phase(self, mode: str, beta_only: bool) -> Phase:
        """What was found, as plain numbers."""
        rows = [tuple(map(_frozen, triple)) for triple in zip(self.before, self.arch, self.gradient, strict=True)]
        n, cells = len(self.net.betas()), self.net.space.cells
        return Phase(
            mode=mode,
            operators=self.net.space.operators,
            inputs=dict(self.net.topology),
            betas={cell: Betas(*row) for cell, row in zip(cells, rows[:n], strict=False)},
            alphas={cell: Alphas(*row) for cell, row in zip(cells, rows[n:], strict=False)},
            beta_only=beta_only,
            iterations=self.adam.steps,
            weight_steps=len(self.losses[1]),
            losses=(tuple(self.losses[0]), tuple(self.losses[1])),
            eigenvalues=tuple(self.early_stop.eigenvalues) if self.early_stop else (),
            stopped_at=self.early_stop.stopped_at if self.early_stop else None,
            seconds=dict(self.seconds),
            kernel_calls=dict(Counter(kernels.calls()) - self.calls),
        )


def _frozen(t: Tensor) -> tuple[Any, ...]:
    values = t.detach().tolist()
    return tuple(tuple(v) if isinstance(v, list) else v for v in values)
