"""Tensors stored in fewer bits than they are computed in: scaled and unscaled fp8, int8 by rows, and what GGUF files hold.

A packed tensor stays in its file, memory-mapped, until it is asked for.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SCALES = (".weight_scale", ".scale_weight")  # the newer and the older spelling of ComfyUI
IGNORED = (".input_scale", ".scale_input")  # of activations, for kernels that multiply in fp8
FORMAT, MARKER = ".comfy_quant", "scaled_fp8"
FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FULL = 0.9  # of the largest number of an fp8 type: only a weight that was divided by its scale comes so close


Rows = Tensor | slice


@dataclass(frozen=True)
class Packed:
    """A tensor of `shape` whose numbers `unpack` computes in float32: of all rows (None), or of some.

    kind: how it is stored, such as "float8_e4m3fn"
    """

    shape: tuple[int, ...]
    kind: str
    unpack: Callable[[Rows | None], Tensor]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """All numbers, as `Tensor.to`."""
        return self.unpack(None).to(device, dtype)

    def __getitem__(self, rows: Rows) -> Tensor:
        """The numbers of some rows."""
        return self.unpack(rows)

    def is_floating_point(self) -> bool:
        """False: its own type is none to compute in."""
        return False


Stored = Tensor | Packed
PackedState = dict[str, Stored]


def kinds(state: Mapping[str, Stored]) -> list[str]:
    """The ways in which the tensors of a state are packed, sorted."""
    return sorted({value.kind for value in state.values() if isinstance(value, Packed)})


def join_scales(state: Mapping[str, Tensor], source: Path) -> PackedState:
    """Weights of 8 bits joined with their scales, which are no tensors of their own any more.

    fp8 without any scale in the file is a plain cast, which some publish: it is taken, and warned of.
    ValueError that names the tensor where a scale or its weight is missing, does not fit or is no scale, or a format is unknown.
    """
    tensors = {key: value for key, value in state.items() if not key.endswith(IGNORED)}
    marked = tensors.pop(MARKER, None) is not None
    formats = {key.removesuffix(FORMAT): tensors.pop(key) for key in list(tensors) if key.endswith(FORMAT)}
    scales = {key[: -len(SCALES[0])]: (key, tensors.pop(key)) for key in list(tensors) if key.endswith(SCALES)}
    for stem, value in formats.items():
        _check_format(f"{stem}{FORMAT}", value, source)
    joined: PackedState = dict(tensors)
    for stem, (key, scale) in scales.items():
        weight = tensors.get(f"{stem}.weight")
        if weight is None:
            raise ValueError(f"'{source}': '{key}' is the scale of '{stem}.weight', which is missing")
        if weight.dtype in (*FLOAT8, torch.int8):
            joined[f"{stem}.weight"] = scaled(weight, _checked(key, scale, weight, source))
        elif not torch.equal(scale, torch.ones_like(scale)):
            raise ValueError(f"'{source}': '{key}' is the scale of a weight in {weight.dtype}, expected one in float8 or int8")
    bare = [key for key, value in joined.items() if isinstance(value, Tensor) and value.dtype in (*FLOAT8, torch.int8)]
    refused = bare if marked or formats or scales else [key for key in bare if tensors[key].dtype == torch.int8]
    if refused:
        raise ValueError(
            f"'{source}': tensor '{refused[0]}' is {tensors[refused[0]].dtype} and has no scale, expected '{refused[0]}_scale'"
        )
    if bare:
        warnings.warn(
            f"'{source}' holds {len(bare)} tensors in fp8 without scales, a plain cast: about 8 % off; scaled fp8 is 6 % off, int8 2 %",
            stacklevel=2,
        )
    return joined | {key: _cast(key, tensors[key], source) for key in bare}


def scaled(weight: Tensor, scale: Tensor) -> Packed:
    """A weight `[O, I]` in 8 bits and its scale, one number or one a row (`[O]`, `[O, 1]`)."""
    column = scale.float().reshape(-1, 1) if scale.numel() > 1 else scale.float().reshape(())

    def unpack(rows: Rows | None) -> Tensor:
        if rows is None:
            return weight.float() * column
        return weight[rows].float() * (column[rows] if column.ndim else column)

    return Packed(tuple(weight.shape), str(weight.dtype).removeprefix("torch."), unpack)


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[O, I]` to int8 and a float32 scale a row, `[O, 1]`: the largest number of a row becomes 127."""
    scale = weight.abs().amax(1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight.float() / scale).round().clamp_(-127, 127).to(torch.int8), scale


def _checked(key: str, scale: Tensor, weight: Tensor, source: Path) -> Tensor:
    if scale.numel() not in (1, len(weight)):
        raise ValueError(f"'{source}': '{key}' is {tuple(scale.shape)}, expected one number or {len(weight)}, one a row")
    if not scale.is_floating_point() or not bool((scale.float().isfinite() & (scale.float() > 0)).all()):
        raise ValueError(f"'{source}': '{key}' holds a number that is no scale, expected positive ones")
    return scale


def _check_format(key: str, value: Tensor, source: Path) -> None:
    try:
        found = json.loads(bytes(value.to(torch.uint8).tolist()))["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{source}': '{key}' is not readable: {error}") from error
    if found not in FORMATS:
        raise ValueError(f"'{source}': '{key}' is '{found}', expected one of {', '.join(FORMATS)}")


def _cast(key: str, weight: Tensor, source: Path) -> Packed:
    limit = FULL * torch.finfo(weight.dtype).max

    def unpack(rows: Rows | None) -> Tensor:
        values = (weight if rows is None else weight[rows]).float()
        if values.numel() and float(values.abs().amax()) >= limit:
            raise ValueError(f"'{source}': '{key}' uses the whole range of {weight.dtype}, so it was scaled, and its scale is missing")
        return values

    return Packed(tuple(weight.shape), str(weight.dtype).removeprefix("torch.") + ", unscaled", unpack)
