"""How large the blocks of the Triton kernels are: a table by architecture, kernel and size class, `tuning.json`.

FTSO_TUNING names a file of the same form whose entries go first; `python -m ftso_fast.kernels.tune` writes it on a
machine with a GPU. An architecture that the table lacks takes the entries of "default".
"""

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("tuning.json")
Block = dict[str, int]


@cache
def _tables(own: str | None) -> tuple[Mapping[str, Mapping[str, Mapping[str, Block]]], ...]:
    return tuple(json.loads(Path(path).read_text()) for path in (own, TABLE) if path)


@cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942"; "default" where there is no GPU, under Triton's interpreter."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "default"
    properties = torch.cuda.get_device_properties(device)
    name: str = getattr(properties, "gcnArchName", "")
    return name.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def block(kernel: str, size_class: str, device: torch.device) -> Block:
    """The constants of `kernel` and its `num_warps`."""
    for name in (architecture(device), "default"):
        for table in _tables(os.environ.get("FTSO_TUNING")):
            if found := table.get(name, {}).get(kernel, {}).get(size_class):
                return dict(found)
    raise KeyError(f"{kernel}: the table of blocks has no size class {size_class!r}")


def plane_class(HW: int, dtype: torch.dtype) -> str:
    """Planes of which a block holds several, or that hold several blocks; and the bytes of a number."""
    return f"{'small' if HW <= 256 else 'large'}-{dtype.itemsize}"


def planes_in(HW: int, size: int) -> Block:
    """A block of `size` pixels as whole planes of some images, or as part of one."""
    pixels = min(1 << (HW - 1).bit_length(), size)
    while pixels > 64 and -(-HW // pixels) * pixels > HW * 9 // 8:  # little of a block lies behind the plane's end
        pixels //= 2
    return {"IMAGES": size // pixels, "PIXELS": pixels} if pixels >= HW else {"IMAGES": 1, "PIXELS": pixels}
