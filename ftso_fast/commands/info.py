"""ftso info."""

import argparse
import platform
from typing import Any

from ..errors import UsageError


def add(commands: Any) -> None:
    info = commands.add_parser("info", help="versions, backends, instruction sets, threads")
    info.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import torch

    from .. import __version__, kernels

    reasons = kernels.backends()
    try:
        requested = kernels.requested()
        isas = f"{', '.join(kernels.available_isas())}; in use: {kernels.isa()}" if reasons["cpu"] is None else "none"
    except kernels.BackendError as error:
        raise UsageError(str(error)) from None
    gpu = torch.cuda.is_available()  # without one, a backend for GPUs is at most interpreted, which nobody chooses
    automatic = next(name for name, why in reasons.items() if why is None and (gpu or name in ("cpu", "reference")))
    lines = {
        "ftso_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{f"backend {name}": why or "ready" for name, why in reasons.items()},
        "backend in use": f"{requested} (FTSO_BACKEND)" if requested else f"{automatic} (the fastest that can)",
        "instruction sets": isas,
    }
    for name, value in lines.items():
        print(f"{name:18} {value}")
