"""docs/operations.md from the newest results that have operations: `python benchmarks/operations_table.py` rewrites it;
with --check it says whether that would change anything. Needs no torch."""

import json
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

from readme_table import newest, newest_with, threads_in_words
from tables import aligned

PAGE = Path(__file__).resolve().parent.parent / "docs" / "operations.md"
SETTINGS = ("kept", "default")
SIZES = {"evaluation": 96, "partial-channel": 256}
"""What a convolution's batch size stands for: the network that is trained at last, and a PC-DARTS edge."""
ASKED = {
    ("evaluation", "sep_conv_3x3"): 1.5,
    ("evaluation", "sep_conv_5x5"): 2.0,
    ("evaluation", "dil_conv_3x3"): 2.3,
    ("evaluation", "dil_conv_5x5"): 3.0,
}
"""The least ratio, forward and backward, that the median over the sizes is to have."""
PARTIAL = 2.5
ABOUT = """\
What each operation costs beside the same in plain PyTorch. Made by `benchmarks/operations_table.py` from
[{stem}](../benchmarks/results/{stem}.md); do not edit.

{about}

A ratio is the fastest peer's time over ours; below 1, in bold, ours loses. Peers: eager NCHW, eager channels_last (the
gradients of its outputs in that format too) and, in the long form, torch.compile. "kept": glibc told to keep its
memory, for both sides; "default": glibc as it is, for both sides. Training mode, but for inference: batch norm folded
into the weights, for both sides (1.5 asked for at 36@32x32, 1 elsewhere). float32; equality with the reference is
checked before the stopwatch starts. ms: the median, memory kept; (n): repetitions."""


def parsed(piece: str) -> dict[str, Any] | None:
    """Operator, sizes and direction of an operation's piece; None where the piece is a search's."""
    found = re.fullmatch(r"(\w+)-(\d+)x(\d+)x(\d+)x(\d+)(?:-k\d+)? (forward(?:\+backward)?|inference)", piece)
    if not found:
        return None
    name, *sizes, direction = found.groups()
    return {"operator": name, "direction": direction} | dict(zip("BCHW", map(int, sizes), strict=True))


def chosen(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each operation's piece, number of threads and instruction set, both memory settings in it."""
    pairs: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in found["rows"].values():
        if what := parsed(row["piece"]):
            own = pairs.setdefault((row["piece"], row["arm"], row["threads"]), what | {"arm": row["arm"]})
            own |= {"threads": row["threads"], row["memory"]: row}
    return [pair for pair in pairs.values() if all(setting in pair for setting in SETTINGS)]


def ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"**{value:.2f}**"


def _against(row: dict[str, Any]) -> str:
    its = row["peers"][row["opponent"]]
    return f"{ratio(row['ratio'])} {row['opponent']} {its['ms']:.2f} ({its['n']})"


def _table(rows: list[dict[str, Any]], labels: list[str]) -> list[str]:
    head = ["", "ms (n)", "rate", "of torch.mm", "of FMA peak", "of copy_", "kept: ratio, peer", "default: ratio, peer"]
    cells = [head]
    for label, pair in zip(labels, rows, strict=True):
        row = pair["kept"]
        shares = [f"{row[n]:.0%}" if n in row else "" for n in ("of torch.mm", "of FMA peak", "of copy_")]
        cells.append([label, f"{row['ms']:.2f} ({row['n']})", f"{row['rate']:.0f} {row['unit']}", *shares])
        cells[-1] += [_against(pair[setting]) for setting in SETTINGS]
    return aligned(cells)


def _shape(pair: dict[str, Any]) -> str:
    return f"{pair['operator']} {pair['C']}@{pair['H']}x{pair['W']}, {pair['B']}, {pair['direction']}"


def medians(pairs: list[dict[str, Any]], sizes: str) -> list[str]:
    """Over the sizes, forward and backward: of each operator at evaluation sizes, of all at partial-channel ones."""
    own = [p for p in pairs if p["B"] == SIZES[sizes] and p["operator"].endswith(("3x3", "5x5"))]
    own = [p for p in own if p["direction"] == "forward+backward"]
    cells = [[f"{sizes} sizes, forward+backward", *(f"median ratio, {setting}" for setting in SETTINGS), "asked for"]]
    groups = {name: [p for p in own if p["operator"] == name] for name in dict.fromkeys(p["operator"] for p in own)}
    if sizes == "partial-channel":
        groups = {"all operators": own}
    for name, group in groups.items():
        if group:
            found = [ratio(median(p[setting]["ratio"] for p in group)) for setting in SETTINGS]
            cells.append([name, *found, str(ASKED.get((sizes, name), PARTIAL))])
    return aligned(cells)


def _searches(found: dict[str, Any], threads: int) -> list[str]:
    arm = f"cpu/{found['machine']['isa']}"
    rows = found["rows"]
    pieces = [f"PC-DARTS {p}" for p in ("architecture step", "weight step", "iteration", "first iteration")]
    pieces = [p for p in pieces if f"{p} {arm} {threads} kept" in rows]
    if not pieces:
        return []
    pairs = [{m: rows[f"{p} {arm} {threads} {m}"] for m in SETTINGS} for p in pieces]
    lines = _table(pairs, pieces)
    memory = [row["default"] for row in pairs if "peak MB" in row["default"]]
    for row in memory:
        peers = ", ".join(f"{name} {p['peak MB']:.0f} MB" for name, p in row["peers"].items())
        share = row["peak MB"] / min(p["peak MB"] for p in row["peers"].values())
        lines += ["", f"Peak memory over import and data, from cold: {row['peak MB']:.0f} MB; {peers}: {share:.0%} of"]
        lines[-1] += " the smallest (a third asked for)."
    return lines


def _measured(found: dict[str, Any], stem: str) -> str:
    """Where and when a section's figures were measured."""
    return (
        f"From [{stem}](../benchmarks/results/{stem}.md), {found['date']}, {found['form']} form, load at start "
        f"{found['load']}."
    )


def _threads(found: dict[str, Any]) -> list[int]:
    return sorted({row["threads"] for row in found["rows"].values()}, reverse=True)


def pc_darts(found: dict[str, Any], stem: str) -> str:
    """The section of PC-DARTS' search."""
    parts = [f"## PC-DARTS' iteration, batch 64 (6 asked for)\n\n{_measured(found, stem)}"]
    for threads in _threads(found):
        if searches := _searches(found, threads):
            parts += [f"### On {threads_in_words(threads)}", "\n".join(searches)]
    return "\n\n".join(parts) + "\n"


def network(found: dict[str, Any], stem: str) -> str:
    """The section of a step of training, and of inference."""
    arm, rows = f"cpu/{found['machine']['isa']}", found["rows"]
    pieces = ("training step", "first training step", "network inference")
    parts = [
        "## The network that is trained",
        "20 cells of 36 channels, every edge a sep_conv_3x3, 96 images of 3x32x32; a step with auxiliary head,\n"
        "dropped paths, clipping and SGD (2 asked for, 1.4 at least; inference 2 and 1.5).\n"
        f"{_measured(found, stem)}",
    ]
    for threads in _threads(found):
        own = [p for p in pieces if f"{p} {arm} {threads} kept" in rows]
        pairs = [{m: rows[f"{p} {arm} {threads} {m}"] for m in SETTINGS} for p in own]
        parts.append("\n".join(_table(pairs, [f"{p}, {threads_in_words(threads)}" for p in own])))
    for name, what in (("peak MB", "Peak memory over import and data, from cold"), ("saved MB", "Kept for backward")):
        row = rows.get(f"first training step {arm} {max(row['threads'] for row in rows.values())} default", {})
        if name in row:
            peers = {peer: p[name] for peer, p in row["peers"].items() if name in p}
            share = row[name] / min(peers.values())
            said = ", ".join(f"{peer} {value:.0f} MB" for peer, value in peers.items())
            parts.append(f"{what}: {row[name]:.0f} MB; {said}: {share:.0%} of the smallest.")
    parts += [f"WARNING: {warning}" for warning in found["warnings"]]
    return "\n\n".join(parts) + "\n"


def text(found: dict[str, Any], stem: str) -> str:
    """The whole page."""
    machine = found["machine"]
    lines = [f"{found['date']}, {machine['cpu']}, {machine['cores']} cores, {machine['isa']}, torch {machine['torch']}"]
    lines[0] += f", {found['form']} form, load at start {found['load']}."
    for threads, rates in found["rates"].items():
        lines.append(f"- {threads}: {', '.join(f'{n} {v:.0f}' for n, v in rates.items())} (GFLOP/s; copy_: GB/s)")
    lines += [f"- WARNING: {warning}" for warning in found["warnings"]]
    parts = ["# Operations", ABOUT.format(stem=stem, about="\n".join(lines))]
    every = chosen(found)
    fastest = f"cpu/{machine['isa']}"
    for threads in sorted({p["threads"] for p in every}, reverse=True):
        parts.append(f"## On {threads_in_words(threads)}")
        pairs = [p for p in every if (p["threads"], p["arm"]) == (threads, fastest)]
        parts += ["\n".join(medians(pairs, sizes)) for sizes in SIZES]
        sections = {
            "Operations": [p for p in pairs if p["operator"] != "partial_mix"],
            "One mixed edge, eight operators, k = 4 (6 asked for)": [
                p for p in pairs if p["operator"] == "partial_mix"
            ],
        }
        for title, own in sections.items():
            if own:
                parts += [f"### {title}", "\n".join(_table(own, [_shape(p) for p in own]))]
        if others := [p for p in every if p["threads"] == threads and p["arm"] != fastest]:
            labels = [f"{_shape(p)}, {p['arm'].removeprefix('cpu/')}" for p in others]
            parts += ["### Other instruction sets", "\n".join(_table(others, labels))]
    return "\n\n".join(parts) + "\n"


def page() -> str | None:
    """The page of the newest results that have convolutions, its sections of larger works each of the newest that have
    those; None where none have convolutions."""
    path = newest(lambda found: any(p["operator"] != "skip_cell" for p in chosen(found)))
    if path is None:
        return None
    parts = [text(json.loads(path.read_text()), path.stem)]
    for piece, section in (("PC-DARTS iteration", pc_darts), ("training step", network)):
        if own := newest_with(piece):
            parts.append(section(json.loads(own.read_text()), own.stem))
    return "\n".join(parts)


if __name__ == "__main__":
    wanted = page()
    if wanted is None:
        sys.exit("no results of operations: run FTSO_BENCH_OUT=benchmarks/results pytest benchmarks/ --benchmark-only")
    if "--check" in sys.argv[1:]:
        same = PAGE.exists() and PAGE.read_text() == wanted
        sys.exit(0 if same else "docs/operations.md has other figures: run python benchmarks/operations_table.py")
    PAGE.write_text(wanted)
