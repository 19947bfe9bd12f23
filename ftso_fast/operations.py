"""Operators of a cell, in the order and shapes of the parameters that DARTS and PC-DARTS have."""

import torch
from torch import Tensor, nn


def batch_norm(channels: int, affine: bool = False) -> nn.BatchNorm2d:
    """Batch norm on the statistics of the batch at hand: the search never leaves training mode."""
    return nn.BatchNorm2d(channels, affine=affine, track_running_stats=False)


class ReLUConvBN(nn.Sequential):
    """ReLU, 1x1 convolution without bias, batch norm: (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), batch_norm(c_out))


class FactorizedReduce(nn.Module):
    """Two 1x1 convolutions of stride 2, the second one pixel down and right, side by side; then batch norm.

    (B, c_in, H, W) -> (B, c_out, H/2, W/2); H, W and c_out even. The skip connection at stride 2.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.bn = batch_norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.bn(torch.cat((self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])), 1))
