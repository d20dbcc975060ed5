"""What a backbone takes, from its configuration alone: parameters, floating-point operations, memory. Imports no torch.

Operations are those of matrix products and attention, two a multiplication and addition. Memory is that of one sample, forwards of
prompt and negative prompt one after the other. Bytes beside the weights are what is alive at the peak of a block, counted off
`model.Block`: L tokens of width d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import DiTConfig

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes a number
CLIP_TOKENS = 257
SCALE = 4  # bytes a row of a weight in 8 bits
Shape = tuple[int, int]  # rows, columns


def tokens(config: DiTConfig, size: tuple[int, int], frames: int) -> int:
    """Tokens of a video of `size` (width, height). ValueError where it is not on the grid of the model."""
    (time, *stride), (p, *patch) = config.stride, config.patch_size
    down, across = (s * q for s, q in zip(stride, patch, strict=True))
    if min(size) < 1 or size[0] % across or size[1] % down:
        raise ValueError(f"size {size[0]}x{size[1]} is not of multiples of {across}x{down}")
    if frames < 1 or (frames - 1) % time:
        raise ValueError(f"{frames} frames are not 1 + {time} k, such as {1 + time * max(0, round((frames - 1) / time))}")
    return (1 + (frames - 1) // time) // p * (size[1] // down) * (size[0] // across)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    running: weights of the linear layers that a step computes with; context: of those that `encode_context` alone does; both in the blocks
    rows: of all these weights; rest: everything else
    piece: of `running`, those of one block
    """

    running: int
    context: int
    rows: int
    rest: int
    piece: int

    @property
    def total(self) -> int:
        return self.running + self.context + self.rest


def block_layers(config: DiTConfig, *, image: bool) -> tuple[list[Shape], list[Shape]]:
    """Weights of a block's linear layers: those that it runs, and those of the context's keys and values."""
    d, f = config.dim, config.ffn_dim
    return [*[(d, d)] * 6, (f, d), (d, f)], [(d, d)] * (4 if image else 2)


def parameters(config: DiTConfig) -> Parameters:
    """Of the whole model: exactly those that `WanDiT` has."""
    d, blocks, vace = config.dim, config.num_layers, len(config.vace_layers)
    image = config.image_dim is not None
    (runs, context), (_, vace_context) = block_layers(config, image=image), block_layers(config, image=False)
    between = [(d, d)] * (vace + (vace > 0))  # after_proj of each VACE block, before_proj of the first
    running = [*runs * (blocks + vace), *between]
    encoding = [*context * blocks, *vace_context * vace]
    rows = sum(row for row, _ in (*running, *encoding))
    norms = 4 * d * config.qk_norm + 2 * d * config.cross_attn_norm
    small = (norms + 6 * d) * (blocks + vace) + d * (image and config.qk_norm) * blocks
    return Parameters(_count(running), _count(encoding), rows, rows + small + _outside(config), _count(runs))  # a bias a row


def _outside(config: DiTConfig) -> int:
    """Parameters that are in no block."""
    d, (p, q, r) = config.dim, config.patch_size
    found = _linear(p * q * r * config.in_dim, d) + _linear(config.text_dim, d) + _linear(d, d)
    found += _linear(config.freq_dim, d) + _linear(d, d) + _linear(d, 6 * d) + _linear(d, p * q * r * config.out_dim) + 2 * d
    if config.image_dim is not None:
        found += 2 * config.image_dim + _linear(config.image_dim, config.image_dim) + _linear(config.image_dim, d) + 2 * d
        found += (config.pos_embed_seq_len or 0) * config.image_dim
    if config.vace_layers:
        found += _linear(p * q * r * config.vace_in_dim, d)
    if config.ref_dim:
        found += _linear(q * r * config.ref_dim, d)
    if config.camera_dim:
        found += _linear(64 * q * r * config.camera_dim, d) + 2 * _linear(9 * d, d)
    return found


@dataclass(frozen=True)
class Operations:
    """Floating-point operations: matrix products and attention of one forward, and those of encoding one prompt (and its images)."""

    products: int
    attention: int
    context: int


def operations(config: DiTConfig, count: int, *, text: int | None = None) -> Operations:
    """Of `count` tokens; text: rows that the prompt is padded to, None for all of `text_len`."""
    d, rows, blocks = config.dim, text or config.text_len, config.num_layers
    vace, (p, q, r) = len(config.vace_layers), config.patch_size
    images = 0 if config.image_dim is None else config.pos_embed_seq_len or CLIP_TOKENS
    found = parameters(config)
    products = found.running * count + p * q * r * d * (config.in_dim + config.out_dim) * count + d * (config.freq_dim + 7 * d)
    products += p * q * r * config.vace_in_dim * d * count if vace else 0
    products += (64 * q * r * config.camera_dim * d + 18 * d * d) * count if config.camera_dim else 0
    attention = 2 * d * count * ((blocks + vace) * (count + rows) + blocks * images)
    context = rows * (d * (config.text_dim + d) + 2 * d * d * (blocks + vace))
    context += images * ((config.image_dim or 0) * ((config.image_dim or 0) + d) + 2 * d * d * blocks)
    return Operations(2 * products, 2 * attention, 2 * context)


@dataclass(frozen=True)
class Weights:
    """Bytes of a backbone's weights: on the device, in the host's memory, and brought to the device in every forward."""

    device: int
    host: int = 0
    brought: int = 0


def weights(config: DiTConfig, dtype: str, *, offload: str = "none", quantise: str | None = None, on_cpu: bool = False) -> Weights:
    """As `offload.load_offloaded` holds them: of blocks that are swapped, two are on the device."""
    found, width = parameters(config), WIDTHS[dtype]
    per_number, scales = (1, SCALE * found.rows) if quantise else (width, 0)
    linear, outside = per_number * (found.running + found.context) + scales, width * found.rest
    if offload not in ("blocks", "stream") or (offload == "blocks" and on_cpu):
        return Weights(linear + outside)
    share = 1 + scales / (per_number * (found.running + found.context))
    two, running = (round(share * per_number * count) for count in (2 * found.piece, found.running))
    return Weights(outside + two, linear if offload == "blocks" else 0, running)


def context_bytes(config: DiTConfig, dtype: str, *, guided: bool) -> int:
    """Keys and values of all blocks, of the prompt and, where it is guided, of the negative prompt."""
    images = 0 if config.image_dim is None else config.pos_embed_seq_len or CLIP_TOKENS
    rows = config.num_layers * (config.text_len + images) + len(config.vace_layers) * config.text_len
    return (1 + guided) * 2 * WIDTHS[dtype] * config.dim * rows


def work_bytes(config: DiTConfig, dtype: str, count: int, *, quantise: str | None = None) -> int:
    """What is alive at the peak of a forward of `count` tokens, the residual stream in fp32.

    Around a block: the trunk's input, and in 16 bits the embedded patches. At a block's peak, self-attention or feed-forward:
    its input, the stream after the first residual, the modulated tokens in fp32 and in the type of the weights. Of few tokens
    the most is the projection of time, whose weights are made fp32; weights in 8 bits are unpacked where they are used.
    """
    width, d, f = WIDTHS[dtype], config.dim, config.ffn_dim
    half = width < 4
    around = 4 + (width if half else 0)
    norming = (4 + 4 + half * width) + 3 * width + (12 if half else 8)  # x, h; v, q, k; what the norm of k makes in fp32
    attending = (4 + 4 + half * width) + 5 * width  # x, h; q, k, v, the result and its copy with heads joined
    feeding = (4 + 4 + 4 + half * width) + 2 * width * f / d  # x in and now, h; hidden, before and after GELU
    hints = width * (1 + len(config.vace_layers)) if config.vace_layers else 0
    rope = 4 * config.head_dim  # complex64 a pair
    block = count * (d * (around + max(norming, attending, feeding) + hints) + rope)
    unpacked = d * f * (4 + (width if half else 0)) if quantise else 0
    return math.ceil(max(block + unpacked, (4 * 6 * d * d + count * d * width) if half else 0))


def _linear(columns: int, rows: int) -> int:
    return columns * rows + rows


def _count(shapes: list[Shape]) -> int:
    return sum(rows * columns for rows, columns in shapes)
