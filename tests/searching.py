"""Small searches for the tests: images, batches, settings, and what two equal runs agree in."""

import dataclasses
import importlib
import json

import numpy as np
import torch

from ftso_fast import SearchConfig, search

# the name `ftso_fast.search` is the function
search_module = importlib.import_module("ftso_fast.search")
Run = importlib.import_module("ftso_fast.run").Run

OPTIONS = [
    "seed",
    "k",
    "backend",
    "classes",
    "progress",
    "method",
    "operators",
    "replace",
    "order",
    "beta_only",
    "beta_init",
    "early_stop",
    "shards",
    "space",
]
SMALL = SearchConfig(cells=4, channels=8, batch_size=8)
NORMAL_CELLS = 2  # of SMALL's four


def arrays(n=32, size=8, classes=4, channels=3, seed=0):
    """uint8 images whose classes differ in brightness, and their labels in turn."""
    g = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = g.integers(0, 160, (n, size, size, channels)) + 20 * y[:, None, None, None]
    return x.astype(np.uint8), y


def batches(n, seed=0, size=8, B=4):
    """Float batches; the images of batch i hold the value i in their first pixel."""
    g = torch.Generator().manual_seed(seed)
    found = [(torch.randn(B, 3, size, size, generator=g), torch.arange(B) % 2) for _ in range(n)]
    for i, (images, _) in enumerate(found):
        images[:, :, 0, 0] = i
    return found


def small(data=None, mode="1it", **changes):
    options = {name: changes.pop(name) for name in OPTIONS if name in changes}
    config = dataclasses.replace(SMALL, **changes)
    return search(arrays() if data is None else data, mode, config=config, **options)


def document(result, *without):
    """Everything in the result but what two equal runs may differ in, as bytes."""
    fields = result.to_dict()
    for name in ("seconds", "peak_bytes", *without):
        del fields[name]
    return json.dumps(fields)


def answer(result):
    return document(result, "config", "losses", "weight_steps", "kernel_calls")
