"""The document of a session (lab.Lab.document): joined with an earlier one, and as text in Markdown. Needs no torch."""

from typing import Any

NOTES = """\
memory: glibc as it is, or told to keep it (MALLOC_MMAP_MAX_=0 ...). Every arm runs in processes of its own and must
agree with the reference before its stopwatch starts. The peers are this package's own reference network in plain
PyTorch, with the search's own steps, neither of which computes a gradient that it does not use; PC-DARTS' own code
takes longer. opponent: the fastest peer with the same memory setting; ratio: its time over ours; of best: the same for
the fastest peer of any setting. torch.compile, in the long form only: its warm iteration, with
TORCHINDUCTOR_CPP_DYNAMIC_THREADS=1 so that one compilation serves every number of threads (measured as fast as
without); no peer in cold work, where it would compile for longer than any other runs. rate: GFLOP are those of the
reference (torch.utils.flop_counter). of torch.mm: the best of 1024, 2048 and 4096; no limit where its library leaves
AVX-512 unused. of FMA peak: multiply-adds on registers alone, same instruction set and threads. over bound: the step's
time over its arithmetic (in a weight step the stem's once more) at torch.mm's rate. first iteration, search 1it: from
cold, the first work of a fresh process, import excluded, batches in memory. peak MB: of that process over import and
data; a first iteration is a whole one, optimizers included. The paper's 0.68 s for 'search 1it' is another machine's,
an RTX 2080 Ti, at a batch size that it does not state."""
HELD = """\
search 1it finds memory that the machine holds, not its host (measure.claim_memory); a first iteration whatever there
is."""

ROW = {
    "piece": "piece",
    "arm": "arm",
    "threads": "threads",
    "memory": "memory",
    "ms": lambda r: f"{r['ms']:.2f}",
    "n": "n",
    "rate": lambda r: f"{r['rate']:.1f} {r['unit']}",
    "of copy_": lambda r: _share(r, "of copy_"),
    "of torch.mm": lambda r: _share(r, "of torch.mm"),
    "of FMA peak": lambda r: _share(r, "of FMA peak"),
    "over bound": lambda r: f"{r['over bound']:.2f} of {r['bound GFLOP']:.1f} GFLOP" if "over bound" in r else "",
    "peak MB": lambda r: _whole(r.get("peak MB")),
    "opponent": "opponent",
    "its ms": lambda r: f"{_its(r)['ms']:.2f}",
    "its n": lambda r: str(_its(r)["n"]),
    "its peak MB": lambda r: _whole(_its(r).get("peak MB")),
    "ratio": lambda r: f"{r['ratio']:.2f}",
    "of best": lambda r: f"{r['of best']:.2f}",
}
"""Column -> a field of the row, or what to show of it."""


def joined(document: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A session's document with what an earlier session measured beside it, if that was the same machine and code."""
    if any(before[name] != document[name] for name in ("machine", "form")):
        return document
    sections = {n: before[n] | section for n, section in document.items() if isinstance(section, dict)}
    warnings = [*before["warnings"], *(w for w in document["warnings"] if w not in before["warnings"])]
    return document | sections | {"warnings": warnings}


def _share(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.0%}" if name in row else ""


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _its(row: dict[str, Any]) -> dict[str, Any]:
    return row["peers"][row["opponent"]]


def aligned(cells: list[list[str]]) -> list[str]:
    """A Markdown table; the first line of `cells` is its head."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [cells[0], ["-" * w for w in widths], *cells[1:]]
    return [f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines]


def comparison(rows: dict[str, dict[str, Any]]) -> list[str]:
    def shown(row: dict[str, Any]) -> list[str]:
        return [str(row[f]) if isinstance(f, str) else f(row) for f in ROW.values()]

    return aligned([list(ROW), *map(shown, rows.values())])


def stage_table(name: str, found: dict[str, Any]) -> list[str]:
    """Where a step's time goes: its launches, and the rest of it."""
    peak, stages = found["FMA peak"], found["stages"]
    total = {"stage": "all launches", "ms": found["inside ms"]}
    total |= {unit: sum(s[unit] for s in stages) for unit in ("GFLOP", "MB")}
    cells = [["stage", "ms", "GFLOP", "GFLOP/s", "of FMA peak", "MB at least", "GB/s"]]
    for s in (*stages, total):
        rate = 1e3 * s["GFLOP"] / s["ms"]
        cells.append([s["stage"], f"{s['ms']:.2f}", f"{s['GFLOP']:.2f}", f"{rate:.0f}", f"{rate / peak:.0%}"])
        cells[-1] += [f"{s['MB']:.0f}", f"{s['MB'] / s['ms']:.1f}"]
    rest = [[what, f"{found[key]:.2f}", *[""] * 5] for what, key in (("outside them", "outside ms"), ("step", "ms"))]
    launches, least = found["launches"], found["least barriers"]
    counted = "; ".join(
        f"{p} {n} launches, {n - 1} barriers of batch norms (at least {least[p] + 1}, {least[p]})"
        for p, n in launches.items()
    )
    return [f"{name}, {found['arm']}, median of {found['n']}: {counted}", "", *aligned(cells + rest)]


def whole(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    if e := found.get("search 1ep"):
        lines.append(
            f"search 1ep on 50,000 uint8 images ({e['images']}), {e['threads']} threads: {e['s']:.2f} s, of which "
            f"data {e['data seconds']:.2f} s: {e['ratio']:.3f} times {e['iterations']} warm iterations of the same "
            f"process, {e['iteration ms']:.1f} ms each (n {e['iterations n']}); at most 1.05 asked for (the last "
            "weight step is left out, the last batch is 168 images)"
        )
    if s := found.get("shell 1it"):
        lines.append(
            f"`ftso search --data DIR --mode 1it` on CIFAR-10's binary files ({s['images']}), {s['threads']} threads, "
            f"in the shell: {s['s']:.2f} s (n {s['n']}), of which the search {s['search s']:.2f} s; `python -c 'import "
            f"torch'` alone {s['import torch s']:.2f} s, {s['import torch s'] / s['s']:.0%}"
        )
    return lines


def memory(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The memory of a whole iteration, beside what is asked of it."""
    lines = []
    for row in rows.values():
        if (row["piece"], row["memory"]) == ("PC-DARTS first iteration", "default"):
            peers = ", ".join(f"{arm} {p['peak MB']:.0f} MB" for arm, p in row["peers"].items())
            lines.append(
                f"peak memory of PC-DARTS' iteration at batch 64, {row['threads']} threads: {row['arm']} "
                f"{row['peak MB']:.0f} MB (at most a third of the peers' asked for); {peers}"
            )
        if (row["piece"], row["memory"]) == ("first iteration", "default"):
            peers = ", ".join(f"{arm} {p['peak MB']:.0f} MB" for arm, p in row["peers"].items())
            lines.append(
                f"peak memory of a whole iteration over import and data, {row['threads']} threads: {row['arm']} "
                f"{row['peak MB']:.0f} MB (at most 450 asked for, 330 aimed at); {peers}"
            )
    return lines


def compiled(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What torch.compile's first iteration took: the first process compiles, later ones find its cache."""
    first = [p["first s"] for row in rows.values() for p in row["peers"].values() if "first s" in p]
    return [f"torch.compile: its first iteration took {max(first):.0f} s, compilation included"] if first else []


def text(document: dict[str, Any]) -> str:
    machine, rows = document["machine"], document["rows"]
    about = {"date": document["date"], **machine, "form": document["form"], "load at start": document["load"]}
    lines = [", ".join(f"{name} {value}" for name, value in about.items())]
    for threads, found in document["rates"].items():
        rates = ", ".join(f"{name} {v:.0f} {'GB/s' if name == 'copy_' else 'GFLOP/s'}" for name, v in found.items())
        lines.append(f"rates, {threads}: {rates}")
    lines += [*memory(rows), *compiled(rows), *whole(document["whole"])]
    lines += [f"WARNING: {warning}" for warning in document["warnings"]]
    parts = ["\n\n".join(lines)] + (["\n".join(comparison(rows))] if rows else [])
    parts += ["\n".join(stage_table(name, found)) for name, found in document["stages"].items()]
    held = [HELD] if any(row.get("memory held") for row in rows.values()) else []
    return "\n\n".join([*parts, NOTES, *held])
