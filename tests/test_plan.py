"""What a search is asked for: presets, warm-up, arguments that do not go together, and the command's own options."""

import dataclasses
import importlib
import json

import numpy as np
import pytest
from searching import arrays, small

from ftso_fast import DARTS, DARTS_CIFAR10, PC_DARTS_CIFAR10, PRIMITIVES, UsageError, kernels, search
from ftso_fast.cli import main
from ftso_fast.plan import settle

run_module = importlib.import_module("ftso_fast.run")

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = {"operators": None, "replace": None, "order": 1, "beta_only": False, "k": None, "seed": 0}
PLAN |= {"precision": "float32", "config": None, "method": "ftso", "space": DARTS}


def test_presets_are_the_published_ones():
    pc, darts = (settle("50ep", **{**PLAN, "method": name}) for name in ("pc-darts", "darts"))
    assert (pc.k, darts.k) == (4, 1)
    assert pc.space.operators == darts.space.operators == PRIMITIVES
    assert (pc.config, darts.config) == (PC_DARTS_CIFAR10, DARTS_CIFAR10)
    assert (pc.config.batch_size, pc.config.weight_lr, pc.config.weight_lr_min, pc.config.arch_lr) == (
        256,
        0.1,
        0,
        6e-4,
    )
    assert pc.config.warmup_epochs == 15
    assert (darts.config.batch_size, darts.config.arch_lr, darts.config.warmup_epochs) == (64, 3e-4, 0)
    assert [darts.config.lr(epoch, 50) for epoch in (0, 25, 50)] == pytest.approx([0.025, 0.013, 0.001])
    for config in (pc.config, darts.config):
        assert (config.arch_betas, config.arch_weight_decay) == ((0.5, 0.999), 1e-3)
        assert (config.momentum, config.weight_decay, config.grad_clip) == (0.9, 3e-4, 5.0)


@pytest.mark.parametrize(
    ("mode", "epochs"), [("1it", 0), ("100it", 0), ("1ep", 0), ("2ep", 1), ("15ep", 14), ("16ep", 15)]
)
def test_pc_darts_warms_up_before_its_last_epoch(mode, epochs):
    assert settle(mode, **{**PLAN, "method": "pc-darts"}).config.warmup_epochs == epochs


def test_a_shortened_warm_up_is_told():
    data = arrays(16)
    result = search(data, "1it", method="pc-darts")
    assert result.to_dict()["config"]["warmup_epochs"] == 0
    assert "Warm-up: 0 epochs without architecture steps, where pc-darts has 15." in str(result)
    config = dataclasses.replace(PC_DARTS_CIFAR10, channels=4, cells=3)
    with pytest.raises(UsageError, match="mode: 1ep ends within the 15 warm-up epochs"):
        search(data, "1ep", method="pc-darts", config=config)


def test_no_kernel_where_one_was_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(run_module.kernels, "calls", dict)
    with (
        kernels.use_backend("cpu"),
        pytest.raises(UsageError, match="'cpu' was asked for, and no kernel computes none, max_"),
    ):
        small(operators="3op")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "enas"}, "method: expected one of ftso, pc-darts, darts, got 'enas'"),
        ({"operators": "5op"}, "operators: expected one of skip, max_pool, sep3, 3op, 4op, got '5op'"),
        ({"operators": "sep3", "method": "darts"}, "operators: expected none for method 'darts', .* got 'sep3'"),
        (
            {"replace": "skip_connect", "method": "pc-darts"},
            "replace: expected none for method 'pc-darts', .* got 'skip",
        ),
        (
            {"replace": "skip_connect", "mode": "1it+1it"},
            "replace: expected none where operators are searched .* got 'skip",
        ),
        ({"replace": "none", "mode": "1it+1it"}, "replace: expected one of max_pool_3x3, .* got 'none'"),
        ({"mode": "1it+1it", "method": "darts"}, "mode: expected one length for method 'darts', .* got two"),
        ({"order": 2}, "order: expected 1 for method 'ftso'; 2 is for pc-darts and darts, got 2"),
        ({"order": 3, "method": "darts"}, "order: expected 1 or 2, got 3"),
        ({"order": True, "method": "darts"}, "order: expected 1 or 2, got True"),
        (
            {"beta_only": True, "method": "darts"},
            "beta_only: expected False for method 'darts', which has no betas, got",
        ),
        ({"beta_only": 1}, "beta_only: expected True or False, got 1"),
        ({"k": 4, "method": "darts"}, "k: expected 1 for method 'darts', which processes every channel, got 4"),
        ({"k": 3, "method": "pc-darts"}, "k: expected a divisor of the 16 channels .* got 3"),
        (
            {"precision": "bf16", "operators": "3op"},
            "precision: expected float32 for all but a skip-only .* got 'bf16'",
        ),
        ({"precision": "bf16", "mode": "1it+1it"}, "precision: expected float32 for all but a skip-only .* got 'bf16'"),
        (
            {"space": dataclasses.replace(DARTS, operators=("none",))},
            "space.operators: expected some of none, .*",
        ),
        ({"space": dataclasses.replace(DARTS, operators=("conv",))}, "space.operators: .* got .'conv',."),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        search(arrays(), options.pop("mode", "1it"), **options)


@pytest.fixture
def images(tmp_path):
    """An npz file of 16 images of 8x8."""
    path = tmp_path / "images.npz"
    g = np.random.default_rng(0)
    np.savez(path, x_train=g.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8), y_train=np.arange(16) % 4)
    return str(path)


COMMANDS = {
    "operators": (
        ["--operators", "4op", "--beta-only"],
        {"method": "ftso", "beta_only": True, "replace": "sep_conv_3x3"},
    ),
    "two lengths": (["--mode", "1it+1it"], {"mode": "1it+1it", "replace": None, "k": 4}),
    "pc-darts": (["--method", "pc-darts", "--mode", "1ep"], {"method": "pc-darts", "mode": "1ep", "order": 1}),
    "darts": (["--method", "darts", "--second-order"], {"method": "darts", "order": 2, "k": 1, "betas": {}}),
    "preset": (["--method", "darts", "--preset", "cifar10-batch64"], {"method": "darts"}),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name, images, capsys):
    options, wanted = COMMANDS[name]
    assert main(["search", "--data", images, "--json", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    fields = json.loads(out)
    assert {key: fields[key] for key in wanted} == wanted
    assert len(fields["genotype"]["normal"]) == 8
    if name == "preset":
        assert fields["config"]["weight_lr_min"] == 0
    if name == "darts":
        assert fields["config"]["weight_lr_min"] == 0.001


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "enas"], "method: expected one of ftso, pc-darts, darts, got 'enas'"),
        (["--operators", "all"], "operators: expected one of skip, max_pool, sep3, 3op, 4op, got 'all'"),
        (["--second-order"], "order: expected 1 for method 'ftso'"),
        (["--method", "darts", "--k", "2"], "k: expected 1 for method 'darts'"),
        (["--mode", "1it+1it", "--replace", "skip_connect"], "replace: expected none where operators are searched"),
    ],
)
def test_bad_command(options, words, images, capsys):
    assert main(["search", "--data", images, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"ftso: {words}")
    assert len(err.splitlines()) == 1


def test_help_names_every_method_and_set(capsys):
    assert main(["search", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "ftso, pc-darts, darts",
        "skip, max_pool, sep3, 3op, 4op",
        "--second-order",
        "--beta-only",
        "1ep+18ep",
    ):
        assert part in text
