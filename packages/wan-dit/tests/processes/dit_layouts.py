"""Writes one model as every checkpoint layout that is published: what the tests of loading read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from wan_dit.config import T2V_1_3B, T2V_14B, TINY, DiTConfig
from wan_dit.layouts import DIFFUSERS_FIELDS, names
from wan_dit.model import WanDiT

SMALL = DiTConfig(
    dim=128, ffn_dim=40, freq_dim=16, text_dim=12, num_heads=1, num_layers=2, latent_space="wan2.1", embedding_space="unknown"
)
VARIANTS = {
    "tiny": TINY,
    "t2v-1.3b": T2V_1_3B,
    "t2v-14b": T2V_14B,
    "no-qk-norm": SMALL.model_copy(update={"qk_norm": False}),
    "no-cross-norm": SMALL.model_copy(update={"cross_attn_norm": False}),
    "i2v": SMALL.model_copy(update={"in_dim": 36, "image_dim": 20}),
    "i2v-2.2": SMALL.model_copy(update={"in_dim": 36}),
    "flf2v": SMALL.model_copy(update={"in_dim": 36, "image_dim": 20, "pos_embed_seq_len": 514}),
    "vace": SMALL.model_copy(update={"vace_layers": (0, 1)}),
    "ti2v": SMALL.model_copy(update={"in_dim": 48, "out_dim": 48, "latent_space": "wan2.2", "stride": (4, 16, 16)}),
    "fun-camera": SMALL.model_copy(update={"in_dim": 32, "image_dim": 20, "camera_dim": 24}),
    "fun-control": SMALL.model_copy(update={"in_dim": 48, "image_dim": 20, "ref_dim": 16}),
}
State = dict[str, torch.Tensor]


def model(config: DiTConfig = SMALL, seed: int = 0) -> WanDiT:
    made = WanDiT(config)
    generator = torch.Generator().manual_seed(seed)
    made.init_weights(generator)
    torch.nn.init.normal_(made.head.proj.weight, std=0.1, generator=generator)
    return made.eval()


def state_in(made: WanDiT, layout: Any) -> State:
    table = names(made.config, layout)
    return {table[key]: value for key, value in made.state_dict().items()}


def official_config(config: DiTConfig) -> dict[str, Any]:
    """What official folders write: neither the patch, the text width nor the norms."""
    fields = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "text_len")
    return {"_class_name": "WanModel", "model_type": "t2v", "text_dim": config.text_dim, **{name: getattr(config, name) for name in fields}}


def diffusers_config(config: DiTConfig) -> dict[str, Any]:
    fields = {theirs: getattr(config, own) for own, theirs in DIFFUSERS_FIELDS.items()}
    kind = "WanVACETransformer3DModel" if config.vace_layers else "WanTransformer3DModel"
    return {"_class_name": kind, "attention_head_dim": config.head_dim, **fields}


def write(folder: Path, state: State, config: dict[str, Any] | None = None, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def own_folder(folder: Path, made: WanDiT) -> Path:
    made.save_pretrained(folder)
    return folder


def official_folder(folder: Path, made: WanDiT) -> Path:
    return write(folder, state_in(made, "official"), official_config(made.config), "diffusion_pytorch_model.safetensors")


def official_sharded(folder: Path, made: WanDiT) -> Path:
    state = state_in(made, "official")
    shards = [f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    index = {key: shards[i % 2] for i, key in enumerate(state)}
    for shard in shards:
        write(folder, {key: value for key, value in state.items() if index[key] == shard}, official_config(made.config), shard)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def diffusers_pipeline(folder: Path, made: WanDiT) -> Path:
    write(folder / "transformer", state_in(made, "diffusers"), diffusers_config(made.config), "diffusion_pytorch_model.safetensors")
    (folder / "model_index.json").write_text("{}")
    return folder


def comfy_file(folder: Path, made: WanDiT) -> Path:
    prefixed = {f"model.diffusion_model.{key}": value for key, value in state_in(made, "official").items()}
    return write(folder, prefixed, name="wan.safetensors") / "wan.safetensors"


def short_prefix_file(folder: Path, made: WanDiT) -> Path:
    prefixed = {f"diffusion_model.{key}": value for key, value in state_in(made, "official").items()}
    return write(folder, prefixed, name="wan.safetensors") / "wan.safetensors"


def diffusers_file(folder: Path, made: WanDiT) -> Path:
    return write(folder, state_in(made, "diffusers"), name="wan.safetensors") / "wan.safetensors"


def pickled_file(folder: Path, made: WanDiT) -> Path:
    folder.mkdir()
    torch.save({"state_dict": state_in(made, "official")}, folder / "wan.pth")
    return folder / "wan.pth"
