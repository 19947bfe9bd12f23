"""How often every edge was kept over many searches, as one self-contained SVG: a square for each edge of each node.

A square's blue is the part of the searches that kept the edge; the bar beside a node is how often two searches agree
on its pair, the tick on it what chance would give.
"""

from collections.abc import Sequence

from .genotype import N_INPUTS
from .space import CELLS
from .stability import Agreement, Stability
from .svg import INK, MONO, MUTED, SANS, label, text

_MARGIN, _SIDE, _GAP, _BAR, _LEFT, _HEAD = 20.0, 44.0, 4.0, 96.0, 62.0, 74.0
_WEAK, _STRONG = (238, 242, 247), (36, 99, 180)


def draw_stability(found: Sequence[Stability], title: str = "Which edges many searches keep") -> str:
    """A row of two panels for each of `found`; the same bytes for the same numbers."""
    nodes = max(len(rows) for s in found for rows in s.edges.values())
    grid = (nodes + N_INPUTS - 1) * (_SIDE + _GAP)
    panel_w, panel_h = _LEFT + grid + _BAR + 34, _HEAD + nodes * (_SIDE + _GAP) + 12
    width, height = 2 * panel_w + 3 * _MARGIN, 60 + len(found) * (panel_h + 16) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.1f}" height="{height:.1f}" '
        f'viewBox="0 0 {width:.1f} {height:.1f}" {SANS} role="img" aria-label="{text(title)}">',
        f"<title>{text(title)}</title>",
        f'<rect width="{width:.1f}" height="{height:.1f}" rx="10" fill="#f4f6f9"/>',
        label(_MARGIN + 2, 36, f'font-size="15" font-weight="600" fill="{INK}"', text(title)),
        label(
            width - _MARGIN - 2,
            36,
            f'text-anchor="end" font-size="12" fill="{MUTED}"',
            "blue: part of the searches that kept the edge; bar: two searches agree on the pair, tick: by chance",
        ),
    ]
    for i, s in enumerate(found):
        for cell, caption, x in zip(CELLS, ("Normal", "Reduction"), (_MARGIN, panel_w + 2 * _MARGIN), strict=True):
            parts += _panel(s, cell, caption, x, 56 + i * (panel_h + 16), panel_w, panel_h)
    return "\n".join([*parts, "</svg>", ""])


def _panel(s: Stability, cell: str, caption: str, x: float, y: float, width: float, height: float) -> list[str]:
    agreement = s.agreement
    start = ", equal start" if s.beta_init == "zeros" else ""
    said = f"{s.mode}{start}, {len(s.trials)} seeds: {100 * agreement[cell].observed:.1f} % agree"
    out = [
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="8" fill="#ffffff" '
        'stroke="#dde2e8"/>',
        label(x + 16, y + 25, f'font-size="13" font-weight="600" fill="{INK}"', f"{caption} cell"),
        label(x + width - 16, y + 25, f'text-anchor="end" font-size="12" fill="{MUTED}"', text(said)),
    ]
    rows = s.edges[cell]
    for state in range(len(rows) + N_INPUTS - 1):
        name = f"input {state}" if state < N_INPUTS else f"node {state}"
        at = x + _LEFT + state * (_SIDE + _GAP) + _SIDE / 2
        out.append(label(at, y + _HEAD - 12, f'text-anchor="middle" font-size="11" fill="{MUTED}"', name))
    for n, row in enumerate(rows):
        top = y + _HEAD + n * (_SIDE + _GAP)
        middle = top + _SIDE / 2 + 4
        out.append(label(x + 16, middle, f'font-size="11" fill="{MUTED}"', f"node {n + N_INPUTS}"))
        for state, part in enumerate(row):
            out.append(_square(x + _LEFT + state * (_SIDE + _GAP), top, part))
        if n:
            left = x + _LEFT + (len(rows) + N_INPUTS - 1) * (_SIDE + _GAP) + 14
            out += _bar(left, top + _SIDE / 2, agreement[f"{cell} {n + N_INPUTS}"])
    return out


def _square(x: float, y: float, part: float) -> str:
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(_WEAK, _STRONG, strict=True))
    ink = "#ffffff" if part > 0.55 else INK
    number = f'text-anchor="middle" {MONO} font-size="11" fill="{ink}"'
    return (
        f'<rect class="edge" x="{x:.1f}" y="{y:.1f}" width="{_SIDE:.1f}" height="{_SIDE:.1f}" rx="5" '
        f'fill="rgb({red},{green},{blue})"/>'
    ) + label(x + _SIDE / 2, y + _SIDE / 2 + 4, number, f"{100 * part:.0f}")


def _bar(x: float, y: float, a: Agreement) -> list[str]:
    tick = x + _BAR * a.chance
    return [
        f'<rect x="{x:.1f}" y="{y - 5:.1f}" width="{_BAR:.1f}" height="10" rx="5" fill="#eef2f7"/>',
        f'<rect class="agreement" x="{x:.1f}" y="{y - 5:.1f}" width="{max(2.0, _BAR * a.observed):.1f}" height="10" '
        'rx="5" fill="#c9a544"/>',
        f'<path d="M{tick:.1f} {y - 9:.1f}v18" stroke="{INK}" stroke-width="1.5"/>',
    ]
