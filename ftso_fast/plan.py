"""The arguments of a search, checked once and settled: what is left to the caller, the method or the paper decides."""

from dataclasses import dataclass
from dataclasses import replace as changed

from . import kernels
from .config import METHODS, Method, Mode, SearchConfig
from .errors import UsageError
from .genotype import PRIMITIVES
from .space import OPERATOR_SETS, SearchSpace

REPLACE = "sep_conv_3x3"
BETA_INITS = ("random", "zeros")


@dataclass(frozen=True)
class Plan:
    """One search. phases: its lengths, one for each super-network. replace: the operator of every kept edge, None
    where operators are searched. operators: the name of the set, or "own" where a search space brought it. shards: the
    parts of a batch."""

    method: Method
    phases: tuple[Mode, ...]
    operators: str
    space: SearchSpace
    replace: str | None
    k: int
    order: int
    beta_only: bool
    seed: int
    precision: str
    config: SearchConfig
    beta_init: str
    early_stop: bool
    shards: int = 1

    @property
    def mode(self) -> str:
        return "+".join(map(str, self.phases))


def settle(
    mode: str,
    *,
    method: str,
    operators: str | None,
    replace: str | None,
    order: int,
    beta_only: bool,
    space: SearchSpace,
    k: int | None,
    seed: int,
    precision: str,
    config: SearchConfig | None,
    beta_init: str = "random",
    early_stop: bool = False,
) -> Plan:
    """The plan of `search`'s arguments of the same names; raises UsageError."""
    phases = Mode.parse(mode)
    if method not in METHODS:
        raise UsageError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    by = METHODS[method]
    if not by.stages:
        _refuse_stages(method, phases, operators, replace)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UsageError(f"seed: expected a whole number, got {seed!r}")
    if precision not in kernels.PRECISIONS:
        raise UsageError(f"precision: expected one of {', '.join(kernels.PRECISIONS)}, got {precision!r}")
    if space.keeps_all:
        raise UsageError(f"space: {space.name!r} keeps its topology: search it with ftso_fast.nats_search.search_nats")
    name, space = _operators(by, operators, space)
    if precision != "float32" and (space.operators != ("skip_connect",) or len(phases) > 1):
        raise UsageError(f"precision: expected float32 for all but a skip-only topology search, got {precision!r}")
    config = config or _in_time(by.config, phases[0])
    for length in phases:
        if length.unit == "ep" and length.count <= config.warmup_epochs:
            raise only_warm_up(length, config)
    _check_gradient(by, order, beta_only)
    _check_start(by, beta_init)
    _check_early_stop(by, phases, early_stop)
    return Plan(
        method=by,
        phases=phases,
        operators=name,
        space=space,
        replace=_replacement(by, phases, replace, space),
        k=_part(by, k),
        order=order,
        beta_only=beta_only,
        seed=seed,
        precision=precision,
        config=config,
        beta_init=beta_init,
        early_stop=early_stop,
    )


def in_shards(plan: Plan, shards: int) -> Plan:
    """The plan on batches of so many parts; raises UsageError."""
    if shards > 1:
        for what, given in (("order", plan.order == 2), ("early_stop", plan.early_stop)):
            if given:
                raise UsageError(f"{what}: needs whole batches, and they are cut into {shards} shards: use one process")
    return changed(plan, shards=shards)


def only_warm_up(length: Mode, config: SearchConfig) -> UsageError:
    """The error of a search that never takes an architecture step."""
    return UsageError(
        f"mode: {length} ends within the {config.warmup_epochs} warm-up epochs, before any architecture step: "
        "lower config.warmup_epochs or search longer"
    )


def _refuse_stages(method: str, phases: tuple[Mode, ...], operators: str | None, replace: str | None) -> None:
    if len(phases) > 1:
        raise UsageError(f"mode: expected one length for method {method!r}, which finds all at once, got two")
    if operators is not None:
        raise UsageError(f"operators: expected none for method {method!r}, which searches all eight, got {operators!r}")
    if replace is not None:
        raise UsageError(f"replace: expected none for method {method!r}, which chooses operators, got {replace!r}")


def _operators(method: Method, operators: str | None, space: SearchSpace) -> tuple[str, SearchSpace]:
    """The set's name, and the search space of the first super-network."""
    if not method.stages:
        return "all", changed(space, operators=PRIMITIVES)
    if operators is not None:
        if operators not in OPERATOR_SETS:
            raise UsageError(f"operators: expected one of {', '.join(OPERATOR_SETS)}, got {operators!r}")
        return operators, changed(space, operators=OPERATOR_SETS[operators])
    if not set(space.operators) - {"none"} or not set(space.operators) <= set(PRIMITIVES):
        raise UsageError(
            f"space.operators: expected some of {', '.join(PRIMITIVES)}, not 'none' alone, got {space.operators!r}"
        )
    return next((name for name, own in OPERATOR_SETS.items() if own == space.operators), "own"), space


def _replacement(method: Method, phases: tuple[Mode, ...], replace: str | None, space: SearchSpace) -> str | None:
    if not method.stages:
        return None
    if replace is not None and replace not in space.replacements:
        raise UsageError(f"replace: expected one of {', '.join(space.replacements)}, got {replace!r}")
    if len(phases) == 1:
        return replace or REPLACE
    if replace is not None:
        raise UsageError(f"replace: expected none where operators are searched (mode with '+'), got {replace!r}")
    return None


def _part(method: Method, k: int | None) -> int:
    """1/k of the channels; what else is wrong with k, the network says."""
    if method.name == "darts" and k not in (None, 1):
        raise UsageError(f"k: expected 1 for method 'darts', which processes every channel, got {k!r}")
    return method.k if k is None else k


def _check_gradient(method: Method, order: int, beta_only: bool) -> None:
    if isinstance(order, bool) or order not in (1, 2):
        raise UsageError(f"order: expected 1 or 2, got {order!r}")
    if order == 2 and method.stages:
        raise UsageError(f"order: expected 1 for method {method.name!r}; 2 is for pc-darts and darts, got 2")
    if not isinstance(beta_only, bool):
        raise UsageError(f"beta_only: expected True or False, got {beta_only!r}")
    if beta_only and not method.weighted_edges:
        raise UsageError(f"beta_only: expected False for method {method.name!r}, which has no betas, got True")


def _check_start(method: Method, beta_init: str) -> None:
    if beta_init not in BETA_INITS:
        raise UsageError(f"beta_init: expected one of {', '.join(BETA_INITS)}, got {beta_init!r}")
    if beta_init == "zeros" and not method.weighted_edges:
        raise UsageError(f"beta_init: expected 'random' for method {method.name!r}, which has no betas, got 'zeros'")


def _check_early_stop(method: Method, phases: tuple[Mode, ...], early_stop: bool) -> None:
    if not isinstance(early_stop, bool):
        raise UsageError(f"early_stop: expected True or False, got {early_stop!r}")
    if early_stop and (method.stages or phases[0].unit != "ep"):
        raise UsageError(f"early_stop: expected pc-darts or darts, searching epochs, got {method.name!r}, {phases[0]}")


def _in_time(config: SearchConfig, length: Mode) -> SearchConfig:
    """A method's own settings, its warm-up cut so that at least the last epoch searches."""
    left = length.count - 1 if length.unit == "ep" else 0
    return changed(config, warmup_epochs=min(config.warmup_epochs, left))
