"""What the shape of the skip-only network decides for a GPU: its cells, the tensors between them, where weights lie."""

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from .skip_net import NetSpec


class Rows(NamedTuple):
    """A stage's weights: `height` rows of `columns` from `at` of the flat copy; `of`: the network's weights in it."""

    at: int
    height: int
    columns: int
    of: tuple[int, ...]

    def within(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.at, self.height * self.columns).view(self.height, self.columns)


class Cell(NamedTuple):
    """sources: for either input the tensor that it reads and its first channel there. product, strided: its tensors."""

    reduction: bool
    channels: int
    sources: tuple[tuple[int, int], tuple[int, int]]
    product: int | None
    strided: int | None
    paths: Rows | None


class Plan(NamedTuple):
    """order: the network's weights as they lie in the flat copy, of `size` numbers."""

    cells: tuple[Cell, ...]
    tensors: tuple[Rows, ...]
    stem: Rows
    order: tuple[int, ...]
    size: int


@lru_cache(maxsize=16)
def plan(in_channels: int, spec: NetSpec) -> Plan:
    """What a network's shape decides; weights are numbered as `skip_net.weight_shapes` lists them."""
    C, S = spec.channels, 3 * spec.channels
    channels: list[int] = []
    reductions: list[bool] = []
    before: list[tuple[int, ...]] = []
    after: list[tuple[int, ...]] = []
    paths: list[tuple[int, ...]] = []
    at = 3
    for i in range(spec.cells):
        reduction = i in (spec.cells // 3, 2 * spec.cells // 3)
        C *= 1 + reduction
        halves = 2 if i and reductions[-1] else 1
        before.append(tuple(range(at, at + halves)))
        after.append((at + halves,))
        paths.append(tuple(range(at + halves + 1, at + halves + 17)) if reduction else ())
        at += halves + 1 + len(paths[-1])
        channels.append(C)
        reductions.append(reduction)
    order: list[int] = []
    size = 0

    def rows(count: int, columns: int, *of: tuple[int, ...]) -> Rows:
        nonlocal size
        found = Rows(size, count, columns, tuple(w for group in of for w in group))
        order.extend(found.of)
        size += count * columns
        return found

    stem = rows(S, 9 * in_channels, (0,))
    tensors = [rows(channels[0] * 2 + channels[1], S, before[0], after[0], before[1])]
    sources: list[list[tuple[int, int]]] = [[(0, 0), (0, channels[0])], [(0, 2 * channels[0])]]
    sources += [[] for _ in range(2, spec.cells)]
    cells = []
    for i, C in enumerate(channels):
        product = strided = None
        two_on = i + 2 < spec.cells
        if i + 1 < spec.cells:
            product = len(tensors)
            sources[i + 1].append((product, 0))
            same = two_on and not reductions[i + 1]
            readers = [after[i + 1], *([before[i + 2]] if same else [])]
            count = channels[i + 1] + (channels[i + 2] if same else 0)
            tensors.append(rows(count, 4 * C, *readers))
            if same:
                sources[i + 2].append((product, channels[i + 1]))
            elif two_on:
                strided = len(tensors)
                sources[i + 2].append((strided, 0))
                tensors.append(rows(channels[i + 2], 4 * C, before[i + 2]))
        q = C // spec.k
        own = rows(8 * q, q, paths[i]) if reductions[i] else None
        first, second = sources[i]
        cells.append(Cell(reductions[i], C, (first, second), product, strided, own))
    return Plan(tuple(cells), tuple(tensors), stem, tuple(order), size)
