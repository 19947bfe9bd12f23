"""The operations of the search, each with a plain PyTorch reference and compiled backends."""

from ._backend import (
    BACKENDS,
    BackendError,
    available_isas,
    backends,
    calls,
    isa,
    requested,
    use_backend,
    use_isa,
)
from .skip_cell import channel_shuffle, skip_cell

__all__ = [
    "BACKENDS",
    "BackendError",
    "available_isas",
    "backends",
    "calls",
    "channel_shuffle",
    "isa",
    "requested",
    "skip_cell",
    "use_backend",
    "use_isa",
]
