"""How large the network is in which a genotype is trained and tested: parameters and multiply-adds. No torch import.

The network of DARTS' and PC-DARTS' evaluation: two stems, `cells` cells of which those at a third and two thirds halve
the image and double the channels, global average, a linear classifier. Batch norm is affine; pools have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from .errors import UsageError
from .genotype import Genotype

Stem = Literal["cifar", "imagenet"]
Counts = tuple[int, int]
"""Parameters, and multiply-adds of convolutions and classifier for one image."""

STEM_MULTIPLIER = 3


def network_size(
    genotype: Genotype,
    channels: int = 36,
    cells: int = 20,
    classes: int = 10,
    stem: Stem = "cifar",
    size: int | None = None,
    auxiliary: bool = False,
) -> Counts:
    """(parameters, multiply-adds) of the evaluation network; multiply-adds leave batch norm and pools out.

    size: height and width of the images, 32 or 224 by default; auxiliary: count the parameters of the auxiliary head
    too, which exists in training only and computes nothing afterwards. Raises UsageError for numbers out of range and
    for the operator none, which no evaluation network has. Source: DARTS and PC-DARTS, NetworkCIFAR, NetworkImageNet.
    """
    size = (32 if stem == "cifar" else 224) if size is None else size
    check_network(genotype, channels, cells, classes, stem, size)
    parts = list(_parts(genotype, channels, cells, classes, stem, size, auxiliary))
    return sum(params for params, _ in parts), sum(macs for _, macs in parts)


def check_network(genotype: Genotype, channels: int, cells: int, classes: int, stem: str, size: int = 32) -> None:
    """Raises UsageError where there is no such network."""
    if not isinstance(genotype, Genotype):
        raise UsageError(f"genotype: expected a Genotype, got {type(genotype).__name__}")
    if stem not in ("cifar", "imagenet"):
        raise UsageError(f"stem: expected 'cifar' or 'imagenet', got {stem!r}")
    named = (("channels", channels, 2), ("cells", cells, 1), ("classes", classes, 2), ("size", size, 1))
    for name, value, least in named:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    if channels % 2:
        raise UsageError(f"channels: expected an even number, which FactorizedReduce halves, got {channels}")
    if any(op == "none" for op, _ in (*genotype.normal, *genotype.reduce)):
        raise UsageError("genotype: expected operators of an evaluation network, got 'none'")


def _parts(
    genotype: Genotype, channels: int, cells: int, classes: int, stem: Stem, size: int, auxiliary: bool
) -> Iterator[Counts]:
    """One entry a module, input first. before, now: the channels of the two states that a cell reads; at: their height,
    once the older one is halved where it is larger."""
    if stem == "cifar":
        wide = STEM_MULTIPLIER * channels
        yield _conv(3, wide, 9, size, size)
        before, now, at = wide, wide, size
    else:
        quarter = _half(_half(size))
        yield _conv(3, channels // 2, 9, _half(size), _half(size))
        yield _conv(channels // 2, channels, 9, quarter, quarter)
        yield _conv(channels, channels, 9, _half(quarter), _half(quarter))
        before, now, at = channels, channels, _half(quarter)
    C = channels
    for i in range(cells):
        reduction = i in (cells // 3, 2 * cells // 3)
        C *= 2 if reduction else 1
        yield _conv(before, C, 1, at, at)  # after a reduction a FactorizedReduce, whose product is the same
        yield _conv(now, C, 1, at, at)
        below = _half(at) if reduction else at
        edges = genotype.reduce if reduction else genotype.normal
        for op, state in edges:
            strided = reduction and state < 2
            yield _operator(op, C, strided, at if strided else below, below)
        concat = genotype.reduce_concat if reduction else genotype.normal_concat
        before, now, at = now, C * len(concat), below
        if auxiliary and i == 2 * cells // 3:
            yield _auxiliary(now, classes, second_norm=stem == "cifar")
    yield now * classes + classes, now * classes


def _half(size: int) -> int:
    return (size + 1) // 2


def _conv(c_in: int, c_out: int, taps: int, height: int, width: int, groups: int = 1, norm: bool = True) -> Counts:
    """A convolution without bias whose result is height x width, and its batch norm."""
    weights = c_in * c_out // groups * taps
    return weights + (2 * c_out if norm else 0), weights * height * width


def _operator(op: str, C: int, strided: bool, above: int, below: int) -> Counts:
    """An operator that reads above x above pixels and writes below x below."""
    kind, _, kernel = op.rpartition("_")
    K = int(kernel.split("x")[0]) if kernel[0].isdigit() else 0
    match kind:
        case "max_pool" | "avg_pool":
            parts = []
        case "skip":
            parts = [_conv(C, C, 1, below, below)] if strided else []
        case "sep_conv" | "dil_conv":
            block = [_conv(C, C, K * K, below, below, groups=C, norm=False), _conv(C, C, 1, below, below)]
            parts = block * (2 if kind == "sep_conv" else 1)
        case _:  # conv_7x1_1x7
            parts = [_conv(C, C, 7, above, below, norm=False), _conv(C, C, 7, below, below)]
    return sum(params for params, _ in parts), sum(macs for _, macs in parts)


def _auxiliary(c_in: int, classes: int, second_norm: bool) -> Counts:
    """Average pool, 1x1 to 128 channels, 2x2 to 768, linear; DARTS' ImageNet head has no second batch norm."""
    convolutions = c_in * 128 + 2 * 128 + 128 * 768 * 4 + (2 * 768 if second_norm else 0)
    return convolutions + 768 * classes + classes, 0
