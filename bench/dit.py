"""What `benchmarks.py` measures of wan-dit: forward, its floor, the sampling loop, loading."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from references import backbone_pair, padded
from timing import Comparison, compare
from torch import Tensor
from wan_dit import Pipeline
from wan_dit.caching import relative_error
from wan_dit.config import DiTConfig
from wan_dit.model import WanDiT
from wan_vae.testing import difference

PROMPT_TOKENS = 20
GRIDS = {300: (3, 20, 20), 1000: (5, 20, 40), 3000: (15, 20, 40)}  # tokens: latents
SIZES = ((512, 300, 11), (512, 1000, 5), (512, 3000, 3), (1024, 300, 7), (1024, 3000, 3), (1536, 300, 5), (1536, 1000, 3))
STEPS = 50
CACHES = ("easycache:threshold=0.05", "first-block:threshold=0.12", "teacache:threshold=0.1", "attention", "cfg-gate")


def config(dim: int) -> DiTConfig:
    """A backbone of this width, with as many layers as a minute allows."""
    heads, layers = (8, 6) if dim == 512 else (dim // 128, 2)
    return DiTConfig(dim=dim, ffn_dim=8960 if dim == 1536 else 4 * dim, num_heads=heads, num_layers=layers, text_dim=512)


def inputs(dim: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, a prompt and a time."""
    generator, own = torch.Generator().manual_seed(3), config(dim)
    latents = torch.randn(1, own.in_dim, *GRIDS[tokens], generator=generator)
    return latents, torch.randn(PROMPT_TOKENS, own.text_dim, generator=generator), torch.tensor([637.0])


def backbone() -> Iterator[Comparison]:
    """One step, ours with the context of the prompt, which a loop encodes once."""
    for dim, tokens, pairs in SIZES:
        ours, theirs = backbone_pair(config(dim))
        latents, prompt, timestep = inputs(dim, tokens)
        context, rows = ours.encode_context([prompt]), padded(prompt, ours.config.text_len)
        mine = partial(ours, latents, timestep, context)
        given = {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": rows, "return_dict": False}
        reference = partial(_first, theirs, given)
        apart = difference(mine(), reference())
        yield compare(f"width {dim}, {tokens:,} tokens", mine, reference, pairs, difference=apart)
        if (dim, tokens) == (512, 300):
            both = partial(_whole, ours, latents, timestep, prompt)
            yield compare(f"width {dim}, {tokens:,} tokens, with the context encoded too", both, reference, pairs, difference=apart)


def _first(model: Any, given: dict[str, Any]) -> Tensor:
    made: Tensor = model(**given)[0]
    return made


def _whole(model: WanDiT, latents: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
    return model(latents, timestep, model.encode_context([prompt]))


def against_floor() -> Iterator[Comparison]:
    for dim, tokens, pairs in SIZES:
        torch.manual_seed(0)
        ours = WanDiT(config(dim)).eval()
        latents, prompt, timestep = inputs(dim, tokens)
        mine = partial(ours, latents, timestep, ours.encode_context([prompt]))
        yield compare(f"width {dim}, {tokens:,} tokens", mine, floor(ours, tokens), pairs)


def floor(model: WanDiT, tokens: int) -> Callable[[], None]:
    """The matrix products and attentions that are left of a forward when all else is cached or free, on contiguous inputs."""
    own, dim, width = model.config, model.config.dim, model.config.head_dim
    x, wide = torch.randn(1, tokens, dim), torch.randn(1, tokens, own.ffn_dim)
    heads, context = torch.randn(1, own.num_heads, tokens, width), torch.randn(1, own.num_heads, PROMPT_TOKENS + 1, width)
    bias = torch.zeros(1, 1, 1, PROMPT_TOKENS + 1)
    patches, embed = torch.randn(1, tokens, own.in_dim * 4), model.patch_embedding
    time, hidden, layers = torch.randn(1, own.freq_dim), torch.randn(1, dim), model.time_embedding

    def run() -> None:
        F.linear(patches, embed.weight.flatten(1), embed.bias)
        for given, layer in ((time, layers[0]), (hidden, layers[2]), (hidden, model.time_projection[1])):
            F.linear(given, layer.weight, layer.bias)
        for block in model.trunk.blocks:
            own, cross = block.self_attn, block.cross_attn
            for layer in (own.q, own.k, own.v, own.o, cross.q, cross.o, block.ffn[0]):
                F.linear(x, layer.weight, layer.bias)
            F.linear(wide, block.ffn[2].weight, block.ffn[2].bias)
            F.scaled_dot_product_attention(heads, heads, heads)
            F.scaled_dot_product_attention(heads, context, context, attn_mask=bias)
        F.linear(x, model.head.proj.weight, model.head.proj.bias)

    return run


def loop() -> Iterator[Comparison]:
    """The built-in model under a cache, against the same without."""
    pipe = Pipeline("tiny")

    def latents(cache: str | None) -> Tensor:
        events = pipe.stream("a red circle moves left", seed=1, steps=STEPS, cache=cache)
        return [event.state.latents for event in events if getattr(event, "state", None)][-1]

    plain = latents(None)
    for cache in CACHES:
        yield compare(f"`{cache}`", partial(latents, cache), partial(latents, None), 3, difference=relative_error(latents(cache), plain))


LOADS = {
    "wan-dit": "import torch; from wan_dit.model import WanDiT as Model; model = Model.from_pretrained({folder!r}, dtype=torch.bfloat16)",
    "diffusers": "import torch; from diffusers import WanTransformer3DModel as Model; "
    "model = Model.from_pretrained({folder!r}, torch_dtype=torch.bfloat16)",
}
# every weight is touched, since a file that is mapped is not read before; not ru_maxrss, which a process inherits
TOUCH = """
total = sum(float(value.detach().sum()) for value in model.parameters())
lines = open('/proc/self/status').read().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith('VmHWM:')))
"""


def loading(clock: Callable[[], float]) -> Iterator[Comparison]:
    """The same folder of bf16 weights, in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder))
        lines = [line.format(folder=folder) + TOUCH for line in LOADS.values()]
        yield compare(
            "a folder that diffusers wrote, 0.7 GB in bf16", partial(_process, lines[0]), partial(_process, lines[1]), 3, clock=clock
        )


def loading_memory() -> list[list[str]]:
    """The most resident memory of a process that loads it."""
    with tempfile.TemporaryDirectory() as folder:
        size = _write(Path(folder))
        peaks = [_process(line.format(folder=folder) + TOUCH) for line in LOADS.values()]
    return [["a folder that diffusers wrote, bf16", f"{size / 1e9:.2f} GB", *(f"{int(peak) / 1e9:.2f} GB" for peak in peaks)]]


def _write(folder: Path) -> int:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=8).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _process(line: str) -> str:
    return subprocess.run([sys.executable, "-c", line], check=True, capture_output=True, text=True).stdout
