"""Ours against diffusers and transformers, interleaved in one process: `python bench/benchmarks.py docs/benchmarks.md`."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import dit
import torch
import training
import training_gpu
from page import header, machine, table
from references import reference_latents, reference_video, text_pair, vae_pair
from timing import Comparison, compare
from wan_dit.config import TINY
from wan_text.config import XXL
from wan_text.encoder import length_batches
from wan_text.encoder import padded as padded_batch
from wan_vae.config import WAN21, WAN22
from wan_vae.testing import difference

SUMMARY = """
Ours against the reference library with the same random weights, on the same input, in fp32. Both alternate in one process,
or one fresh process after the other, after one run each to warm up. Times are CPU time of one thread: on an idle machine that
is the wall time, on a busy one it still holds. A ratio is the reference's time over ours, so above 1 ours is faster: the median
over pairs, then the least and the greatest. Ratios are of these shapes and this machine, not a promise for a GPU, and the
backbone is narrower than the published ones. "Apart" is the largest difference between the two results over max(1, largest
reference).
"""
VAE21 = WAN21.model_copy(update={"base_dim": 32, "decoder_base_dim": 32})
VAE22 = WAN22.model_copy(update={"base_dim": 32, "decoder_base_dim": 48})
FRAMES, HEIGHT, WIDTH = 9, 64, 112
UMT5 = XXL.model_copy(update={"vocab_size": 4096, "num_layers": 1})
LENGTHS = (6, 12, 20, 33, 48, 64, 90, 112)  # tokens of eight prompts


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
    """One block of umT5-XXL. The reference gets what Wan's pipelines give it: every prompt padded to 512, with a mask."""
    ours, theirs = text_pair(UMT5)
    generator = torch.Generator().manual_seed(2)

    def prompts(*lengths: int) -> list[tuple[int, ...]]:
        return [tuple(torch.randint(2, UMT5.vocab_size, (length,), generator=generator).tolist()) for length in lengths]

    def mine(ids: list[tuple[int, ...]]) -> torch.Tensor:
        rows = {}
        for batch in length_batches(ids):
            rows.update((one, row[: len(one)]) for one, row in zip(batch, ours(*padded_batch(batch)), strict=True))
        return torch.cat([rows[one] for one in ids])

    def reference(ids: list[tuple[int, ...]]) -> torch.Tensor:
        wide = torch.tensor([[*one, *[0] * (UMT5.max_tokens - len(one))] for one in ids])
        mask = torch.tensor([[int(i < len(one)) for i in range(UMT5.max_tokens)] for one in ids])
        hidden = theirs(input_ids=wide, attention_mask=mask).last_hidden_state
        return torch.cat([row[: len(one)] for one, row in zip(ids, hidden, strict=True)])

    for length in (16, 64, 128):
        ids = prompts(length)
        yield run(f"one prompt of {length} tokens", partial(mine, ids), partial(reference, ids), 3)
    ids = prompts(*LENGTHS)
    yield run(f"eight prompts of {min(LENGTHS)} to {max(LENGTHS)} tokens", partial(mine, ids), partial(reference, ids), 2, warm=False)


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
    yield fresh("from wan_text import TextEncoder", "from transformers import UMT5EncoderModel, T5Tokenizer", 3)
    yield fresh("import wan_text", "import transformers", 5)


def listing() -> Iterator[Comparison]:
    yield fresh("from wan_dit.cli import main; main(['plugins'])", "import torch", 9)
    yield fresh("from wan_text.cli import main; main(['list'])", "import transformers", 5)


def memory() -> Iterator[list[str]]:
    """The most resident memory of whole processes that decode or encode once, Python and libraries included."""
    for what in ("encode", "decode"):
        peaks = {}
        for who in ("winograd", "direct", "diffusers"):
            command = [sys.executable, str(Path(__file__).with_name("peak.py")), what, who]
            peaks[who] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1e9
        yield [f"{what} 9 x 96 x 160", *(f"{peak:.2f} GB" for peak in peaks.values())]


@dataclass(frozen=True)
class Section:
    """Of the page; `rows` gives those of its table, or none where this machine cannot measure them."""

    title: str
    what: str
    rows: Callable[[], Iterable[list[str]]]
    columns: tuple[str, ...] = ("what", "ours", "reference", "ratio", "pairs", "apart")

    def measured(self) -> str:
        found = []
        for row in self.rows():
            found.append(row)
            sys.stderr.write(f"{self.title}: {' | '.join(row)}\n")
        body = table(self.columns, found) if found else "Not measured: there is no GPU here.\n"
        return f"## {self.title}\n\n{self.what[0].upper()}{self.what[1:]}.\n\n{body}"


def rows_of(measure: Callable[[], Iterator[Comparison]]) -> Callable[[], Iterator[list[str]]]:
    return lambda: (comparison.row() for comparison in measure())


SECTIONS = (
    Section("Video VAE", "Wan2.1 at full width against diffusers' AutoencoderKLWan; normalised latents in and out", rows_of(vae)),
    Section(
        "A clip that stands still", "Wan2.1 at full width, ours with the shortcut against ours without it, equal to the bit", rows_of(still)
    ),
    Section("Video VAE, other widths", "against diffusers' AutoencoderKLWan; normalised latents in and out", rows_of(widths)),
    Section(
        "Text encoder",
        "one block of umT5-XXL; transformers' UMT5EncoderModel gets prompts padded to 512 tokens, as Wan's pipelines give it",
        rows_of(text),
    ),
    Section(
        "Backbone",
        f"one step of a sampling loop, whose prompt ours has encoded before, against diffusers' WanTransformer3DModel; one sample, "
        f"a prompt of {dit.PROMPT_TOKENS} tokens, 6 layers at width 512, else 2",
        rows_of(dit.backbone),
    ),
    Section(
        "Backbone and its floor",
        "the same, against the matrix products and attentions that are left when all else is cached or costs nothing; 0.87 is 1.15 times "
        "the floor",
        rows_of(dit.against_floor),
    ),
    Section(
        "Sampling under a cache",
        f"the built-in model, {dit.STEPS} steps with guidance, against the same without a cache; here apart is the relative L2 of the "
        "last latents",
        rows_of(dit.loop),
    ),
    Section(
        "Training step",
        "one step of the trainer at width 512 with 6 layers, from cached latents: forward, backward, clipping and AdamW, without averaged "
        "weights. The reference is diffusers' WanTransformer3DModel in a plain loop with torch's AdamW as it comes, over the same latents "
        "and the same embeddings, which it pads: to 512, as Wan is trained, or to 32, where ours has nothing to save. Here apart is the "
        "relative L2 of the gradients of one batch",
        rows_of(training.steps),
    ),
    Section(
        "Training by layout",
        f"`wan-train run` over gloo, a process a core of the {os.cpu_count()} there are, and fresh ones for each run. Steps of "
        f"{training.SAMPLES} samples of {training.TOKENS} tokens by the same model, in wall time, so that whatever else the machine does "
        "counts. The share is that of one process in the same round: 2 would be perfect",
        training.layouts,
        ("layout", "tokens a second", "share", "rounds"),
    ),
    Section(
        "Training step on a GPU",
        f"six blocks of the 1.3B model on one {training_gpu.NAME}, 480 x 832, bf16 autocast, one sample, against the same loop; in wall "
        "time",
        rows_of(training_gpu.steps),
    ),
    Section(
        "Use of a GPU in training",
        f"the whole 1.3B model on one {training_gpu.NAME}, 480 x 832, 81 frames, one sample, bf16 autocast, AdamW; prompts of width "
        f"{TINY.text_dim}. MFU is the model's operations, three times those of the forward, over {training_gpu.PEAK / 1e12:.0f} TFLOP/s. "
        "The peak is what torch has allocated, the plan that of `wan-train plan` without its estimate of the runtime",
        training_gpu.utilisation,
        ("what", "a step", "MFU", "peak memory", "planned"),
    ),
    Section("Loading", "fresh processes, imports and a look at every weight included", rows_of(lambda: dit.loading(children))),
    Section("Imports", "in fresh processes, Python's own start included", rows_of(imports)),
    Section("Listing plugins", "in fresh processes, against what importing torch, or transformers, alone would take", rows_of(listing)),
    Section(
        "Peak memory of the video VAE",
        "Wan2.1 at full width in fp32, a process each, one run",
        memory,
        ("what", "ours, winograd", "ours, direct", "diffusers"),
    ),
    Section(
        "Peak memory of loading",
        "a process each, one run; Python and libraries included",
        dit.loading_memory,
        ("what", "file", "ours", "diffusers"),
    ),
)


def main(target: Path, chosen: list[str]) -> None:
    """Write the page; with titles, as they are in lower case, measure these sections and leave the others, where the page has them."""
    torch.set_num_threads(1)
    if unknown := sorted(set(chosen) - {section.title.lower() for section in SECTIONS}):
        raise SystemExit(f"no section {', '.join(unknown)}; there are {', '.join(section.title.lower() for section in SECTIONS)}")
    old = target.read_text().split("\n## ") if chosen else []
    parts = [header("Benchmarks", "benchmarks", SUMMARY), machine(torch.get_num_threads())]
    with torch.no_grad():
        for section in SECTIONS:
            kept = next((part for part in old if part.startswith(f"{section.title}\n")), None)
            measured = kept is None or section.title.lower() in chosen
            parts.append(section.measured() if measured else f"## {kept}".rstrip("\n") + "\n")
    target.write_text("\n".join(parts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
