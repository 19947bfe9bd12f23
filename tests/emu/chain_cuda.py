"""The whole network with its normal cells on the emulated CUDA kernels, the rest on Triton's interpreter.

A process of its own: TRITON_INTERPRET must be set before triton is imported. Argument: the emulated module.
"""

import importlib
import importlib.util
import sys

import torch
from ftso_fast.kernels import cell_step_cuda
from gpu_networks import agrees

torch.set_num_threads(1)
loader = importlib.util.spec_from_file_location("_cuda_emulated", sys.argv[1])
module = importlib.util.module_from_spec(loader)
loader.loader.exec_module(module)
cell_step_cuda.module = lambda: module
cell_step_cuda._where = lambda x: (0, 0)

skip_net = importlib.import_module("ftso_fast.kernels.skip_net")  # the name `kernels.skip_net` is the function
pooled = skip_net._pooled
skip_net._pooled = lambda *arguments: pooled(*arguments[:-1], "cuda")
for shape in ((5, 16, 4, 3, 2, 8, 8), (5, 16, 2, 1, 4, 8, 12)):
    ran = agrees(shape, "cpu")
    cells = {f"cell_{stage}/cuda" for stage in ("fwd", "bwd", "pool_fwd", "pool_bwd")}
    assert {name for name in ran if name.startswith("cell_")} == cells, ran
