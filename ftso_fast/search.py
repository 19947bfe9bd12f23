"""FTSO's algorithms 1 and 2 and the two methods that it builds on: super-network after super-network, to a genotype."""

import gc
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from . import kernels
from .config import SearchConfig
from .data import prepare
from .errors import UsageError
from .plan import in_shards, settle
from .ranks import ranks
from .result import SearchResult
from .run import Progress, Stream
from .space import DARTS, SearchSpace
from .stages import search_stages

if TYPE_CHECKING:
    from .stability import Stability


@overload
def search(
    data: Any,
    mode: str = ...,
    *,
    method: str = ...,
    operators: str | None = ...,
    replace: str | None = ...,
    order: int = ...,
    beta_only: bool = ...,
    space: SearchSpace = ...,
    k: int | None = ...,
    classes: int | None = ...,
    seed: int = ...,
    seeds: None = ...,
    beta_init: str = ...,
    early_stop: bool = ...,
    backend: str | None = ...,
    device: str | None = ...,
    precision: str = ...,
    shards: int | None = ...,
    config: SearchConfig | None = ...,
    progress: Progress | None = ...,
) -> SearchResult: ...


@overload
def search(
    data: Any,
    mode: str = ...,
    *,
    method: str = ...,
    operators: str | None = ...,
    replace: str | None = ...,
    order: int = ...,
    beta_only: bool = ...,
    space: SearchSpace = ...,
    k: int | None = ...,
    classes: int | None = ...,
    seed: int = ...,
    seeds: int,
    beta_init: str = ...,
    early_stop: bool = ...,
    backend: str | None = ...,
    device: str | None = ...,
    precision: str = ...,
    shards: None = ...,
    config: SearchConfig | None = ...,
    progress: Progress | None = ...,
) -> "Stability": ...


def search(
    data: Any,
    mode: str = "1it",
    *,
    method: str = "ftso",
    operators: str | None = None,
    replace: str | None = None,
    order: int = 1,
    beta_only: bool = False,
    space: SearchSpace = DARTS,
    k: int | None = None,
    classes: int | None = None,
    seed: int = 0,
    seeds: int | None = None,
    beta_init: str = "random",
    early_stop: bool = False,
    backend: str | None = None,
    device: str | None = None,
    precision: str = "float32",
    shards: int | None = None,
    config: SearchConfig | None = None,
    progress: Progress | None = None,
) -> "SearchResult | Stability":
    """Find a cell for `data`: which two inputs each of its nodes reads, and by which operators.

    data: a DataLoader or Dataset over a map data set, a tuple (X, y) of arrays, a tuple of two loaders (weights,
    architecture), any iterable of (images, labels) batches, or the path of an npz file or of CIFAR-10's binary
    folder; `ftso_fast.data.prepare` has the details. Images are B,C,H,W with 1 or 3 channels, H and W divisible
    by 4. mode: 'Nit' or 'Nep', iterations or epochs; an iteration is one architecture step and one weight step.

    method: 'ftso' finds the topology with the set `operators` on every edge ('skip', 'max_pool', 'sep3', '3op',
    '4op'; default: the space's own, 'skip') and then puts `replace` (default: sep_conv_3x3) on every kept edge. With a
    mode of two lengths, '1ep+18ep', the second searches operators instead: a fresh super-network on the kept edges
    with all eight operators. 'pc-darts' and 'darts' find both at once, among all eight operators, 'darts' without
    edge weights; order=2: along DARTS' second-order gradient. beta_only: edges are ranked by their betas alone
    rather than by beta times the largest alpha (without none). Ties go to the lower state and the earlier operator.

    k: 1/k of the channels are processed (default: the method's; 1: DARTS). classes: found in the data where not given.
    seed: decides everything random. seeds: so many searches instead of one, with seeds from `seed` on, each the
    same as alone, byte for byte; they share reading and memory, and torchrun's processes; returned is their
    `Stability`. beta_init: 'random' as the paper, or 'zeros', which starts all edges alike, so that their start
    decides nothing: the first step is a vote of signs, whose ties the raw gradient breaks. early_stop: pc-darts and
    darts in epochs: DARTS-ES, which goes back where the loss' dominant eigenvalue grows. backend: one of
    `kernels.BACKENDS`, which then runs or raises; None: the fastest that can. device: "cpu" (the default) or
    "cuda", where a step is a CUDA graph after its first two. precision: one of `kernels.PRECISIONS`; other than
    float32 it needs the cpu backend and a skip-only topology search, is for long searches (one iteration follows
    the gradient's sign only), and the result says what it did to the first gradient. shards: each batch is cut into so
    many parts with batch norm of their own, gradients are averages; under torchrun, whose processes share them out,
    as many as there are processes, and every process returns the same. config: default: the method's
    own, its warm-up cut to end before a short search does.
    progress: called with (iterations done, iterations in all or None).

    The architecture step comes first and takes one batch of the architecture half; then the weight step, one of
    the weight half, under the new architecture. The last weight step is left out unless `config.final_weight_step`:
    it cannot change the answer. Same input, seed and backend: same bytes.

    Raises UsageError (mode, method, operators and the like), DataError (see `prepare`; also data that end before
    the mode does), NumericalError (a loss or gradient is not finite). Source: FTSO, algorithms 1 and 2, Table 4;
    PC-DARTS and its order of steps; DARTS.
    """
    plan = settle(
        mode,
        method=method,
        operators=operators,
        replace=replace,
        order=order,
        beta_only=beta_only,
        space=space,
        k=k,
        seed=seed,
        precision=precision,
        config=config,
        beta_init=beta_init,
        early_stop=early_stop,
    )
    where = _device(device)
    if seeds is not None and shards is not None:
        raise UsageError(f"seeds: processes share out whole searches, got shards={shards!r} too: leave one of them out")
    if seeds is not None and where.type != "cpu":
        raise UsageError(f"seeds: many searches at once run on the cpu, got device={device!r}: leave one of them out")
    for what, given in (("early_stop", early_stop), ("config.nesterov", plan.config.nesterov)):
        if given and where.type != "cpu":
            raise UsageError(f"{what}: expected False on a GPU, which has no such step, got {given}: search on the cpu")
    start = time.perf_counter()
    with chosen_backend(backend), earlier_objects_left_alone():
        if seeds is not None:
            from .many import search_seeds

            return search_seeds(data, plan, seeds, classes, progress)
        with ranks() as here:
            plan = in_shards(plan, here.shards(shards))
            if plan.shards > 1 and where.type != "cpu":
                raise UsageError(f"device: expected cpu for {plan.shards} shards, got {device!r}")
            prepared = prepare(data, classes=classes, seed=seed, batch_size=plan.config.batch_size)
            stream = Stream(prepared)
            phases, rounding = search_stages(plan, prepared.report, stream, progress, start, device=where, ranks=here)
        isa = kernels.isa() if any(phase.backend == "cpu" for phase in phases) else None
    seconds = sum((Counter(phase.seconds) for phase in phases), Counter[str]())
    return SearchResult(
        topology_search=phases[0],
        operator_search=phases[1] if len(phases) > 1 else None,
        method=plan.method.name,
        mode=plan.mode,
        operators=plan.operators,
        replace=plan.replace,
        order=plan.order,
        beta_only=plan.beta_only,
        k=plan.k,
        seed=seed,
        beta_init=plan.beta_init,
        isa=isa,
        precision=precision,
        shards=plan.shards,
        rounding=rounding,
        seconds={**seconds, "total": time.perf_counter() - start},
        peak_bytes=peak_bytes(),
        data=prepared.report,
        config=plan.config,
    )


def _device(name: str | None) -> torch.device:
    if name not in (None, "cpu", "cuda"):
        raise UsageError(f"device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device: {name!r} was asked for, and torch finds no GPU here")
    return torch.device(name or "cpu")


_left_alone = False


@contextmanager
def earlier_objects_left_alone() -> Iterator[None]:
    """Within the block the garbage collector passes over what was there before: going through PyTorch's own objects
    once takes as long as the steps of a one-iteration search. So does counting them, if they are passed over."""
    global _left_alone
    if _left_alone or gc.get_freeze_count():  # a block's around this one, or the caller's own: `unfreeze` would undo it
        yield
        return
    gc.freeze()
    _left_alone = True
    try:
        yield
    finally:
        _left_alone = False
        gc.unfreeze()


@contextmanager
def chosen_backend(name: str | None) -> Iterator[None]:
    try:
        with kernels.use_backend(name):
            if kernels.requested() != "reference" and kernels.lacks("cpu") is None:
                kernels.isa()  # FTSO_ISA is judged before any work is done
            yield
    except kernels.BackendError as error:
        raise UsageError(str(error)) from None


def peak_bytes() -> int:
    """Largest resident memory; on Linux not from getrusage, which hands a large parent's peak on to its children."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
