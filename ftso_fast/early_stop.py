"""DARTS-ES: stop a search where the dominant eigenvalue grows, and go back to the architecture before it did.

With l(e) the mean of the eigenvalues of the 2r + 1 = 5 epochs around e, a search whose l(e) > 1.3 l(e - 4) returns to
the architecture of epoch e - 4, from epoch 10 on. Source: Zela et al., Understanding and Robustifying DARTS, 2020,
section 4.3, with the constants of its published code.
"""

from dataclasses import dataclass, field

from torch import Tensor

from .data import Batch
from .hessian import largest
from .unrolled import Searchable


@dataclass
class EarlyStop:
    """The eigenvalues of the epochs so far, and the architecture after each. weight_decay: added to the diagonal."""

    weight_decay: float = 0.0
    window: int = 5
    factor: float = 1.3
    delta: int = 4
    start: int = 10
    eigenvalues: list[float] = field(default_factory=list)
    kept: list[list[Tensor]] = field(default_factory=list)
    stopped_at: int | None = None

    def epoch(self, net: Searchable, batch: Batch) -> bool:
        """Take note of an epoch's end; True where the search is over, its architecture then taken back."""
        self.eigenvalues.append(largest(net, batch) + self.weight_decay)
        self.kept.append([t.detach().clone() for t in net.arch_parameters()])
        self.stopped_at = self.back_to()
        if self.stopped_at is None:
            return False
        for t, before in zip(net.arch_parameters(), self.kept[self.stopped_at], strict=True):
            t.detach().copy_(before)
        return True

    def back_to(self) -> int | None:
        """The epoch (from 0) to return to, if its time has come."""
        now = len(self.eigenvalues) - 1 - self.window // 2
        before = now - self.delta
        if before < max(self.start, self.window // 2) or self.local(now) <= self.factor * self.local(before):
            return None
        return before

    def local(self, epoch: int) -> float:
        """The mean of the window around an epoch."""
        half = self.window // 2
        return sum(self.eigenvalues[epoch - half : epoch + half + 1]) / self.window
