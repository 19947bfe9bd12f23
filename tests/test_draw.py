"""Drawings: valid XML that shows every node and operator, where nothing covers anything else."""

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftso_fast.draw import draw_genotype
from ftso_fast.genotype import REPLACEMENTS, Genotype

SVG = "{http://www.w3.org/2000/svg}"
WIDE, DEEP = [(0, 1)] * 4, [(0, 1), (1, 2), (2, 3), (3, 4)]


def genotype_of(normal, reduce, ops=REPLACEMENTS):
    def cell(topology):
        return [(ops[(2 * n + i) % len(ops)], j) for n, pair in enumerate(topology) for i, j in enumerate(pair)]

    return Genotype(cell(normal), range(2, len(normal) + 2), cell(reduce), range(2, len(reduce) + 2))


@st.composite
def genotypes(draw):
    def cell():
        n_nodes = draw(st.integers(1, 6))
        edges = [(draw(st.sampled_from(ops)), draw(st.integers(0, n + 1))) for n in range(n_nodes) for _ in (0, 1)]
        return edges, draw(st.lists(st.integers(2, n_nodes + 1), min_size=1, unique=True))

    ops = draw(st.sampled_from([("sep_conv_3x3",), REPLACEMENTS, ("none", "conv_7x1_1x7")]))
    return Genotype(*cell(), *cell())


def boxes(root, *kinds):
    return [
        (kind, *(float(rect.get(side)) for side in ("x", "y", "width", "height")))
        for rect in root.iter(SVG + "rect")
        if (kind := rect.get("class")) in kinds
    ]


def points(path):
    """Points along a path of M, C and H commands, the end of its arrow left out."""
    x = y = 0.0
    for command, numbers in re.findall(r"([MCH])([^MCH]*)", path):
        values = [float(number) for number in numbers.split()]
        if command == "C":
            (a, b, c, d, e, f), (x0, y0) = values, (x, y)
            for i in range(33):
                t = i / 32
                u = 1 - t
                yield (u**3 * x0 + 3 * u * u * t * a + 3 * u * t * t * c + t**3 * e,
                       u**3 * y0 + 3 * u * u * t * b + 3 * u * t * t * d + t**3 * f)  # fmt: skip
            x, y = e, f
        else:
            x, y = values if command == "M" else (values[0], y)
            yield x, y


def check_layout(root):
    width, height = float(root.get("width")), float(root.get("height"))
    everything = boxes(root, "input", "output", "node", "label")
    for i, (_, x, y, w, h) in enumerate(everything):
        assert min(x, y, width - x - w, height - y - h) >= 0
        for _, x2, y2, w2, h2 in everything[:i]:
            assert x + w < x2 or x2 + w2 < x or y + h < y2 or y2 + h2 < y
    for edge in root.iter(SVG + "path"):
        if edge.get("class") != "edge":
            continue
        for px, py in points(edge.get("d")):
            for _, x, y, w, h in boxes(root, "input", "output", "node"):
                assert not (x + 0.2 < px < x + w - 0.2 and y < py < y + h)


@settings(deadline=None)
@given(genotypes())
def test_nothing_covers_anything_else(genotype):
    root = ET.fromstring(draw_genotype(genotype, "a title"))
    check_layout(root)
    uniform = len({op for op, _ in genotype.normal + genotype.reduce}) == 1
    n_nodes = (len(genotype.normal) + len(genotype.reduce)) // 2
    n_edges = 2 * n_nodes
    assert len(boxes(root, "node")) == n_nodes
    assert len(boxes(root, "label")) == (0 if uniform else n_edges)
    edges = [path for path in root.iter(SVG + "path") if path.get("class") == "edge"]
    assert len(edges) == n_edges + len(genotype.normal_concat) + len(genotype.reduce_concat)
    assert len({path.get("d") for path in edges}) == len(edges)


def test_the_overlap_check_can_fail():
    svg = draw_genotype(genotype_of(WIDE, DEEP))
    first = re.search(r'class="label" x="[\d.]+" y="[\d.]+"', svg).group()
    second = re.findall(r'class="label" x="[\d.]+" y="[\d.]+"', svg)[1]
    with pytest.raises(AssertionError):
        check_layout(ET.fromstring(svg.replace(first, second)))
    node = re.search(r'class="node" x="([\d.]+)" y="([\d.]+)"', svg)
    x, y = float(node[1]) + 9, float(node[2]) + 9
    through = f'<path class="edge" d="M0 {y}C0 0 900 0 {x} {y}"/>'
    with pytest.raises(AssertionError):
        check_layout(ET.fromstring(svg.replace("</svg>", through + "</svg>")))


def test_every_node_and_operator_is_named():
    genotype = genotype_of(WIDE, DEEP)
    root = ET.fromstring(draw_genotype(genotype, "Found"))
    texts = ["".join(text.itertext()) for text in root.iter(SVG + "text")]
    for name in ("ck\u22122", "ck\u22121", "ck", *"0123"):
        assert texts.count(name) == 2
    for op in REPLACEMENTS:
        assert texts.count(op) == sum(op == other for other, _ in genotype.normal + genotype.reduce)
    assert {"Found", "Normal cell", "Reduction cell"} <= set(texts)


def test_an_operator_on_all_edges_is_named_once():
    root = ET.fromstring(draw_genotype(Genotype.from_topology(WIDE, DEEP, "sep_conv_3x3")))
    texts = ["".join(text.itertext()) for text in root.iter(SVG + "text")]
    assert [text for text in texts if "sep_conv_3x3" in text] == ["every edge: sep_conv_3x3"]


@pytest.mark.parametrize("topology", [WIDE, DEEP])
@pytest.mark.parametrize("ops", [("skip_connect",), REPLACEMENTS])
def test_four_nodes_fit_the_width_of_a_readme(topology, ops):
    root = ET.fromstring(draw_genotype(genotype_of(topology, topology, ops), "title"))
    assert float(root.get("width")) <= 880


def test_source_text_travels_in_the_picture():
    genotype = genotype_of(DEEP, WIDE)
    assert Genotype.read(ET.fromstring(draw_genotype(genotype)).find(SVG + "desc").text) == genotype


@pytest.mark.parametrize(
    "title", ["<b>&\"'</b>", "]]>", "a\x00b\x1b", "\ud800", "\uffff", "é 漢 🙂", "x" * 500, "two\nlines"]
)
def test_titles_are_escaped(title):
    svg = draw_genotype(Genotype.from_topology(WIDE, WIDE, "none"), title)
    root = ET.fromstring(svg.encode())
    expected = re.sub("[\x00\x1b\ud800\uffff]", "\ufffd", title)
    assert root.find(SVG + "title").text == expected
    assert root.get("aria-label") == expected.replace("\n", " ")
    assert len(next(root.iter(SVG + "text")).text) <= 64


def test_nothing_comes_from_elsewhere():
    svg = draw_genotype(genotype_of(DEEP, WIDE), "title")
    assert re.findall(r"https?:[^\"]*", svg) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"<(script|style|image|use|foreignObject)|href|url\(", svg)


def test_same_bytes_and_same_file(tmp_path):
    genotype = genotype_of(WIDE, DEEP)
    again = Genotype.from_text(repr(genotype))
    assert draw_genotype(genotype) == draw_genotype(again) == genotype._repr_svg_()
    genotype.draw(tmp_path / "cell.svg", "title")
    assert (tmp_path / "cell.svg").read_bytes() == draw_genotype(genotype, "title").encode()


def test_sixty_four_nodes():
    chain = [(n, n + 1) for n in range(64)]
    root = ET.fromstring(draw_genotype(genotype_of(chain, [(0, 1)] * 64)))
    assert len(boxes(root, "node")) == 128
