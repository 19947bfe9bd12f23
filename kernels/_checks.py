"""What no kernel may see: checks of tensors, each error one sentence with operation, argument, expected and got."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .operators import OPERATORS

CANDIDATES = tuple(OPERATORS)[:8]


def whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def check_dense(what: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{what}: expected a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{what}: expected a dense tensor, got {x.layout}")


def check_list(what: str, tensors: Any) -> None:
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{what}: expected a list of tensors, got {type(tensors).__name__}")


def check_states(op: str, inputs: Sequence[Tensor], strides: Sequence[int]) -> None:
    """States that all give the same shape at their strides."""
    check_list(f"{op}: inputs", inputs)
    if not inputs:
        raise ValueError(f"{op}: inputs: expected at least one state, got none")
    if len(strides) != len(inputs):
        raise ValueError(f"{op}: strides: expected one for each of the {len(inputs)} inputs, got {len(strides)}")
    for i, stride in enumerate(strides):
        if not whole(stride) or stride not in (1, 2):
            raise ValueError(f"{op}: strides[{i}]: expected 1 or 2, got {stride!r}")
    first, size = inputs[0], None
    for i, (x, s) in enumerate(zip(inputs, strides, strict=True)):
        what = f"{op}: " + (f"inputs[{i}]" if len(inputs) > 1 or op.startswith("partial") else "x")
        check_dense(what, x)
        if x.dim() != 4:
            raise ValueError(f"{what}: expected shape (B, C, H, W), got {tuple(x.shape)}")
        if 0 in x.shape:
            raise ValueError(f"{what}: expected no empty dimension, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{what}: expected a floating type, got {x.dtype}")
        if x.dtype != first.dtype or x.device != first.device:
            raise TypeError(f"{what}: expected {first.dtype} on {first.device}, got {x.dtype} on {x.device}")
        here = (*x.shape[:2], -(-x.shape[2] // s), -(-x.shape[3] // s))
        size = size or here
        if here != size:
            raise ValueError(f"{what}: expected a state that gives {size} at stride {s}, got {tuple(x.shape)}")


def check_tensor(what: str, t: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    check_dense(what, t)
    if tuple(t.shape) != shape:
        raise ValueError(f"{what}: expected shape {shape}, got {tuple(t.shape)}")
    if t.dtype != like.dtype or t.device != like.device:
        raise TypeError(f"{what}: expected {like.dtype} on {like.device}, got {t.dtype} on {t.device}")


def check_tensors(what: str, tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], like: Tensor) -> None:
    check_list(what, tensors)
    if len(tensors) != len(shapes):
        raise ValueError(f"{what}: expected {len(shapes)} tensors, got {len(tensors)}")
    dtype, device = like.dtype, like.device
    for i, (t, shape) in enumerate(zip(tensors, shapes, strict=True)):
        dense = isinstance(t, Tensor) and t.layout == torch.strided
        if not (dense and t.shape == shape and t.dtype == dtype and t.device == device):
            check_tensor(f"{what}[{i}]", t, shape, like)


def check_divisor(op: str, k: Any, C: int) -> None:
    if not whole(k) or k < 1 or C % k:
        raise ValueError(f"{op}: k: expected a divisor of the {C} channels, got {k!r}")


def check_operators(op: str, operators: Any) -> None:
    """Different names among the candidates of a cell."""
    if isinstance(operators, str) or not operators or len(set(operators)) != len(operators):
        raise ValueError(f"{op}: operators: expected different names, at least one, got {operators!r}")
    for i, name in enumerate(operators):
        if name not in CANDIDATES:
            raise ValueError(f"{op}: operators[{i}]: expected one of {', '.join(CANDIDATES)}, got {name!r}")


def check_halves(op: str, inputs: Sequence[Tensor], strides: Sequence[int], operators: Sequence[str], k: int) -> None:
    """What a stride of 2 asks for where channels bypass the operators or pass a FactorizedReduce."""
    halving = "skip_connect" in operators or "factorized_reduce" in operators
    for i, (x, stride) in enumerate(zip(inputs, strides, strict=True)):
        if stride == 2 and (k > 1 or halving) and (x.shape[2] % 2 or x.shape[3] % 2):
            what = f"{op}: " + (f"inputs[{i}]" if op.startswith("partial") else "x")
            raise ValueError(f"{what}: expected an even height and width at stride 2, got {tuple(x.shape)}")
