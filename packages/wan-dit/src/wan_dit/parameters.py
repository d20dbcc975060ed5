"""How many parameters a transformer has, by its configuration alone."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import DiTConfig

CAMERA_FOLD = 8**2  # pixels of a camera path that become channels of one, see `conditions.CameraAdapter`


def count_parameters(config: DiTConfig) -> int:
    """The exact count: that of the tensors in a checkpoint."""
    d, patch, vace = config.dim, prod(config.patch_size), len(config.vace_layers)
    count = config.in_dim * patch * d + d  # patches
    count += _linear(config.text_dim, d) + _linear(d, d)  # context embedder
    count += _linear(config.freq_dim, d) + _linear(d, d) + _linear(d, 6 * d)  # time
    count += _linear(d, config.out_dim * patch) + 2 * d  # head
    count += config.num_layers * _block(config, image=config.image_dim is not None)
    if config.image_dim is not None:
        count += 2 * config.image_dim + _linear(config.image_dim, config.image_dim) + _linear(config.image_dim, d) + 2 * d
        count += (config.pos_embed_seq_len or 0) * config.image_dim
    if vace:
        count += config.vace_in_dim * patch * d + d + vace * (_block(config, image=False) + _linear(d, d)) + _linear(d, d)
    if config.ref_dim:
        count += config.ref_dim * prod(config.patch_size[1:]) * d + d
    if config.camera_dim:
        count += config.camera_dim * CAMERA_FOLD * prod(config.patch_size[1:]) * d + d + 2 * (9 * d * d + d)
    return count


def _block(config: DiTConfig, *, image: bool) -> int:
    d = config.dim
    count = 8 * _linear(d, d) + _linear(d, config.ffn_dim) + _linear(config.ffn_dim, d) + 6 * d  # attention, feed-forward, modulation
    count += 4 * d * config.qk_norm + 2 * d * config.cross_attn_norm
    return count + (2 * _linear(d, d) + d * config.qk_norm if image else 0)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
