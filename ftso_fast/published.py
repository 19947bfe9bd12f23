"""Genotypes that others published, under the names of the releases that they come from. No torch import.

NASNet (Zoph et al., 2018) and AmoebaNet (Real et al., 2019) as DARTS' release states them; DARTS_V1 and DARTS_V2 from
that release (Liu et al., 2019), PDARTS from P-DARTS' (Chen et al., 2019), PC_DARTS_cifar and PC_DARTS_image from
PC-DARTS' (Xu et al., 2020). ENAS (Pham et al., 2018) is the `fixed_arc` of its release's cifar10_micro_final.sh, PNAS
(Liu et al., 2018) the cell of the release PNASNet.pytorch, normal and reduction alike; both were trained in networks of
their own, so the counts that their papers state are not those of ours. SNAS (Xie et al., 2019) as other searches' files
of genotypes state it; its counts are the 2.66 M parameters and 422 M multiply-adds that are quoted for it.

BayesNAS (Zhou et al., 2019) has none: the cells of its release join up to five operators in a node and several on one
edge, which no genotype of two edges a node can state.
"""

from .genotype import Genotype

_SHORT = {
    "max": "max_pool_3x3",
    "avg": "avg_pool_3x3",
    "skip": "skip_connect",
    "sep3": "sep_conv_3x3",
    "sep5": "sep_conv_5x5",
    "sep7": "sep_conv_7x7",
    "dil3": "dil_conv_3x3",
    "dil5": "dil_conv_5x5",
    "7x1": "conv_7x1_1x7",
}


def _genotype(
    normal: str, reduce: str, normal_concat: range = range(2, 6), reduce_concat: tuple[int, ...] = (2, 3, 4, 5)
) -> Genotype:
    """From edges written as `operator input`."""
    cells = []
    for words in (normal.split(), reduce.split()):
        cells.append([(_SHORT[op], int(state)) for op, state in zip(words[::2], words[1::2], strict=True)])
    return Genotype(cells[0], normal_concat, cells[1], reduce_concat)


PUBLISHED = {
    "NASNet": _genotype(
        "sep5 1 sep3 0  sep5 0 sep3 0  avg 1 skip 0  avg 0 avg 0  sep3 1 skip 1",
        "sep5 1 sep7 0  max 1 sep7 0  avg 1 sep5 0  skip 3 avg 2  sep3 2 max 1",
        range(2, 7),
        (4, 5, 6),
    ),
    "AmoebaNet": _genotype(
        "avg 0 max 1  sep3 0 sep5 2  sep3 0 avg 3  sep3 1 skip 1  skip 0 avg 1",
        "avg 0 sep3 1  max 0 sep7 2  sep7 0 avg 1  max 0 max 1  7x1 0 sep3 5",
        range(4, 7),
        (3, 4, 6),
    ),
    "ENAS": _genotype(
        "avg 0 sep3 0  skip 0 sep5 0  skip 0 sep5 1  sep3 1 sep5 0  avg 0 sep5 1",
        "sep3 1 sep3 1  max 0 avg 0  sep5 1 sep5 3  sep3 1 skip 0  max 0 sep5 1",
        range(2, 7),
        (2, 4, 5, 6),
    ),
    "PNAS": _genotype(
        "sep5 0 max 0  sep7 1 max 1  sep5 1 sep3 1  sep3 4 max 1  sep3 0 skip 1",
        "sep5 0 max 0  sep7 1 max 1  sep5 1 sep3 1  sep3 4 max 1  sep3 0 skip 1",
        range(2, 7),
        (2, 3, 4, 5, 6),
    ),
    "DARTS_V1": _genotype(
        "sep3 1 sep3 0  skip 0 sep3 1  skip 0 sep3 1  sep3 0 skip 2",
        "max 0 max 1  skip 2 max 0  max 0 skip 2  skip 2 avg 0",
    ),
    "DARTS_V2": _genotype(
        "sep3 0 sep3 1  sep3 0 sep3 1  sep3 1 skip 0  skip 0 dil3 2",
        "max 0 max 1  skip 2 max 1  max 0 skip 2  skip 2 max 1",
    ),
    "SNAS": _genotype(
        "sep3 0 sep3 1  skip 0 dil3 1  skip 1 skip 0  skip 0 sep3 1",
        "max 0 max 1  max 1 skip 2  skip 2 max 1  max 0 dil5 2",
    ),
    "PDARTS": _genotype(
        "skip 0 dil3 1  skip 0 sep3 1  sep3 1 sep3 3  sep3 0 dil5 4",
        "avg 0 sep5 1  sep3 0 dil5 2  max 0 dil3 1  dil3 1 dil5 3",
    ),
    "PC_DARTS_cifar": _genotype(
        "sep3 1 skip 0  sep3 0 dil3 1  sep5 0 sep3 1  avg 0 dil3 1",
        "sep5 1 max 0  sep5 1 sep5 2  sep3 0 sep3 3  sep3 1 sep3 2",
    ),
    "PC_DARTS_image": _genotype(
        "skip 1 sep3 0  sep3 0 skip 1  sep3 1 sep3 3  sep3 1 dil5 4",
        "sep3 0 skip 1  dil5 2 max 1  sep3 2 sep3 1  sep5 0 sep3 3",
    ),
}
