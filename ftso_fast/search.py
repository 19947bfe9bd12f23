"""FTSO's algorithm 1: tune the edge weights of a skip-only super-network, keep two inputs a node, name an operator."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import kernels
from .config import CIFAR10, Mode, SearchConfig
from .data import Batch, SearchData, ended_early, prepare
from .errors import NumericalError, UsageError
from .genotype import Genotype
from .optimizer import SGD, Adam, clip_norm
from .result import CELLS, Betas, Rounding, SearchResult
from .space import DARTS, SearchSpace
from .supernet import SuperNet

Progress = Callable[[int, int | None], None]


def search(
    data: Any,
    mode: str = "1it",
    *,
    space: SearchSpace = DARTS,
    replace: str = "sep_conv_3x3",
    k: int = 4,
    classes: int | None = None,
    seed: int = 0,
    backend: str | None = None,
    precision: str = "float32",
    config: SearchConfig | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Find a cell topology for `data` and put the operator `replace` on every kept edge.

    data: a DataLoader or Dataset over a map data set, a tuple (X, y) of arrays, a tuple of two loaders (weights,
    architecture), any iterable of (images, labels) batches, or the path of an npz file or of CIFAR-10's binary
    folder; `ftso_fast.data.prepare` has the details. Images are B,C,H,W with 1 or 3 channels, H and W divisible
    by 4. mode: 'Nit' or 'Nep', iterations or epochs; an iteration is one architecture step and one weight step.
    k: 1/k of the channels are processed (1: DARTS). classes: found in the data where not given. seed: decides
    everything random. backend: "cpu" or "reference", which then runs or raises; None: the fastest that can.
    precision: one of `kernels.PRECISIONS`; other than float32 it needs the cpu backend, is for long searches (one
    iteration follows the gradient's sign only), and the result says what it did to the first gradient. progress:
    called with (iterations done, iterations in all or None).

    The architecture step comes first and takes one batch of the architecture half; then the weight step, one of
    the weight half, under the new betas. The last weight step is left out unless `config.final_weight_step`: it
    cannot change the answer. Same input, seed and backend: same bytes.

    Raises UsageError (mode, operator, k, backend, precision), DataError (see `prepare`; also data that end before
    the mode does), NumericalError (a loss or gradient is not finite). Source: FTSO, algorithm 1 and Table 4;
    PC-DARTS' order of steps.
    """
    config = config or CIFAR10
    length = Mode.parse(mode)
    if replace not in space.replacements:
        raise UsageError(f"replace: expected one of {', '.join(space.replacements)}, got {replace!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UsageError(f"seed: expected a whole number, got {seed!r}")
    if length.unit == "ep" and length.count <= config.warmup_epochs:
        raise _only_warm_up(length, config)
    if precision not in kernels.PRECISIONS:
        raise UsageError(f"precision: expected one of {', '.join(kernels.PRECISIONS)}, got {precision!r}")
    start = time.perf_counter()
    with _backend(backend):
        before = kernels.calls()
        prepared = prepare(data, classes=classes, seed=seed, batch_size=config.batch_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = SuperNet(prepared.report.classes, config.channels, config.cells, k, prepared.report.shape[0], space)
        net.precision = precision
        run = _Run(net, config)
        run.seconds["setup"] = time.perf_counter() - start
        run.all(prepared, length, progress)
        if not run.adam.steps:
            raise _only_warm_up(length, config)
        ran = {name: n - before.get(name, 0) for name, n in kernels.calls().items() if n > before.get(name, 0)}
    run.seconds["total"] = time.perf_counter() - start

    betas = {cell: Betas(*rows) for cell, rows in zip(CELLS, run.rows(), strict=True)}
    return SearchResult(
        genotype=Genotype.from_topology(betas["normal"].topology, betas["reduce"].topology, replace),
        betas=betas,
        mode=str(length),
        replace=replace,
        k=k,
        seed=seed,
        backend="cpu" if ran else "reference",
        isa=kernels.isa() if ran else None,
        precision=precision,
        rounding=run.rounding,
        iterations=run.adam.steps,
        weight_steps=len(run.losses[1]),
        losses=(tuple(run.losses[0]), tuple(run.losses[1])),
        seconds=dict(run.seconds),
        peak_bytes=_peak_bytes(),
        kernel_calls=ran,
        data=prepared.report,
        config=config,
    )


def _only_warm_up(length: Mode, config: SearchConfig) -> UsageError:
    return UsageError(
        f"mode: {length} ends within the {config.warmup_epochs} warm-up epochs, before any architecture step: "
        "lower config.warmup_epochs or search longer"
    )


class _Run:
    """One search under way: the network, its optimizers, and what is recorded."""

    def __init__(self, net: SuperNet, config: SearchConfig) -> None:
        self.net, self.config = net, config
        self.adam = Adam(net.betas(), config.arch_lr, config.arch_betas, config.arch_eps, config.arch_weight_decay)
        self.weights = net.weights()
        self.sgd = SGD(self.weights, config.momentum, config.weight_decay)
        self.before = [b.detach().clone() for b in net.betas()]
        self.gradient: list[Tensor] = [torch.zeros_like(b) for b in self.before]
        self.rounding: Rounding | None = None
        self.losses: tuple[list[float], list[float]] = ([], [])
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def all(self, data: SearchData, length: Mode, progress: Progress | None) -> None:
        """Every iteration of the search, in the order of PC-DARTS: architecture step, then weight step."""
        per_epoch = data.iterations_per_epoch  # None: known only when the pass ends
        total = length.count if length.unit == "it" else per_epoch and length.count * per_epoch
        epochs = length.count if length.unit == "ep" else -(-length.count // per_epoch) if per_epoch else None
        architecture, weights = data.architecture_batches(), data.weight_batches(0)
        done = epoch = begun = 0
        while done != total:
            searching = epoch >= self.config.warmup_epochs
            stepping = done + 1 != total or self.config.final_weight_step
            with self.timed("data"):
                first = next(architecture, None) if searching else None
                second = next(weights, None) if stepping and (first or not searching) else None
            if (searching and not first) or (stepping and not second):
                if done == begun or (length.unit == "ep" and epoch + 1 == length.count):
                    break
            else:
                if first:
                    self.architecture_step(first)
                if second:
                    self.weight_step(second, self.config.lr(epoch, epochs or epoch + 2))
                done += 1
                if progress:
                    progress(done, total)
                if per_epoch is None or done != (epoch + 1) * per_epoch:
                    continue
            epoch, begun = epoch + 1, done
            if done != total:
                weights = data.weight_batches(epoch)
        if done != total and (total or epoch + 1 < length.count or not done):
            raise ended_early(total or length.count, done)

    def architecture_step(self, batch: Batch) -> None:
        """One Adam step on the betas; no weight gradient is computed."""
        with self.timed("architecture"), self.net.only_betas():
            loss = F.cross_entropy(self.net(batch.images), batch.labels)
            grads = list(torch.autograd.grad(loss, self.net.betas()))
            if self.config.arch_grad_clip is not None:
                clip_norm(grads, self.config.arch_grad_clip)
            self._record(0, loss, all(bool(g.isfinite().all()) for g in grads))
            if not any(bool(g.any()) for g in grads):
                raise NumericalError(
                    f"architecture step {len(self.losses[0])}: the gradient is exactly zero, so there is nothing to "
                    "follow: the images are all alike or too large for float32; check and normalise them"
                )
            if not self.adam.steps and self.net.precision != "float32":
                self.rounding = self._rounding(batch, grads)
            self.gradient = grads
            self.adam.step(grads)

    def _rounding(self, batch: Batch, grads: list[Tensor]) -> Rounding:
        """The first architecture step's gradients against those in float32."""
        precision, self.net.precision = self.net.precision, "float32"
        try:
            loss = F.cross_entropy(self.net(batch.images), batch.labels)
            exact = list(torch.autograd.grad(loss, self.net.betas()))
        finally:
            self.net.precision = precision
        if self.config.arch_grad_clip is not None:
            clip_norm(exact, self.config.arch_grad_clip)
        found, wanted = torch.cat(grads), torch.cat(exact)
        error = (found - wanted).abs().max() / wanted.abs().max()
        return Rounding(float(error), int((found.sign() != wanted.sign()).sum()))

    def weight_step(self, batch: Batch, lr: float) -> None:
        """One SGD step on the weights, under the betas of now; no beta gradient is computed."""
        with self.timed("weights"), self.net.only_weights():
            loss = F.cross_entropy(self.net(batch.images), batch.labels)
            grads = torch.autograd.grad(loss, self.weights)
            norm = clip_norm(grads, self.config.grad_clip or float("inf"))
            self._record(1, loss, bool(norm.isfinite()))
            self.sgd.step(grads, lr)

    def _record(self, which: int, loss: Tensor, finite: bool) -> None:
        value = float(loss.detach())
        if not finite or value != value:
            step = ("architecture", "weight")[which]
            raise NumericalError(
                f"{step} step {len(self.losses[which]) + 1}: the loss ({value}) or its gradient is not finite; "
                "lower the learning rate or normalise the images"
            )
        self.losses[which].append(value)

    def rows(self) -> list[tuple[tuple[float, ...], ...]]:
        """Per cell type: betas before, betas after, last gradient."""
        triples = zip(self.before, self.net.betas(), self.gradient, strict=True)
        return [tuple(tuple(t.detach().tolist()) for t in triple) for triple in triples]


@contextmanager
def _backend(name: str | None) -> Iterator[None]:
    try:
        with kernels.use_backend(name):
            if kernels.requested() != "reference" and kernels.backends()["cpu"] is None:
                kernels.isa()  # FTSO_ISA is judged before any work is done
            yield
    except kernels.BackendError as error:
        raise UsageError(str(error)) from None


def _peak_bytes() -> int:
    """Largest resident memory; on Linux not from getrusage, which hands a large parent's peak on to its children."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
