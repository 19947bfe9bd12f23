"""The stages of cells and stem as Triton kernels against the float64 references: values and every gradient."""

import pytest
import torch
from ftso_fast.kernels import (
    _cell_triton,
    _launch,
    _nodes_triton,
    _tile_triton,
    cell_step,
    cell_step_triton,
    reduce_step,
    reduce_step_triton,
    stem_step,
    stem_step_triton,
)
from ftso_fast.kernels.cell_step import Behind, Raw
from ftso_fast.kernels.cell_step_triton import Tile
from ftso_fast.kernels.reduce_step import Paths
from gpu_stages import ALLOWED, NAN, Cell, Draw, error, room_for, untouched, whole, wide

CELLS = [
    Cell(2, 16, 4, 4, 4, 32, 0),
    Cell(2, 16, 7, 5, 1, 48, 0),
    Cell(3, 32, 4, 6, 8, 32, 16),
    Cell(1, 64, 4, 4, 2, 64, 0),
    Cell(1, 128, 2, 2, 4, 128, 64),
    Cell(2, 16, 5, 3, 2, 0, 0),
]
REDUCTIONS = [
    Cell(2, 32, 4, 4, 4, 64, 0),
    Cell(1, 32, 2, 6, 8, 32, 16),
    Cell(2, 16, 2, 2, 1, 32, 0),
    Cell(3, 64, 2, 2, 2, 0, 0),
]
HALF = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    for name in ("new_empty",):
        real = getattr(torch.Tensor, name)

        def poisoned(*arguments, real=real, **options):
            made = real(*arguments, **options)
            return made.fill_(NAN) if made.is_floating_point() else made

        monkeypatch.setattr(torch.Tensor, name, poisoned)


def readers(case, draw):
    """Weights, the gradients behind what they make (None until it is made), and d_pooled."""
    mean = None if case.N else draw.normal(case.B, 4 * case.C)
    return draw.weights(case.N, 4 * case.C), draw.weights(2 * case.S, 4 * case.C), mean


def rooms_for_weights(case, device, dtype=torch.float32, parts=2):
    shapes = [(parts, n, 4 * case.C) if n else None for n in (case.N, 2 * case.S)]
    return [None if s is None else torch.full(s, NAN, device=device, dtype=dtype) for s in shapes]


def products(found, wanted):
    """Errors of what a forward stage wrote, by name."""
    names = {}
    for name, a, b in zip(("z", "strided"), found, wanted, strict=False):
        if b is not None:
            names |= {name: error(a.z, b.z), f"{name}'s sums": error(whole(a.sums), whole(b.sums))}
    return names | ({"pooled": error(found.pooled, wanted.pooled)} if wanted.pooled is not None else {})


def cell_errors(case, device, dtype=torch.float32, seed=0):
    """By name, how far both directions are from the reference; forward's from its own inputs."""
    draw = Draw(seed, device, dtype)
    x0, x1 = (draw.raw(case.B, case.C, case.H, case.W) for _ in range(2))
    edges = draw.positive(14)
    w, w_strided, mean = readers(case, draw)
    found = cell_step_triton.forward(x0, x1, edges, case.k, w, w_strided)
    exact = [wide(t) for t in (x0, x1, edges)]
    errors = products(found, cell_step.forward_reference(*exact, case.k, wide(w), wide(w_strided)))
    d = None if found.z is None else draw.behind(found.z.z)
    d_strided = None if found.strided is None else draw.behind(found.strided.z)
    shape = (case.B, case.C, case.H, case.W)
    g, right = ([room_for(*shape, device=device, dtype=t) for _ in range(2)] for t in (dtype, torch.float64))
    dw, right_dw = rooms_for_weights(case, device), rooms_for_weights(case, device, torch.float64, 1)
    got = cell_step_triton.backward(x0, x1, edges, case.k, w, w_strided, d, d_strided, mean, *g, *dw)
    want = cell_step.backward_reference(
        *exact, case.k, *map(wide, (w, w_strided, d, d_strided, mean)), *right, *right_dw
    )
    errors |= {f"g{i}": error(a, b) for i, (a, b) in enumerate(zip(g, right, strict=True))}
    errors |= {"g's sums": error(whole(got.sums), whole(want.sums)), "dots": error(whole(got.dots), whole(want.dots))}
    for name, a, b in zip(("dw", "dw_strided"), dw, right_dw, strict=True):
        errors |= {} if a is None else {name: error(whole(a), whole(b))}
    assert all(map(untouched, g))
    return errors


def check(errors, allowed=ALLOWED):
    assert not {name: e for name, e in errors.items() if not e <= allowed}


@pytest.mark.parametrize("case", CELLS, ids=str)
def test_a_cell(case, device, verified):
    check(cell_errors(case, device))
    verified("cell_step", "triton")


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_added_up_in_float32(dtype, device, verified):
    """Only what is written is rounded, by a unit in the last place: the interpreter cuts off where a GPU rounds."""
    check(cell_errors(CELLS[2], device, dtype), HALF[dtype])
    verified("cell_step", "triton", dtype)
    check(paths_errors(REDUCTIONS[1], device, dtype), HALF[dtype])
    check(nodes_errors(REDUCTIONS[1], device, dtype), HALF[dtype])
    verified("reduce_step", "triton", dtype)
    check(stem_errors(3, device, dtype), HALF[dtype])
    verified("stem_step", "triton", dtype)


def test_many_small_tiles(device, monkeypatch):
    """More tiles than one of each kind, and tiles that end behind the last pixel."""
    monkeypatch.setattr(cell_step_triton, "tile", lambda *of: Tile(16, 16, 16, 4))
    check(cell_errors(Cell(2, 16, 5, 5, 4, 16, 0), device))
    check(cell_errors(Cell(3, 16, 2, 6, 4, 16, 16), device))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
def test_only_the_gradients_that_are_wanted(wanted, device):
    """An architecture step: no weight gradients, and no gradient that nobody reads; the others are as before."""
    case = Cell(1, 16, 2, 3, 4, 16, 0)
    draw = Draw(1, device)
    x0, x1 = (draw.raw(case.B, case.C, case.H, case.W) for _ in range(2))
    edges, w = draw.positive(14), draw.weights(case.N, 4 * case.C)
    d = draw.behind(draw.normal(case.B, case.N, case.H, case.W))
    shape = (case.B, case.C, case.H, case.W)
    everything = [room_for(*shape, device=device) for _ in range(2)]
    whole_run = cell_step_triton.backward(x0, x1, edges, case.k, w, None, d, None, None, *everything)
    g = [room_for(*shape, device=device) if want else None for want in wanted]
    found = cell_step_triton.backward(x0, x1, edges, case.k, w, None, d, None, None, *g)
    assert torch.equal(found.dots, whole_run.dots)
    for i, (a, b) in enumerate(zip(g, everything, strict=True)):
        channels = slice(i * case.C, (i + 1) * case.C)
        assert a is None or torch.equal(a, b)
        assert a is None or torch.equal(found.sums[..., channels], whole_run.sums[..., channels])


def paths_errors(case, device, dtype=torch.float32):
    """The first stage of a reduction cell whose nodes are of the case's size."""
    draw, q = Draw(2, device, dtype), case.C // case.k
    x0, x1 = (draw.raw(case.B, case.C, 2 * case.H, 2 * case.W) for _ in range(2))
    w = draw.normal(4, 2, 2, q // 2, q)
    f, pooled = reduce_step_triton.paths(x0, x1, w, q)
    want_f, want_pooled = reduce_step.paths_reference(wide(x0), wide(x1), wide(w), q)
    errors = {"f": error(f.z, want_f.z), "f's sums": error(whole(f.sums), whole(want_f.sums))}
    errors["pooled"] = error(pooled, want_pooled)
    d, d_pooled = draw.behind(f.z), draw.normal(*pooled.shape, dtype=dtype)
    g, right = ([room_for(*x0.z.shape, device=device, dtype=t) for _ in (0, 1)] for t in (dtype, torch.float64))
    dw = torch.full((2, *w.shape), NAN, device=device)
    sums = reduce_step_triton.paths_backward(x0, x1, w, q, d, torch.stack(d[2:]), d_pooled, *g, dw)
    exact = (wide(x0), wide(x1), wide(w), q, wide(d), wide(d_pooled))
    right_dw = torch.empty(1, *w.shape, device=device, dtype=torch.float64)
    want = reduce_step.paths_backward_reference(*exact, *right, right_dw)
    errors |= {f"g{i}": error(a, b) for i, (a, b) in enumerate(zip(g, right, strict=True))}
    errors |= {"g's sums": error(whole(sums), whole(want)), "dw": error(whole(dw), whole(right_dw))}
    assert all(map(untouched, g))
    return errors


def nodes_errors(case, device, dtype=torch.float32):
    draw, q = Draw(3, device, dtype), case.C // case.k
    f = Raw(draw.normal(case.B, 8 * q, case.H, case.W, dtype=dtype), draw.positive(8 * q), draw.normal(8 * q))
    paths = Paths(f, draw.normal(case.B, 2 * (case.C - q), case.H, case.W, dtype=dtype))
    edges = draw.positive(14)
    w, w_strided, mean = readers(case, draw)
    found = cell_step_triton.nodes_forward(paths, edges, case.k, w, w_strided)
    exact = (wide(paths), wide(edges), case.k, wide(w), wide(w_strided))
    errors = products(found, reduce_step.nodes_reference(*exact))
    d = None if found.z is None else draw.behind(found.z.z)
    d_strided = None if found.strided is None else draw.behind(found.strided.z)
    g, right = (
        [torch.full(t.shape, NAN, device=device, dtype=kind) for t in (f.z, paths.pooled)]
        for kind in (dtype, torch.float64)
    )
    dw, right_dw = rooms_for_weights(case, device), rooms_for_weights(case, device, torch.float64, 1)
    got = cell_step_triton.nodes_backward(paths, edges, case.k, w, w_strided, d, d_strided, mean, *g, *dw)
    want = reduce_step.nodes_backward_reference(*exact, *map(wide, (d, d_strided, mean)), *right, *right_dw)
    errors |= {name: error(a, b) for name, a, b in zip(("g_f", "g_pooled"), g, right, strict=True)}
    errors |= {"sums": error(whole(got.sums), whole(want.sums)), "dots": error(whole(got.dots), whole(want.dots))}
    for name, a, b in zip(("dw", "dw_strided"), dw, right_dw, strict=True):
        errors |= {} if a is None else {name: error(whole(a), whole(b))}
    return errors


@pytest.mark.parametrize("case", REDUCTIONS, ids=str)
def test_a_reduction_cell(case, device, verified):
    check(paths_errors(case, device))
    check(nodes_errors(case, device))
    verified("reduce_step", "triton")


def test_the_first_of_equal_maxima_takes_the_gradient(device):
    x = Raw(torch.ones(1, 32, 4, 4, device=device), *torch.ones(2, 32, device=device))
    g = room_for(1, 32, 4, 4, device=device)
    w, d_pooled = torch.zeros(4, 2, 2, 4, 8, device=device), torch.ones(1, 48, 2, 2, device=device)
    f = torch.zeros(1, 64, 2, 2, device=device)
    d = Behind(f, f, *torch.zeros(3, 64, device=device))
    reduce_step_triton.paths_backward(x, x, w, 8, d, torch.stack(d[2:]), d_pooled, g, None, None)
    first = torch.zeros(4, 4, device=device)
    first[::2, ::2] = 1
    assert torch.equal(g[0, 8:], first.expand(24, 4, 4))
    assert not g[0, :8].any()


def stem_errors(channels, device, dtype=torch.float32):
    draw = Draw(4, device, dtype)
    B, S, N, H, W = 2, 48, 48, 4, 7
    images, w = draw.normal(B, channels, H, W, dtype=dtype), draw.normal(S, channels, 3, 3)
    found, wanted = stem_step_triton.convolution(images, w), stem_step.convolution_reference(wide(images), wide(w))
    errors = {"z": error(found.z, wanted.z), "sums": error(whole(found.sums), whole(wanted.sums))}
    stem = stem_step.Stem(found.z, *draw.normal(4, S))
    w = draw.weights(N, S)
    found, wanted = stem_step_triton.products(stem, w), stem_step.products_reference(wide(stem), wide(w))
    errors |= {"products": error(found.z, wanted.z), "their sums": error(whole(found.sums), whole(wanted.sums))}
    d = draw.behind(found.z)
    g, right = (torch.full(stem.z.shape, NAN, device=device, dtype=t) for t in (dtype, torch.float64))
    dw, right_dw = torch.full((2, N, S), NAN, device=device), torch.empty(1, N, S, device=device, dtype=torch.float64)
    sums = stem_step_triton.products_backward(stem, w, d, torch.stack(d[2:]), g, dw)
    want = stem_step.products_backward_reference(wide(stem), wide(w), wide(d), right, right_dw)
    errors |= {"g": error(g, right), "g's sums": error(whole(sums), whole(want))}
    errors["dw"] = error(whole(dw), whole(right_dw))
    d = draw.behind(stem.z)
    shape = (S, channels, 3, 3)
    dw, right_dw = torch.full((2, *shape), NAN, device=device), torch.empty(1, *shape, device=device).double()
    stem_step_triton.convolution_backward(images, d, torch.stack(d[2:]), dw)
    stem_step.convolution_backward_reference(wide(images), wide(d), right_dw)
    errors["dw of the convolution"] = error(whole(dw), whole(right_dw))
    return errors


@pytest.mark.parametrize("channels", [1, 3])
def test_the_stem(channels, device, verified):
    check(stem_errors(channels, device))
    verified("stem_step", "triton")


# -- what the comparison sees


def seeded(module, name, wrong):
    return pytest.param(module, name, wrong, id=f"{name}")


BUGS = [
    seeded(_cell_triton, "unshuffled", _tile_triton.shuffled),
    seeded(_nodes_triton, "shuffled", _tile_triton.unshuffled),
    seeded(_nodes_triton, "relu", lambda x: x),
    seeded(_cell_triton, "to", lambda c, C, K: c),
    seeded(_tile_triton, "to", lambda c, C, K: c),
    seeded(_cell_triton, "put_sums", lambda *arguments: None),
]


@pytest.mark.parametrize(("module", "name", "wrong"), BUGS)
def test_a_seeded_bug_is_seen(module, name, wrong, monkeypatch, device):
    if not _launch.interpreted():
        pytest.skip("a compiled kernel does not look its parts up again")
    case = Cell(1, 16, 2, 3, 2, 16, 0)
    check(cell_errors(case, device))
    monkeypatch.setattr(module, name, wrong)
    assert max(cell_errors(case, device).values()) > 100 * ALLOWED
