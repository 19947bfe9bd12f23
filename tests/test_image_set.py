"""Images by index: parts and shares of them, batches that depend on nothing but their key, cutout, photographs."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ftso_fast import DataError, UsageError
from ftso_fast.augment import MEAN, STD, augment, cut_out, draws, order
from ftso_fast.image_set import TRAINING, image_set
from ftso_fast.photos import _turned, window

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
Y = np.repeat(np.arange(5), 10)[RNG.permutation(50)]


def test_what_can_be_given():
    first = image_set((X, Y))
    assert (len(first), first.classes, first.shape, first.source) == (50, 5, (3, 8, 8), "arrays")
    assert image_set(first) is first
    pairs = TensorDataset(torch.from_numpy(X.transpose(0, 3, 1, 2).copy()), torch.from_numpy(Y))
    for data in (pairs, DataLoader(pairs, 7)):
        assert np.array_equal(image_set(data).x, X)
    digits, test = image_set("digits"), image_set("digits", split="test")
    assert (len(digits), len(test), digits.classes) == (1437, 360, 10)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (3, UsageError, "images of type int are not accepted"),
        ((X, Y, Y), UsageError, "images of type tuple are not accepted"),
        ((X, Y[:-1]), DataError, "arrays: 50 images and 49 labels"),
        ((X[:0], Y[:0]), DataError, "arrays: 0 images and 0 labels"),
        ((X, Y * 0), DataError, "arrays: 1 class: a network tells at least 2 apart"),
        ((X, Y - 1), DataError, "arrays: label -1 is negative"),
        ((X[..., :2], Y), DataError, "arrays: images of shape"),
        ([(X[0], 1), (X[1][:4], 0)], DataError, "data set: images of different shapes"),
        ([X[0]], DataError, "data set: expected pairs"),
    ],
)
def test_what_cannot(data, error, message):
    with pytest.raises(error, match=message):
        image_set(data)


def test_labels_above_the_given_classes():
    with pytest.raises(DataError, match=r"arrays: label 4 is outside 0\.\.2"):
        image_set((X, Y), classes=3)
    assert image_set((X, Y), classes=7).classes == 7


def test_shares_are_stratified_and_nested():
    whole = image_set((X, Y))
    large, small, least = (whole.fraction(share, seed=1) for share in (0.5, 0.2, 0.001))
    assert np.bincount(large.labels).tolist() == [5] * 5
    assert np.bincount(small.labels).tolist() == [2] * 5
    assert np.bincount(least.labels).tolist() == [1] * 5
    assert set(least.index) < set(small.index) < set(large.index)
    assert not np.array_equal(whole.fraction(0.5, seed=2).index, large.index)
    rest, held = whole.split(0.3, seed=1)
    assert np.bincount(held.labels).tolist() == [3] * 5
    assert sorted([*rest.index, *held.index]) == list(range(50))
    for share in (0, 1.5, True, "x", float("nan")):
        with pytest.raises(UsageError, match="fraction: expected a number above 0 and at most 1"):
            whole.fraction(share)
    with pytest.raises(UsageError, match="validation: expected a share between 0 and 1, got 1"):
        whole.split(1)


def batches(data, **more):
    return list(data.training_batches(**{"seed": 3, "epoch": 2, "batch_size": 16} | more))


def test_batches_are_the_shuffled_augmented_images():
    data = image_set((X, Y))
    found = batches(data)
    assert [len(index) for index, _ in found] == [16, 16, 16, 2]
    shuffled = order(50, 3, TRAINING, 2)
    assert np.array_equal(np.concatenate([index for index, _ in found]), shuffled)
    for index, batch in found:
        assert torch.equal(batch.images, augment(X[index], 3, TRAINING, 2, index))
        assert np.array_equal(batch.labels, Y[index])


def test_an_image_looks_the_same_in_every_batch():
    data = image_set((X, Y))
    whole = {int(i): image for index, batch in batches(data) for i, image in zip(index, batch.images, strict=True)}
    for other in (batches(data, batch_size=7), batches(data.fraction(0.4, 0)), batches(data, workers=2)):
        for index, batch in other:
            for i, image in zip(index, batch.images, strict=True):
                assert torch.equal(image, whole[int(i)])


def test_parts_and_beginnings():
    data = image_set((X, Y))
    whole = batches(data, batch_size=20)
    for n in (2, 3):
        parts = [batches(data, batch_size=20, part=(i, n)) for i in range(n)]
        for (index, batch), *pieces in zip(whole, *parts, strict=True):
            assert np.array_equal(np.concatenate([i for i, _ in pieces]), index)
            assert torch.equal(torch.cat([b.images for _, b in pieces]), batch.images)
    late = batches(data, batch_size=20, first=2)
    assert len(late) == 1
    assert torch.equal(late[0][1].images, whole[2][1].images)
    assert data.n_batches(24) == 3  # 2 are left
    assert data.n_batches(24, 2) == len(batches(data, batch_size=24, part=(0, 2))) == 2  # one image a part is too few
    assert data.n_batches(49) == 1


def test_threads_prepare_the_same_batches_and_end():
    data = image_set((X, Y))
    for workers in (1, 2, 5):
        for (i, a), (j, b) in zip(batches(data), batches(data, workers=workers), strict=True):
            assert np.array_equal(i, j)
            assert torch.equal(a.images, b.images)
    stream = data.training_batches(seed=0, epoch=0, batch_size=2, workers=2)
    next(stream)
    stream.close()


def test_faults_come_through_the_threads():
    x = X.astype(np.float32)
    x[17] = np.nan
    data = image_set((x, Y))
    for workers in (0, 2):
        with pytest.raises(DataError, match="arrays: images hold NaN or infinity"):
            batches(data, workers=workers)
    with pytest.raises(DataError, match="NaN"):
        list(data.test_batches(8))


def test_testing_sees_every_image_once_in_order():
    data = image_set((X, Y)).part(np.arange(3, 20))
    found = list(data.test_batches(8))
    assert [len(b.labels) for b in found] == [8, 8, 1]
    want = (X[3:20].transpose(0, 3, 1, 2) / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    assert torch.cat([b.images for b in found]).numpy() == pytest.approx(want, abs=1e-5)
    assert np.array_equal(torch.cat([b.labels for b in found]), Y[3:20])


def test_cutout_is_darts():
    """Its Cutout class, pixel by pixel; every place is as likely."""
    index = np.arange(400)
    images = cut_out(torch.ones(400, 3, 8, 12), 5, 1, TRAINING, 2, index)
    bits = draws(1, TRAINING + 32, 2, index)
    seen = np.zeros((8, 12))
    for image, b in zip(images, bits.tolist(), strict=True):
        y, x = (b >> 40) * 8 >> 24, ((b >> 16) & 0xFFFFFF) * 12 >> 24
        seen[y, x] += 1
        mask = np.ones((8, 12))
        y1, y2 = np.clip((y - 5 // 2, y + 5 // 2), 0, 8)
        x1, x2 = np.clip((x - 5 // 2, x + 5 // 2), 0, 12)
        mask[y1:y2, x1:x2] = 0
        assert np.array_equal(image, np.broadcast_to(mask, (3, 8, 12)))
    assert (seen > 0).mean() > 0.9


def test_photographs():
    photos = RNG.integers(0, 256, (6, 64, 96, 3), dtype=np.uint8)
    data = image_set((photos, np.arange(6) % 2))
    found = batches(data, augmentation="imagenet")
    assert found[0][1].images.shape == (6, 3, 224, 224)
    again = batches(data, augmentation="imagenet", batch_size=2)
    assert torch.equal(torch.cat([b.images for _, b in again]), found[0][1].images)
    (tested,) = data.test_batches(6, "imagenet")
    assert tested.images.shape == (6, 3, 224, 224)
    flat = np.full((2, 64, 64, 3), 128, np.uint8)
    (grey,) = image_set((flat, [0, 1])).test_batches(2, "imagenet")
    want = (128 / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    assert grey.images.mean((2, 3)).numpy() == pytest.approx(np.broadcast_to(want, (2, 3)), abs=1e-4)


def test_windows_of_photographs():
    """8 to 100 % of the area, 3/4 to 4/3 of aspect, inside; the middle where none fits."""
    rng = np.random.default_rng(1)
    areas = []
    for _ in range(300):
        top, left, h, w = window(100, 150, iter(rng.random(40).tolist()))
        assert 0 <= top <= 100 - h
        assert 0 <= left <= 150 - w
        assert 0.72 <= w / h <= 1.38
        areas.append(h * w / 15000)
    assert 0.07 < min(areas) < 0.2
    assert 0.6 < max(areas) <= 1.01
    assert window(10, 1000, iter([0.999] * 40)) == (0, 493, 10, 13)


def test_hues_turn_as_colorsys_has_it():
    import colorsys

    colours = torch.rand(3, 50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for turn in (-0.2, 0.0, 0.13):
        found = _turned(colours, turn)
        for i in range(50):
            h, s, v = colorsys.rgb_to_hsv(*colours[:, i, 0].tolist())
            assert found[:, i, 0].tolist() == pytest.approx(colorsys.hsv_to_rgb((h + turn) % 1, s, v), abs=1e-9)
    grey = torch.full((3, 2, 2), 0.3)
    assert torch.allclose(_turned(grey, 0.1), grey)
