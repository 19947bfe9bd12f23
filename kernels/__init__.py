"""The operations of the search, each with a plain PyTorch reference and compiled backends."""

from ._backend import (
    BACKENDS,
    BackendError,
    Launch,
    available_isas,
    backends,
    calls,
    choose,
    isa,
    lacks,
    requested,
    trace,
    use_backend,
    use_isa,
)
from ._memory import room
from .crops import cropped
from .folded_conv import fold_batch_norm, folded_conv
from .mixed_cell import mixed_cell, strides_of
from .node_sum import node_sum
from .partial_mix import mixed_weights, partial_mix
from .relu_conv_bn import factorized_reduce, relu_conv_bn
from .search_step import SearchStep, zeros_in_one_piece
from .sep_conv import dil_conv, sep_conv
from .skip_cell import channel_shuffle, skip_cell
from .skip_net import PRECISIONS, NetSpec, cannot, flat_weights, release_memory, skip_net

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "BackendError",
    "Launch",
    "NetSpec",
    "SearchStep",
    "available_isas",
    "backends",
    "calls",
    "cannot",
    "channel_shuffle",
    "choose",
    "cropped",
    "dil_conv",
    "factorized_reduce",
    "flat_weights",
    "fold_batch_norm",
    "folded_conv",
    "isa",
    "lacks",
    "mixed_cell",
    "mixed_weights",
    "node_sum",
    "partial_mix",
    "release_memory",
    "relu_conv_bn",
    "requested",
    "room",
    "sep_conv",
    "skip_cell",
    "skip_net",
    "strides_of",
    "trace",
    "use_backend",
    "use_isa",
    "zeros_in_one_piece",
]
