"""How far ours is from the official code and from the reference libraries: `python bench/parity.py docs/parity.md`.

The cases, configurations and references are those of the packages' tests; this measures what those assert.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import parity_dit
import torch
from package_tests import PACKAGES, load
from page import header, machine, table
from parity_dit import Pairs, Row, exact_row, official_row
from references import vae_pair
from safetensors.torch import load_file
from torch import Tensor, nn
from wan_dit.model import WanDiT
from wan_dit.recognition import ARCHITECTURES
from wan_text._shared.weights import build
from wan_text.checkpoint import read_encoder
from wan_text.clip_vision import CLIPVision
from wan_text.config import VIT_H_14, XXL
from wan_text.tokenizer import clean
from wan_text.umt5 import UMT5Encoder, relative_buckets
from wan_vae.codecs.dcae import DCAE
from wan_vae.codecs.dcae_config import PRESETS as DCAE_PRESETS
from wan_vae.codecs.ltx import LTXVAE
from wan_vae.codecs.ltx_config import PRESETS as LTX_PRESETS
from wan_vae.config import WAN21, WAN22
from wan_vae.model import WanVAE
from wan_vae.testing import difference

SUMMARY = """
In fp32 on a CPU, with every tensor random: those that a new model has at zero or one are re-drawn first. A difference is the
largest absolute one over max(1, largest absolute reference), unless it says otherwise; 0 means equal to the bit. The tests of
the packages assert the limits; this page says how far inside them the code is.
"""
OFFICIAL = """Numbers that the official code (Wan2.1 at 9737cba9, Wan2.2 at 42bf4cfa) computed with tiny random models, read through our
official-layout loader. "Used" is the largest error as a share of what the case allows, atol + rtol * |reference|.
"""
LIBRARIES = """The same random weights in both, over several small configurations a row; the worst of them.
"""
SIZES = """Built on the meta device from the preset; every tensor has its place in the published checkpoint.
"""
T = TypeVar("T")


def golden() -> Iterator[Row]:
    """One row a case of the official code."""
    vae = load("wan-vae", "test_vae_golden")
    for name in vae.CASES:
        for backend in vae.COMPUTED:
            measured = in_folder(lambda folder, name=name, backend=backend: vae_pairs(vae.computed_by(vae.Case(name, folder), backend)))
            yield official_row(name, f"moments, latents, video; {backend}", *measured)
    yield official_row("text_umt5", "hidden states of prompts of several lengths", *in_folder(text_pairs))
    yield official_row("clip_vision", "image tokens, preprocessing", *in_folder(clip_pairs))
    yield exact_row("text_buckets", "relative position buckets", bucket_errors())
    yield exact_row("text_clean", "cleaned prompts, three modes", cleaning_errors())
    yield from parity_dit.golden()


def in_folder(measure: Callable[[Path], T]) -> T:
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder))


def vae_pairs(case: Any) -> tuple[Pairs, float, float]:
    pairs: Pairs = []
    for name, video in case.calls("encode"):
        kept = case.kept(video)
        got = (*case.vae.moments(kept), case.vae.encode(kept))
        pairs += [(value, case.output(name, output)) for value, output in zip(got, ("mean", "log_var", "mean_normalised"), strict=True)]
    pairs += [(case.vae.decode(latents), case.output(name, "video").clamp(-1, 1)) for name, latents in case.calls("decode")]
    return pairs, case.about["tolerance"]["atol"], case.about["tolerance"]["rtol"]


def text_case(name: str) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((PACKAGES / "wan-text" / "tests" / "golden" / f"{name}.json").read_text(encoding="utf-8"))
    return about


def text_tensors(name: str) -> dict[str, Tensor]:
    return load_file(PACKAGES / "wan-text" / "tests" / "golden" / f"{name}.safetensors")


def text_pairs(folder: Path) -> tuple[Pairs, float, float]:
    about, tensors = text_case("text_umt5"), text_tensors("text_umt5")
    official = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    torch.save(official, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    config, state = read_encoder(folder)
    encoder, pairs = build(lambda: UMT5Encoder(config), state), []
    for call in about["calls"]:
        hidden = encoder(*(tensors[call["args"][argument]] for argument in ("ids", "mask")))
        expected = next(value for key, value in tensors.items() if key.startswith(f"outputs/{call['name']}"))
        pairs += [(row[:length], reference[:length]) for row, reference, length in zip(hidden, expected, call["lengths"], strict=True)]
    return pairs, about["tolerance"]["atol"], about["tolerance"]["rtol"]


def clip_pairs(folder: Path) -> tuple[Pairs, float, float]:
    pairs, near = load("wan-text", "test_text_clip").official_case(PACKAGES / "wan-text" / "tests" / "golden", folder)
    return pairs, near["atol"], near["rtol"]


def bucket_errors() -> int:
    about, tensors = text_case("text_buckets"), text_tensors("text_buckets")
    wrong = 0
    for variant in about["config"]["cases"]:
        buckets, farthest, both = variant["num_buckets"], variant["max_dist"], variant["bidirectional"]
        got = relative_buckets(tensors["inputs/relative_position"], buckets, farthest, bidirectional=both)
        wrong += int((got != tensors[f"outputs/buckets_{buckets}_{'bi' if both else 'uni'}_{farthest}"]).sum())
    return wrong


def cleaning_errors() -> int:
    modes: Any = ("whitespace", "lower", "canonicalize")
    return sum(clean(row["raw"], mode) != row[mode] for row in text_case("text_clean")["rows"] for mode in modes)


def libraries() -> Iterator[Row]:
    """One row a reference class of diffusers and transformers."""
    vae, text = load("wan-vae", "test_vae_diffusers"), load("wan-text", "test_text_parity")
    for backend, limit in vae.TOLERANCES.items():
        encoded, decoded = zip(*(vae_differences(vae, config, backend) for config in vae.CONFIGS.values()), strict=True)
        count = f"{len(encoded)} configurations"
        yield [f"VAE encode, {backend}", f"diffusers AutoencoderKLWan, {count}", f"{max(encoded):.1e}", f"{limit:.0e}"]
        yield [f"VAE decode, {backend}", f"diffusers AutoencoderKLWan, {count}", f"{max(decoded):.1e}", f"{limit:.0e}"]
    yield from dcae_rows(load("wan-vae", "third_party/dcae_pairs"))
    yield from ltx_rows(load("wan-vae", "test_vae_ltx"))
    for attention, limit in (("sdpa", "3e-06"), ("eager", "0, with `exact=True`")):
        worst = max(text_difference(text, sizes, attention) for sizes in text.SIZES)
        yield ["umT5", f"transformers UMT5EncoderModel ({attention}), {len(text.SIZES)} configurations", f"{worst:.1e}", limit]
    clip = load("wan-text", "test_text_clip")
    worst = max(in_folder(lambda folder, config=config: clip.off_transformers(folder, config, "gelu")) for config in clip.CONFIGS)
    yield ["CLIP vision tower", f"transformers CLIPVisionModel, {len(clip.CONFIGS)} configurations", f"{worst:.1e}", "1e-05"]
    yield from parity_dit.libraries()


def vae_differences(module: Any, config: Any, backend: str) -> tuple[float, float]:
    ours, theirs = vae_pair(config)
    module.use(ours, backend)
    (time, height, width), generator = ours.spec.stride, torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, 13, 2 * height, 3 * width, generator=generator) * 2 - 1  # 13: the reference takes 1 + 4k whatever the stride
    latents = torch.randn(1, config.z_dim, 1 + 12 // time, 2, 3, generator=generator)
    encoded = difference(ours.encode(video), theirs.encode(video).latent_dist.mean)
    return encoded, difference(ours.decode(latents), theirs.decode(latents).sample)


def dcae_rows(module: Any) -> Iterator[Row]:
    """Encoding, decoding and gradients of DC-AE; those of the weights over the largest of each."""
    with torch.enable_grad():
        far = [module.parity(config, cells) for config in module.CONFIGS.values() for cells in module.CELLS.values()]
    for name in far[0]:
        limit = "1e-04 (relative)" if name == module.LOOSE else "1e-05"
        yield [f"DC-AE: {name}", f"diffusers AutoencoderDC, {len(far)} cases", f"{max(case[name] for case in far):.1e}", limit]


def ltx_rows(module: Any) -> Iterator[Row]:
    """LTX-Video's VAE, with the same noise in both."""
    with torch.enable_grad():
        slopes = max(max(module.off_in_gradients(name).values()) for name in module.CONFIGS)
    frames = max(module.off_in_frames(name, steps) for name in module.CONFIGS for steps in (1, 4))
    moments = max(module.off_in_moments(name, steps) for name in module.CONFIGS for steps in (0, 3))
    found = {"moments and latents": moments, "frames, with the same noise": frames, "gradients, over the largest of each weight": slopes}
    for name, worst in found.items():
        yield [f"LTX-Video VAE: {name}", f"diffusers AutoencoderKLLTXVideo, {len(module.CONFIGS)} configurations", f"{worst:.1e}", "1e-05"]


def text_difference(module: Any, sizes: dict[str, int], attention: str) -> float:
    ours, theirs = module.pair(sizes, attention)
    ids, mask = module.batch(sizes)
    got, expected = ours(ids, mask, exact=attention == "eager"), theirs(ids, mask).last_hidden_state
    return difference(got[mask.bool()], expected[mask.bool()])


def sizes() -> Iterator[Row]:
    """Parameters and tensors of the published models."""
    published: tuple[tuple[str, Callable[[], nn.Module]], ...] = (
        ("Wan2.1 VAE", lambda: WanVAE(WAN21)),
        ("Wan2.2 VAE", lambda: WanVAE(WAN22)),
        *((name, partial(DCAE, config)) for name, config in DCAE_PRESETS.items() if "mix" not in name),
        *((f"{name} VAE", partial(LTXVAE, config)) for name, config in LTX_PRESETS.items()),
        ("umT5-XXL encoder", lambda: UMT5Encoder(XXL)),
        ("CLIP ViT-H/14, the part of its vision tower that is used", lambda: CLIPVision(VIT_H_14)),
        *((name, partial(WanDiT, config)) for name, config in ARCHITECTURES.items()),
    )
    for name, make in published:
        with torch.device("meta"):
            model = make()
        yield [name, f"{sum(value.numel() for value in model.parameters()):,}", str(len(model.state_dict()))]


def main(target: Path) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        official, library = list(golden()), list(libraries())
    parts = [
        header("Parity", "parity", SUMMARY),
        machine(torch.get_num_threads()),
        f"## The official code\n\n{OFFICIAL}\n{table(['case', 'what', 'difference', 'allowed', 'used'], official)}",
        f"## diffusers and transformers\n\n{LIBRARIES}\n{table(['part', 'reference', 'difference', 'limit'], library)}",
        f"## Published models\n\n{SIZES}\n{table(['model', 'parameters', 'tensors'], list(sizes()))}",
    ]
    target.write_text("\n".join(parts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
