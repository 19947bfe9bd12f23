"""ftso export."""

import argparse
from typing import Any

from ..errors import UsageError


def add(commands: Any) -> None:
    export = commands.add_parser("export", help="write a trained network for other tools")
    export.add_argument(
        "network", metavar="DIR|FILE.safetensors", help="an evaluation's folder, or a file of this command"
    )
    export.add_argument(
        "--to", required=True, action="append", metavar="FILE", help="a name that ends in .safetensors, .pt2 or .onnx"
    )
    export.add_argument("--size", type=int, help="height and width of the images (default: 32; ImageNet's stem: 224)")
    export.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..export import FORMATS, export, load

    for path in args.to:
        if not path.endswith(FORMATS):
            raise UsageError(f"to: expected a name that ends in {', '.join(FORMATS)}, got {path!r}")
    net = load(args.network)
    for path in args.to:
        error = export(net, path, args.size)
        print(f"{path}: logits on random images within {error:.1e} of the network's")
