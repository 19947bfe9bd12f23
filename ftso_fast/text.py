"""A search's result in a few lines: what was found, on what, and how far to trust it."""

from .config import METHODS
from .data import DataReport
from .genotype import N_INPUTS
from .phase import Phase
from .result import SearchResult
from .space import CELLS
from .supernet import SPREAD


def describe(result: SearchResult) -> str:
    """The text that `ftso search` prints; its last line is the genotype."""
    lines = [_headline(result), _data(result.data)]
    for cell in CELLS:
        nodes = []
        for node, (kept, margin) in enumerate(zip(result.topology[cell], result.margins[cell], strict=True), N_INPUTS):
            trust = "" if margin is None else f" (margin {margin:.1f})"
            nodes.append(f"{node} <- {', '.join(map(str, kept))}{trust}")
        lines.append(f"  {cell:6}  {'   '.join(nodes)}")
    if any(result.choices.values()):
        rows = (
            "  ".join("-" if c.margin is None else f"{c.margin:.1f}" for c in result.choices[cell]) for cell in CELLS
        )
        lines.append("Operators over their runners-up, in the genotype's order: normal {}; reduce {}.".format(*rows))
    if result.rounding is not None:
        lines.append(
            f"Precision {result.precision}: the first beta gradient differs from float32's by "
            f"{result.rounding.gradient_error:.2%} of its largest value, {result.rounding.sign_flips} of "
            f"{sum(len(b.after) for b in result.betas.values())} signs flipped."
        )
    if result.shards > 1:
        lines.append(f"Batches were cut into {result.shards} shards, each with batch norm of its own.")
    if result.topology_search.eigenvalues:
        lines.append(_early(result.topology_search))
    warm_up = METHODS[result.method].config.warmup_epochs
    if result.config.warmup_epochs < warm_up:
        lines.append(
            f"Warm-up: {result.config.warmup_epochs} epochs without architecture steps, where {result.method} has "
            f"{warm_up}."
        )
    return "\n".join([*lines, _trust(result), repr(result.genotype)])


def _early(phase: Phase) -> str:
    end = f"after {len(phase.eigenvalues)} epochs {phase.eigenvalues[-1]:.3g}"
    if phase.stopped_at is None:
        return f"DARTS-ES: the loss' dominant eigenvalue did not grow enough to stop, {end}."
    epoch = phase.stopped_at + 1
    return f"DARTS-ES: the loss' dominant eigenvalue grew, {end}; back to the architecture of epoch {epoch}."


def _headline(result: SearchResult) -> str:
    phases = [phase for phase in (result.topology_search, result.operator_search) if phase is not None]
    ran = " then ".join(dict.fromkeys(f"cpu/{result.isa}" if p.backend == "cpu" else p.backend for p in phases))
    operators = "" if result.operators in ("skip", "all") else f", operators {result.operators}"
    setting = f"{result.seconds['total']:.2f} s on {ran} (seed {result.seed}, k {result.k}{operators})"
    count = _counted(result.iterations, "iteration")
    if result.operator_search is not None:
        then = _counted(result.operator_search.iterations, "iteration")
        return f"Topology found in {count}, then operators in {then}, {setting}."
    if result.replace is None:
        order = ", second order" if result.order == 2 else ""
        return f"Cell found by {result.method}{order} in {count}, {setting}."
    return f"Topology found in {count}, {setting}; every edge is {result.replace}."


def _data(data: DataReport) -> str:
    shape = "x".join(map(str, data.shape))
    images = f"{data.images} images of {shape}" if data.images is not None else f"images of {shape}"
    return f"Data: {data.source}, {images}, {data.classes} classes; {data.split}; augmentation: {data.augmentation}."


def _trust(result: SearchResult) -> str:
    topology, operators = result.topology, result.operator_search
    changed = sum(map(len, result.changed.values()))
    free = sum(len(nodes) - 1 for nodes in topology.values())
    text = f"Margins are in units of the learning rate. The search changed {changed} of {free} free nodes"
    if result.replace is None:
        phase = operators or result.topology_search
        edges = sum(map(len, result.choices.values()))
        text += f" and {phase.operators_changed(topology)} of {edges} operators"
    text += " from its random start"
    if result.beta_init == "zeros" and operators is None:
        return (
            "Margins are in units of the learning rate. All edges started alike (beta_init zeros), which is not the "
            "paper's way: equal betas went to the stronger gradient. Other weights to start from give another answer: "
            "compare seeds."
        )
    phases = [result.topology_search, *([operators] if operators else [])]
    short = [phase for phase in phases if phase.iterations * result.config.arch_lr < 5 * SPREAD]
    return text + (_warning(short[0], result.config.arch_lr) if short else "") + "."


def _warning(phase: Phase, lr: float) -> str:
    return (
        f": {_counted(phase.iterations, 'step')} of about {lr:g} cannot outweigh a start drawn with deviation "
        f"{SPREAD:g}, so this answer is mostly its seed; compare seeds, or search an epoch (mode 1ep)"
    )


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n > 1)}"
