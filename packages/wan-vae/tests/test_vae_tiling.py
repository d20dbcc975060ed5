"""Exact tiles give what the whole picture gives; blended ones come close, and have no seams."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import wan_vae.tiling
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from wan_vae import load_vae
from wan_vae.config import TINY, WAN21, WAN22, VAEConfig
from wan_vae.metrics import psnr
from wan_vae.model import WanVAE
from wan_vae.testing import difference, randomise
from wan_vae.tiles import blending_weights, kept_apart, overlapping, reach
from wan_vae.tiling import TiledVAE
from wan_vae.video import Reader, to_tensor

SMALL21 = VAEConfig(
    base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=(1, 2, 2), temporal_downsample=(False, True), num_res_blocks=1, latent_space="small"
)
CONFIGS = {"tiny": TINY.model_copy(update={"base_dim": 4, "decoder_base_dim": 4}), "wan2.1": SMALL21}


def make(config: VAEConfig) -> WanVAE:
    vae = WanVAE(config).eval().double()
    randomise(vae)
    return vae


VAES = {name: make(config) for name, config in CONFIGS.items()}


def clip(vae: WanVAE, rows: int, columns: int, frames: int | None = None, seed: int = 0) -> Tensor:
    time, height, width = vae.spec.stride
    shape = (1, 3, frames or 1 + 2 * time, rows * height, columns * width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def noise(vae: WanVAE, rows: int, columns: int, frames: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((1, vae.config.z_dim, frames, rows, columns), generator=generator, dtype=torch.float64)


def tiled(vae: WanVAE, rows: int, columns: int, mode: str = "exact", overlap: int | None = None) -> TiledVAE:
    _, height, width = vae.spec.stride
    return TiledVAE(vae, (rows * height, columns * width), mode, overlap)


def test_the_reach_of_the_published_models() -> None:
    for config in (WAN21, WAN22):
        assert reach(config, "encoder") == (8, 9)
        assert reach(config, "decoder") == (13, 13)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(sorted(VAES)),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_exact_tiles_equal_the_whole(name: str, grid: tuple[int, int], tile: tuple[int, int]) -> None:
    vae = VAES[name]
    tile = max(tile[0], grid[0] // 3), max(tile[1], grid[1] // 3)
    video, latents = clip(vae, *grid, frames=1 + vae.spec.stride[0]), noise(vae, *grid, frames=2)
    assert difference(tiled(vae, *tile).encode(video), vae.encode(video)) < 1e-10
    assert difference(tiled(vae, *tile).decode(latents), vae.decode(latents)) < 1e-10


@pytest.mark.parametrize("name", sorted(VAES))
@pytest.mark.parametrize("half", ["encoder", "decoder"])
@pytest.mark.parametrize("side", [0, 1])
def test_one_cell_less_of_surroundings_is_seen(monkeypatch: pytest.MonkeyPatch, name: str, half: str, side: int) -> None:
    vae, grid = VAES[name], (24, 2)
    full = reach(vae.config, half)  # type: ignore[arg-type]
    given_ = clip(vae, *grid, frames=1) if half == "encoder" else noise(vae, *grid, frames=1)
    whole, tiles = (model.encode if half == "encoder" else model.decode for model in (vae, tiled(vae, 12, 2)))
    assert difference(tiles(given_), whole(given_)) < 1e-13
    short = tuple(cells - (i == side) for i, cells in enumerate(full))
    monkeypatch.setattr(wan_vae.tiling, "reach", lambda *_: short)
    assert difference(tiles(given_), whole(given_)) > 1e-12


@pytest.mark.parametrize("chunk", [1, 2])
def test_tiles_stream_chunk_by_chunk(chunk: int) -> None:
    vae = VAES["tiny"]
    time = vae.spec.stride[0]
    video, latents = clip(vae, 10, 4, frames=1 + 2 * time), noise(vae, 10, 4)
    sizes = [1, *[chunk] * (2 // chunk)]
    model = tiled(vae, 3, 2)
    encoded = torch.cat(list(model.encode_stream(video.split([1, *[time * n for n in sizes[1:]]], dim=2))), dim=2)
    decoded = torch.cat(list(model.decode_stream(latents.split(sizes, dim=2))), dim=2)
    assert difference(encoded, vae.encode(video)) < 1e-10
    assert difference(decoded, vae.decode(latents)) < 1e-10


def test_in_single_precision_and_by_winograd_the_tiles_stay_close() -> None:
    vae = load_vae("tiny")
    vae.backend = "winograd"
    video = clip(vae, 20, 12, frames=5).float()
    latents = vae.encode(video)
    assert difference(tiled(vae, 8, 8).encode(video), latents) < 5e-5
    assert difference(tiled(vae, 8, 8).decode(latents), vae.decode(latents)) < 5e-5


def test_halves_of_other_precision() -> None:
    vae = make(TINY).float().set_precision(encode=torch.bfloat16)
    video = clip(vae, 10, 4, frames=5).float()
    latents, exact = tiled(vae, 4, 4).encode(video), vae.encode(video)
    assert latents.dtype == exact.dtype
    assert difference(latents.float(), exact.float()) < 0.03
    assert difference(tiled(vae, 4, 4).decode(latents), vae.decode(latents)) < 1e-5


def test_exact_tiles_give_the_log_variance_too() -> None:
    vae = VAES["wan2.1"]
    video = clip(vae, 6, 4)
    session = tiled(vae, 3, 2).encode_session()
    pairs = [session.push(chunk, moments=True) for chunk in (video[:, :, :1], video[:, :, 1:])]
    mean, logvar = vae.moments(video)
    assert difference(torch.cat([pair[0] for pair in pairs], 2), mean) < 1e-10
    assert difference(torch.cat([pair[1] for pair in pairs], 2), logvar) < 1e-10
    with pytest.raises(ValueError, match="log-variance"):
        tiled(vae, 3, 2, "blend").encode_session()


@given(st.integers(1, 60), st.integers(2, 30), st.data())
def test_tiles_cover_the_picture_and_none_is_superfluous(cells: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile // 2))
    spans = overlapping(cells, tile, overlap)
    assert spans[0].start == 0
    assert spans[-1].stop == cells
    assert all(span.stop - span.start == min(tile, cells) for span in spans)
    assert all(b.start <= a.stop - overlap for a, b in pairwise(spans))
    assert (len(spans) - 2) * (tile - overlap) + tile < cells or len(spans) == 1, "one tile fewer would do"
    total = torch.zeros(3 * cells, dtype=torch.float64)
    for span, weights in zip(spans, blending_weights(spans, 3), strict=True):
        assert weights.min() >= 0
        total[3 * span.start : 3 * span.stop] += weights
    assert torch.allclose(total, torch.ones_like(total), atol=1e-12)
    parts = kept_apart(cells, tile, 2, 3)
    assert [cell for part in parts for cell in range(part.start, part.stop)] == list(range(cells))
    assert all(part.low == max(0, part.start - 2) and part.high == min(cells, part.stop + 3) for part in parts)


def test_blending_weights_have_no_steps() -> None:
    spans = overlapping(40, 16, 4)
    for weights in blending_weights(spans, 8):
        assert weights.diff().abs().max() < 0.06


class Smooth:
    """A VAE that doubles values and repeats pixels: what it makes does not depend on what surrounds a tile."""

    spec = load_vae("tiny").spec

    def encode_stream(self, chunks):  # type: ignore[no-untyped-def]
        for chunk in chunks:
            yield 2 * chunk[:, :1, :: self.spec.stride[0], ::8, ::8]

    def decode_stream(self, chunks):  # type: ignore[no-untyped-def]
        for chunk in chunks:
            yield (chunk / 2).repeat_interleave(8, 3).repeat_interleave(8, 4)


def test_blended_tiles_of_a_pointwise_vae_are_the_whole_and_a_constant_has_no_seam() -> None:
    model = TiledVAE(Smooth(), (64, 48), "blend", 16)
    latents = torch.randn(1, 1, 2, 21, 17, generator=torch.Generator().manual_seed(0))
    whole = torch.cat(list(Smooth().decode_stream(latents.split(1, 2))), 2)
    assert difference(model.decode(latents), whole) < 1e-6
    video = torch.full((1, 3, 5, 168, 136), 0.25)
    assert torch.allclose(torch.cat(list(model.encode_stream([video[:, :, :1], video[:, :, 1:]])), 2), torch.tensor(0.5), atol=1e-6)


def test_blended_tiles_of_a_real_film_come_close(real_clips: Path) -> None:
    vae = load_vae("tiny")
    video = to_tensor(frame.pixels for frame in Reader(real_clips / "bikes.mp4", limit=5))[..., :192, :256]
    whole = vae.decode(vae.encode(video))
    model = TiledVAE(vae, (128, 128), "blend", 48)
    assert psnr(model.decode(model.encode(video)), whole) > 18


@pytest.mark.parametrize(
    ("tile", "mode", "overlap", "message"),
    [
        ((20, 16), "exact", None, "24"),
        ((16, 0), "exact", None, "width is 0"),
        ((16, 16), "fast", None, "exact, blend"),
        ((16, 16), "blend", 9, "overlap"),
    ],
)
def test_tiles_that_cannot_be_are_refused(tile: tuple[int, int], mode: str, overlap: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TiledVAE(load_vae("tiny"), tile, mode, overlap)
    with pytest.raises(ValueError, match="blend"):
        TiledVAE(Smooth(), (16, 16))


def test_a_tiled_vae_is_the_one_it_wraps_in_all_else() -> None:
    vae = load_vae("tiny")
    model = TiledVAE(vae, (64, 64))
    assert model.spec == vae.spec
    assert model.fingerprint() == vae.fingerprint()
    assert next(model.parameters()) is next(vae.parameters())
    assert not hasattr(model, "reconstruct")
