"""Networks, batches and gradients that the tests of the super-network and of its kernels share."""

import torch
from torch.nn import functional as F

from ftso_fast import SuperNet

NODES = ((0, 2), (2, 5), (5, 9), (9, 14))
SPREAD = 0.3


def net_of(seed, **sizes):
    """A float64 network with betas of spread 0.3 and a random affine batch norm in the stem."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SuperNet(**sizes).double()
        with torch.no_grad():
            for betas in net.betas():
                betas.normal_(0, SPREAD)
            net.stem[1].weight.uniform_(0.5, 1.5)
            net.stem[1].bias.normal_(0, 0.5)
    return net


def batch_of(seed, shape, classes):
    """Noise whose channels differ in mean and deviation, and labels."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(shape, generator=g, dtype=torch.float64)
    scale = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)[: shape[1]].view(1, -1, 1, 1)
    return images * scale + scale - 1, torch.randint(classes, shape[:1], generator=g)


def gradients(net, images, labels, inputs):
    """[loss, gradient of each input], the loss in float64 whatever the network computes in."""
    loss = F.cross_entropy(net(images).double(), labels)
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True))]
