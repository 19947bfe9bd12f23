"""Starting a Triton kernel: the one place where it happens, so that launches can be counted, traced and left out."""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ._backend import interpreted, launched

__all__ = ["interpreted", "launch", "moved", "power_of_two"]


def launch(
    stage: str,
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    constants: dict[str, Any],
    warps: int,
    moved: int,
) -> None:
    """Start `kernel` on the current stream of the arguments' device. moved: the bytes that it reads and writes."""
    launched(stage, "triton", moved)
    run(kernel, grid, arguments, constants, warps)


def run(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any], warps: int) -> None:
    """Start it, uncounted, on the device where its tensors lie; an argument may be a tuple of them."""
    flat = chain.from_iterable(a if isinstance(a, tuple) else (a,) for a in arguments)
    device = next(a.device for a in flat if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants, num_warps=warps)


def moved(*tensors: Tensor) -> int:
    """Their bytes; of a slice its own."""
    return sum(t.numel() * t.element_size() for t in tensors)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())
