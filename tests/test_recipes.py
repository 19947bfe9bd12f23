"""The recipes: the numbers of the paper's Table 4 and of DARTS' and PC-DARTS' training, their schedules, wrong ones."""

import math

import pytest
import torch

from ftso_fast import UsageError
from ftso_fast.recipes import RECIPES, Recipe, recipe_named


def test_table_4():
    cifar, longer, imagenet = (RECIPES[name] for name in ("cifar600", "cifar1200", "imagenet250"))
    assert (cifar.cells, cifar.channels, cifar.lr, cifar.schedule, cifar.epochs) == (20, 36, 0.025, "cosine", 600)
    assert (imagenet.cells, imagenet.channels, imagenet.lr, imagenet.schedule) == (14, 48, 0.5, "linear")
    assert (imagenet.epochs, imagenet.batch_size, imagenet.warmup_epochs, imagenet.label_smoothing) == (
        250,
        1024,
        5,
        0.1,
    )
    assert (cifar.batch_size, cifar.cutout, cifar.auxiliary_weight, cifar.grad_clip) == (96, 16, 0.4, 5.0)
    assert longer == cifar.changed(name="cifar1200", epochs=1200)
    assert not any(recipe.deviations() for recipe in RECIPES.values())


def test_cosine_is_torchs():
    recipe = Recipe(epochs=7)
    w = torch.nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([w], lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 7)
    for epoch in range(7):
        assert math.isclose(recipe.rate(epoch), schedule.get_last_lr()[0], rel_tol=1e-12)
        sgd.step()
        schedule.step()


def test_linear_is_pc_darts():
    """Its adjust_lr, and its warm-up."""
    recipe = RECIPES["imagenet250"]
    for epoch in range(250):
        rate = 0.5 * (245 - epoch) / 245 if 250 - epoch > 5 else 0.5 * (250 - epoch) / (245 * 5)
        rate *= (epoch + 1) / 5 if epoch < 5 else 1
        assert math.isclose(recipe.rate(epoch), rate, rel_tol=1e-12)
    short = recipe.changed(epochs=3, warmup_epochs=0)
    assert [short.rate(e) for e in range(3)] == pytest.approx([0.5, 1 / 3, 1 / 6])


def test_paths_are_dropped_more_and_more_often():
    recipe = Recipe(epochs=10, drop_path=0.2)
    assert [recipe.dropped(e) for e in (0, 5, 9)] == pytest.approx([0, 0.1, 0.18])


def test_what_differs_is_said():
    changed = RECIPES["smoke"].changed(epochs=3, cutout=8)
    assert changed.deviations() == ["epochs 3 in place of 12", "cutout 8 in place of 0"]
    assert recipe_named(changed) is changed
    assert recipe_named("smoke") is RECIPES["smoke"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "recipe.epochs: expected a whole number of at least 1, got 0"),
        ({"batch_size": 1}, "recipe.batch_size: expected a whole number of at least 2, got 1"),
        ({"batch_size": True}, "recipe.batch_size: .* got True"),
        ({"lr": -1.0}, "recipe.lr: expected a finite number of at least 0, got -1.0"),
        ({"lr": math.nan}, "recipe.lr: .* got nan"),
        ({"drop_path": 1.0}, "recipe.drop_path: expected less than 1, got 1.0"),
        ({"schedule": "step"}, "recipe.schedule: expected cosine or linear, got 'step'"),
        ({"stem": "mnist"}, "recipe.stem: expected cifar or imagenet, got 'mnist'"),
        ({"epoch": 3}, "recipe: expected fields among .*, got epoch"),
    ],
)
def test_wrong_recipes(change, message):
    with pytest.raises(UsageError, match=message):
        RECIPES["smoke"].changed(**change)


@pytest.mark.parametrize("name", ["cifar", 3, Recipe(name="mine")])
def test_unknown_recipes(name):
    with pytest.raises(UsageError, match="expected one of cifar600, cifar1200, imagenet250, smoke, got"):
        recipe_named(name)
