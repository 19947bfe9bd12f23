"""The network that is trained: its size, its wiring against one written out from DARTS' paper, its two modes."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ftso_fast import Genotype, Network, UsageError, kernels
from ftso_fast.nats import Architecture
from ftso_fast.nats_network import NatsNetwork
from ftso_fast.network import TRAINED_OPS
from ftso_fast.operations import OPS
from ftso_fast.published import PUBLISHED

NAMES = sorted(PUBLISHED)
MIXED = Genotype(
    normal=[("sep_conv_3x3", 0), ("dil_conv_5x5", 1), ("skip_connect", 0), ("sep_conv_5x5", 2)],
    normal_concat=range(2, 4),
    reduce=[("skip_connect", 0), ("dil_conv_3x3", 1), ("avg_pool_3x3", 1), ("max_pool_3x3", 2)],
    reduce_concat=range(2, 4),
)


def small(genotype=MIXED, auxiliary=True, seed=0, **more):
    torch.manual_seed(seed)
    net = Network(genotype, **{"channels": 4, "cells": 3, "classes": 5, "auxiliary": auxiliary} | more)
    for name, t in (*net.named_parameters(), *net.named_buffers()):  # no batch norm stays at its start
        if t.dtype.is_floating_point and t.dim() == 1:
            t.data.uniform_(0.5, 1.5) if "var" in name or "weight" in name else t.data.uniform_(-0.5, 0.5)
    return net


def images(n=6, size=32, seed=1):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# -- written out


def norm(x, state, at, training):
    mean, variance = (None, None) if training else (state[f"{at}.running_mean"], state[f"{at}.running_var"])
    return F.batch_norm(x, mean, variance, state[f"{at}.weight"], state[f"{at}.bias"], training, eps=1e-5)


def conv(x, state, at, **how):
    return F.conv2d(x, state[f"{at}.weight"], **how)


def operator(op, x, state, at, stride, training):
    C = x.shape[1]
    if op == "max_pool_3x3":
        return F.max_pool2d(x, 3, stride, 1)
    if op == "avg_pool_3x3":
        return F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    if op == "skip_connect":
        return x if stride == 1 else reduced(x, state, at, training)
    if op == "conv_7x1_1x7":
        x = conv(x.relu(), state, f"{at}.1", stride=(1, stride), padding=(0, 3))
        return norm(conv(x, state, f"{at}.2", stride=(stride, 1), padding=(3, 0)), state, f"{at}.3", training)
    K, dilation = int(op[-1]), 2 if op.startswith("dil") else 1
    for first in (0,) if dilation == 2 else (0, 4):
        how = {"padding": dilation * (K // 2), "dilation": dilation, "groups": C}
        x = conv(x.relu(), state, f"{at}.{first + 1}", stride=stride, **how)
        x = norm(conv(x, state, f"{at}.{first + 2}"), state, f"{at}.{first + 3}", training)
        stride = 1
    return x


def reduced(x, state, at, training):
    x = x.relu()
    halves = [conv(h, state, f"{at}.conv_{i}", stride=2) for i, h in ((1, x), (2, x[:, :, 1:, 1:]))]
    return norm(torch.cat(halves, 1), state, f"{at}.bn", training)


def projected(x, state, at, training):
    return norm(conv(x.relu(), state, f"{at}.1"), state, f"{at}.2", training)


def textbook(net, x, state, training, cells=3, imagenet=False, factors=None):
    """Logits, and those of the auxiliary head."""
    factors = iter(factors if factors is not None else ())
    if imagenet:
        s0 = norm(conv(x, state, "stem0.0", stride=2, padding=1), state, "stem0.1", training).relu()
        s0 = norm(conv(s0, state, "stem0.3", stride=2, padding=1), state, "stem0.4", training)
        s1 = norm(conv(s0.relu(), state, "stem1.1", stride=2, padding=1), state, "stem1.2", training)
    else:
        s0 = s1 = norm(conv(x, state, "stem.0", padding=1), state, "stem.1", training)
    auxiliary, after = None, imagenet
    for i in range(cells):
        reduction = i in (cells // 3, 2 * cells // 3)
        edges = net.genotype.reduce if reduction else net.genotype.normal
        concat = net.genotype.reduce_concat if reduction else net.genotype.normal_concat
        at = f"cells.{i}"
        first = reduced if after else projected
        states = [first(s0, state, f"{at}.preprocess0", training), projected(s1, state, f"{at}.preprocess1", training)]
        terms = []
        for e, (op, source) in enumerate(edges):
            stride = 2 if reduction and source < 2 else 1
            terms.append(operator(op, states[source], state, f"{at}.ops.{e}", stride, training))
            if not (op == "skip_connect" and stride == 1) and (factor := next(factors, None)) is not None:
                terms[-1] = terms[-1] * factor[:, None, None, None]
            if e % 2:
                states.append(terms[-2] + terms[-1])
        s0, s1, after = s1, torch.cat([states[n] for n in concat], 1), reduction
        if i == 2 * cells // 3 and training:
            a = F.avg_pool2d(s1.relu(), 5, 2 if imagenet else 3, count_include_pad=False)
            a = norm(conv(a, state, "auxiliary_head.2"), state, "auxiliary_head.3", True).relu()
            a = conv(a, state, "auxiliary_head.5")
            a = (a if imagenet else norm(a, state, "auxiliary_head.6", True)).relu().mean((2, 3))
            last = f"auxiliary_head.{9 if imagenet else 10}"
            auxiliary = F.linear(a, state[f"{last}.weight"], state[f"{last}.bias"])
    return F.linear(s1.mean((2, 3)), state["classifier.weight"], state["classifier.bias"]), auxiliary


def doubles(net):
    return {
        name: t.detach().double().requires_grad_(name in dict(net.named_parameters()))
        for name, t in (*net.named_parameters(), *net.named_buffers())
    }


def close(got, want, tolerance):
    assert got.shape == want.shape
    error = (got.detach().double() - want.detach()).abs().max()
    assert error <= tolerance * want.detach().abs().max()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", [*NAMES, "mixed"])
def test_it_computes_what_the_paper_says(name, backend):
    """Training mode with dropped paths, and what it is tested as."""
    net = small(PUBLISHED.get(name, MIXED))
    x, state = images(), doubles(net)
    drop = torch.rand(net.n_drop_paths, len(x), generator=torch.Generator().manual_seed(2)).round() * 1.25
    with kernels.use_backend(backend):
        with torch.no_grad():
            logits, auxiliary = copy.deepcopy(net)(x, drop)
        want = textbook(net, x.double(), state, True, factors=drop.double())
        close(logits, want[0], 1e-4)
        close(auxiliary, want[1], 1e-4)
        net.eval()
        with torch.no_grad():
            tested = net(x)
        close(tested, textbook(net, x.double(), state, False)[0], 1e-4)
        close(net(x).detach(), tested.double(), 1e-4)  # with gradients asked for, it is not folded


@pytest.mark.parametrize("name", ["DARTS_V2", "NASNet"])
def test_imagenet(name):
    net = small(PUBLISHED[name], stem="imagenet")
    x, state = images(2, 224), doubles(net)
    for training in (True, False):
        net.train(training)
        with torch.no_grad():
            got = copy.deepcopy(net)(x)
        want = textbook(net, x.double(), state, training, imagenet=True)
        for g, w in zip(got if training else (got,), want, strict=False):
            close(g, w, 1e-4)


def test_gradients_and_running_statistics(isa):
    """Against double precision, beside the float32 reference, at inputs whose masks hardly flip."""
    net, x = small(auxiliary=False), images(16, 16)
    found = {}
    for backend in ("cpu", "reference"):
        own = copy.deepcopy(net)
        with kernels.use_backend(backend):
            (own(x) ** 2).mean().backward()
        found[backend] = {n: p.grad for n, p in own.named_parameters()}, dict(own.named_buffers())
    exact = copy.deepcopy(net).double()
    with kernels.use_backend("reference"):
        (exact(x.double()) ** 2).mean().backward()
    for name, p in exact.named_parameters():
        scale = float(p.grad.abs().max()) + 1e-9
        ours, theirs = (float((found[b][0][name].double() - p.grad).abs().max()) / scale for b in found)
        assert ours <= max(2e-3, 3 * theirs), name
    for name, t in exact.named_buffers():
        for backend in found:
            got = found[backend][1][name]
            torch.testing.assert_close(got.double(), t.double(), rtol=1e-5, atol=1e-6, msg=f"{backend} {name}")
            assert "tracked" in name or not torch.equal(got, dict(net.named_buffers())[name])


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", NAMES)
def test_it_has_the_parameters_that_are_counted(name, stem):
    more = {"channels": 6, "cells": 5, "classes": 7, "stem": stem}
    genotype = PUBLISHED[name]
    for auxiliary in (False, True):
        with torch.device("meta"):
            net = Network(genotype, **more, auxiliary=auxiliary)
        assert sum(p.numel() for p in net.parameters()) == genotype.params(**more, auxiliary=auxiliary)
    heads = sum(p.numel() for n, p in net.named_parameters() if n.startswith("auxiliary_head"))
    assert heads == genotype.params(**more, auxiliary=True) - genotype.params(**more)


@pytest.mark.parametrize(("stem", "size"), [("cifar", 32), ("imagenet", 224)])
def test_it_multiplies_as_often_as_is_counted(stem, size):
    genotype = PUBLISHED["AmoebaNet"]
    with torch.device("meta"), kernels.use_backend("reference"):
        net = Network(genotype, 6, 5, 7, stem).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, size, size))
    assert counter.get_total_flops() == 2 * genotype.macs(channels=6, cells=5, classes=7, stem=stem)


def test_the_whole_network_of_the_paper_has_the_published_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in Network(PUBLISHED["DARTS_V2"]).parameters()) == 3_349_342


def test_threads_leave_the_bytes_alone(one_thread):
    """Of the cells; the stem and the heads are PyTorch's."""
    g = torch.Generator().manual_seed(3)
    s0, s1 = (torch.randn(9, 12, 16, 16, generator=g) for _ in range(2))
    net = small(PUBLISHED["PC_DARTS_cifar"])
    drop = torch.rand(net.n_drop_paths, 9, generator=g).round()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        cell = copy.deepcopy(net.cells[0])
        out = cell(s0, s1, iter(drop))
        out.square().sum().backward()
        cell.eval()
        with torch.no_grad():
            found.append([out, cell(s0, s1, None), *(p.grad for p in cell.parameters()), *cell.buffers()])
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


def test_folded_weights_follow_the_parameters():
    net, x = small(auxiliary=False).eval(), images(2)
    with torch.no_grad():
        before = net(x)
        assert torch.equal(net(x), before)
        net.cells[0].ops[0][2].weight.mul_(2)
        assert not torch.equal(net(x), before)
        net.load_state_dict(small(auxiliary=False).state_dict())
        assert torch.equal(net(x), before)


def test_every_operator_can_be_trained():
    assert set(OPS) - {"none"} < set(TRAINED_OPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"genotype": "DARTS"}, "genotype: expected a Genotype, got str"),
        ({"channels": 5}, "channels: expected an even number"),
        ({"classes": 1}, "classes: expected a whole number of at least 2, got 1"),
        ({"cells": True}, "cells: expected a whole number of at least 1, got True"),
        ({"stem": "mnist"}, "stem: expected 'cifar' or 'imagenet', got 'mnist'"),
        ({"in_channels": 2}, "in_channels: expected 1 or 3, got 2"),
    ],
)
def test_wrong_networks(arguments, message):
    with pytest.raises(UsageError, match=message):
        Network(**{"genotype": MIXED} | arguments)


def test_wrong_images_and_paths():
    net = small()
    with pytest.raises(UsageError, match=r"images: expected shape \(B, 3, H, W\) with H and W divisible by 4"):
        net(torch.zeros(2, 3, 30, 32))
    with pytest.raises(UsageError, match=r"images: .* got \(2, 1, 32, 32\)"):
        net(torch.zeros(2, 1, 32, 32))
    with pytest.raises(UsageError, match=r"drop_path: expected shape \(\d+, 2\), got \(1, 2\)"):
        net(torch.zeros(2, 3, 32, 32), torch.ones(1, 2))


# -- NAS-Bench-201

ARCHITECTURE = Architecture.from_text("|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|avg_pool_3x3~1|none~2|")


def test_nats_network_written_out():
    torch.manual_seed(0)
    net = NatsNetwork(ARCHITECTURE, 5, 4, 1)
    cell = net.parts[2]
    x = images(3, 8)[:, :1].expand(3, 4, 8, 8)
    first = cell.ops[0](x)
    assert torch.equal(cell(x), F.avg_pool2d(first, 3, 1, 1, count_include_pad=False) + x)
    assert net(images()).shape == (6, 5)
    net.eval()
    with torch.no_grad():
        close(net(images()), net.double()(images().double()), 1e-4)


@pytest.mark.parametrize("text", [str(ARCHITECTURE), "|nor_conv_1x1~0|+|nor_conv_3x3~0|nor_conv_1x1~1|+"
                                  "|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"])  # fmt: skip
def test_nats_network_has_the_size_that_the_benchmark_tells(text):
    architecture = Architecture.from_text(text)
    with torch.device("meta"), kernels.use_backend("reference"):
        net = NatsNetwork(architecture).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, 32, 32))
    assert sum(p.numel() for p in net.parameters()) == architecture.params()
    assert counter.get_total_flops() == 2 * architecture.macs()


def test_wrong_nats_networks():
    with pytest.raises(UsageError, match="architecture: expected an Architecture, got str"):
        NatsNetwork(str(ARCHITECTURE))
    with pytest.raises(UsageError, match="cells: expected a whole number of at least 1, got 0"):
        NatsNetwork(ARCHITECTURE, cells=0)
    with pytest.raises(UsageError, match=r"images: .* got \(2, 1, 8, 8\)"):
        NatsNetwork(ARCHITECTURE)(torch.zeros(2, 1, 8, 8))
