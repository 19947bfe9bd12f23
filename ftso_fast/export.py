"""A trained network for other tools: safetensors with a JSON beside it, torch.export's pt2, ONNX; and back.

What is written is the network in evaluation mode without its auxiliary head, the last two by plain PyTorch operators:
whoever reads them needs none of this package. Each file is read again and compared before it is believed.
"""

import hashlib
import json
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, kernels
from .errors import DataError, UsageError
from .genotype import Genotype
from .network import Network

SCHEMA = "ftso.network/1"
FORMATS = (".safetensors", ".pt2", ".onnx")
TOLERANCE = 1e-5
"""Largest difference of a logit, as a part of the largest, that what is read again may have."""
_HEAD = "auxiliary_head"


def export(net: Network, path: str | os.PathLike[str], size: int | None = None) -> float:
    """Write the network to `path`: .safetensors (and .json beside it), .pt2 or .onnx. Returns the largest difference of
    the file's logits on random images, as a part of the largest logit.

    size: height and width of the images (32, or 224 with ImageNet's stem); their number stays free. Raises UsageError
    for another ending or size, DataError where the file computes something else, ImportError's sentence as UsageError
    where onnx, onnxscript or onnxruntime are not installed.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UsageError(f"path: expected a name that ends in {', '.join(FORMATS)}, got {path.name!r}")
    if size is None:
        size = 32 if net.divisor == 4 else 224
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % net.divisor:
        raise UsageError(f"size: expected a multiple of {net.divisor}, got {size!r}")
    plain = without_head(net)
    g = torch.Generator().manual_seed(0)
    images = torch.randn(3, net.in_channels, size, size, generator=g)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), kernels.use_backend("reference"):
        want: Tensor = plain(images)
        write = {".safetensors": _write_safetensors, ".pt2": _write_pt2, ".onnx": _write_onnx}[path.suffix]
        got = write(plain, path, images)
    error = float((got - want).abs().max() / want.abs().max())
    if not error <= TOLERANCE:
        raise DataError(f"{path}: computes something else than the network: its logits differ by {error:.1e}")
    return error


def load(path: str | os.PathLike[str]) -> Network:
    """The network of a .safetensors file of `export`, or of an evaluation's folder (its newest checkpoint that
    verifies), in evaluation mode. Raises DataError for what cannot be read or is not what was written."""
    path = Path(path)
    return _from_run(path) if path.is_dir() else _from_safetensors(path)


def without_head(net: Network) -> Network:
    """A copy in evaluation mode."""
    sizes: dict[str, Any] = net.sizes
    plain = Network(net.genotype, **sizes)
    plain.load_state_dict({n: t for n, t in net.state_dict().items() if not n.startswith(_HEAD)})
    return plain.eval()


def _write_safetensors(net: Network, path: Path, images: Tensor) -> Tensor:
    from safetensors.torch import save

    data = save({name: t.contiguous() for name, t in net.state_dict().items()})
    told = {
        "schema": SCHEMA,
        "genotype": net.genotype.to_dict(),
        **net.sizes,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    path.write_bytes(data)
    path.with_suffix(".json").write_text(json.dumps(told) + "\n", encoding="utf-8")
    found: Tensor = load(path)(images)
    return found


def _write_pt2(net: nn.Module, path: Path, images: Tensor) -> Tensor:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (images,), dynamic_shapes={"images": {0: batch}})
    torch.export.save(program, path)
    module = torch.export.load(path).module()
    parts = [module(part) for part in images.split([1, 2])]  # another number of images than it was written with
    return torch.cat(parts)


def _write_onnx(net: nn.Module, path: Path, images: Tensor) -> Tensor:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter writes with it)
    except ImportError as error:
        raise UsageError(f"onnx: {error.name} is not installed: run pip install 'ftso_fast[onnx]'") from None
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of older and newer PyTorch
        torch.onnx.export(
            net, (images,), path, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False,
            dynamic_shapes={"images": {0: batch}}, external_data=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    parts = [session.run(["logits"], {"images": part.numpy()})[0] for part in images.split([1, 2])]
    return torch.cat([torch.from_numpy(part) for part in parts])


def _from_safetensors(path: Path) -> Network:
    from safetensors import SafetensorError
    from safetensors.torch import load as parsed

    beside = path.with_suffix(".json")
    try:
        told, data = json.loads(beside.read_text(encoding="utf-8")), path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read, or {beside.name} beside it ({error})") from None
    if not isinstance(told, dict) or told.pop("schema", None) != SCHEMA:
        raise DataError(f"{beside}: is not the description of a network ({SCHEMA})")
    if told.pop("sha256", None) != hashlib.sha256(data).hexdigest():
        raise DataError(f"{path}: is not what {beside.name} describes (its sha256 differs)")
    with suppress(SafetensorError, RuntimeError, TypeError, KeyError):
        net = Network(Genotype.from_dict(told.pop("genotype")), **told)
        net.load_state_dict(parsed(data))
        return net.eval()
    raise DataError(f"{path}: does not fit the network that {beside.name} describes")


def _from_run(folder: Path) -> Network:
    found = checkpoint.newest(folder)
    if found is None:
        raise DataError(f"{folder}: holds no checkpoint of an evaluation")
    of, state = found.state["of"], {}
    for name, t in found.tensors.items():
        if name.startswith("network.") and not name.startswith(f"network.{_HEAD}"):
            state[name.removeprefix("network.")] = t
    first = state["stem.0.weight" if of["recipe"]["stem"] == "cifar" else "stem0.0.weight"]
    net = Network(
        Genotype.from_dict(of["genotype"]),
        of["recipe"]["channels"],
        of["recipe"]["cells"],
        len(state["classifier.bias"]),
        of["recipe"]["stem"],
        in_channels=first.shape[1],
    )
    net.load_state_dict(state)
    return net.eval()
