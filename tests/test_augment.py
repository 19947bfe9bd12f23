"""The counter-based draws, and the augmentation against a plain loop over the images."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from ftso_fast.kernels import cropped

from ftso_fast.augment import MEAN, STD, WEIGHTS, augment, draws, halves, order

MASK = (1 << 64) - 1


def plain_draw(seed, stream, epoch, index):
    """SplitMix64 in Python's own integers."""

    def finalise(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    key = 0
    for word in (seed, stream, epoch):
        key = finalise(((key ^ (word & MASK)) + 0x9E3779B97F4A7C15) & MASK)
    return finalise((key + (index + 1) * 0x9E3779B97F4A7C15) & MASK)


def plain_augment(images, seed, stream, epoch, index):
    """One image, one channel, one pixel at a time."""
    count, height, width, channels = images.shape
    mean, std = (MEAN, STD) if channels == 3 else ([sum(MEAN) / 3], [sum(STD) / 3])
    out = np.zeros((count, channels, height, width))
    for b in range(count):
        bits = plain_draw(seed, stream + 16, epoch, int(index[b]))
        top, left, flip = ((bits >> 40) * 9) >> 24, (((bits >> 16) & 0xFFFFFF) * 9) >> 24, bits & 1
        for i in range(height):
            for j in range(width):
                y, x = i + top - 4, (width - 1 - j if flip else j) + left - 4
                inside = 0 <= y < height and 0 <= x < width
                for c in range(channels):
                    pixel = images[b, y, x, c] / 255 if inside else 0.0
                    out[b, c, i, j] = (pixel - mean[c]) / std[c]
    return out


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_the_finaliser_is_splitmix64():
    """First outputs of Vigna's splitmix64.c for seed 1234567, as Rosetta Code lists them."""
    from ftso_fast.augment import _GOLDEN, _finalise

    state = np.arange(1, 4, dtype=np.uint64) * _GOLDEN + np.uint64(1234567)
    assert _finalise(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("key", [(0, 0, 0), (1, 2, 3), (-5, 1, 0), (2**70 + 1, 0, 49)])
def test_draws_equal_plain_integers(key):
    index = np.array([0, 1, 7, 10**9])
    assert draws(*key, index).tolist() == [plain_draw(*key, int(i)) for i in index]


def test_draws_depend_on_every_part_of_the_key():
    index = np.arange(1000)
    keys = [(s, t, e) for s in range(4) for t in range(4) for e in range(4)]
    assert len({bits for key in keys for bits in draws(*key, index).tolist()}) == len(keys) * 1000


def test_an_order_is_a_permutation_and_differs_by_epoch_stream_and_seed():
    orders = [order(100, *key) for key in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0))]
    assert all(sorted(o) == list(range(100)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4
    assert np.array_equal(order(100, 0, 1, 0), orders[0])


def test_shuffles_are_fair():
    """Where image 0 lands in 4,000 shuffles of 4: each place about 1,000 times (sd 27)."""
    places = np.bincount([int(np.flatnonzero(order(4, seed, 1, 0) == 0)[0]) for seed in range(4000)])
    assert abs(places - 1000).max() < 140


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (8, 12), (4, 4)])
def test_augment_equals_a_plain_loop(channels, size):
    images, index = pixels(12, *size, channels), np.arange(100, 112)
    for epoch in range(3):
        ours = augment(images, 3, WEIGHTS, epoch, index)
        assert ours.dtype == torch.float32
        assert ours.is_contiguous()
        np.testing.assert_allclose(ours.numpy(), plain_augment(images, 3, WEIGHTS, epoch, index), rtol=0, atol=2e-6)


def test_every_crop_and_both_flips_occur_equally():
    """20,000 draws over 9 x 9 x 2 cells: 123 each (sd 11)."""
    bits = draws(0, WEIGHTS + 16, 0, np.arange(20000)).tolist()
    cells = [(((b >> 40) * 9) >> 24, (((b >> 16) & 0xFFFFFF) * 9) >> 24, b & 1) for b in bits]
    counts = [cells.count(cell) for cell in set(cells)]
    assert len(counts) == 162
    assert min(counts) > 70
    assert max(counts) < 180


def test_an_image_is_augmented_alike_in_any_batch():
    images, index = pixels(20, 32, 32, 3), np.arange(20)
    together = augment(images, 0, WEIGHTS, 1, index)
    pick = np.array([13, 2, 19])
    assert torch.equal(augment(images[pick], 0, WEIGHTS, 1, pick), together[pick])
    assert not torch.equal(augment(images, 0, WEIGHTS, 2, index), together)


def test_strided_images_are_read_rightly():
    planes = pixels(5, 3, 8, 8)
    view = planes.transpose(0, 2, 3, 1)
    a, b = (augment(x, 0, 1, 0, np.arange(5)) for x in (view, np.ascontiguousarray(view)))
    assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(1, 4, 4, 1), (5, 8, 12, 3), (33, 32, 32, 3), (40, 3, 5, 1), (2, 1, 1, 3)])
def test_the_compiled_pass_gives_the_bytes_of_numpy(shape, monkeypatch):
    images, key = pixels(*shape), (1, WEIGHTS, 2, np.arange(shape[0]))
    threads, found = torch.get_num_threads(), []
    monkeypatch.setattr("ftso_fast.kernels.crops.pooled", lambda *size: torch.full(size, torch.nan))
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(augment(images, *key))
    torch.set_num_threads(threads)
    monkeypatch.setattr("ftso_fast.augment.cropped", lambda *arguments: None)
    wanted = augment(images, *key)
    assert all(torch.equal(own, wanted) for own in found)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, "images: expected uint8 .N, H, W, C., got float32"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, "images: expected uint8 .N, H, W, C., got uint8"),
        ({"bits": np.zeros(3, np.uint64)}, "bits: expected uint64 of shape .2,., got uint64 .3,."),
        ({"bits": np.zeros(2, np.int64)}, "bits: expected uint64 of shape .2,., got int64"),
        ({"pad": -1}, "pad: expected 0 to 1048575, got -1"),
        ({"values": torch.zeros(1, 256)}, r"values: expected contiguous float32 of shape \(3, 256\)"),
        ({"values": torch.zeros(256, 3).T}, r"values: expected contiguous float32 of shape \(3, 256\)"),
    ],
)
def test_what_cannot_be_cropped_meets_a_sentence(changes, sentence):
    given = {"images": pixels(2, 4, 4, 3), "bits": np.zeros(2, np.uint64), "pad": 4, "values": torch.zeros(3, 256)}
    with pytest.raises(ValueError, match=sentence):
        cropped(**given | changes)


@pytest.mark.parametrize("counts", [[5, 5], [3, 3, 3, 3], [1, 7, 2, 9, 1], [50], [4, 0, 5]])
def test_halves_are_disjoint_complete_and_stratified(counts):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    weights, architecture = halves(labels, 7)
    assert sorted([*weights, *architecture]) == list(range(len(labels)))
    assert 0 <= len(weights) - len(architecture) <= 1
    difference = [np.sum(labels[weights] == c) - np.sum(labels[architecture] == c) for c in range(len(counts))]
    assert max(map(abs, difference)) <= 1
    odd = [d for d in difference if d]
    assert all(a == -b for a, b in pairwise(odd))


def test_halves_depend_on_the_seed():
    labels = np.repeat([0, 1], 20)
    assert not np.array_equal(halves(labels, 0)[0], halves(labels, 1)[0])
    assert np.array_equal(halves(labels, 0)[0], halves(labels, 0)[0])
