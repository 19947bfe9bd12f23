"""Starting a Triton kernel: the one place where it happens, so that launches can be counted, traced and left out."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ._backend import interpreted, launched

__all__ = ["aot_case", "interpreted", "launch", "moved", "power_of_two"]


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
    """Start it, uncounted, on the device where its tensors lie."""
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants, num_warps=warps)


def moved(*tensors: Tensor) -> int:
    """Their bytes; of a slice its own."""
    return sum(t.numel() * t.element_size() for t in tensors)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


def aot_case(
    name: str,
    kernel: Any,
    constants: dict[str, Any],
    floats: Sequence[str],
    divisible: Sequence[str],
    warps: int,
    tensors: Sequence[str] = (),
    dtype: str = "fp32",
) -> tuple[str, Any, dict[str, Any], dict[str, Any], tuple[str, ...], int]:
    """A kernel to compile ahead of time: its arguments `floats` point to float32, of them `tensors` to `dtype`, other
    numbers are 32 bits wide, and those of `divisible` are multiples of 16."""
    names = [p.name for p in kernel.params]
    types = {n: "constexpr" if n in constants else "*fp32" if n in floats else "i32" for n in names}
    types |= {"labels": "*i64"} if "labels" in names else {}
    types |= {n: f"*{dtype}" for n in tensors if n in types}
    name = name if dtype == "fp32" else f"{name}-{dtype}"
    return name, kernel, types, constants, tuple(n for n in divisible if n in names), warps
