"""The search for blocks, with a clock of its own: what it picks must have agreed with the reference."""

from ftso_fast.kernels import testing, tune


def test_the_fastest_that_agrees_is_picked(device):
    case = testing.Case("skip_cell", 2, 4, 3, 5, 2)
    blocks = [{"SIZE": n, "num_warps": 4} for n in (128, 64, 100)]  # 100 is no power of two: it cannot run
    seconds = iter((3.0, 2.0, 1.0))
    found = tune.search(
        device, {"skip_cell_fwd": blocks}, lambda kernel: iter([("small-4", case)]), lambda f: next(seconds)
    )
    assert found == {"skip_cell_fwd": {"small-4": blocks[1]}}


def test_every_size_class_has_a_case():
    assert {name for name, _ in tune.cases_of("node")} == {"narrow", "wide"}
    assert {name for name, _ in tune.cases_of("skip_cell_fwd")} == {"small-4", "large-4"}
