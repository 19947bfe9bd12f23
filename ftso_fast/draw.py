"""Drawings of genotypes as self-contained SVG: no graphviz, no fonts or scripts from elsewhere.

The layout is Sugiyama's: a node's column is its depth, operator names have columns of their own between them,
and an edge that crosses a column holds a slot in it. Everything in a column is stacked without overlap and
edges bend only between columns, so no name covers another and no edge runs through a box.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

from .genotype import N_INPUTS, Genotype
from .svg import INK, MONO, MUTED, SANS, label, text

WIDTH = 880.0
_MARGIN, _PAD, _MIN_GAP, _MAX_GAP = 20.0, 24.0, 20.0, 96.0
_CAPTION, _CHAR, _SWEEPS = 20.0, 6.63, 40
_SLOTS = {"pass", "label"}
_HUES = {"": "#aab", "sep": "#2463b4", "dil": "#7a3fb0", "max": "#b4540a", "avg": "#b4540a", "ski": "#3c7a3c"}


@dataclass(eq=False)
class _Item:
    """One thing in a column: a box, an operator's name, or the slot of an edge that passes."""

    kind: str
    text: str = ""
    width: float = 0.0
    height: float = 10.0
    half: float = 0.0
    x: float = 0.0
    y: float = 0.0
    before: list[_Item] = field(default_factory=list)
    after: list[_Item] = field(default_factory=list)


@dataclass(eq=False)
class _Cell:
    columns: list[list[_Item]]
    wires: list[tuple[list[_Item], str]]
    top: float = 0.0
    width: float = 0.0
    height: float = 0.0

    def items(self) -> list[_Item]:
        return [item for column in self.columns for item in column]


def draw_genotype(genotype: Genotype, title: str | None = None) -> str:
    """The normal and the reduction cell as one SVG document, the same bytes for the same genotype and title.

    Inputs are left, the output right; where all edges carry one operator, the caption alone names it. The
    genotype's source text travels in `<desc>`. Source: the cell drawings of DARTS (Liu et al., 2019).
    """
    operators = sorted({op for op, _ in genotype.normal + genotype.reduce})
    labelled = len(operators) > 1
    cells = [_arranged(_build(genotype, cell, labelled)) for cell in ("normal", "reduce")]
    widest, tallest = max(cell.width for cell in cells), max(cell.height for cell in cells)
    left, top = _MARGIN, _MARGIN + (30 if title or not labelled else 0)
    beside = not labelled and 2 * widest + 3 * _MARGIN <= WIDTH
    panel = (WIDTH - 3 * _MARGIN) / 2 if beside else max(WIDTH - 2 * _MARGIN, widest)
    heights = [tallest if beside else cell.height for cell in cells]
    corners = [(left, top), (2 * left + panel, top) if beside else (left, top + heights[0] + 16)]
    width, height = corners[1][0] + panel + _MARGIN, corners[1][1] + heights[1] + _MARGIN
    name = title or "Normal and reduction cell"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.1f}" height="{height:.1f}" '
        f'viewBox="0 0 {width:.1f} {height:.1f}" {SANS} role="img" aria-label="{text(name)}">',
        f"<title>{text(name)}</title>",
        f"<desc>{text(repr(genotype))}</desc>",
        f'<rect width="{width:.1f}" height="{height:.1f}" rx="10" fill="#f4f6f9"/>',
    ]
    if title:
        shown = title if len(title) <= 64 else f"{title[:63]}…"
        parts.append(label(left + 2, 36, f'font-size="15" font-weight="600" fill="{INK}"', text(shown)))
    if not labelled:
        op, x, anchor = operators[0], *((width - left - 2, "end") if title else (left + 2, "start"))
        name = f'every edge: <tspan {MONO} fill="{_HUES.get(op[:3], MUTED)}">{op}</tspan>'
        parts.append(label(x, 36, f'font-size="12.5" text-anchor="{anchor}" fill="{MUTED}"', name))
    for cell, caption, (x, y), tall in zip(cells, ("Normal", "Reduction"), corners, heights, strict=True):
        parts += _panel(cell, f"{caption} cell", x, y, panel, tall)
    return "\n".join([*parts, "</svg>", ""])


def _build(genotype: Genotype, cell: str, labelled: bool) -> _Cell:
    nodes = genotype.nodes(cell)
    concat = genotype.normal_concat if cell == "normal" else genotype.reduce_concat
    depth = [0] * N_INPUTS
    for pair in nodes:
        depth.append(1 + max(depth[j] for _, j in pair))
    stride = 2 if labelled else 1
    columns: list[list[_Item]] = [[] for _ in range(stride * max(depth) + 2)]
    small = '<tspan dy="4" font-size="10">'
    states = [_Item("input", f"c{small}k\u2212{back}</tspan>", 52, 32) for back in (2, 1)]
    states += [_Item("node", str(n), 34, 34) for n in range(len(nodes))]
    for state, d in zip(states, depth, strict=True):
        columns[stride * d].append(state)
    output = _Item("output", f"c{small}k</tspan>", 52, max(44.0, 12.0 * len(concat) + 8))
    columns[-1].append(output)
    wires: list[tuple[list[_Item], str]] = []

    def wire(source: int, target: _Item, last: int, op: str) -> None:
        chain = [states[source]]
        for c in range(stride * depth[source] + 1, last):
            named = bool(op) and labelled and c == last - 1
            chain.append(_Item("label", op, _CHAR * len(op) + 12, 20) if named else _Item("pass"))
            columns[c].append(chain[-1])
        chain.append(target)
        for a, b in pairwise(chain):
            a.after.append(b)
            b.before.append(a)
        wires.append((chain, op))

    for n, pair in enumerate(nodes):
        for op, j in sorted(pair, key=lambda edge: edge[1]):
            wire(j, states[n + N_INPUTS], stride * depth[n + N_INPUTS], op)
    for j in concat:
        wire(j, output, len(columns) - 1, "")
    return _Cell(columns, wires)


def _arranged(cell: _Cell) -> _Cell:
    """Order every column by the mean place of its neighbours, keep the order with the fewest crossings."""
    columns = cell.columns
    best, fewest = [list(column) for column in columns], _crossings(columns)
    for sweep in range(_SWEEPS):
        forward = sweep % 2 == 0
        for fixed, column in pairwise(columns if forward else columns[::-1]):
            place = {item: i for i, item in enumerate(fixed)}
            near = [item.before if forward else item.after for item in column]
            own = {item: fmean([place[o] for o in near[i]] or [i]) for i, item in enumerate(column)}
            column.sort(key=own.__getitem__)
        if (crossings := _crossings(columns)) < fewest:
            best, fewest = [list(column) for column in columns], crossings
    columns[:] = best
    for column in columns:
        for item in column:
            item.half = max(other.width for other in column) / 2
    for sweep in range(_SWEEPS):
        for _, column in pairwise(columns if sweep % 2 == 0 else columns[::-1]):
            _stack(column)
    cell.top = min(item.y - item.height / 2 for item in cell.items())
    bottom = max(item.y + item.height / 2 for item in cell.items())
    cell.height = bottom - cell.top + 2 * _PAD + _CAPTION
    cell.width = sum(2 * column[0].half + _MIN_GAP for column in columns) - _MIN_GAP + 2 * _PAD
    return cell


def _crossings(columns: list[list[_Item]]) -> int:
    total = 0
    for column, following in pairwise(columns):
        place, seen = {item: i for i, item in enumerate(following)}, list[int]()
        for item in column:
            ends = [place[other] for other in item.after]
            total += sum(len(seen) - bisect_right(seen, end) for end in ends)
            seen = sorted(seen + ends)
    return total


def _stack(column: list[_Item]) -> None:
    """Set y near the neighbours' mean, in order and spaced: least squares by pooling violators."""
    offset, offsets, blocks = 0.0, list[float](), list[tuple[float, int]]()
    for above, item in zip([None, *column], column, strict=False):
        if above:
            offset += (above.height + item.height) / 2 + (6 if {above.kind, item.kind} & _SLOTS else 16)
        near = item.before + item.after
        # The next slot of the same edge weighs more, so that long edges run straight.
        weights = [8.0 if {item.kind, other.kind} <= _SLOTS else 1.0 for other in near]
        mean, count = (fmean([other.y for other in near], weights) if near else item.y) - offset, 1
        while blocks and blocks[-1][0] > mean:
            previous, size = blocks.pop()
            mean, count = (previous * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
        offsets.append(offset)
    means = (mean for mean, count in blocks for _ in range(count))
    for item, mean, offset in zip(column, means, offsets, strict=True):
        item.y = mean + offset


def _panel(cell: _Cell, caption: str, left: float, top: float, width: float, height: float) -> list[str]:
    gaps = len(cell.columns) - 1
    gap = min(_MAX_GAP, _MIN_GAP + (width - cell.width) / gaps)
    x = left + _PAD + (width - cell.width - (gap - _MIN_GAP) * gaps) / 2
    for column in cell.columns:
        for item in column:
            item.x = x + item.half
            item.y += top - cell.top + _CAPTION + _PAD + (height - cell.height) / 2
        x += 2 * column[0].half + gap
    by_height = sorted(cell.wires, key=lambda wire: wire[0][-2].y)
    out = [
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" rx="8" fill="#ffffff" '
        'stroke="#dde2e8"/>',
        label(left + 16, top + 25, f'font-size="13" font-weight="600" fill="{INK}"', caption),
    ]
    for chain, op in sorted(cell.wires, key=lambda wire: wire[1] != ""):
        ports = [other is chain for other, _ in by_height if other[-1] is chain[-1]]
        step = min(14.0, (chain[-1].height - 12) / max(1, len(ports) - 1))
        port = (ports.index(True) - (len(ports) - 1) / 2) * step
        out.append(_wire(chain, port, _HUES.get(op[:3], MUTED)))
    return out + [_draw(item) for item in cell.items() if item.kind != "pass"]


def _wire(chain: list[_Item], port: float, colour: str) -> str:
    x, y = chain[0].x + chain[0].half, chain[0].y
    end = chain[-1].x - chain[-1].half - 6, chain[-1].y + port
    path = f"M{x:.1f} {y:.1f}"
    for item in chain[1:]:
        to_x, to_y = end if item is chain[-1] else (item.x - item.half, item.y)
        bend = (to_x - x) / 2
        path += f"C{x + bend:.1f} {y:.1f} {to_x - bend:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}"
        if item is not chain[-1]:
            path += f"H{item.x + item.half:.1f}"
        x, y = item.x + item.half, item.y
    return (
        f'<path class="edge" d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        f'<path d="M{end[0] + 6:.1f} {end[1]:.1f}l-8 -3.6v7.2z" fill="{colour}"/>'
    )


def _draw(item: _Item) -> str:
    ink = _HUES.get(item.text[:3], MUTED) if item.kind == "label" else INK
    box, font = {
        "input": ('rx="6" fill="#e8eef6" stroke="#8aa0b8"', 'font-size="14" font-style="italic"'),
        "output": ('rx="6" fill="#eef0f2" stroke="#98a3ae"', 'font-size="14" font-style="italic"'),
        "node": ('rx="17" fill="#fff6dc" stroke="#c9a544"', 'font-size="13" font-weight="600"'),
        "label": (f'rx="4" fill="#fff" stroke="{ink}" stroke-opacity=".45"', f'{MONO} font-size="11"'),
    }[item.kind]
    return (
        f'<rect class="{item.kind}" x="{item.x - item.width / 2:.1f}" y="{item.y - item.height / 2:.1f}" '
        f'width="{item.width:.1f}" height="{item.height:.1f}" {box}/>'
    ) + label(item.x, item.y + 4, f'text-anchor="middle" {font} fill="{ink}"', item.text)
