"""A whole cell of mixed nodes: every state is written where the cell's output has it, and nothing is copied.

States 0 and 1 are the inputs; state j + 2 is node j, a `partial_mix` over the predecessors that `inputs` names:

    x_{j+2} = partial_mix(x_i for i in inputs[j])        out = cat(x_2, x_3, ...)  in  B x n_nodes*C x H/s x W/s

Edges are numbered node after node. In a reduction cell (s = 2) the edges that start at an input have stride 2. The
total gradient of a node is that of its part of the output and what later nodes send back; it is added up in place.
Source: DARTS, section 2.1; PC-DARTS, section 3.1.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _memory
from . import partial_mix as node
from ._autograd import Operation
from ._backend import choose
from ._checks import check_dense, check_divisor, check_operators, check_states, check_tensor, check_tensors, whole
from ._native import NAMES, NodeCall, NodeGradients, floats_of, norms_of, planes, run_backward, run_forward

Inputs = Sequence[Sequence[int]]
N_INPUTS = 2


def strides_of(inputs: Inputs, reduction: bool) -> list[list[int]]:
    """The stride of every edge, by node."""
    return [[2 if reduction and i < N_INPUTS else 1 for i in own] for own in inputs]


def reference(
    x0: Tensor,
    x1: Tensor,
    edge_weights: Tensor,
    operator_weights: Tensor,
    weights: Sequence[Tensor],
    operators: Sequence[str],
    inputs: Inputs,
    reduction: bool,
    k: int,
) -> Tensor:
    """The definition, node after node."""
    states, edge, weight = [x0, x1], 0, 0
    for own, strides in zip(inputs, strides_of(inputs, reduction), strict=True):
        n = _n_weights(operators, strides)
        rows = slice(edge, edge + len(own))
        states.append(
            node.reference(
                [states[i] for i in own],
                edge_weights[rows],
                operator_weights[rows],
                weights[weight : weight + n],
                operators,
                strides,
                k,
            )
        )
        edge, weight = edge + len(own), weight + n
    return torch.cat(states[N_INPUTS:], 1)


def mixed_cell(
    x0: Tensor,
    x1: Tensor,
    edge_weights: Tensor,
    operator_weights: Tensor,
    weights: Sequence[Tensor],
    operators: Sequence[str],
    inputs: Inputs,
    reduction: bool = False,
    k: int = 4,
) -> Tensor:
    """The cell of the module's equation.

    x0, x1: (B, C, H, W), H and W even in a reduction cell; edge_weights: (E,); operator_weights:
    (E, len(operators)); weights: flat, edge after edge, see `partial_mix`; inputs: for each node its predecessors,
    states before it. Returns (B, len(inputs) * C, H', W'). The cpu backend takes float32, first derivatives only.

    Raises ValueError or TypeError naming the argument, what was expected and what came; BackendError when a backend
    asked for by name cannot run.
    """
    _check_structure(x0, operators, inputs)
    run = choose("mixed_cell", {"cpu": _cpu, "reference": _reference}, x0)
    return run(x0, x1, edge_weights, operator_weights, weights, operators, inputs, reduction, k)


def _n_weights(operators: Sequence[str], strides: Sequence[int]) -> int:
    return sum(len(own) for edge in node.mixed_weights(2, 1, operators, strides) for own in edge)


def _check_structure(x0: Tensor, operators: Sequence[str], inputs: Inputs) -> None:
    """What must hold before a backend can be chosen, and what numbers would no longer tell."""
    op = "mixed_cell"
    check_dense(f"{op}: x0", x0)
    check_operators(op, operators)
    if not inputs:
        raise ValueError(f"{op}: inputs: expected at least one node, got none")
    for j, own in enumerate(inputs):
        if not own or not all(whole(i) and 0 <= i < j + N_INPUTS for i in own):
            raise ValueError(f"{op}: inputs[{j}]: expected states from 0 to {j + 1}, got {tuple(own)}")
        if len(set(own)) != len(own):
            raise ValueError(f"{op}: inputs[{j}]: expected different states, got {tuple(own)}")


def _check(
    x0: Tensor,
    x1: Tensor,
    edge_weights: Tensor,
    operator_weights: Tensor,
    weights: Sequence[Tensor],
    operators: Sequence[str],
    inputs: Inputs,
    reduction: bool,
    k: int,
) -> None:
    """What no kernel may see: every node as `partial_mix` would be asked for it, on states of the right size."""
    op = "mixed_cell"
    _check_structure(x0, operators, inputs)
    if x0.dim() != 4 or 0 in x0.shape:
        raise ValueError(f"{op}: x0: expected shape (B, C, H, W), none of them 0, got {tuple(x0.shape)}")
    check_states(op, [x0], [1])
    check_tensor(f"{op}: x1", x1, tuple(x0.shape), x0)
    strides = [s for own in strides_of(inputs, reduction) for s in own]
    edges = len(strides)
    check_divisor(op, k, x0.shape[1])
    if reduction and (x0.shape[2] % 2 or x0.shape[3] % 2):
        raise ValueError(f"{op}: x0: expected an even height and width in a reduction cell, got {tuple(x0.shape)}")
    if reduction and "skip_connect" in operators and x0.shape[1] // k % 2:
        raise ValueError(f"{op}: k: expected an even number of processed channels, got {x0.shape[1] // k}")
    check_tensor(f"{op}: edge_weights", edge_weights, (edges,), x0)
    check_tensor(f"{op}: operator_weights", operator_weights, (edges, len(operators)), x0)
    shapes = [s for edge in node.mixed_weights(x0.shape[1], k, operators, strides) for own in edge for s in own]
    check_tensors(f"{op}: weights", weights, shapes, x0)


def _reference(*arguments: Any) -> Tensor:
    _check(*arguments)
    return reference(*arguments)


def _cpu(*arguments: Any) -> Tensor:
    """The operation checks the rest."""
    *tensors, weights, operators, inputs, reduction, k = arguments
    chosen = [NAMES.index(o) for o in operators]
    flat, counts = [i for own in inputs for i in own], [len(own) for own in inputs]
    out, _ = OP(*tensors, list(weights), chosen, flat, counts, reduction, k)
    return out


_ARGUMENTS = (
    "Tensor x0, Tensor x1, Tensor edge_weights, Tensor operator_weights, Tensor[] weights, int[] operators, "
    "int[] inputs, int[] counts, bool reduction, int k"
)
_LIB = torch.library.Library("ftso_fast", "FRAGMENT")
_LIB.define(f"mixed_cell({_ARGUMENTS}) -> (Tensor, Tensor)")
_LIB.define(
    f"mixed_cell_bwd(Tensor grad, Tensor out, Tensor saved, {_ARGUMENTS}, bool[] needs, bool needs_weights) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])"
)


class _Cell(NamedTuple):
    """One call of the operation; operators are numbers of `NAMES`, counts the inputs of each node."""

    x0: Tensor
    x1: Tensor
    edge_weights: Tensor
    operator_weights: Tensor
    weights: Sequence[Tensor]
    operators: Sequence[int]
    flat: Sequence[int]
    counts: Sequence[int]
    reduction: bool
    k: int

    def checked(self) -> "_Cell":
        """The operation may be called by itself: what `mixed_cell` refuses is refused here."""
        if any(not 0 <= o < len(NAMES) for o in self.operators):
            expected = f"numbers from 0 to {len(NAMES) - 1}"
            raise ValueError(f"mixed_cell: operators: expected {expected}, got {list(self.operators)}")
        if any(n < 1 for n in self.counts) or sum(self.counts) != len(self.flat):
            expected = f"positive numbers that sum to the {len(self.flat)} inputs"
            raise ValueError(f"mixed_cell: counts: expected {expected}, got {list(self.counts)}")
        _check(*self[:5], [NAMES[o] for o in self.operators], self.inputs, self.reduction, self.k)
        return self

    def check_backward(self, grad: Tensor, out: Tensor, saved: Tensor, needs: Sequence[bool]) -> None:
        """Refuses what forward did not leave."""
        floats = (self.saved_from[-1],)
        for name, t, expected in (("grad", grad, self.size), ("out", out, self.size), ("saved", saved, floats)):
            if tuple(t.shape) != expected or t.dtype != self.x0.dtype:
                raise ValueError(
                    f"mixed_cell_bwd: {name}: expected {self.x0.dtype} of shape {expected}, "
                    f"got {t.dtype} of shape {tuple(t.shape)}"
                )
        if len(needs) != N_INPUTS:
            raise ValueError(f"mixed_cell_bwd: needs: expected {N_INPUTS} flags, got {len(needs)}")

    def ready(self) -> "_Cell":
        """The same with memory laid out as the core reads it."""
        if self.x0.dtype != torch.float32:
            raise TypeError(f"mixed_cell: x0: the cpu backend expected float32, got {self.x0.dtype}")
        return self._replace(
            x0=planes(self.x0),
            x1=planes(self.x1),
            edge_weights=self.edge_weights.contiguous(),
            operator_weights=self.operator_weights.contiguous(),
            weights=[w.contiguous() for w in self.weights],
        )

    @property
    def size(self) -> tuple[int, int, int, int]:
        """The shape of the output."""
        B, C, H, W = self.x0.shape
        return (B, C * len(self.counts), H // 2, W // 2) if self.reduction else (B, C * len(self.counts), H, W)

    # where each node's edges, weights and saved values begin; the last entry is where they end

    @property
    def edges_from(self) -> list[int]:
        return list(accumulate(self.counts, initial=0))

    @property
    def inputs(self) -> list[list[int]]:
        return [list(self.flat[a:b]) for a, b in pairwise(self.edges_from)]

    @property
    def weights_from(self) -> list[int]:
        names = [NAMES[o] for o in self.operators]
        return list(accumulate((_n_weights(names, s) for s in strides_of(self.inputs, self.reduction)), initial=0))

    @property
    def saved_from(self) -> list[int]:
        B, C, H, W = self.x0.shape[0], self.x0.shape[1] // self.k, *self.size[2:]
        nodes = strides_of(self.inputs, self.reduction)
        norms = (norms_of(C, C, [self.operators] * len(strides), strides) for strides in nodes)
        return list(accumulate((floats_of(B, H, W, node) for node in norms), initial=0))

    def nodes(self, out: Tensor, saved: Tensor) -> list[tuple[NodeCall, Tensor]]:
        """Each node's call on states that lie in `out`, and its part of `saved`."""
        states = self.states(self.x0, self.x1, out)
        calls = [
            NodeCall([states[i] for i in own], self.edge_weights[e], self.operator_weights[e], self.weights[w], [],
                     self.operators, strides, self.k)
            for own, e, w, strides in zip(self.inputs, _parts(self.edges_from), _parts(self.weights_from),
                                          strides_of(self.inputs, self.reduction), strict=True)
        ]  # fmt: skip
        return list(zip(calls, (saved[part] for part in _parts(self.saved_from)), strict=True))

    def states(self, x0: Tensor, x1: Tensor, out: Tensor) -> list[Tensor]:
        """The inputs, and each node's channels of the output."""
        return [x0, x1, *out.chunk(len(self.counts), 1)]


def _parts(bounds: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(bounds)]


def _fwd_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    cell = _Cell(*arguments).checked().ready()
    out, saved = _memory.pooled(*cell.size), _memory.pooled(cell.saved_from[-1])
    for (call, own), state in zip(cell.nodes(out, saved), cell.states(cell.x0, cell.x1, out)[N_INPUTS:], strict=True):
        run_forward(call, state, own)
    return out, saved


def _bwd_cpu(grad: Tensor, out: Tensor, saved: Tensor, *arguments: Any) -> tuple[Any, ...]:
    *rest, needs, needs_weights = arguments
    cell = _Cell(*rest).checked().ready()
    cell.check_backward(grad, out, saved, needs)
    out, saved = planes(out), saved.contiguous()
    total = _memory.pooled(*out.shape).copy_(grad)  # of every node; later nodes add to it
    d_inputs = [_memory.pooled(*x.shape) if n else x.new_empty(0) for x, n in zip(cell[:2], needs, strict=True)]
    d_edges, d_operators = torch.empty_like(cell.edge_weights), torch.empty_like(cell.operator_weights)
    d_weights = [torch.empty_like(w) if needs_weights else w.new_empty(0) for w in cell.weights]
    gradients = cell.states(d_inputs[0], d_inputs[1], total)
    wanted, written = [*needs, *(True for _ in cell.counts)], [False, False, *(True for _ in cell.counts)]
    every = zip(cell.nodes(out, saved), cell.inputs, _parts(cell.edges_from), _parts(cell.weights_from),
                gradients[N_INPUTS:], strict=True)  # fmt: skip
    for (call, kept), own, edges, weights, d_node in reversed(list(every)):
        places = NodeGradients(
            [gradients[i] if wanted[i] else None for i in own],
            [written[i] for i in own],
            d_edges[edges],
            d_operators[edges],
            d_weights[weights] if needs_weights else [],
            [],
        )
        run_backward(call, d_node, kept, places)
        for i in own:
            written[i] = True
    for d, done in zip(d_inputs, written, strict=False):
        if not done:
            d.zero_()
    return *d_inputs, d_edges, d_operators, d_weights


def _fwd_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    cell = _Cell(*arguments).checked()
    return cell.x0.new_empty(cell.size), cell.x0.new_empty(cell.saved_from[-1])


def _bwd_fake(grad: Tensor, out: Tensor, saved: Tensor, *arguments: Any) -> tuple[Any, ...]:
    *rest, needs, needs_weights = arguments
    cell = _Cell(*rest).checked()
    cell.check_backward(grad, out, saved, needs)
    d0, d1 = (x.new_empty(x.shape if need else (0,)) for x, need in zip(cell[:2], needs, strict=True))
    d_weights = [w.new_empty(w.shape if needs_weights else (0,)) for w in cell.weights]
    return d0, d1, torch.empty_like(cell.edge_weights), torch.empty_like(cell.operator_weights), d_weights


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x0, x1, edges, operator_weights, weights, *ctx.rest = inputs
    ctx.set_materialize_grads(False)
    ctx.needs = [x0.requires_grad, x1.requires_grad]
    ctx.needs_weights = any(w.requires_grad for w in weights)
    ctx.save_for_backward(*output, x0, x1, edges, operator_weights, *weights)


def _derive(ctx: Any, bwd: Callable[..., Any], grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    out, saved, x0, x1, edges, operator_weights, *weights = ctx.saved_tensors
    if grad is None:
        return None, None, None, None, [None] * len(weights)
    d0, d1, d_edges, d_operators, d_weights = bwd(
        grad, out, saved, x0, x1, edges, operator_weights, weights, *ctx.rest, ctx.needs, ctx.needs_weights
    )
    d_weights = d_weights if ctx.needs_weights else [None] * len(weights)
    given = [d if need else None for d, need in zip((d0, d1), ctx.needs, strict=True)]
    return *given, d_edges, d_operators, d_weights


OP = Operation(_LIB, "mixed_cell", (_fwd_cpu, _bwd_cpu), (_fwd_fake, _bwd_fake), _save, _derive)
