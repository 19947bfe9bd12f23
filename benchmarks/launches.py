"""Launches and bytes of a search's steps, counted as they are dispatched; nothing is computed, so no GPU is needed.

An operation that torch dispatches is one launch: views and allocations are none, memsets and copies one; one over
lists of tensors (foreach) is as many as torch's tables of tensors need. Our kernels are counted where they are started.
Bytes: what a launch's tensors hold, read and written once each; of ours, every time that they are read.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ftso_fast import SuperNet, kernels
from ftso_fast.config import SearchConfig
from ftso_fast.on_device import DeviceRun

PAGE = Path(__file__).resolve().parent.parent / "docs" / "launches.md"
TENSORS_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36}
"""Of torch's multi-tensor kernels, by how many lists they walk along."""
COPIES = {"slice_backward": 2, "select_backward": 2, "max_pool2d_with_indices_backward": 2, "index_select_backward": 2}
"""A memset, and what is then put there."""
NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_local_scalar_dense",
    "_unsafe_view",
}


class Count(TorchDispatchMode):
    """Launches and bytes within the block, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: dict[str, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        space, name = function._schema.name.split("::")
        if space == "aten" and not function.is_view and name not in NO_LAUNCH:
            self.launches[name] = self.launches.get(name, 0) + launches_of(name, args, out)
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        return out


def launches_of(name: str, args: Any, out: Any) -> int:
    """Of one dispatched operation."""
    if name == "convolution_backward":
        return sum(args[-1])  # a product for each gradient that is asked for
    if not name.startswith(("_foreach_", "_fused_")):
        return COPIES.get(name, 1)
    lists = [x for x in (*args, out) if isinstance(x, list | tuple) and x and isinstance(x[0], torch.Tensor)]
    return -(-len(lists[0]) // TENSORS_A_LAUNCH[min(len(lists), 4)])


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within the block our kernels are asked for, with a GPU's tiles, and started by nobody; tensors hold nothing."""
    from ftso_fast.kernels import _launch, cell_step_triton, reduce_step_triton, stem_step_triton

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict("os.environ", TRITON_INTERPRET="1"))
        stack.enter_context(mock.patch.object(_launch, "run"))
        for module in (cell_step_triton, reduce_step_triton, stem_step_triton):
            stack.enter_context(mock.patch.object(module, "interpreted", return_value=False))
        yield


def steps(ours: bool, batch_size: int, config: SearchConfig, size: int = 32) -> dict[str, tuple[int, int, Count]]:
    """By step (launches, bytes, what torch dispatched) of the second of its kind: ours on Triton's kernels, or plain
    PyTorch; optimizers and clipping are the same."""
    found = {}
    with (
        as_on_a_gpu(),
        FakeTensorMode(allow_non_fake_inputs=True),
        kernels.use_backend("triton" if ours else "reference"),
    ):
        net = SuperNet(10, config.channels, config.cells, 4)
        images, labels = torch.randn(batch_size, 3, size, size), torch.zeros(batch_size, dtype=torch.int64)
        run = DeviceRun(net, config, 1, torch.device("cpu"), replayed=False)
        for name, step in (("architecture", run._architecture), ("weights", run._weights)):
            only = net.only_arch if name == "architecture" else net.only_weights
            for _ in range(2):
                with only(), kernels.trace() as launched, Count() as count:
                    step(images, labels)
            torch_launches = sum(count.launches.values())
            moved = count.bytes + sum(int(launch.bytes) for launch in launched)
            found[name] = torch_launches + len(launched), moved, count
    return found


def page(counted: dict[str, dict[str, tuple[int, int, Count]]]) -> str:
    """docs/launches.md."""
    lines = [
        "# Launches and bytes of a step on a GPU",
        "",
        "Made by `python benchmarks/launches.py`: counted by tracing dispatch on tensors that hold nothing, without a",
        "GPU. The skip-only super-network, batch 256 of 3x32x32, 16 channels, 8 cells, k = 4; forward, backward,",
        "clipping and optimizer. Eager: the same network in plain PyTorch, with the same fused optimizers.",
        "",
        "| step | launches | of these our kernels | eager | share | GB | eager | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for step, (own, moved, count) in counted["ours"].items():
        eager, eager_moved, _ = counted["eager"][step]
        kernels_of_ours = own - sum(count.launches.values())
        lines.append(
            f"| {step} | {own} | {kernels_of_ours} | {eager} | 1/{eager / own:.1f} | {moved / 1e9:.2f} | "
            f"{eager_moved / 1e9:.2f} | 1/{eager_moved / moved:.1f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page({name: steps(name == "ours", 256, SearchConfig()) for name in ("ours", "eager")}))
