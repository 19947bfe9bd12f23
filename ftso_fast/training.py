"""A network being trained: its steps, what of it is random, and its state from which it goes on byte for byte.

A global batch is cut into `shards`, each with batch norm of its own: gradients are their average, running statistics
the average of what each alone would have made of the old ones. Processes of torchrun share the shards out; one process
that computes all of them ends with the same weights.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from .augment import draws
from .batch import Batch
from .errors import NumericalError
from .image_set import ImageSet
from .network import Network
from .optimizer import SGD, clip_norm
from .ranks import ALONE, Ranks
from .recipes import Recipe

DROP_PATH = 6
"""Stream of random numbers, behind those of `image_set`."""
Indexed = tuple[NDArray[np.int64], Batch]


@dataclass
class Tally:
    """What an epoch has seen so far."""

    loss: float = 0.0
    correct: int = 0
    images: int = 0
    waited: float = field(default=0.0, compare=False)
    seconds: float = field(default=0.0, compare=False)


class Training:
    """The network, its optimizer, and where in the recipe it is: `step` counts global batches from the beginning."""

    def __init__(
        self, net: Network, recipe: Recipe, seed: int, shards: int, ranks: Ranks = ALONE, bf16: bool = False
    ) -> None:  # fmt: skip
        self.net, self.recipe, self.seed, self.shards = net, recipe, seed, shards
        self.ranks, self.bf16 = ranks, bf16
        self.step, self.tally = 0, Tally()
        self.named = dict(net.named_parameters())
        self.weights = list(self.named.values())
        self.buffers = list(net.buffers())
        self.running = [b for b in self.buffers if b.is_floating_point()]
        self.sgd = SGD(self.weights, recipe.momentum, recipe.weight_decay)
        self.forward: nn.Module = net
        if self.ranks.world > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch have a second name for it
                self.forward = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)

    def epoch(self, data: ImageSet, workers: int) -> Iterator[int]:
        """Train to the end of the epoch that `step` is in; yields the step after each."""
        per_epoch = data.n_batches(self.recipe.batch_size, self.shards)
        epoch, first = divmod(self.step, per_epoch)
        self.net.train()
        own = [
            data.training_batches(
                seed=self.seed,
                epoch=epoch,
                batch_size=self.recipe.batch_size,
                augmentation=self.recipe.augmentation,
                cutout=self.recipe.cutout,
                first=first,
                part=(shard, self.shards),
                workers=workers,
            )
            for shard in self.ranks.own(self.shards)
        ]
        start = time.perf_counter()
        for pieces in zip(*own, strict=True):
            waited = time.perf_counter() - start
            self._step(pieces, epoch)
            self.step += 1
            self.tally.waited += waited
            self.tally.seconds += time.perf_counter() - start
            yield self.step
            start = time.perf_counter()

    def _step(self, pieces: Sequence[Indexed], epoch: int) -> None:
        before = _copies(self.buffers) if len(pieces) > 1 else []
        after: list[Tensor] = []
        sums = torch.zeros(3, dtype=torch.float64)
        for number, (index, batch) in enumerate(pieces):
            for b, old in zip(self.buffers, before, strict=bool(before)):
                b.copy_(old)
            with self._alone(number + 1 < len(pieces)):
                loss, logits = self._loss(index, batch, epoch)
                loss.backward()
            hits = (logits.argmax(1) == batch.labels).sum()
            sums += torch.tensor([float(loss.detach()) * len(batch.labels), float(hits), len(batch.labels)])
            if before:
                after = [a + b for a, b in zip(after, self.running, strict=True)] if number else _copies(self.running)
        grads = [_gradient(w) for w in self.weights]
        if len(pieces) > 1:
            torch._foreach_mul_(grads, 1 / len(pieces))
            for b, total in zip(self.running, after, strict=True):
                b.copy_(total.div_(len(pieces)))
        self._share(sums)
        norm = clip_norm(grads, self.recipe.grad_clip)
        if not (sums.isfinite().all() and norm.isfinite()):
            what = "loss" if not sums.isfinite().all() else "gradient"
            raise NumericalError(
                f"training: the {what} of step {self.step} (epoch {epoch}) is not finite: lower the learning rate "
                f"({self.recipe.rate(epoch):g} there), or look at the images"
            )
        self.sgd.step(grads, self.recipe.rate(epoch))
        for w in self.weights:
            w.grad = None
        self.tally.loss += float(sums[0])
        self.tally.correct += int(sums[1])
        self.tally.images += int(sums[2])

    def _alone(self, not_yet: bool) -> AbstractContextManager[Any]:
        """Within the block gradients stay in this process, where another shard is to come."""
        if not_yet and isinstance(self.forward, nn.parallel.DistributedDataParallel):
            return self.forward.no_sync()
        return nullcontext()

    def _share(self, sums: Tensor) -> None:
        """What the processes have to know of each other, beside the gradients."""
        if self.ranks.world > 1:
            dist.all_reduce(sums)
            flat = torch.cat([b.flatten() for b in self.running])
            dist.all_reduce(flat)
            flat /= self.ranks.world
            for b, part in zip(self.running, flat.split([b.numel() for b in self.running]), strict=True):
                b.copy_(part.view_as(b))

    def _loss(self, index: NDArray[np.int64], batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        smooth = self.recipe.label_smoothing
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            found = self.forward(batch.images, self.drop_path(index, epoch))
        if not isinstance(found, tuple):
            return F.cross_entropy(found.float(), batch.labels, label_smoothing=smooth), found
        logits, auxiliary = (z.float() for z in found)
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=smooth)
        aside = F.cross_entropy(auxiliary, batch.labels, label_smoothing=smooth)
        return loss + self.recipe.auxiliary_weight * aside, logits

    def drop_path(self, index: NDArray[np.int64], epoch: int) -> Tensor | None:
        """(paths, B): 0 or 1/(1 - p), drawn for each image and operator; None where p is 0."""
        p, n = self.recipe.dropped(epoch), self.net.n_drop_paths
        if not p or not n:
            return None
        keys = index[None, :] * n + np.arange(n)[:, None]
        bits = draws(self.seed, DROP_PATH, epoch, keys.ravel()).reshape(keys.shape)
        kept = (bits >> np.uint64(11)).astype(np.float64) / (1 << 53) >= p
        return torch.from_numpy(kept / (1 - p)).to(torch.float32)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, buffers and velocities."""
        found = {f"network.{name}": t for name, t in self.net.state_dict().items()}
        velocity = self.sgd.velocity or []
        return found | {f"velocity.{name}": v for name, v in zip(self.named, velocity, strict=bool(velocity))}

    def load(self, tensors: dict[str, Tensor], step: int, tally: Tally) -> None:
        """Go on from what `tensors` gave."""
        own = {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
        self.net.load_state_dict(own)
        moved = [tensors[f"velocity.{name}"] for name in self.named if f"velocity.{name}" in tensors]
        self.sgd.velocity = moved or None
        self.step, self.tally = step, tally


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def _gradient(w: Tensor) -> Tensor:
    """Zeros where nothing that is looked at depends on w: a genotype may leave a node unread."""
    return torch.zeros_like(w) if w.grad is None else w.grad


@torch.no_grad()
def measured(
    net: nn.Module, data: ImageSet, batch_size: int, augmentation: str = "cifar", bf16: bool = False
) -> dict[str, float]:  # fmt: skip
    """Loss, and the shares of images whose class is the likeliest, or among the five likeliest, by evaluation mode;
    bf16: with convolutions and products in bfloat16."""
    net.eval()
    loss, first, five = 0.0, 0, 0
    for batch in data.test_batches(batch_size, augmentation):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = net(batch.images).float()
        loss += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
        ranks = (logits > logits.gather(1, batch.labels[:, None])).sum(1)
        first, five = first + int((ranks < 1).sum()), five + int((ranks < 5).sum())
    n = len(data)
    if not np.isfinite(loss):
        raise NumericalError("testing: the loss is not finite: lower the learning rate")
    return {"loss": loss / n, "accuracy": first / n, "top5": five / n}


def told(found: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """What process 0 found, on every process."""
    if ranks.world == 1:
        return found
    values = torch.tensor(list(found.values()), dtype=torch.float64)
    dist.broadcast(values, 0)
    return dict(zip(found, values.tolist(), strict=True))
