"""What commands share: the progress bar, and arguments that are a text or a file of it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..config import PRESETS, SearchConfig
from ..errors import DataError, UsageError
from ..genotype import Genotype
from ..published import PUBLISHED

if TYPE_CHECKING:
    from ..run import Progress


@contextmanager
def progress_bar(what: str) -> Iterator["Progress | None"]:
    """A progress bar on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def preset(name: str | None) -> SearchConfig | None:
    """The settings of that name."""
    if name not in (None, *PRESETS):
        raise UsageError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name] if name else None


def use_threads(n: int | None) -> None:
    """So many, if a number is given."""
    if n is None:
        return
    if n < 1:
        raise UsageError(f"threads: expected a positive number, got {n}")
    import torch

    torch.set_num_threads(n)


def genotype_named(argument: str) -> Genotype:
    """A published genotype of that name, or what its text, its JSON or a file of either says."""
    return PUBLISHED.get(argument) or Genotype.read(text_or_file(argument))


def text_or_file(argument: str) -> str | bytes:
    if "(" in argument or "{" in argument:
        return argument
    try:
        with open(argument, "rb") as file:
            return file.read(1 << 20)
    except (OSError, ValueError) as error:
        raise DataError(
            f"genotype: {argument!r} is neither a genotype nor a file that can be read "
            f"({getattr(error, 'strerror', None) or error}): give Genotype(...) text, its JSON, or such a file"
        ) from None
