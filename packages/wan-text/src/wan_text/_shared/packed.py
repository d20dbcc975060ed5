"""Tensors stored in fewer bits than they are computed in: fp8 with and without scales, int8 by rows, and what GGUF files hold.

A packed tensor stays in its file, memory-mapped, until it is asked for.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SCALES = (".weight_scale", ".scale_weight")  # the newer and the older spelling of ComfyUI
IGNORED = (".input_scale", ".scale_input")  # of activations, for kernels that multiply in fp8
FORMAT, MARKER = ".comfy_quant", "scaled_fp8"
TYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8": torch.int8}
PIECE = 1 << 18  # numbers that are unpacked at a time: larger pieces leave holes between the tensors that are kept
FULL = 0.9  # of the largest number of an fp8 type: only a weight that was divided by its scale comes so close

Rows = Tensor | slice


@dataclass(frozen=True)
class Packed:
    """A tensor of `shape` whose numbers `unpack` computes in float32: of all rows (None), or of some.

    kind: how it is stored, such as "float8_e4m3fn"
    parts: the stored numbers and their scale, where they are such
    """

    shape: tuple[int, ...]
    kind: str
    unpack: Callable[[Rows | None], Tensor]
    parts: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """All numbers, as `Tensor.to`; no more than a piece of them is in float32 at a time."""
        if dtype == torch.float32 or len(self.shape) < 2:
            return self.unpack(None).to(device, dtype)
        made = torch.empty(self.shape, device=device, dtype=dtype)
        rows = max(1, PIECE // math.prod(self.shape[1:]))
        for start in range(0, self.shape[0], rows):
            made[start : start + rows] = self.unpack(slice(start, start + rows))
        return made

    def __getitem__(self, rows: Rows) -> Tensor:
        """The numbers of some rows."""
        return self.unpack(rows)

    def is_floating_point(self) -> bool:
        """False: its own type is none to compute in."""
        return False


Stored = Tensor | Packed
PackedState = dict[str, Stored]


def kinds(state: Mapping[str, Stored]) -> set[str]:
    """The ways in which the tensors of a state are packed."""
    return {value.kind for value in state.values() if isinstance(value, Packed)}


def join_scales(state: Mapping[str, Tensor], source: object) -> PackedState:
    """Weights of 8 bits joined with their scales, which are no tensors of their own any more.

    fp8 without any scale in the file is a plain cast, which some publish: it is taken, and warned of.
    ValueError that names the tensor where a scale or its weight is missing, does not fit or is no scale, or a format is
    unknown or another than the weight's.
    """
    tensors = {key: value for key, value in state.items() if not key.endswith(IGNORED)}
    marked = tensors.pop(MARKER, None) is not None
    formats = {key: tensors.pop(key) for key in list(tensors) if key.endswith(FORMAT)}
    scales = {key: tensors.pop(key) for key in list(tensors) if key.endswith(SCALES)}
    for key, value in formats.items():
        _check_format(key, value, tensors.get(f"{key.removesuffix(FORMAT)}.weight"), source)
    joined: PackedState = dict(tensors)
    for key, scale in scales.items():
        name = f"{key.rpartition('.')[0]}.weight"
        weight = tensors.get(name)
        if weight is None:
            raise ValueError(f"'{source}': '{key}' is the scale of '{name}', which is missing")
        if weight.dtype in TYPES.values():
            joined[name] = scaled(weight, _checked(key, scale, weight, source))
        elif not torch.equal(scale, torch.ones_like(scale)):
            raise ValueError(f"'{source}': '{key}' is the scale of a weight in {weight.dtype}, expected one in float8 or int8")
    bare = [key for key, value in joined.items() if isinstance(value, Tensor) and value.dtype in TYPES.values()]
    refused = bare if marked or formats or scales else [key for key in bare if tensors[key].dtype == torch.int8]
    if refused:
        raise ValueError(
            f"'{source}': tensor '{refused[0]}' is {tensors[refused[0]].dtype} and has no scale, expected '{refused[0]}_scale'"
        )
    if bare:
        warnings.warn(
            f"'{source}' holds {len(bare)} tensors in fp8 without scales, a plain cast: several per cent off; int8 is nearer",
            stacklevel=2,
        )
    return joined | {key: _cast(key, tensors[key], source) for key in bare}


def scaled(weight: Tensor, scale: Tensor) -> Packed:
    """A weight `[O, I]` in 8 bits and its scale, one number or one a row (`[O]`, `[O, 1]`)."""
    column = scale.float().reshape(-1, 1) if scale.numel() > 1 else scale.float().reshape(())

    def unpack(rows: Rows | None) -> Tensor:
        if rows is None:
            return weight.float().mul_(column)
        return weight[rows].float().mul_(column[rows] if column.ndim else column)

    return Packed(tuple(weight.shape), str(weight.dtype).removeprefix("torch."), unpack, (weight, scale))


def _checked(key: str, scale: Tensor, weight: Tensor, source: object) -> Tensor:
    if scale.numel() not in (1, len(weight)):
        raise ValueError(f"'{source}': '{key}' is {tuple(scale.shape)}, expected one number or {len(weight)}, one a row")
    if not scale.is_floating_point() or not bool((scale.float().isfinite() & (scale.float() > 0)).all()):
        raise ValueError(f"'{source}': '{key}' holds a number that is no scale, expected positive ones")
    return scale


def _check_format(key: str, value: Tensor, weight: Tensor | None, source: object) -> None:
    try:
        found = str(json.loads(bytes(value.to(torch.uint8).tolist()))["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{source}': '{key}' is not readable: {error}") from error
    if found not in TYPES:
        raise ValueError(f"'{source}': '{key}' is '{found}', expected one of {', '.join(TYPES)}")
    if weight is None or weight.dtype != TYPES[found]:
        raise ValueError(f"'{source}': '{key}' is '{found}', but its weight is {'missing' if weight is None else weight.dtype}")


def _cast(key: str, weight: Tensor, source: object) -> Packed:
    limit = FULL * torch.finfo(weight.dtype).max

    def unpack(rows: Rows | None) -> Tensor:
        values = (weight if rows is None else weight[rows]).float()
        if values.numel() and not float(values.abs().amax()) < limit:  # NaN is refused too
            raise ValueError(f"'{source}': '{key}' uses the whole range of {weight.dtype}, so it was scaled, and its scale is missing")
        return values

    return Packed(tuple(weight.shape), str(weight.dtype).removeprefix("torch.") + ", unscaled", unpack)
