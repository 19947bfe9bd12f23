"""The processes that torchrun started: who this one is, and texts and sums from all of them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UsageError


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `world`."""

    rank: int = 0
    world: int = 1

    def shards(self, asked: int | None) -> int:
        """Into how many parts a batch is cut: as asked, or one for each process; raises UsageError."""
        parts = self.world if asked is None else asked
        if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1 or parts % self.world:
            raise UsageError(f"shards: expected a multiple of the {self.world} processes, got {parts!r}")
        return parts

    def own(self, parts: int) -> range:
        """Of `parts` things, a multiple of `world`, those that this process cares for."""
        each = parts // self.world
        return range(self.rank * each, (self.rank + 1) * each)

    def total(self, rows: Tensor) -> Tensor:
        """The sum (n) of all processes' rows (R, n) in their order: the same bytes, however many share them."""
        if self.world > 1:
            from torch import distributed

            boxes = [torch.empty_like(rows) for _ in range(self.world)]
            distributed.all_gather(boxes, rows)
            rows = torch.cat(boxes)
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        return total

    def gather(self, texts: Sequence[str]) -> list[str]:
        """The texts of all processes, process after process; every one of them must call it."""
        if self.world == 1:
            return list(texts)
        from torch import distributed

        own = bytearray(b"\0".join(text.encode() for text in texts))
        sizes = [torch.zeros(2, dtype=torch.int64) for _ in range(self.world)]
        distributed.all_gather(sizes, torch.tensor([len(own), len(texts)]))
        room = max(1, *(int(size[0]) for size in sizes))
        boxes = [torch.zeros(room, dtype=torch.uint8) for _ in range(self.world)]
        distributed.all_gather(boxes, torch.frombuffer(own.ljust(room, b"\0"), dtype=torch.uint8))
        found: list[str] = []
        for box, (length, count) in zip(boxes, (size.tolist() for size in sizes), strict=True):
            parts = box[:length].numpy().tobytes().split(b"\0")
            found += [part.decode() for part in parts[:count]]
        return found


ALONE = Ranks()


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Within the block the processes are joined, over gloo; outside torchrun there is one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world < 2:
        yield ALONE
        return
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    joined = distributed.is_initialized()
    if not joined:
        store, rank, _ = next(rendezvous("env://"))
        # torchrun may keep its store over a restart, with the addresses of the processes that are gone
        store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        if not joined:
            distributed.destroy_process_group()
