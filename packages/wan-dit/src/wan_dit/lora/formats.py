"""The names in LoRA files, as tables: what stands before the name of a layer, and after it.

PEFT and diffusers; ComfyUI, diffusion-pipe and ai-toolkit; DiffSynth; kohya (musubi-tuner) and LyCORIS; lightx2v's `.diff`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from .reference import Expert

Format = Literal["peft", "comfy", "kohya", "plain"]
Place = Literal["weight", "bias", "modulation"]


class Prefix(NamedTuple):
    """What keys of a format start with.

    expert: the expert of Wan2.2 A14B that such keys are of
    flat: whether dots in the name of the layer are written as underscores
    """

    text: str
    format: Format
    expert: Expert | None = None
    flat: bool = False


PREFIXES = (  # a longer one stands before its beginning
    Prefix("base_model.model.", "peft"),
    Prefix("transformer.", "peft"),
    Prefix("transformer_2.", "peft", "low"),
    Prefix("model.diffusion_model.", "comfy"),
    Prefix("diffusion_model.", "comfy"),
    Prefix("lora_unet_", "kohya", flat=True),
    Prefix("lora_transformer_", "kohya", flat=True),
    Prefix("lycoris_", "kohya", flat=True),
    Prefix("", "plain"),
)
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
PARTS = {  # end of a key: what it holds
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_B.default.bias": "up_bias",
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".diff_m": "diff_m",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
    **{f".{part}": part for part in (*LOHA, *LOKR)},
}
UNSUPPORTED = {  # ends of keys that change what the others of their layer mean
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_magnitude_vector.weight": "DoRA",
    ".lora_magnitude_vector.default.weight": "DoRA",
    ".lora_mid.weight": "a convolution in three factors",
    ".reshape_weight": "an enlarged layer",
}
ENDS: dict[Place, tuple[str, ...]] = {  # ends of the names of the tensors that they are added to; "" is a parameter itself
    "weight": (".weight", ""),
    "bias": (".bias",),
    "modulation": (".modulation", ".scale_shift_table"),
}
DIFFS: dict[str, Place] = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}

Target = Literal["peft", "comfy", "kohya"]
PREFIX_WRITTEN: dict[Target, str] = {"peft": "transformer.", "comfy": "diffusion_model.", "kohya": "lora_unet_"}
PREFIX_LOW = "transformer_2."  # of PEFT, where a file is of the expert of low noise
ENDS_WRITTEN: dict[Target, dict[str, str]] = {  # other parts are written as they are called
    "peft": {"down": "lora_A.weight", "up": "lora_B.weight", "up_bias": "lora_B.bias"},
    "comfy": {"down": "lora_down.weight", "up": "lora_up.weight"},
    "kohya": {"down": "lora_down.weight", "up": "lora_up.weight"},
}
