"""The super-network over any operators once more, operator by operator. Shares no code with the package.

Nothing is taken out of a sum: every edge slices, runs each of its operators, weighs and adds them, concatenates,
shuffles and is weighed by itself. Convolutions and pools are written as sums over the window.
"""

import torch
from torch.nn import functional as F

KINDS = {"sep_conv_3x3": 3, "sep_conv_5x5": 5, "dil_conv_3x3": 3, "dil_conv_5x5": 5}


def normalise(x):
    """Batch norm without affine on the statistics of the batch (biased variance, eps 1e-5)."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def pointwise(x, weight):
    return torch.einsum("bchw,oc->bohw", x, weight[:, :, 0, 0])


def windows(x, K, stride, dilation, fill):
    """(B, C, H', W', K*K): what a window of size K sees around every stride-th pixel, `fill` beyond the border."""
    reach = dilation * (K // 2)
    H, W = x.shape[2:]
    padded = F.pad(x, [reach] * 4, value=fill)
    steps = [dilation * i for i in range(K)]
    return torch.stack([padded[:, :, i : i + H : stride, j : j + W : stride] for i in steps for j in steps], -1)


def separable(x, depthwise, pointwise_weight, stride, dilation):
    K = depthwise.shape[-1]
    seen = windows(x.relu(), K, stride, dilation, 0.0)
    return normalise(pointwise((seen * depthwise.reshape(1, -1, 1, 1, K * K)).sum(-1), pointwise_weight))


def reduce(x, weight_1, weight_2):
    x = x.relu()
    return normalise(torch.cat((pointwise(x[:, :, 0::2, 0::2], weight_1), pointwise(x[:, :, 1::2, 1::2], weight_2)), 1))


def operator(name, x, stride, take):
    if name == "none":
        return 0 * x[:, :, ::stride, ::stride]
    if name == "skip_connect":
        return x if stride == 1 else reduce(x, next(take), next(take))
    if name == "max_pool_3x3":
        return normalise(windows(x, 3, stride, 1, -torch.inf).amax(-1))
    if name == "avg_pool_3x3":
        there = windows(torch.ones_like(x), 3, stride, 1, 0.0).sum(-1)
        return normalise(windows(x, 3, stride, 1, 0.0).sum(-1) / there)
    if name.startswith("dil"):
        return separable(x, next(take), next(take), stride, 2)
    return separable(separable(x, next(take), next(take), stride, 1), next(take), next(take), 1, 1)


def shuffle(x, k):
    """out[c*k + g] = in[g*(C/k) + c]."""
    n = x.shape[1] // k
    return x[:, [g * n + c for c in range(n) for g in range(k)]]


def edge(x, stride, k, operators, shares, take):
    C = x.shape[1]
    processed, bypass = x[:, : C // k], x[:, C // k :]
    mixed = 0
    for o, name in enumerate(operators):
        mixed = mixed + shares[o] * operator(name, processed, stride, take)
    if k > 1:
        bypass = bypass if stride == 1 else F.max_pool2d(bypass, 2, 2)
        mixed = shuffle(torch.cat((mixed, bypass), 1), k)
    return mixed


def logits(images, weights, arch, operators, topology, *, layers, k):
    """Images to logits; weights flat in PC-DARTS' order, arch: {'betas_normal': ..., 'alphas_reduce': ...} or fewer.

    Without betas every edge weighs 1, without alphas the only operator does.
    """
    take = iter(weights)
    x = F.conv2d(images, next(take), padding=1)
    s0 = s1 = normalise(x) * next(take).view(1, -1, 1, 1) + next(take).view(1, -1, 1, 1)
    reduced_before = False
    for i in range(layers):
        cell = "reduce" if i in (layers // 3, 2 * layers // 3) else "normal"
        x0 = reduce(s0, next(take), next(take)) if reduced_before else normalise(pointwise(s0.relu(), next(take)))
        states = [x0, normalise(pointwise(s1.relu(), next(take)))]
        betas, alphas = arch.get(f"betas_{cell}"), arch.get(f"alphas_{cell}")
        at = 0
        for sources in topology[cell]:
            node = 0
            for e, j in enumerate(sources, at):
                beta = 1 if betas is None else betas[e].exp() / betas[at : at + len(sources)].exp().sum()
                shares = [1] if alphas is None else alphas[e].exp() / alphas[e].exp().sum()
                stride = 2 if cell == "reduce" and j < 2 else 1
                node = node + beta * edge(states[j], stride, k, operators, shares, take)
            at += len(sources)
            states.append(node)
        s0, s1 = s1, torch.cat(states[2:], 1)
        reduced_before = cell == "reduce"
    out = s1.mean((2, 3)) @ next(take).T + next(take)
    assert next(take, None) is None, "weights left over"
    return out


def gradients(images, labels, weights, arch, *setting, **sizes):
    """[loss, gradient of each architecture tensor, gradient of each weight]."""
    arch = {name: t.detach().clone().requires_grad_() for name, t in arch.items()}
    weights = [w.detach().clone().requires_grad_() for w in weights]
    out = logits(images, weights, arch, *setting, **sizes)
    loss = (out.logsumexp(1) - out[torch.arange(len(labels)), labels]).mean()
    return [loss.detach(), *torch.autograd.grad(loss, [*arch.values(), *weights])]
