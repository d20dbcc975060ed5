"""Ours against diffusers and transformers, interleaved in one process: `python bench/benchmarks.py docs/benchmarks.md`."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from page import header, machine, table
from references import backbone_pair, padded, reference_latents, reference_video, text_pair, vae_pair
from timing import Comparison, compare
from wan_dit.config import DiTConfig
from wan_text.config import UMT5Config
from wan_vae.config import WAN21, WAN22
from wan_vae.testing import difference

SUMMARY = """
Ours against the reference library with the same random weights, on the same input, in fp32. Both alternate in one process,
or one fresh process after the other, after one run each to warm up. Times are CPU time of one thread: on an idle machine that
is the wall time, on a busy one it still holds. A ratio is the reference's time over ours, so above 1 ours is faster: the median
over pairs, then the least and the greatest. Ratios are of these shapes and this machine, not a promise for a GPU, and the text
encoder and the backbone are narrower than the published ones. "Apart" is the largest difference between the two results over
max(1, largest reference).
"""
COLUMNS = ["what", "ours", "reference", "ratio", "pairs", "apart"]
VAE21 = WAN21.model_copy(update={"base_dim": 32, "decoder_base_dim": 32})
VAE22 = WAN22.model_copy(update={"base_dim": 32, "decoder_base_dim": 48})
FRAMES, HEIGHT, WIDTH = 9, 64, 112
UMT5 = UMT5Config(vocab_size=4096, dim=512, dim_attn=512, dim_ffn=1280, num_heads=8, num_layers=4, embedding_space="bench")
PROMPT_TOKENS = 20
DIT = DiTConfig(dim=512, ffn_dim=2048, num_heads=8, num_layers=6, text_dim=512)
GRID = (3, 20, 20)  # latents; 300 tokens


def run(name: str, ours: Callable[[], torch.Tensor], theirs: Callable[[], torch.Tensor], pairs: int, *, warm: bool = True) -> Comparison:
    """Compare times and results; without `warm` the runs that are timed are the only ones."""
    if warm:
        return compare(name, ours, theirs, pairs, difference=difference(ours(), theirs()))
    results: dict[str, torch.Tensor] = {}
    timed = compare(name, lambda: results.update(ours=ours()), lambda: results.update(theirs=theirs()), pairs, warm=False)
    return replace(timed, difference=difference(results["ours"], results["theirs"]))


def vae() -> Iterator[Comparison]:
    generator = torch.Generator().manual_seed(1)
    ours, theirs = vae_pair(WAN21)

    def rows(name: str, frames: int, height: int, width: int, pairs: int, *, warm: bool = True) -> Iterator[Comparison]:
        video = torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1
        latents = torch.randn(1, 16, 1 + (frames - 1) // 4, height // 8, width // 8, generator=generator)
        yield run(f"encode {name}", partial(ours.encode, video), partial(reference_latents, theirs, video), pairs, warm=warm)
        yield run(f"decode {name}", partial(ours.decode, latents), partial(reference_video, theirs, latents), pairs, warm=warm)

    yield from rows("9 x 96 x 160", 9, 96, 160, 5)
    yield from rows("one frame, 128 x 192", 1, 128, 192, 5)
    picture = torch.rand(1, 3, 1, 64, 96, generator=generator) * 2 - 1
    clip = torch.cat([picture, torch.zeros(1, 3, 32, 64, 96)], 2)
    yield run(
        "encode I2V conditioning, a picture and 32 zero frames, 64 x 96",
        partial(ours.encode, clip),
        partial(reference_latents, theirs, clip),
        3,
    )
    yield from rows("17 x 240 x 416, once", 17, 240, 416, 1, warm=False)


def still() -> Iterator[Comparison]:
    """The shortcut for streams that stand still, against ours without it."""
    ours, _ = vae_pair(WAN21, reference=False)
    picture = torch.rand(1, 3, 1, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    chunks = torch.cat([picture, torch.zeros(1, 3, 80, 64, 96)], 2).split([1, *[4] * 20], 2)

    def encode(watched: bool) -> torch.Tensor:
        session = ours.encode_session()
        if not watched:
            session.state.watch = lambda chunk: chunk
        return torch.cat([session.push(chunk) for chunk in chunks], 2)

    yield run("encode a picture and 80 zero frames, 64 x 96", partial(encode, True), partial(encode, False), 3)


def widths() -> Iterator[Comparison]:
    """Models of other widths, which the Winograd algorithm does not suit, by the direct backend."""
    video = torch.rand(1, 3, FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for name, config in (("Wan2.1", VAE21), ("Wan2.2", VAE22)):
        ours, theirs = vae_pair(config)
        latents = ours.encode(video)
        clip = f"width {config.base_dim} / {config.decoder_base_dim}, {FRAMES} x {HEIGHT} x {WIDTH}"
        yield run(f"{name} encode, {clip}", partial(ours.encode, video), partial(reference_latents, theirs, video), 5)
        yield run(f"{name} decode, {clip}", partial(ours.decode, latents), partial(reference_video, theirs, latents), 5)


def text() -> Iterator[Comparison]:
    ours, theirs = text_pair(UMT5)
    ids = torch.randint(0, UMT5.vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(2))
    padding = torch.zeros(1, UMT5.max_tokens - PROMPT_TOKENS, dtype=torch.long)
    wide, mask = torch.cat([ids, padding], 1), torch.cat([torch.ones_like(ids), padding], 1)
    yield run(
        f"{PROMPT_TOKENS} tokens; the reference padded to {UMT5.max_tokens} and cut, as Wan's pipelines do",
        lambda: ours(ids),
        lambda: theirs(input_ids=wide, attention_mask=mask).last_hidden_state[:, :PROMPT_TOKENS],
        15,
    )
    yield run(f"{PROMPT_TOKENS} tokens, both at true length", lambda: ours(ids), lambda: theirs(input_ids=ids).last_hidden_state, 30)


def backbone() -> Iterator[Comparison]:
    ours, theirs = backbone_pair(DIT)
    generator = torch.Generator().manual_seed(3)
    latents, prompt = torch.randn(1, DIT.in_dim, *GRID, generator=generator), torch.randn(PROMPT_TOKENS, DIT.text_dim, generator=generator)
    timestep, context, rows = torch.tensor([637.0]), ours.encode_context([prompt]), padded(prompt, DIT.text_len)

    def reference() -> torch.Tensor:
        return theirs(hidden_states=latents, timestep=timestep, encoder_hidden_states=rows, return_dict=False)[0]

    yield run(
        "one step of a sampling loop: ours with the context it encoded before", lambda: ours(latents, timestep, context), reference, 11
    )
    yield run("one step alone: ours encodes the context too", lambda: ours(latents, timestep, ours.encode_context([prompt])), reference, 11)


def fresh(ours: str, theirs: str, pairs: int) -> Comparison:
    """Two lines of Python, each in new processes."""

    def process(line: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", line], check=True, capture_output=True)

    return compare(f"`{ours}` / `{theirs}`", process(ours), process(theirs), pairs, clock=children)


def children() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def imports() -> Iterator[Comparison]:
    yield fresh("import wan_dit", "import diffusers", 5)
    yield fresh("from wan_dit import Pipeline", "from diffusers import WanPipeline", 3)
    yield fresh("from wan_vae import WanVAE", "from diffusers import AutoencoderKLWan", 3)
    yield fresh("from wan_text.umt5 import UMT5Encoder", "from transformers import UMT5EncoderModel", 3)


def listing() -> Iterator[Comparison]:
    yield fresh("from wan_dit.cli import main; main(['plugins'])", "import torch", 9)


def memory() -> str:
    """The most resident memory of whole processes that decode or encode once, Python and libraries included."""
    rows = []
    for what in ("encode", "decode"):
        peaks = {}
        for who in ("winograd", "direct", "diffusers"):
            command = [sys.executable, str(Path(__file__).with_name("peak.py")), what, who]
            peaks[who] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1e9
        rows.append([f"{what} 9 x 96 x 160", *(f"{peak:.2f} GB" for peak in peaks.values())])
    columns = ["what", "ours, winograd", "ours, direct", "diffusers"]
    return f"## Peak memory of the video VAE\n\nWan2.1 at full width in fp32, a process each, one run.\n\n{table(columns, rows)}"


SECTIONS = (
    ("Video VAE", "Wan2.1 at full width against diffusers' AutoencoderKLWan; normalised latents in and out", vae),
    ("A clip that stands still", "Wan2.1 at full width, ours with the shortcut against ours without it, equal to the bit", still),
    ("Video VAE, other widths", "against diffusers' AutoencoderKLWan; normalised latents in and out", widths),
    ("Text encoder", f"against transformers' UMT5EncoderModel; width {UMT5.dim}, {UMT5.num_layers} layers, one prompt", text),
    ("Backbone", f"against diffusers' WanTransformer3DModel; width {DIT.dim}, {DIT.num_layers} layers, 300 tokens, one sample", backbone),
    ("Imports", "in fresh processes, Python's own start included", imports),
    ("Listing plugins", "all kinds, in fresh processes, against what importing torch alone would add", listing),
)


def main(target: Path) -> None:
    torch.set_num_threads(1)
    parts = [header("Benchmarks", "benchmarks", SUMMARY), machine(torch.get_num_threads())]
    with torch.no_grad():
        for title, what, measure in SECTIONS:
            rows = []
            for comparison in measure():
                rows.append(comparison.row())
                sys.stderr.write(f"{title}: {' | '.join(rows[-1])}\n")
            parts.append(f"## {title}\n\n{what[0].upper()}{what[1:]}.\n\n{table(COLUMNS, rows)}")
        parts.append(memory())
    target.write_text("\n".join(parts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
