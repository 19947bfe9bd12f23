"""The skip-only super-network once more, edge by edge as the equations have it. Shares no code with the package.

Nothing is taken out of a sum and nothing is computed once for several edges: every edge slices, reduces or passes,
concatenates, shuffles and is weighted by itself.
"""

import torch
from torch.nn import functional as F

NODES = 4


def normalise(x):
    """Batch norm without affine on the statistics of the batch (biased variance, eps 1e-5)."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def relu_conv_bn(x, weight):
    """ReLU, 1x1 convolution, batch norm."""
    return normalise(F.conv2d(x.relu(), weight))


def factorized_reduce(x, weight_1, weight_2):
    """ReLU; every second pixel from (0, 0) through one 1x1 convolution, from (1, 1) through another; batch norm."""
    x = x.relu()
    even, odd = x[:, :, 0::2, 0::2], x[:, :, 1::2, 1::2]
    return normalise(torch.cat((F.conv2d(even, weight_1), F.conv2d(odd, weight_2)), 1))


def shuffle(x, k):
    """out[c*k + g] = in[g*(C/k) + c]."""
    C = x.shape[1]
    source = [0] * C
    for g in range(k):
        for c in range(C // k):
            source[c * k + g] = g * (C // k) + c
    return x[:, source]


def edge(x, k, reduce_weights):
    """One skip connection behind partial channels; `reduce_weights` is None at stride 1, else two weights."""
    C = x.shape[1]
    processed, bypass = x[:, : C // k], x[:, C // k :]
    if reduce_weights is not None:
        processed = factorized_reduce(processed, *reduce_weights)
        if k > 1:  # at k = 1 nothing is bypassed, and torch refuses to pool no channels
            bypass = F.max_pool2d(bypass, 2, 2)
    mixed = processed if k == 1 else torch.cat((processed, bypass), 1)
    return shuffle(mixed, k)


def logits(images, weights, beta_normal, beta_reduce, *, layers, k):
    """Images (B, channels, H, W) to (B, classes); `weights` flat in PC-DARTS' order of parameters."""
    take = iter(weights)
    x = F.conv2d(images, next(take), padding=1)
    s0 = s1 = normalise(x) * next(take).view(1, -1, 1, 1) + next(take).view(1, -1, 1, 1)
    reduced_before = False
    for i in range(layers):
        reduction = i in (layers // 3, 2 * layers // 3)
        x0 = factorized_reduce(s0, next(take), next(take)) if reduced_before else relu_conv_bn(s0, next(take))
        states = [x0, relu_conv_bn(s1, next(take))]
        beta = beta_reduce if reduction else beta_normal
        at = 0
        for _ in range(NODES):
            share = torch.softmax(beta[at : at + len(states)], 0)
            at += len(states)
            node = 0
            for j, state in enumerate(states):
                own = (next(take), next(take)) if reduction and j < 2 else None
                node = node + share[j] * edge(state, k, own)
            states.append(node)
        s0, s1 = s1, torch.cat(states[2:], 1)
        reduced_before = reduction
    out = s1.mean((2, 3)) @ next(take).T + next(take)
    assert next(take, None) is None, "weights left over"
    return out


def gradients(images, labels, weights, beta_normal, beta_reduce, *, layers, k):
    """[loss, gradient of each beta vector, gradient of each weight]."""
    leaves = [t.detach().double().requires_grad_() for t in (beta_normal, beta_reduce, *weights)]
    normal, reduce, *rest = leaves
    out = logits(images.double(), rest, normal, reduce, layers=layers, k=k)
    loss = (out.logsumexp(1) - out[torch.arange(len(labels)), labels]).mean()
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]
