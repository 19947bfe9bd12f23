"""The stability of a search in a few lines and tables."""

from .crossed import FACTORS, Split
from .genotype import N_INPUTS
from .space import CELLS
from .stability import Agreement, Stability, Study


def describe(found: Stability) -> str:
    """One set of searches; its last line is the consensus genotype."""
    consensus = found.consensus
    kinds = {cell: len(rows) for cell, rows in found.topologies.items()}
    n = len(found.trials)
    return "\n".join(
        [
            _headline(found),
            "",
            *_table(found),
            "",
            f"Different topologies among {n}: {kinds['normal']} normal, {kinds['reduce']} reduction cells. "
            f"Most frequent: {_frequent(found)}.",
            f"Consensus, the most frequent pair of each node; {consensus.whole:.0%} of the searches found all of it:",
            repr(consensus.genotype),
        ]
    )


def describe_study(study: Study) -> str:
    """What `ftso stability` prints."""
    parts = [describe(study.random)]
    if study.split is not None:
        parts.append(_split(study.split))
    if study.zeros is not None:
        parts.append(
            "From equal edges (beta_init zeros; not the paper's way: after one step equal betas go to the stronger "
            f"gradient)\n{describe(study.zeros)}"
        )
    return "\n\n".join(parts)


def _headline(found: Stability) -> str:
    n, total = len(found.trials), found.seconds["total"]
    last, steps = found.trials[-1].seed, f"{found.iterations} iteration{'s' * (found.iterations > 1)}"
    where = f"cpu/{found.isa}" if found.isa else found.backend
    spread = "" if found.processes == 1 else f" in {found.processes} processes"
    return (
        f"{n} searches ({found.mode}, {steps}, batch {found.batch_size}, {found.source}, seeds "
        f"{found.trials[0].seed} to {last}), {total:.1f} s on {where}{spread}."
    )


def _table(found: Stability) -> list[str]:
    agreement, changed, support = found.agreement, found.changed, found.consensus.support
    lines = [f"{'':13}two seeds agree   by chance   changed from start   consensus: inputs, support"]
    genotype = found.consensus.genotype
    for cell in CELLS:
        for n, pair in enumerate(genotype.nodes(cell)):
            if not n:
                continue
            name = f"{cell} {n + N_INPUTS}"
            start = "" if found.beta_init == "zeros" else f"{changed[cell][n]:.0%}"
            inputs = ", ".join(str(state) for _, state in pair)
            lines.append(f"{name:13}{_row(agreement[name])}   {start:>18}   {inputs:>17}, {support[cell][n]:>7.0%}")
    for name in (*CELLS, "both"):
        lines.append(f"{'both' if name == 'both' else f'{name} cell':13}{_row(agreement[name])}")
    return lines


def _row(a: Agreement) -> str:
    error = "" if a.error is None else f" ± {100 * a.error:.1f}"
    return f"{f'{100 * a.observed:.1f}{error} %':>15}   {_chance(a.chance):>9}"


def _chance(chance: float) -> str:
    return f"{100 * chance:.1f} %" if chance > 0.02 else f"{100 * chance:.2g} %"


def _frequent(found: Stability) -> str:
    rows = {cell: found.topologies[cell][0] for cell in CELLS}
    return "; ".join(
        f"{cell} {_pairs(topology)}, {count} of {len(found.trials)}" for cell, (topology, count) in rows.items()
    )


def _pairs(topology: tuple[tuple[int, ...], ...]) -> str:
    return "(" + " ".join("".join(map(str, pair)) for pair in topology) + ")"


def _split(split: Split) -> str:
    n = split.levels
    lines = [
        f"What decides, by a crossed design of {n} starts of the betas, {n} of the weights and {n} orders of images:",
        "                       betas' start   weights' start   images   combinations",
    ]
    for name, row in (("of the found betas", split.values), ("of their moves", split.moves)):
        a, b, c = (f"{100 * row[factor]:.0f} %" for factor in FACTORS)
        lines.append(f"{name:20}{a:>15}{b:>17}{c:>9}{100 * row['combinations']:>13.0f} %")
    a, b, c = (f"{100 * split.agreement[factor]:.0f} %" for factor in FACTORS)
    lines.append(f"{'a pair is kept':20}{a:>15}{b:>17}{c:>9}")
    lines.append("(above: shares of the squares about the mean; last line: how often, where that alone is drawn anew)")
    return "\n".join(lines)
