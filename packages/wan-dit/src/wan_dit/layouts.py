"""The names of the transformer's tensors in every layout that it is published in, as tables, and those of configuration fields.

`official` is Wan-Video's, which ComfyUI, Kijai and GGUF files share; Fun's parts have VideoX-Fun's names in both layouts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from .config import DiTConfig

Layout = Literal["official", "diffusers"]


class Row(NamedTuple):
    """One layer's name in each layout, and the ends that its tensors' names have there."""

    own: str
    official: str
    diffusers: str
    ends: tuple[str, ...]


_LAYER, _NORM, _TENSOR = (".weight", ".bias"), (".weight",), ("",)
TOP = (
    Row("patch_embedding", "patch_embedding", "patch_embedding", _LAYER),
    Row("context_embedder.0", "text_embedding.0", "condition_embedder.text_embedder.linear_1", _LAYER),
    Row("context_embedder.2", "text_embedding.2", "condition_embedder.text_embedder.linear_2", _LAYER),
    Row("time_embedding.0", "time_embedding.0", "condition_embedder.time_embedder.linear_1", _LAYER),
    Row("time_embedding.2", "time_embedding.2", "condition_embedder.time_embedder.linear_2", _LAYER),
    Row("time_projection.1", "time_projection.1", "condition_embedder.time_proj", _LAYER),
    Row("head.proj", "head.head", "proj_out", _LAYER),
    Row("head.modulation", "head.modulation", "scale_shift_table", _TENSOR),
)
IMAGE = (
    Row("image_embedder.norm1", "img_emb.proj.0", "condition_embedder.image_embedder.norm1", _LAYER),
    Row("image_embedder.linear1", "img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj", _LAYER),
    Row("image_embedder.linear2", "img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2", _LAYER),
    Row("image_embedder.norm2", "img_emb.proj.4", "condition_embedder.image_embedder.norm2", _LAYER),
)
IMAGE_POSITIONS = (Row("image_embedder.pos_embed", "img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed", _TENSOR),)
VACE = (Row("vace_patch_embedding", "vace_patch_embedding", "vace_patch_embedding", _LAYER),)
REFERENCE = (Row("ref_conv", "ref_conv", "ref_conv", _LAYER),)
CAMERA = (
    Row("control_adapter.conv", "control_adapter.conv", "control_adapter.conv", _LAYER),
    Row("control_adapter.conv1", "control_adapter.residual_blocks.0.conv1", "control_adapter.residual_blocks.0.conv1", _LAYER),
    Row("control_adapter.conv2", "control_adapter.residual_blocks.0.conv2", "control_adapter.residual_blocks.0.conv2", _LAYER),
)
BLOCK = (
    Row("modulation", "modulation", "scale_shift_table", _TENSOR),
    Row("self_attn.q", "self_attn.q", "attn1.to_q", _LAYER),
    Row("self_attn.k", "self_attn.k", "attn1.to_k", _LAYER),
    Row("self_attn.v", "self_attn.v", "attn1.to_v", _LAYER),
    Row("self_attn.o", "self_attn.o", "attn1.to_out.0", _LAYER),
    Row("cross_attn.q", "cross_attn.q", "attn2.to_q", _LAYER),
    Row("cross_attn.k", "cross_attn.k", "attn2.to_k", _LAYER),
    Row("cross_attn.v", "cross_attn.v", "attn2.to_v", _LAYER),
    Row("cross_attn.o", "cross_attn.o", "attn2.to_out.0", _LAYER),
    Row("ffn.0", "ffn.0", "ffn.net.0.proj", _LAYER),
    Row("ffn.2", "ffn.2", "ffn.net.2", _LAYER),
)
QK_NORM = (
    Row("self_attn.norm_q", "self_attn.norm_q", "attn1.norm_q", _NORM),
    Row("self_attn.norm_k", "self_attn.norm_k", "attn1.norm_k", _NORM),
    Row("cross_attn.norm_q", "cross_attn.norm_q", "attn2.norm_q", _NORM),
    Row("cross_attn.norm_k", "cross_attn.norm_k", "attn2.norm_k", _NORM),
)
CROSS_NORM = (Row("norm3", "norm3", "norm2", _LAYER),)
BLOCK_IMAGE = (
    Row("cross_attn.k_img", "cross_attn.k_img", "attn2.add_k_proj", _LAYER),
    Row("cross_attn.v_img", "cross_attn.v_img", "attn2.add_v_proj", _LAYER),
)
QK_NORM_IMAGE = (Row("cross_attn.norm_k_img", "cross_attn.norm_k_img", "attn2.norm_added_k", _NORM),)
BEFORE = (Row("before_proj", "before_proj", "proj_in", _LAYER),)
AFTER = (Row("after_proj", "after_proj", "proj_out", _LAYER),)

# fields of the other config.json; what is not written there has the value of the released models
OFFICIAL_FIELDS = (
    *("patch_size", "in_dim", "out_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "text_len"),
    *("num_heads", "num_layers", "qk_norm", "cross_attn_norm", "eps", "vace_layers", "vace_in_dim"),
)
DIFFUSERS_FIELDS = {  # own: theirs
    "patch_size": "patch_size",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "num_heads": "num_attention_heads",
    "num_layers": "num_layers",
    "cross_attn_norm": "cross_attn_norm",
    "eps": "eps",
    "image_dim": "image_dim",
    "pos_embed_seq_len": "pos_embed_seq_len",
    "vace_layers": "vace_layers",
    "vace_in_dim": "vace_in_channels",
}
OFFICIAL_CLASSES = ("WanModel", "VaceWanModel")
DIFFUSERS_CLASSES = ("WanTransformer3DModel", "WanVACETransformer3DModel")
# parts of models that have more than this transformer
UNSUPPORTED = {
    "pose_patch_embedding": "Wan2.2 Animate",
    "casual_audio_encoder": "Wan2.2 S2V",
    "motion_encoder": "Wan2.2 Animate",
}


def block_rows(config: DiTConfig, *, image: bool) -> tuple[Row, ...]:
    """The layers of a block."""
    rows = (*BLOCK, *(QK_NORM if config.qk_norm else ()), *(CROSS_NORM if config.cross_attn_norm else ()))
    return (*rows, *BLOCK_IMAGE, *(QK_NORM_IMAGE if config.qk_norm else ())) if image else rows


def top_rows(config: DiTConfig) -> tuple[Row, ...]:
    """The layers outside the blocks."""
    parts = (
        (True, TOP),
        (config.image_dim is not None, IMAGE),
        (config.pos_embed_seq_len is not None, IMAGE_POSITIONS),
        (bool(config.vace_layers), VACE),
        (bool(config.ref_dim), REFERENCE),
        (bool(config.camera_dim), CAMERA),
    )
    return tuple(row for present, rows in parts if present for row in rows)


def names(config: DiTConfig, layout: Layout) -> dict[str, str]:
    """Every tensor of a model of this configuration: own name -> name in `layout`, a bijection."""
    table = _named(top_rows(config), "", "", layout)
    for i in range(config.num_layers):
        table |= _named(block_rows(config, image=config.image_dim is not None), f"trunk.blocks.{i}.", f"blocks.{i}.", layout)
    for i in range(len(config.vace_layers)):
        rows = (*block_rows(config, image=False), *(BEFORE if i == 0 else ()), *AFTER)
        table |= _named(rows, f"trunk.vace_blocks.{i}.", f"vace_blocks.{i}.", layout)
    return table


def _named(rows: tuple[Row, ...], own: str, theirs: str, layout: Layout) -> dict[str, str]:
    return {own + row.own + end: theirs + getattr(row, layout) + end for row in rows for end in row.ends}
