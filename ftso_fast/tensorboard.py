"""A callback of `evaluate` that writes TensorBoard's event files."""

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

from .errors import UsageError

SCALARS = ("train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "eval_top5", "lr")


def tensorboard(folder: str | PathLike[str]) -> Callable[[Mapping[str, Any]], None]:
    """Losses, accuracies and learning rate of every epoch, by step, for `tensorboard --logdir folder`.

    Raises UsageError where the package tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("tensorboard: is not installed: run pip install tensorboard") from None
    writer = SummaryWriter(str(folder))

    def write(event: Mapping[str, Any]) -> None:
        for name in SCALARS:
            writer.add_scalar(name, event[name], event["step"])
        writer.flush()

    return write
