"""README's figures from the newest results file: `python benchmarks/readme_table.py` rewrites the block between the
two markers; with --check it says whether that would change anything. Needs no torch."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: begin, made by benchmarks/readme_table.py -->\n", "<!-- figures: end -->\n"
PIECES = {
    "architecture step": "architecture step",
    "weight step": "weight step",
    "iteration": "iteration",
    "iteration, batch 64": "iteration, batch 64",
    "first iteration": "iteration, first in its process",
    "search 1it": "`search('1it')`, first in its process",
}
LONGER = {"PC-DARTS iteration": "PC-DARTS' iteration, batch 64"}
"""Of the newest results that have it, which may be others."""
NUMBERS = {"1": "one thread", "2": "two threads"}


def newest(fit: Callable[[dict[str, Any]], bool]) -> Path | None:
    """Of the results files that fit the one with the latest date."""
    files = {path: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    return max((p for p, found in files.items() if fit(found)), key=lambda p: files[p]["date"], default=None)


def newest_with(piece: str) -> Path | None:
    """The newest results of a piece, with the memory setting that the short form leaves out."""
    return newest(lambda found: (piece, "default") in {(row["piece"], row["memory"]) for row in found["rows"].values()})


def threads_in_words(n: int) -> str:
    return NUMBERS.get(str(n), f"{n} threads")


def _seconds(ms: float) -> str:
    return f"{ms / 1e3:.3f} s" if ms < 1e3 else f"{ms / 1e3:.2f} s"


def _pair(found: dict[str, Any], piece: str, threads: int) -> list[dict[str, Any]]:
    """A piece of ours by default, and with memory kept."""
    return [
        found["rows"][f"{piece} cpu/{found['machine']['isa']} {threads} {memory}"] for memory in ("default", "kept")
    ]


def _line(label: str, default: dict[str, Any], kept: dict[str, Any]) -> str:
    cells = [label, f"{_seconds(default['ms'])} ({default['n']})"]
    for row in (kept, default):
        its = row["peers"][row["opponent"]]
        cells.append(f"**{row['ratio']:.1f}x**, {row['opponent']} {_seconds(its['ms'])} ({its['n']})")
    cells += [f"{default['rate']:.0f}", f"{default['of FMA peak']:.0%}"]
    return f"| {' | '.join(cells)} |"


def block(path: Path) -> str:
    """The lines between the markers."""
    found = json.loads(path.read_text())
    machine, rows = found["machine"], found["rows"]
    used = sorted({row["threads"] for row in rows.values()}, reverse=True)
    most = used[0]

    def pair(piece: str, threads: int) -> list[dict[str, Any]]:
        return _pair(found, piece, threads)

    lines = [
        f"{found['date']}, {machine['cpu']}, {machine['cores']} cores, {machine['isa']}, torch {machine['torch']}; "
        f"[everything that was measured](benchmarks/results/{path.stem}.md).",
        "",
        f"| {threads_in_words(most)}: median (n) | ftso_fast | against the fastest peer, memory kept | the same, "
        "default | GFLOP/s | of FMA peak |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_line(label, *pair(piece, most)) for piece, label in PIECES.items()]
    for piece, label in LONGER.items():
        if own := newest_with(piece):
            other = json.loads(own.read_text())
            when = "" if own == path else f", measured {other['date']}"
            lines.append(_line(label + when, *_pair(other, piece, most)))
    for threads in used[1:]:
        chosen = ("iteration", "search 1it")
        lines += [_line(f"{PIECES[piece]}, {threads_in_words(threads)}", *pair(piece, threads)) for piece in chosen]
    rates = found["rates"][f"{most} threads"]
    first, steps = pair("first iteration", most)[0], [pair(s, most)[0] for s in ("architecture step", "weight step")]
    over = [f"{row['over bound']:.2f} (its {row['bound GFLOP']:.1f} GFLOP)" for row in steps]
    # of the part of the run that these steps were in: each part measures anew
    multiplied = 1e3 * steps[0]["bound GFLOP"] * steps[0]["over bound"] / steps[0]["ms"]
    peers = ", ".join(f"{name} {p['peak MB']:.0f} MB" for name, p in first["peers"].items())
    lines += [
        "",
        f"- The machine: multiply-adds on registers {rates['FMA peak']:.0f} GFLOP/s, torch.mm "
        f"{multiplied:.0f}, copying {rates['copy_']:.0f} GB/s. A step's time over its arithmetic at torch.mm's "
        f"rate: architecture {over[0]}, weights {over[1]}.",
        f"- Memory of a whole iteration over import and data, at its peak: {first['peak MB']:.0f} MB; {peers}.",
    ]
    compiled = [p["first s"] for row in rows.values() for p in row["peers"].values() if "first s" in p]
    if compiled:
        lines.append(f"- torch.compile is a peer in warm work; its first iteration takes {max(compiled):.0f} s.")
    if e := found["whole"].get("search 1ep"):
        lines.append(
            f"- `search('1ep')` on 50,000 uint8 images: {e['s']:.1f} s, data included, {e['ratio']:.2f} times "
            f"{e['iterations']} warm iterations of the same process (its last weight step is left out)."
        )
    if s := found["whole"].get("shell 1it"):
        lines.append(
            f"- `ftso search --mode 1it` on CIFAR-10's binary files, in the shell: {s['s']:.2f} s ({s['n']}), of which "
            f"`import torch` {s['import torch s']:.2f} s and the search {s['search s']:.2f} s."
        )
    lines.append(
        "- [docs/operations.md](docs/operations.md): separable and dilated convolutions, the mixed edge, PC-DARTS."
    )
    lines += [f"- A warning of that run: {warning}." for warning in found["warnings"]]
    return "\n".join(lines) + "\n"


def rewritten(text: str) -> str:
    """README's text with the block of the newest results in the long form."""
    path = newest(
        lambda found: found["form"] == "long" and any(r["piece"] == "iteration" for r in found["rows"].values())
    )
    assert path is not None, "no results in the long form"
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block(path)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = rewritten(readme.read_text())
    if "--check" in sys.argv[1:]:
        sys.exit(
            "README.md has other figures: run python benchmarks/readme_table.py" if text != readme.read_text() else 0
        )
    readme.write_text(text)
