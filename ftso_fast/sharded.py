"""A search whose batches are cut into shards, which torchrun's processes share out."""

import torch
from torch import Tensor

from .config import SearchConfig
from .data import Batch
from .errors import DataError
from .ranks import Ranks
from .run import Run
from .unrolled import Searchable


class ShardedRun(Run):
    """`Run`, each shard with batch norm of its own: losses and gradients are averages over a batch's images.

    Shards are added up in their order, so that one process that computes all of them ends with the same bytes.
    """

    def __init__(self, net: Searchable, config: SearchConfig, shards: int, ranks: Ranks) -> None:
        super().__init__(net, config)
        self.shards, self.ranks = shards, ranks

    def gradient_of(self, batch: Batch, wanted: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """`Run.gradient_of`, on every process; raises DataError where a batch has fewer images than shards."""
        n = len(batch.labels)
        if n < self.shards:
            raise DataError(
                f"shards: a batch of {n} images cannot be cut into {self.shards} parts: take larger batches"
            )
        parts = list(zip(batch.images.tensor_split(self.shards), batch.labels.tensor_split(self.shards), strict=True))
        rows = []
        for images, labels in (parts[i] for i in self.ranks.own(self.shards)):
            loss, grads = super().gradient_of(Batch(images, labels), wanted)
            rows.append(torch.cat([loss.detach().view(1), *(g.flatten() for g in grads)]) * (len(labels) / n))
        loss, *found = self.ranks.total(torch.stack(rows)).split([1, *(w.numel() for w in wanted)])
        return loss[0], [g.view_as(w) for g, w in zip(found, wanted, strict=True)]
