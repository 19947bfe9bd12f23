"""The options below float32: what they change, what they leave exact, what they say of themselves."""

import pytest
import torch
from conftest import every_isa
from ftso_fast.kernels import NetSpec, skip_net

from ftso_fast import SuperNet, UsageError, kernels, search
from ftso_fast.config import SearchConfig

SHAPES = {"one vector": (NetSpec(16, 4, 4), (4, 3, 16, 12)), "padded": (NetSpec(12, 8, 2), (3, 1, 8, 8))}


def outcome(spec, shape, precision):
    """Logits and the gradients of edges and of all weights, same numbers for every precision."""
    torch.manual_seed(3)
    net = SuperNet(5, *spec, shape[1])
    edges = [net.edge_weights(b).detach().float().requires_grad_() for b in net.betas()]
    weights = list(net.parameters())
    logits = skip_net(torch.randn(shape), *edges, weights, spec, precision)
    return logits.detach(), *torch.autograd.grad(logits.sin().sum(), [*edges, *weights])


def worst(found, wanted):
    return max(float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@every_isa
def test_bf16_backward_keeps_forward_exact(isa, shape):
    exact, rounded = (outcome(*SHAPES[shape], precision) for precision in ("float32", "bf16_backward"))
    assert torch.equal(exact[0], rounded[0])
    assert torch.equal(exact[-2], rounded[-2]), "the classifier's gradient lies before any rounding"
    assert 1e-5 < worst(rounded[1:], exact[1:]) < 0.05


@pytest.mark.parametrize("shape", SHAPES)
@every_isa
def test_bf16_is_near_float32(isa, shape):
    exact, rounded = (outcome(*SHAPES[shape], precision) for precision in ("float32", "bf16"))
    assert 1e-5 < worst(rounded[:1], exact[:1]) < 0.1


@pytest.mark.parametrize("precision", ["bf16_backward", "bf16"])
def test_threads_do_not_change_a_byte(precision, one_thread):
    alone = outcome(*SHAPES["padded"], precision)
    torch.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(alone, outcome(*SHAPES["padded"], precision), strict=True))


def data():
    g = torch.Generator().manual_seed(0)
    return torch.randn(32, 3, 16, 16, generator=g), torch.arange(32) % 4


def test_the_search_prints_what_the_precision_cost():
    config = SearchConfig(channels=8, cells=4, batch_size=16)
    exact, rounded = (search(data(), "2it", config=config, precision=p) for p in ("float32", "bf16_backward"))
    assert exact.rounding is None
    assert "Precision" not in str(exact)
    assert 1e-5 < rounded.rounding.gradient_error < 0.05
    assert rounded.to_dict()["rounding"] == {
        "gradient_error": rounded.rounding.gradient_error,
        "sign_flips": rounded.rounding.sign_flips,
    }
    cost = f"{100 * rounded.rounding.gradient_error:.2f}%"
    assert f"Precision bf16_backward: the first beta gradient differs from float32's by {cost}" in str(rounded)
    assert rounded.betas != exact.betas


def test_the_first_gradient_is_compared_with_float32s():
    config = SearchConfig(channels=8, cells=4, batch_size=16)
    exact, rounded = (search(data(), "1it", config=config, precision=p) for p in ("float32", "bf16"))
    wanted, found = (torch.tensor([g for b in r.betas.values() for g in b.gradient]) for r in (exact, rounded))
    assert rounded.rounding.gradient_error == pytest.approx(float((found - wanted).abs().max() / wanted.abs().max()))
    assert rounded.rounding.sign_flips == int((found.sign() != wanted.sign()).sum())


def test_bad_precision():
    with pytest.raises(UsageError, match="precision: expected one of float32, bf16_backward, bf16, got 'fp8'"):
        search(data(), precision="fp8")


def test_the_reference_refuses():
    config = SearchConfig(channels=8, cells=4, batch_size=16)
    with pytest.raises(UsageError, match="precision: bf16 needs the cpu backend"):
        search(data(), config=config, precision="bf16", backend="reference")
    assert kernels.requested() is None
