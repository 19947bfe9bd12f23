"""A cell whose edges hold any set of operators: the search cell of DARTS and PC-DARTS.

Its states are x0 and x1, the two inputs after preprocessing, then one per node j over its predecessors i:

    x_j = sum_i beta_ij MixedOp_ij(x_i, alpha_ij),      beta, alpha: after their softmaxes

an edge from x0 or x1 has stride 2 in a reduction cell. The nodes of a cell are one `kernels.mixed_cell`.
Source: DARTS, equation 2; PC-DARTS, equations 2 and 3.
"""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from . import kernels
from .operations import FactorizedReduce, MixedOp, ReLUConvBN
from .space import Topology


class MixedCell(nn.Module):
    """Nodes over two inputs; (B, c_prev_prev, ...), (B, c_prev, H, W) -> (B, nodes * C, H, W), halved in a reduction.

    `inputs` holds the predecessors of each node, ascending; edges are numbered node after node in that order.
    Parameters, in PC-DARTS' order: preprocess0, preprocess1, then edge after edge, operator after operator.
    """

    def __init__(
        self,
        c_prev_prev: int,
        c_prev: int,
        C: int,
        k: int,
        reduction: bool,
        reduction_prev: bool,
        inputs: Topology,
        operators: Sequence[str],
    ) -> None:
        super().__init__()
        self.k, self.reduction, self.inputs, self.operators = k, reduction, inputs, tuple(operators)
        before = FactorizedReduce if reduction_prev else ReLUConvBN
        self.preprocess0 = before(c_prev_prev, C)
        self.preprocess1 = ReLUConvBN(c_prev, C)
        strides = (stride for node in kernels.strides_of(inputs, reduction) for stride in node)
        self.edges = nn.ModuleList(MixedOp(C, stride, k, operators) for stride in strides)

    def forward(self, s0: Tensor, s1: Tensor, edge_weights: Tensor, operator_weights: Tensor) -> Tensor:
        """edge_weights: (E,); operator_weights: (E, len(operators))."""
        weights = [w for edge in self.edges for w in cast(MixedOp, edge).weights()]
        x0, x1 = self.preprocess0(s0), self.preprocess1(s1)
        return kernels.mixed_cell(
            x0, x1, edge_weights, operator_weights, weights, self.operators, self.inputs, self.reduction, self.k
        )
