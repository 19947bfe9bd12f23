"""A step of the network that is trained with a genotype, and its inference, on one arm.

20 cells, 36 channels, auxiliary head, every edge a 3x3 separable convolution, drop path, 96 images of 3x32x32; loss,
backward, clipping and SGD included.
"""

import copy
from typing import Any

import torch
from measure import Found, memory_mb, prepared, repeat, sample, seconds_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ftso_fast import Genotype, Network
from ftso_fast.operations import Fused
from ftso_fast.optimizer import SGD, clip_norm

BATCH, CLASSES = 96, 10
TOPOLOGY = ((0, 1), (0, 2), (1, 2), (0, 3))
GENOTYPE = Genotype.from_topology(TOPOLOGY, TOPOLOGY, "sep_conv_3x3")
SHALLOW = 2
TRAINING = {"loss": 1e-5, "weight": 5e-2}
DEEP = {"loss": 2e-3}
INFERENCE = {"logits": 1e-3}
"""As `measure.NETWORK`. Through twenty untrained cells rounding grows until masks flip everywhere: two layouts of plain
PyTorch differ by 2e-4 in the loss and by half of a gradient there. Gradients are compared through SHALLOW cells."""


class Training:
    """One batch, trained on again and again."""

    def __init__(self, arm: str, batch: int = BATCH, channels: int = 36, cells: int = 20) -> None:
        torch.manual_seed(0)
        self.net = prepared(Network(GENOTYPE, channels, cells, CLASSES, auxiliary=True), arm)
        g = torch.Generator().manual_seed(2)
        images = torch.randn(batch, 3, 32, 32, generator=g)
        self.images = images.to(memory_format=torch.channels_last) if arm == "channels_last" else images
        self.labels = torch.randint(CLASSES, (batch,), generator=g)
        self.drop_path = (torch.rand(self.net.n_drop_paths, batch, generator=g) < 0.8) / 0.8
        self.weights = list(self.net.parameters())
        self.sgd = SGD(self.weights, 0.9, 3e-4)
        self.losses: list[float] = []

    def step(self) -> None:
        logits, auxiliary = self.net(self.images, self.drop_path)
        loss = F.cross_entropy(logits, self.labels) + 0.4 * F.cross_entropy(auxiliary, self.labels)
        grads = list(torch.autograd.grad(loss, self.weights))
        clip_norm(grads, 5.0)
        self.sgd.step(grads, 0.025)
        self.losses.append(float(loss.detach()))

    def saved_mb(self) -> float:
        """What autograd keeps of the forward pass, each memory once, the parameters and the images left out."""
        kept: dict[int, int] = {}
        known = {t.untyped_storage().data_ptr() for t in (*self.weights, *self.net.buffers(), self.images)}

        def keep(t: Tensor) -> Tensor:
            at = t.untyped_storage()
            if at.data_ptr() not in known:
                kept[at.data_ptr()] = at.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            held = self.net(self.images, self.drop_path)
        del held
        return sum(kept.values()) / 1e6


def folded_by_torch(net: nn.Module) -> nn.Module:
    """For inference a peer has its batch norms folded as well, by PyTorch's own means."""
    for name, child in net.named_children():
        if isinstance(child, Fused | nn.Sequential):
            parts = list(child)
            for i in range(len(parts) - 1):
                if isinstance(parts[i], nn.Conv2d) and isinstance(parts[i + 1], nn.BatchNorm2d):
                    parts[i : i + 2] = [fuse_conv_bn_eval(parts[i], parts[i + 1]), nn.Identity()]
            setattr(net, name, nn.Sequential(*(p for p in parts if not isinstance(p, nn.Identity))))
        else:
            folded_by_torch(child)
    return net


def training(arm: str, found: Found) -> None:
    """The first step from cold, with the memory that it takes over import and data; then warm ones."""
    before = memory_mb("VmRSS")
    state = Training(arm)
    found.seconds["first training step"] = [seconds_of(state.step)]
    found.more["peak MB"] = memory_mb("VmHWM") - before
    found.gate("training step", {"loss": state.losses[:1]}, DEEP)
    shallow = Training(arm, cells=SHALLOW)
    shallow.step()
    directions = sample(shallow.sgd.velocity or [], 64)
    values = {"loss": shallow.losses} | {f"weight {name}": v for name, v in directions.items()}
    found.gate("training step, two cells", values, TRAINING)
    found.seconds |= repeat({"training step": state.step}, budget=8.0, most=10)
    found.more["saved MB"] = state.saved_mb() if arm != "compile" else 0.0


def inference(arm: str, found: Found) -> None:
    """Logits of a batch in evaluation mode."""
    net, images = inferring(arm)
    with torch.no_grad():
        logits = net(images)
        found.gate("inference", {"logits": logits.flatten().tolist()}, INFERENCE)
        found.seconds |= repeat({"network inference": lambda: net(images)}, budget=4.0)


def inferring(arm: str, **sizes: Any) -> tuple[nn.Module, Tensor]:
    state = Training("eager", **sizes)
    net: nn.Module = copy.deepcopy(state.net).eval()
    g = torch.Generator().manual_seed(3)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1, generator=g)  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 1.5, generator=g)  # type: ignore[union-attr]
    if not arm.startswith("cpu"):
        net = prepared(folded_by_torch(net), arm)
    layout = torch.channels_last if arm == "channels_last" else torch.contiguous_format
    return net, state.images.to(memory_format=layout)
