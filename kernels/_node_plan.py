"""The plan of a mixed node's launches on a GPU: where everything lies, and the tables that its programs read.

A row of `blocks` has ROW numbers, in the order in which `sep_conv_triton` reads them; likewise `pools`, `sources`,
`edges` and `targets`, 16 each. Nothing in a plan is an address: it is made once for a shape and stays on the device.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import _tuning
from ._native import NAMES, NodeCall

ROW, BLOCK = 24, 16
ALIGNED = 16


class Plan:
    """Sizes and tables; see the launches in `_node_triton`."""

    def __init__(
        self, B: int, C: int, N: int, k: int, operators: tuple[int, ...],
        inputs: tuple[tuple[int, int, int, int, int], ...], block: tuple[tuple[str, int], ...],
    ) -> None:  # fmt: skip
        """inputs: height, width, stride of the edge, and the strides of images and channels in memory."""
        H, W, S = inputs[0][:3]
        self.B, self.C, self.N, self.k = B, C // k, N, k
        self.operators, self.inputs, self.block = operators, inputs, dict(block)
        self.size = -(-H // S), -(-W // S)
        self.Q = self.size[0] * self.size[1]
        self.P = B * self.Q
        self.raw = self.taps = self.work = self.n_weights = self.n_pointwise = 0
        self.norms: list[tuple[int, int, bool]] = []  # channels, where its raw result begins, behind the second launch
        self.blocks: list[dict[str, int]] = []
        self.pools: list[dict[str, int]] = []
        self.sources: list[list[int]] = []
        self.n_depthwise = [0, 0]  # of blocks behind an inner batch norm, of those before
        self.weight_places: list[tuple[str, int]] = []
        for edge in range(len(inputs)):
            self._edge(edge)
        self._order()
        self._lay_out()

    # -- what there is

    def _norm(self, channels: int, second: bool) -> int:
        self.norms.append((channels, self.raw, second))
        self.raw += -(-self.B * channels * self.Q // ALIGNED) * ALIGNED
        return len(self.norms) - 1

    def _room(self, channels: int) -> int:
        at = self.work
        self.work += -(-self.B * channels * self.Q // ALIGNED) * ALIGNED
        return at

    def _block(self, edge: int, K: int, S: int, D: int, source: int, to: int, first: int, N: int, origin: int) -> int:
        """source: the norm before it, or -1; returns its row."""
        group = 0 if source >= 0 else 1
        b = {"edge": edge, "K": K, "S": S, "D": D, "source": source, "to": to, "first": first, "N": N,
             "origin": origin, "depthwise": 0, "d_depthwise": 0, "back": self._room(self.C)}  # fmt: skip
        if K > 1:
            b["depthwise"], b["d_depthwise"] = self.n_weights, self.n_depthwise[group]
            self.weight_places.append(("second" if group == 0 else "first", self.n_depthwise[group]))
            self.n_weights += self.C * K * K
            self.n_depthwise[group] += self.C * K * K
        b["pointwise"], b["d_pointwise"] = self.n_weights, self.n_pointwise
        self.weight_places.append(("pointwise", self.n_pointwise))
        self.n_weights += self.C * N
        self.n_pointwise += self.C * N
        self.blocks.append(b)
        return len(self.blocks) - 1

    def _edge(self, edge: int) -> None:
        S = self.inputs[edge][2]
        pool = {"edge": edge, "max": -1, "mean": -1, "taps": 0}
        for o, number in enumerate(self.operators):
            name = NAMES[number]
            if name == "max_pool_3x3":
                pool["max"], pool["taps"] = self._norm(self.C, False), self.taps
                self.taps += self.B * self.C * self.Q
                self._source(edge, o, pool["max"])
            elif name == "avg_pool_3x3":
                pool["mean"] = self._norm(self.C, False)
                self._source(edge, o, pool["mean"])
            elif name.startswith("sep"):
                K = int(name[-1])
                inner, outer = self._norm(self.C, False), self._norm(self.N, True)
                room = self._room(self.C)
                first = self._block(edge, K, S, 1, -1, inner, 0, self.C, -(K // 2))
                self._block(edge, K, 1, 1, inner, outer, 0, self.N, -(K // 2))
                self.blocks[first]["gradient"] = room
                self._source(edge, o, outer)
            elif name.startswith("dil"):
                K = int(name[-1])
                outer = self._norm(self.N, False)
                self._block(edge, K, S, 2, -1, outer, 0, self.N, -2 * (K // 2))
                self._source(edge, o, outer)
            elif name == "relu_conv_bn":
                outer = self._norm(self.N, False)
                self._block(edge, 1, 1, 1, -1, outer, 0, self.N, 0)
                self._source(edge, o, outer)
            elif name != "none" and S == 2:
                outer = self._norm(self.N, False)
                self._block(edge, 1, 2, 1, -1, outer, 0, self.N // 2, 0)
                self._block(edge, 1, 2, 1, -1, outer, self.N // 2, self.N // 2, 1)
                self._source(edge, o, outer)
            elif name == "skip_connect":
                self._source(edge, o, -1)
        if pool["max"] >= 0 or pool["mean"] >= 0:
            self.pools.append(pool)

    def _source(self, edge: int, op: int, norm: int) -> None:
        self.sources.append([edge, op, norm])

    # -- where it lies

    def _order(self) -> None:
        """Channels of the batch norms within separable convolutions, T_inner of them, go before the others that the
        first launch feeds, T_first with them, and these before the rest: `order` lists norms, `firsts` has each norm's
        first channel, T counts all."""
        inner = {b["source"] for b in self.blocks if b["source"] >= 0}
        self.order = sorted(range(len(self.norms)), key=lambda i: (self.norms[i][2], i not in inner))
        self.firsts, self.T = [0] * len(self.norms), 0
        for i in self.order:
            self.firsts[i] = self.T
            self.T += self.norms[i][0]
        self.T_first = sum(channels for channels, _, second in self.norms if not second)
        self.T_inner = sum(self.norms[i][0] for i in inner)
        self.n_sources = len(self.sources)

    def _block_row(self, b: dict[str, int]) -> list[int]:
        inside = b["source"] >= 0
        H, W, _, image, channel = self.inputs[b["edge"]]
        if inside:
            (H, W), image, channel = self.size, self.C * self.Q, self.Q
        channels, at, _ = self.norms[b["to"]]
        inner = "gradient" in b
        return [
            -1 if inside else b["edge"], H, W, b["S"], b["K"], b["D"], b["origin"], self.C, b["N"],
            self.norms[b["source"]][1] if inside else 0, image, channel, b["depthwise"], b["pointwise"],
            self.firsts[b["source"]] if inside else -1, at + b["first"] * self.Q, channels * self.Q,
            self.firsts[b["to"]] + b["first"], b["gradient"] if inner else b["first"], b["back"], b["d_depthwise"],
            b["d_pointwise"],
        ]  # fmt: skip

    def _lay_out(self) -> None:
        tile, own = self.block["BC"], range(len(self.blocks))
        BN = self.block["BN"]
        rows: dict[str, list[list[int]]] = {"blocks": [self._block_row(b) for b in self.blocks]}
        rows["pools"] = [self._pool_row(p) for p in self.pools]
        rows["sources"] = [self._source_row(*s) for s in self.sources]
        rows["edges"] = [self._edge_row(e) for e in range(len(self.inputs))]
        second = [i for i in own if self.blocks[i]["source"] >= 0]
        first = [i for i in own if self.blocks[i]["source"] < 0]
        outer = [i for i in own if "gradient" not in self.blocks[i]]
        inner = [i for i in own if "gradient" in self.blocks[i]]
        for name, chosen in (("first", first), ("second", second)):
            rows[name] = [[0, i, n, 0] for i in chosen for n in range(0, self.blocks[i]["N"], BN)]
        rows["first"] += [[1, i, c, 0] for i in range(len(self.pools)) for c in range(0, self.C, tile)]
        for name, chosen in (("outer", outer), ("inner", inner)):
            rows[name] = [[0, i, c, 0] for i in chosen for c in range(0, self.C, tile)]
            rows[f"{name}_weights"] = rows[name] + [
                [1, i, c, n] for i in chosen for c in range(0, self.C, tile) for n in range(0, self.blocks[i]["N"], BN)
            ]
        rows["targets"], contributions = self._targets(first, second)
        rows["to_inner"] = [[t, c, 0, 0] for t in range(len(second)) for c in range(0, self.C, tile)]
        states = range(len(second), len(rows["targets"]))
        rows["to_states"] = [[t, c, 0, 0] for t in states for c in range(0, self.C, tile)]
        self.gathered = [self.P], [self.B * i[0] * i[1] for i in self.inputs]
        within = [self.blocks[i]["source"] for i in second]
        self._tables: dict[str, tuple[int, list[list[int]]]] = {
            name: (ROW if name == "blocks" else BLOCK if name in ("pools", "sources", "edges", "targets") else 4, r)
            for name, r in rows.items()
        }
        self._tables["contributions"] = 1, [[i] for i in contributions]
        self._tables["ranges"] = 2, [[self.firsts[i], self.firsts[i] + self.norms[i][0]] for i in within]

    def _pool_row(self, p: dict[str, int]) -> list[int]:
        H, W, S, image, channel = self.inputs[p["edge"]]
        places = [self.norms[p[kind]][1] if p[kind] >= 0 else -1 for kind in ("max", "mean")]
        firsts = [self.firsts[p[kind]] if p[kind] >= 0 else -1 for kind in ("max", "mean")]
        return [p["edge"], H, W, S, image, channel, self.C, *places, *firsts, p["taps"]]

    def _source_row(self, edge: int, op: int, norm: int) -> list[int]:
        if norm < 0:
            return [1, edge, op, 0, *self.inputs[edge][3:], -1]
        channels, at, _ = self.norms[norm]
        return [0, edge, op, at, channels * self.Q, self.Q, self.firsts[norm]]

    def _edge_row(self, edge: int) -> list[int]:
        H, W, S, image, channel = self.inputs[edge]
        mine = [i for i, s in enumerate(self.sources) if s[0] == edge] or [0]
        n = sum(s[0] == edge for s in self.sources)
        return [H, S, W, image, channel, self.C, mine[0], mine[0] + n]

    def _targets(self, first: Sequence[int], second: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        """What lies within separable convolutions, then the states; and the blocks that reach each."""
        rows, contributions = [], list(second)
        for n, i in enumerate(second):
            b = self.blocks[i]
            source = b["source"]
            room = next(o["gradient"] for o in self.blocks if o["to"] == source)
            rows.append([-1, *self.size, self.norms[source][1], self.C * self.Q, self.Q, self.C, self.firsts[source],
                         n, n + 1, -1, -1, room, self.C * self.Q])  # fmt: skip
        for edge, (H, W, S, image, channel) in enumerate(self.inputs):
            mine = [i for i in first if self.blocks[i]["edge"] == edge]
            pool = next((i for i, p in enumerate(self.pools) if p["edge"] == edge), -1)
            skip = next((op for e, op, norm in self.sources if e == edge and norm < 0), -1)
            at = len(contributions)
            rows.append([edge, H, W, 0, image, channel, self.C, -1, at, at + len(mine), pool, skip if S == 1 else -1,
                         0, self.C * self.k * H * W])  # fmt: skip
            contributions += mine
        return rows, contributions

    @cache  # noqa: B019  (plans are kept for good)
    def tables(self, device: torch.device) -> dict[str, Tensor]:
        """Flat tables of int64 on the device; copied there once."""
        found = {}
        for name, (width, rows) in self._tables.items():
            table = torch.zeros(max(len(rows), 0), width, dtype=torch.int64)
            for i, row in enumerate(rows):
                table[i, : len(row)] = torch.tensor(row)
            found[name] = table.flatten().to(device)
        return found


@cache
def _plan(*arguments: Any) -> Plan:
    return Plan(*arguments)


def plan_of(call: NodeCall) -> Plan:
    B, C = call.inputs[0].shape[:2]
    block = _tuning.block("node", _tuning.width_class(C // call.k, call.channels_out), call.inputs[0].device)
    inputs = tuple((*x.shape[2:], s, x.stride(0), x.stride(1)) for x, s in zip(call.inputs, call.strides, strict=True))
    return _plan(B, C, call.channels_out, call.k, tuple(call.operators), inputs, tuple(block.items()))
