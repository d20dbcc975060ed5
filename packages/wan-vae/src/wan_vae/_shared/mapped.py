"""A safetensors file as a mapping that reserves no memory: it may be larger than what the machine has."""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

MAP_NORESERVE = 0x4000  # of Linux; the module mmap has no name for it
TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def read_mapped(path: Path) -> dict[str, Tensor]:
    """All tensors of a file (Linux alone); what safetensors maps for PyTorch reserves memory for the whole of it."""
    with safe_open(path, "np") as checked, open(path, "rb") as file:
        types = {key: TYPES[checked.get_slice(key).get_dtype()] for key in checked.keys()}  # noqa: SIM118 (not a mapping)
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        flags = mmap.MAP_PRIVATE | MAP_NORESERVE  # a copy is made of what is written to, as in PyTorch's
        content = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return {
        key: torch.frombuffer(
            content, dtype=dtype, count=math.prod(header[key]["shape"]), offset=start + header[key]["data_offsets"][0]
        ).reshape(header[key]["shape"])
        if math.prod(header[key]["shape"])
        else torch.empty(header[key]["shape"], dtype=dtype)
        for key, dtype in types.items()
    }
