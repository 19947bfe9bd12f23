"""The beta-weighted skip cell: four nodes, each a weighted sum of all states before it.

With x_0, x_1 the inputs (B, C, H, W), b the 14 edge weights in the order node 2 from (0, 1), node 3 from
(0, 1, 2), ..., and P the channel shuffle out[c*k + g] = in[g*(C/k) + c] (the identity at k = 1):

    x_j = P( sum_{i<j} b_ij x_i ),  j = 2..5          out = cat(x_2, x_3, x_4, x_5)  in  B x 4C x H x W

With partial channels a skip connection passes the processed and the bypassed channels alike, so an edge is P
alone (FTSO section 3.2; PC-DARTS, figure 2). D_j being the total gradient of x_j and G_j the given one,

    D_j = G_j + sum_{m>j} b_jm P'D_m       dL/db_ij = <P'D_j, x_i>       dL/dx_i = sum_j b_ij P'D_j,  i = 0, 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._backend import choose, core, first_derivatives_only, on_first_call

N_NODES = 4
N_EDGES = 14


def channel_shuffle(x: Tensor, k: int) -> Tensor:
    """P of the equations above: (B, C, H, W) with channel g*(C/k) + c moved to c*k + g."""
    if k == 1:
        return x
    B, C, H, W = x.shape
    return x.view(B, k, C // k, H, W).transpose(1, 2).reshape(B, C, H, W)


def reference(x0: Tensor, x1: Tensor, weights: Tensor, k: int) -> Tensor:
    """The definition, in any floating type, differentiable as often as wanted."""
    states, at = [x0, x1], 0
    for _ in range(N_NODES):
        total = weights[at] * states[0]
        for i, x in enumerate(states[1:], at + 1):
            total = total + weights[i] * x
        at += len(states)
        states.append(channel_shuffle(total, k))
    return torch.cat(states[2:], 1)


def _check(x0: Tensor, x1: Tensor, weights: Tensor, k: int) -> tuple[int, ...]:
    """Refuses what no kernel may see; returns the output's shape. Runs before any backend, fake tensors included."""
    if not x0.is_floating_point():
        raise TypeError(f"skip_cell: x0: expected a floating type, got {x0.dtype}")
    if x0.dim() != 4:
        raise ValueError(f"skip_cell: x0: expected shape (B, C, H, W), got {tuple(x0.shape)}")
    if x1.shape != x0.shape:
        raise ValueError(f"skip_cell: x1: expected the shape of x0, {tuple(x0.shape)}, got {tuple(x1.shape)}")
    if weights.shape != (N_EDGES,):
        raise ValueError(f"skip_cell: weights: expected shape ({N_EDGES},), got {tuple(weights.shape)}")
    for name, t in (("x1", x1), ("weights", weights)):
        if t.dtype != x0.dtype:
            raise TypeError(f"skip_cell: {name}: expected the type of x0, {x0.dtype}, got {t.dtype}")
        if t.device != x0.device:
            raise ValueError(f"skip_cell: {name}: expected the device of x0, {x0.device}, got {t.device}")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1 or x0.shape[1] % k:
        raise ValueError(f"skip_cell: k: expected a divisor of the {x0.shape[1]} channels, got {k!r}")
    B, C, H, W = x0.shape
    return B, N_NODES * C, H, W


def skip_cell(x0: Tensor, x1: Tensor, weights: Tensor, k: int = 4) -> Tensor:
    """The skip cell of the module's equation.

    x0, x1: (B, C, H, W); weights: (14,), one softmax per node (see `SuperNet`), same type and device; k: a divisor
    of C. Returns (B, 4C, H, W). The cpu backend takes float32, triton also bfloat16 and float16, both with first
    derivatives only; the reference takes any floating type and any number of derivatives.

    Raises ValueError or TypeError naming the argument, what was expected and what came; BackendError when a
    backend asked for by name cannot run. Source: FTSO, algorithm 1 and section 3.2.
    """
    _check(x0, x1, weights, k)
    return choose("skip_cell", _BACKENDS, x0)(x0, x1, weights, k)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _fwd_cpu(x0: Tensor, x1: Tensor, weights: Tensor, k: int) -> Tensor:
    out = x0.new_empty(_check(x0, x1, weights, k))
    _require_float32(x0)
    x0, x1, weights = x0.contiguous(), x1.contiguous(), weights.contiguous()
    pointers = (t.data_ptr() for t in (x0, x1, weights, out))
    core().skip_cell_fwd(*_sizes(x0), k, *pointers, torch.get_num_threads())
    return out


def _bwd_cpu(
    grad: Tensor, x0: Tensor, x1: Tensor, weights: Tensor, k: int, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    outs = _bwd_fake(grad, x0, x1, weights, k, needs)
    _require_float32(x0)
    grad, x0, x1, weights = grad.contiguous(), x0.contiguous(), x1.contiguous(), weights.contiguous()
    pointers = [t.data_ptr() for t in (grad, x0, x1, weights)]
    wanted = [t.data_ptr() if need else 0 for t, need in zip(outs, needs, strict=True)]
    core().skip_cell_bwd(*_sizes(x0), k, *pointers, *wanted, torch.get_num_threads())
    return outs


def _fwd_triton(x0: Tensor, x1: Tensor, weights: Tensor, k: int) -> Tensor:
    _check(x0, x1, weights, k)
    out: Tensor = on_first_call("skip_cell_triton", "skip_cell_fwd")(x0, x1, weights, k)
    return out


def _bwd_triton(
    grad: Tensor, x0: Tensor, x1: Tensor, weights: Tensor, k: int, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    outs = _bwd_fake(grad, x0, x1, weights, k, needs)
    on_first_call("skip_cell_triton", "skip_cell_bwd")(grad, x0, x1, weights, k, needs, outs)
    return outs


def _require_float32(x0: Tensor) -> None:
    if x0.dtype != torch.float32:
        raise TypeError(f"skip_cell: x0: the cpu backend expected float32, got {x0.dtype}")


def _fwd_fake(x0: Tensor, x1: Tensor, weights: Tensor, k: int) -> Tensor:
    return x0.new_empty(_check(x0, x1, weights, k))


def _bwd_fake(
    grad: Tensor, x0: Tensor, x1: Tensor, weights: Tensor, k: int, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shape = _check(x0, x1, weights, k)
    if grad.shape != shape or grad.dtype != x0.dtype or grad.device != x0.device:
        raise ValueError(
            f"skip_cell_bwd: grad: expected {shape} of {x0.dtype} on {x0.device}, "
            f"got {tuple(grad.shape)} of {grad.dtype} on {grad.device}"
        )
    if len(needs) != 3:
        raise ValueError(f"skip_cell_bwd: needs: expected three flags, got {len(needs)}")
    g0, g1, gw = (t.new_empty(t.shape if need else (0,)) for t, need in zip((x0, x1, weights), needs, strict=True))
    return g0, g1, gw


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    *tensors, ctx.k = inputs
    ctx.save_for_backward(*tensors)


def _backward(name: str) -> Callable[..., tuple[Tensor | None, ...]]:
    bwd = getattr(torch.ops.ftso_fast, f"{name}_bwd")

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        grads = bwd(grad, *ctx.saved_tensors, ctx.k, needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None

    return backward


_LIB = torch.library.Library("ftso_fast", "FRAGMENT")
_Pair = tuple[Callable[..., Any], Callable[..., Any]]


def _register(name: str, backend: str, kernels: dict[str, _Pair]) -> None:
    """kernels: forward and backward by dispatch key."""
    arguments = "Tensor x0, Tensor x1, Tensor weights, int k"
    _LIB.define(f"{name}({arguments}) -> Tensor")
    _LIB.define(f"{name}_bwd(Tensor grad, {arguments}, bool[] needs) -> (Tensor, Tensor, Tensor)")
    for key, (fwd, bwd) in kernels.items():
        _LIB.impl(name, fwd, key)
        _LIB.impl(f"{name}_bwd", bwd, key)
    torch.library.register_fake(f"ftso_fast::{name}", _fwd_fake, lib=_LIB)
    torch.library.register_fake(f"ftso_fast::{name}_bwd", _bwd_fake, lib=_LIB)
    torch.library.register_autograd(f"ftso_fast::{name}", _backward(name), setup_context=_save, lib=_LIB)
    refuse = first_derivatives_only("skip_cell", backend)
    torch.library.register_autograd(f"ftso_fast::{name}_bwd", refuse, lib=_LIB)


_TRITON = _fwd_triton, _bwd_triton
_register("skip_cell", "cpu", {"CPU": (_fwd_cpu, _bwd_cpu), "CUDA": _TRITON})
_register("skip_cell_triton", "triton", {"CPU": _TRITON, "CUDA": _TRITON})  # on the cpu: interpreted

_BACKENDS: dict[str, Callable[..., Any]] = {
    "triton": torch.ops.ftso_fast.skip_cell_triton,
    "cpu": torch.ops.ftso_fast.skip_cell,
    "reference": reference,
}
