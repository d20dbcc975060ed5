"""The Wan diffusion transformer: text, and what a task gives besides it, to velocity. Every released variant is one config.

Wan report (arXiv 2503.20314), section 4.2; official `wan/modules/model.py` of Wan2.1 and Wan2.2, whose tensors it reads.
Sigma 1 is noise and the model predicts velocity = noise - data; timesteps are 1000 * sigma. Weights may be bf16: the
fp32 islands of `layers.py` stay fp32, the residual stream among them, and the velocity is always fp32.

Shape suffixes: B batch, L tokens, M context rows, D width, P rotary pairs, R timesteps (one a sample, or one a latent frame).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ._shared.packed import PackedState, kinds
from ._shared.quantised import Quantisation, build_quantised, packed_state
from ._shared.weights import Pretrained, default_dtype, fingerprint, locate
from .attention import CrossAttention, SelfAttention, pad_bias
from .checkpoint import HUB_FILES, read_checkpoint
from .conditions import CameraAdapter, ImageEmbedder, reference_embedding
from .config import DiTConfig
from .contracts import Conditioning, Context, KeysValues
from .layers import (
    Fp32LayerNorm,
    Fp32Linear,
    PatchEmbedding,
    Precision,
    computes_in_fp32,
    gated_add,
    modulated_norm,
    precision_types,
    time_sinusoid,
)
from .layouts import names
from .plugins import BackboneSpec
from .rope import rope_table

Grid = tuple[int, int, int]
RunTrunk = Callable[..., Tensor]
ALL, NOTHING = slice(None), Conditioning()


class Block(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer; time shifts, scales and gates the first and the last."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, heads, eps = config.dim, config.num_heads, config.eps
        self.eps = eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.self_attn = SelfAttention(dim, heads, config.qk_norm, eps)
        self.norm3 = Fp32LayerNorm(dim, eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(dim, heads, config.qk_norm, eps, image=self.reads_images(config))
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim))

    @staticmethod
    def reads_images(config: DiTConfig) -> bool:
        return config.image_dim is not None

    def forward(
        self, x_BLD: Tensor, rope_LP: Tensor, modulation_R6D: Tensor, rows_BL: Tensor, context: KeysValues, bias: Tensor | None
    ) -> Tensor:
        dtype = self.self_attn.q.bias.dtype  # that of the weights too, unless they are in 8 bits
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.to(modulation_R6D.dtype) + modulation_R6D).unbind(1)
        h_BLD = modulated_norm(x_BLD, shift1, scale1, rows_BL, self.eps)
        x_BLD = gated_add(x_BLD, self.self_attn(h_BLD.to(dtype), rope_LP), gate1, rows_BL)
        x_BLD = x_BLD + self.cross_attn(self.norm3(x_BLD).to(dtype), context, bias).to(x_BLD.dtype)
        h_BLD = modulated_norm(x_BLD, shift2, scale2, rows_BL, self.eps)
        return gated_add(x_BLD, self.ffn(h_BLD.to(dtype)), gate2, rows_BL)


class VaceBlock(Block):
    """A block over the tokens of the VACE context, and the projection of its output to a hint; it reads no images."""

    def __init__(self, config: DiTConfig, first: bool) -> None:
        super().__init__(config)
        self.before_proj = nn.Linear(config.dim, config.dim) if first else None
        self.after_proj = nn.Linear(config.dim, config.dim)

    @staticmethod
    def reads_images(config: DiTConfig) -> bool:
        return False


class Trunk(nn.Module):
    """All blocks, and everything that has a token axis: parallelism from outside splits it here."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.vace_layers = config.vace_layers
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.vace_blocks = nn.ModuleList(VaceBlock(config, first=i == 0) for i in range(len(config.vace_layers)))

    def forward(
        self,
        x_BLD: Tensor,
        rope_LP: Tensor,
        modulation_R6D: Tensor,
        rows_BL: Tensor,
        context: Context,
        vace_BLD: Tensor | None = None,
        vace_scale: float | tuple[float, ...] = 1.0,
        blocks: slice = ALL,
    ) -> Tensor:
        """`rows` is the timestep row of each token, `[B, L]`, or of each sample, `[B, 1]`.

        vace: tokens of the VACE context; vace_scale: strength of its hints, one number or one a VACE block
        blocks: which to run; a cache that decides by the first block runs them in two calls
        """
        shared = rope_LP, modulation_R6D, rows_BL
        hints = {} if vace_BLD is None else self._hints(x_BLD, vace_BLD, shared, context)
        scales = vace_scale if isinstance(vace_scale, tuple) else len(self.vace_layers) * (vace_scale,)
        for i in range(len(self.blocks))[blocks]:
            x_BLD = self.blocks[i](x_BLD, *shared, context.blocks[i], context.bias)
            if i in hints:
                x_BLD = torch.add(x_BLD, hints[i].to(x_BLD.dtype), alpha=scales[self.vace_layers.index(i)])
        return x_BLD

    def _hints(self, x_BLD: Tensor, vace_BLD: Tensor, shared: tuple[Tensor, ...], context: Context) -> dict[int, Tensor]:
        """What the VACE blocks add after each block of `vace_layers`; all of them see the tokens before the first block."""
        hints = {}
        for i, module, keys_values in zip(self.vace_layers, self.vace_blocks, context.vace_blocks, strict=True):
            block = cast(VaceBlock, module)
            if block.before_proj is not None:
                vace_BLD = block.before_proj(vace_BLD).to(x_BLD.dtype) + x_BLD
            vace_BLD = block(vace_BLD, *shared, keys_values, context.bias)
            hints[i] = block.after_proj(vace_BLD.to(block.after_proj.bias.dtype))
        return hints


class Head(nn.Module):
    """Modulated norm and projection to velocity patches, in fp32."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.patch_size, self.eps = config.patch_size, config.eps
        p, q, r = config.patch_size
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.proj = Fp32Linear(config.dim, config.out_dim * p * q * r)

    def forward(self, x_BLD: Tensor, time_RD: Tensor, rows_BL: Tensor, grid: Grid) -> Tensor:
        shift_RD, scale_RD = (self.modulation.to(time_RD.dtype) + time_RD[:, None]).unbind(1)
        patches = self.proj(modulated_norm(x_BLD, shift_RD, scale_RD, rows_BL, self.eps))
        (f, h, w), (p, q, r) = grid, self.patch_size
        return rearrange(patches, "b (f h w) (p q r c) -> b c (f p) (h q) (w r)", f=f, h=h, w=w, p=p, q=q, r=r)


class WanDiT(Pretrained):
    """The backbone of Wan2.1 and Wan2.2: text to video, image to video, first and last frame, VACE, and Fun's control.

    precision: `"official"` (fp32 residual stream and modulation), `"diffusers"` (residual in the type of the weights) or
    `"fast"` (modulation and norms too), which differ only where the weights are not fp32; `"strict"` is official with fp64 rotations
    A new instance has torch's default weights, good for nothing but shapes: `from_pretrained` loads weights and
    `init_weights` draws those that training starts from.

    Example:
        >>> model = WanDiT(TINY)
        >>> context = model.encode_context([torch.randn(5, 96)])
        >>> model(torch.randn(1, 16, 5, 8, 8), torch.tensor([999.0]), context).shape
        torch.Size([1, 16, 5, 8, 8])
    """

    format = "wan-dit/1"
    hub_files = HUB_FILES
    precision: Precision = "official"

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config.in_dim, dim, config.patch_size)
        if config.vace_layers:
            self.vace_patch_embedding = PatchEmbedding(config.vace_in_dim, dim, config.patch_size)
        if config.ref_dim:
            self.ref_conv = reference_embedding(config)
        if config.camera_dim:
            self.control_adapter = CameraAdapter(config.camera_dim, dim, config.patch_size)
        if config.image_dim is not None:
            self.image_embedder = ImageEmbedder(config.image_dim, dim, config.pos_embed_seq_len)
        self.context_embedder = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(Fp32Linear(config.freq_dim, dim), nn.SiLU(), Fp32Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Fp32Linear(dim, 6 * dim))
        self.trunk = Trunk(config)
        self.head = Head(config)

    @property
    def spec(self) -> BackboneSpec:
        return self.config.spec(self.name or "wan-dit")

    def encode_context(self, text: list[Tensor], conditioning: Conditioning | None = None) -> Context:
        """Project prompts and compute the keys and values of every block's cross-attention, once for all steps.

        text: one `[L_i, text_dim]` a sample, without pad rows; gradients flow into it
        Raises ValueError where a prompt is longer than `text_len` or of another width.
        """
        config, weight = self.config, self.patch_embedding.weight
        for tokens in text:
            if tokens.ndim != 2 or len(tokens) > config.text_len or tokens.shape[1] != config.text_dim:
                raise ValueError(
                    f"context is {tuple(tokens.shape)}, expected [L, {config.text_dim}] with L <= {config.text_len}: "
                    f"encode the prompt with a text encoder of embedding space '{config.embedding_space}', cut to {config.text_len} tokens"
                )
        scale = 1.0 if conditioning is None else conditioning.vace_scale
        if isinstance(scale, tuple) and len(scale) != len(config.vace_layers):
            raise ValueError(f"vace_scale has {len(scale)} numbers, the backbone {len(config.vace_layers)} VACE blocks: give one for each")
        lengths = [len(tokens) for tokens in text]
        # log(n / m) in bf16 would be off by up to 1.6 %: there all pad rows are kept and no bias is needed
        rows = min(max(lengths) + 1, config.text_len) if computes_in_fp32(weight) else config.text_len
        padded = torch.stack([F.pad(tokens.to(weight), (0, 0, 0, rows - len(tokens))) for tokens in text])
        text_BMD, image_BMD = self.context_embedder(padded), self._embed_images(conditioning, len(text))
        blocks, vace_blocks = self.trunk.blocks, self.trunk.vace_blocks
        return Context(
            tuple(cast(CrossAttention, block.cross_attn).keys_values(text_BMD, image_BMD) for block in blocks),
            pad_bias(lengths, rows, config.text_len, weight.device),
            tuple(cast(CrossAttention, block.cross_attn).keys_values(text_BMD) for block in vace_blocks),
        )

    def _embed_images(self, conditioning: Conditioning | None, batch: int) -> Tensor | None:
        images = None if conditioning is None else conditioning.image_context
        count, width = self.config.pos_embed_seq_len, self.config.image_dim
        if width is None:
            if images is not None:
                raise ValueError("this backbone reads no image tokens: give no image_context")
            return None
        expected = f"image_context [{batch}, {count or 'N'}, {width}]"
        if images is None:
            raise ValueError(f"this backbone reads image tokens: give {expected} of a CLIP image encoder in the conditioning")
        if images.ndim != 3 or len(images) != batch or images.shape[2] != width or images.shape[1] != (count or images.shape[1]):
            raise ValueError(f"image_context is {list(images.shape)}, expected {expected}")
        embedded: Tensor = self.image_embedder(images.to(self.patch_embedding.weight))
        return embedded

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Context,
        conditioning: Conditioning | None = None,
        run_trunk: RunTrunk | None = None,
    ) -> Tensor:
        """Velocity `[B, out_dim, T', H', W']` in fp32.

        latents: `[B, C, T', H', W']`, H' and W' multiples of the patch
        timestep: 0..1000, `[B]`, or `[B, T']` where every latent frame has its own; never bf16
        context: from `encode_context`, of the same batch size
        run_trunk: called with the trunk and its arguments in its place, as a cache that may know the result from an earlier step
        """
        given = conditioning or NOTHING
        residual, modulation = precision_types(self.precision, self.patch_embedding.weight.dtype)
        if given.extra_latents is not None:
            latents = torch.cat([latents, given.extra_latents.to(latents.dtype)], dim=1)
        x_BLD, grid = self.patch_embedding(latents), self.grid(latents)
        if given.camera is not None:
            x_BLD = x_BLD + self.control_adapter(given.camera)
        if given.reference is not None:
            x_BLD, grid = torch.cat([self._embed_reference(given.reference), x_BLD], dim=1), (grid[0] + 1, *grid[1:])
        time_RD, rows_BL = self.embed_time(timestep, grid)
        modulation_R6D = self.time_projection(time_RD).unflatten(-1, (6, -1)).to(modulation)
        vace_BLD = None if given.vace is None else self.vace_patch_embedding(given.vace)
        rope_LP = rope_table(grid, self.config.head_dim, x_BLD.device, torch.complex128 if self.precision == "strict" else torch.complex64)
        trunk = self.trunk if run_trunk is None else partial(run_trunk, self.trunk)
        x_BLD = trunk(x_BLD.to(residual), rope_LP, modulation_R6D, rows_BL, context, vace_BLD, given.vace_scale)
        velocity = self.head(x_BLD, time_RD, rows_BL, grid)
        return velocity if given.reference is None else velocity[:, :, self.config.patch_size[0] :]

    def _embed_reference(self, reference: Tensor) -> Tensor:
        embedded: Tensor = self.ref_conv(reference.to(self.ref_conv.weight.dtype))
        return embedded.flatten(2).transpose(1, 2)

    def grid(self, latents: Tensor) -> Grid:
        """Tokens along (frames, height, width)."""
        (t, h, w), (p, q, r) = latents.shape[2:], self.config.patch_size
        return t // p, h // q, w // r

    def embed_time(self, timestep: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Embedded times `[R, D]` and the row of each sample `[B, 1]` or token `[B, L]`.

        The time MLP runs once per given time, never per token.
        """
        if timestep.ndim == 2:
            timestep = timestep[:, :: self.config.patch_size[0]]
        rows = torch.arange(timestep.numel(), device=timestep.device).view(len(timestep), -1)
        if timestep.ndim == 2:
            rows = rows.repeat_interleave(grid[1] * grid[2], dim=1)
        return self.time_embedding(time_sinusoid(timestep.flatten(), self.config.freq_dim)), rows

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights that training starts from, as the official code does.

        Linear layers and patches Xavier uniform without bias, text and time embeddings N(0, 0.02), modulation
        N(0, 1/dim), norms one, head and VACE's projections zero: a new model predicts velocity 0. The constructor does not call it.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | PatchEmbedding):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, Block | Head):
                nn.init.normal_(module.modulation, std=self.config.dim**-0.5, generator=generator)
        for block in self.trunk.vace_blocks:
            for layer in (block.before_proj, block.after_proj):
                if isinstance(layer, nn.Linear):
                    layer.weight.zero_()
        for layer in (*self.context_embedder, *self.time_embedding):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02, generator=generator)
        self.head.proj.weight.zero_()

    def reinitialised(self, **architecture: Any) -> Self:
        """A new model with this one's config, the fields in `architecture` changed, and the weights of `init_weights`."""
        model = super().reinitialised(**architecture)
        model.init_weights()
        return model

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, dtype: Any = None, device: Any = None, quantise: Quantisation | None = None
    ) -> Self:
        """Load a file, a folder or a Hub id in any layout.

        dtype None is fp32 on a CPU and the checkpoint's own on a GPU (bf16 where that is fp32); device None is the CPU.
        quantise: `"fp8"` or `"int8"` keeps the weights of the blocks' linear layers in 8 bits; those that a file has so stay as they are
        """
        if quantise is None:
            return super().from_pretrained(source, dtype=dtype, device=device)
        path = locate(source, cls.hub_files)
        config, state = cls.read_checkpoint(path)
        dtype = dtype or default_dtype(state, torch.device(device or "cpu"))
        return build_quantised(lambda: cls(config), state, "trunk", quantise, dtype=dtype, device=device, source=path)

    @classmethod
    def read_checkpoint(cls, path: Path) -> tuple[DiTConfig, PackedState]:
        return read_checkpoint(path)

    @classmethod
    def official_names(cls, config: DiTConfig) -> dict[str, str]:
        found = names(config, "official")
        return found | {f"{own}_scale": f"{official}_scale" for own, official in found.items() if own.startswith("trunk.")}

    def fingerprint(self) -> str:
        """sha256 of the weights under their official names; of those in 8 bits the numbers that they stand for."""
        state, table = packed_state(self.state_dict()), self.official_names(self.config)
        dtype = self.patch_embedding.weight.dtype if kinds(state) else None
        return fingerprint({table[key]: value for key, value in state.items()}, dtype)
