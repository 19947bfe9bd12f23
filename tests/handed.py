"""What the tests of the data hand to `prepare`: small arrays, data sets and batches whose images tell who they are."""

import numpy as np
import pytest
import torch
from torch.utils.data import (
    Dataset,
    IterableDataset,
    TensorDataset,
)

from ftso_fast.data import prepare

N = 22
X = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)
Y = np.arange(N) % 3
FLOATS = np.random.default_rng(1).standard_normal((N, 3, 8, 8)).astype(np.float32)
FLOATS[:, 0, 0, 0] = np.arange(N)


def ids(batch):
    """Which of FLOATS are in a batch."""
    return batch.images[:, 0, 0, 0].to(torch.int64).tolist()


def ready(data, classes=None, seed=0, batch_size=4):
    return prepare(data, classes=classes, seed=seed, batch_size=batch_size)


def refused(error, call, *words):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert word in message, message


def batches(count, size=4, floats=True, start=0):
    """`count` ready-made batches; their images are numbered from `start`."""
    for k in range(count):
        index = (start + k * size + np.arange(size)) % N
        images = torch.from_numpy(FLOATS[index] if floats else X[index])
        yield images, torch.from_numpy(Y[index])


def pairs_equal(one, two):
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(one, two, strict=True)
    )


class Photos(Dataset):
    """A map data set of uint8 H,W,C arrays that lists no labels."""

    def __init__(self, labels=Y, images=X):
        self.y, self.images = labels, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        assert type(i) is int
        return self.images[i], int(self.y[i])


class Listed(Photos):
    @property
    def targets(self):
        return self.y.tolist()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(torch.from_numpy(FLOATS), Y.tolist(), strict=True))


def floats():
    return TensorDataset(torch.from_numpy(FLOATS), torch.from_numpy(Y))
