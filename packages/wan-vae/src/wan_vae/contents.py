"""What a checkpoint holds: its tensors, or their types and shapes alone, without a prefix and checked; and what it is.

Everything that is no whole set of plain weights is refused here with one line that says what it is.
"""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ._shared.files import read_json
from ._shared.weights import State, read_state

Shapes = dict[str, tuple[int, ...]]

PREFIXES = ("model_state.", "state_dict.", "module.", "model.", "vae.", "first_stage_model.")
WITHIN = ("vae.", "first_stage_model.")  # of a file that holds a whole video model: the VAE, and below the other parts
OTHER_PARTS = ("model.diffusion_model.", "text_encoders.", "cond_stage_model.", "clip_vision.", "conditioner.")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
}  # fmt: skip
PLAIN = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
COUNTS = (".num_batches_tracked", "per_channel_statistics.channel")  # of a batch norm, or of channels: whole numbers beside weights
SCALES = re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale|weight_scale_inv)$")

WAN, TAEHV, DCAE, LTX = "a Wan VAE", "a TAEHV-style tiny decoder", "a DC-AE", "a VAE of LTX-Video"
KINDS = (  # the first pattern that matches a name tells what the file is
    (r"(encoder|decoder)\.\d+\.conv\.weight$", TAEHV),
    (r"(encoder|decoder)\.(stages\.\d+\.op_list|project_in|project_out)\.|(encoder\.down|decoder\.up)_blocks\.\d+\.\d+\.", DCAE),
    (r"per_channel_statistics\.|latents_(mean|std)$|(encoder\.down|decoder\.up)_blocks\.\d+\.res_blocks\.", LTX),
    (r"(encoder\.(downsamples|conv1)|decoder\.(upsamples|conv1|head)|(post_)?quant_conv|encoder\.down_blocks|decoder\.up_blocks)\b", WAN),
    (r"lora_|.*\.lora_(A|B|down|up)\.", "a LoRA, which is applied to a diffusion transformer"),
    (r"(model\.diffusion_model\.)?(patch_embedding\.|blocks\.\d+\.(self_attn|attn1)\.)", "a diffusion transformer; wan-dit reads it"),
    (r"(token_embedding|shared)\.weight|blocks\.\d+\.attn\.|encoder\.block\.\d+\.layer\.", "a text encoder; wan-text reads it"),
    (r"(visual|vision_model|textual)\.", "an image encoder (CLIP)"),
    (r"(encoder|decoder)\.(down|up|mid)\.", "an image VAE"),
    (r"(encoder|decoder)\.\d+\.", "a tiny image autoencoder (TAESD)"),
    (r"(latents|logvar|timestamps)$", "latents; `wan-vae decode` reads them"),
)  # fmt: skip


def read_tensors(path: Path) -> State:
    """The tensors of a file or folder without their prefix. ValueError for all that `check` refuses, and for NaN and infinity."""
    state = check(without_prefix(_read(path)), path)
    for key, value in state.items():
        if not value.sum(dtype=torch.float32).isfinite() and not value.isfinite().all():  # the sum is quick, but may overflow
            raise ValueError(f"'{path}' is damaged: '{key}' holds NaN or infinity")
    return state


def read_header(path: Path) -> State:
    """The tensors of a file or folder without their data, on meta; as `read_tensors`, but for NaN and infinity."""
    files = _files(path)
    if not files or any(file.suffix != ".safetensors" for file in files):
        found = {key: value.to("meta") for key, value in _tensors_only(_read(path), path).items()}
    else:
        found = {}
        for name in files:
            name.open("rb").close()  # says why it cannot be read, where safetensors says that it is not there
            try:
                with safe_open(name, "pt") as file:
                    for key in file.keys():  # noqa: SIM118 (not a mapping)
                        part = file.get_slice(key)
                        found[key] = torch.empty(part.get_shape(), dtype=DTYPES.get(part.get_dtype(), torch.uint8), device="meta")
            except SafetensorError as error:
                raise ValueError(f"'{name}' is not a readable checkpoint: {error}") from error
    return check(without_prefix(found), path)


def shapes_of(state: Mapping[str, torch.Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in state.items()}


def kind_of(names: Iterable[str]) -> str | None:
    """What a file with these names holds: `WAN`, `TAEHV`, `DCAE`, `LTX`, or a phrase for a message; None where it is nothing known."""
    names = list(names)
    return next((kind for pattern, kind in KINDS if any(re.match(pattern, name) for name in names)), None)


def check(state: State, path: Path) -> State:
    """The state as it is. ValueError where it holds scaled or quantised weights, other things than tensors, or one half of a VAE."""
    _tensors_only(state, path)
    for key, value in state.items():
        if SCALES.search(key) or (value.dtype not in PLAIN and not key.endswith(COUNTS)):
            raise ValueError(
                f"'{path}' holds scaled or quantised weights ('{key}' is {str(value.dtype).removeprefix('torch.')}); "
                f"wan-vae reads fp32, bf16 and fp16: take the checkpoint in one of these"
            )
    kind = kind_of(state)
    halves = {key.partition(".")[0] for key in state} & {"encoder", "decoder"}
    if kind in (WAN, TAEHV, DCAE, LTX) and len(halves) == 1:
        half = halves.pop()
        missing = "decoder" if half == "encoder" else "encoder"
        raise ValueError(f"'{path}' holds the {half} of {kind} alone, without its {missing}: give a checkpoint with both")
    return state


def check_one_dtype(state: State, path: Path) -> None:
    """ValueError where the tensors are of several types, which no layout but our own is written in."""
    counts = Counter(value.dtype for key, value in state.items() if not key.endswith(COUNTS))
    if len(counts) > 1:
        (usual, many), *_, (rare, few) = counts.most_common()
        odd = [key for key, value in state.items() if value.dtype == rare]
        raise ValueError(
            f"'{path}' mixes types: {many} tensors are {PLAIN[usual]} and {few} {PLAIN[rare]} "
            f"({', '.join(odd[:3])}{', ...' if few > 3 else ''}); expected one type"
        )


def without_prefix(state: State) -> State:
    """The state without the prefixes that every name carries; of a file that holds a whole video model, the VAE's part."""
    if any(key.startswith(OTHER_PARTS) for key in state):
        for prefix in WITHIN:
            part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if part and all(key.startswith((prefix, *OTHER_PARTS)) for key in state):
                return without_prefix(part)
        return state
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            return without_prefix({key.removeprefix(prefix): value for key, value in state.items()})
    return state


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if index := next(path.glob("*.safetensors.index.json"), None):
        shards = [path / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        if lost := [shard.name for shard in shards if not shard.exists()]:
            raise FileNotFoundError(f"'{path}' is not complete: there is no '{lost[0]}'")
        return shards
    return sorted(path.glob("*.safetensors"))


def _read(path: Path) -> State:
    """`read_state`, with a pickle that holds more than tensors, or a shard that is not there, told in one line."""
    _files(path)  # all there
    try:
        return read_state(path)
    except ValueError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise ValueError(
                f"'{path}' is a damaged pickle, or one that holds code or other objects beside tensors, which is not run: "
                f"take a .safetensors file, or a .pth that holds a state_dict"
            ) from error
        if isinstance(error.__cause__, AttributeError):
            raise ValueError(f"'{path}' holds no names and tensors: expected a state_dict") from error
        raise ValueError(str(error).strip().splitlines()[0]) from error


def _tensors_only(state: State, path: Path) -> State:
    if strange := [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]:
        raise ValueError(f"'{path}' holds '{strange[0]}', which is not a tensor: expected a state_dict")
    return state
