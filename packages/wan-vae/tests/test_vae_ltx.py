"""LTX-Video's VAE: parity with diffusers, sizes of the released models, noise, training, and the contract of a VAE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo
from torch import Tensor
from wan_vae.codecs.ltx import LTXVAE
from wan_vae.codecs.ltx_config import PRESETS, LTXConfig
from wan_vae.codecs.ltx_diffusers import diffusers_config, diffusers_names, from_diffusers
from wan_vae.codecs.ltx_stream import LTXState, Noise, draw_seed
from wan_vae.plugins import find_vae
from wan_vae.testing import VAEContract, difference, randomise

TOLERANCE = 1e-5
DOUBLE = ["compress_all", {"residual": True, "multiplier": 2}]
PLAIN = [["res_x", 2], ["compress_all", {}], ["res_x_y", {}], ["res_x", 1], ["compress_all", {}], ["res_x", 1], ["res_x", 1]]
INJECT = ["res_x", {"num_layers": 1, "inject_noise": True}]
NOISY = [INJECT, DOUBLE, ["res_x", {"num_layers": 2, "inject_noise": True}], DOUBLE, ["res_x", 1]]
FOLDED = [["res_x", 1], ["compress_space_res", {}], ["res_x", 1], ["compress_time_res", {}], ["res_x", 1], ["compress_all_res", {}]]
FOLDED.append(["res_x", 1])
SMALL: dict[str, Any] = {
    "latent_channels": 4, "encoder_base_channels": 8, "decoder_base_channels": 8, "patch_size": 2, "latent_space": "test",
    "latents_mean": (0.5, -0.25, 0.125, 1.0), "latents_std": (0.5, 2.0, 1.25, 0.75),
}  # fmt: skip
CONFIGS = {
    "0.9": LTXConfig(**SMALL, encoder_blocks=PLAIN, decoder_blocks=PLAIN),
    "0.9.1": LTXConfig(**SMALL, encoder_blocks=PLAIN, decoder_blocks=NOISY, timestep_conditioning=True),
    "0.9.5": LTXConfig(
        **SMALL,
        encoder_blocks=FOLDED,
        decoder_blocks=[["res_x", 1], DOUBLE, ["res_x", 2], DOUBLE, ["res_x", 1]],
        timestep_conditioning=True,
    ),
}
# what diffusers has no words for
OWN = LTXConfig(
    **SMALL, encoder_blocks=FOLDED, timestep_conditioning=True, latent_log_var="per_channel", spatial_padding_mode="replicate",
    decoder_blocks=[["res_x", 1], ["compress_time", {}], ["compress_space", {}], DOUBLE, INJECT],
)  # fmt: skip
CAUSAL = LTXConfig(**SMALL, encoder_blocks=PLAIN, decoder_blocks=PLAIN, causal_decoder=True, latent_log_var="none")


def drawn(config: LTXConfig, seed: int = 0) -> LTXVAE:
    vae = LTXVAE(config).eval()
    randomise(vae, seed)
    if config.timestep_conditioning:
        torch.nn.init.constant_(vae.decoder.timestep_scale_multiplier, 900.0)
    return vae


def pair(name: str) -> tuple[LTXVAE, Any]:
    """Ours and diffusers' with the same weights."""
    ours = drawn(CONFIGS[name])
    config, state = ours.to_diffusers()
    theirs = AutoencoderKLLTXVideo.from_config(config)
    theirs.load_state_dict(state, strict=True)
    return ours, theirs.eval()


def clip(config: LTXConfig, steps: int = 3, batch: int = 1) -> Tensor:
    time, height, width = config.stride
    shape = (batch, 3, 1 + steps * time, 2 * height, 3 * width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents_of(config: LTXConfig, steps: int = 4, batch: int = 1) -> Tensor:
    return torch.randn(batch, config.latent_channels, steps, 2, 3, generator=torch.Generator().manual_seed(2))


def timesteps(vae: LTXVAE, batch: int) -> Tensor | None:
    return torch.full((batch,), vae.config.decode_timestep) if vae.config.timestep_conditioning else None


@torch.no_grad()
def off_in_moments(name: str, steps: int) -> float:
    """The largest difference to diffusers in mean, log-variance and normalised latents."""
    vae, theirs = pair(name)
    video = clip(vae.config, steps, batch=2)
    posterior = theirs.encode(video).latent_dist
    mean, logvar = vae.moments(video)
    assert logvar is not None
    normalised = (posterior.mean - theirs.latents_mean.view(1, -1, 1, 1, 1)) / theirs.latents_std.view(1, -1, 1, 1, 1)
    pairs = ((mean, posterior.mean), (logvar, posterior.logvar), (vae.encode(video), normalised))
    return max(difference(got, expected) for got, expected in pairs)


@torch.no_grad()
def off_in_frames(name: str, steps: int) -> float:
    """The largest difference to diffusers in the frames of the whole clip and in those of `decode`, with the same noise in both."""
    vae, theirs = pair(name)
    latents = latents_of(vae.config, steps, batch=2)
    seed = draw_seed(torch.Generator().manual_seed(3))
    given = vae.denormalise(vae.noised(latents, LTXState(noise=Noise([seed]))))
    torch.manual_seed(seed + 1)  # diffusers takes noise per position from torch's own generator
    reference = theirs.decode(given, timesteps(vae, 2)).sample
    assert reference.abs().max() > 0.5
    whole = vae.decode_step(vae.noised(latents, state := LTXState(carry=False, noise=Noise([seed]))), state)
    frames = vae.decode(latents, generator=torch.Generator().manual_seed(3))
    return max(difference(whole, reference), difference(frames, reference.clamp(-1, 1)))


def off_in_gradients(name: str) -> dict[str, float]:
    """The difference to diffusers in the gradient of every parameter, over the largest of each."""
    vae, theirs = pair(name)
    video = clip(vae.config, 2)
    weight = torch.randn(video.shape, generator=torch.Generator().manual_seed(4))
    output, _, logvar = vae.reconstruct(video)
    assert logvar is not None
    ((output * weight).sum() + logvar.sum()).backward()
    posterior = theirs.encode(video).latent_dist
    given = vae.denormalise(vae.noised(vae.normalise(posterior.mode()), LTXState(noise=Noise.of(None))))
    torch.manual_seed(1)
    ((theirs.decode(given, timesteps(vae, 1)).sample * weight).sum() + posterior.logvar.sum()).backward()
    reference, names = dict(theirs.named_parameters()), diffusers_names(vae.config, [name for name, _ in vae.named_parameters()])
    scales = {own: reference[names[own]].grad.abs().max() for own, _ in vae.named_parameters()}
    assert min(scales.values()) > 0
    return {
        own: difference(parameter.grad / scales[own], reference[names[own]].grad / scales[own])  # type: ignore[operator]
        for own, parameter in vae.named_parameters()
    }


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_moments_are_those_of_diffusers(name: str, steps: int) -> None:
    assert off_in_moments(name, steps) <= TOLERANCE


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoded_frames_are_those_of_diffusers_with_the_same_noise(name: str, steps: int) -> None:
    assert off_in_frames(name, steps) <= TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_diffusers(name: str) -> None:
    assert {own: off for own, off in off_in_gradients(name).items() if off > TOLERANCE} == {}


def numbers(shape: tuple[int, ...], salt: int) -> Tensor:
    """float64 between -0.5 and 0.5: element n is (7919 n + 104729 salt) mod 10007 / 10007 - 0.5."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 7919 + salt * 104729) % 10007 / 10007 - 0.5).reshape(shape)


def known(config: LTXConfig) -> LTXVAE:
    """The i-th tensor by name is numbers(shape, i) * sqrt(24 / inputs) of a matrix, 0.1 * numbers of a vector."""
    vae = LTXVAE(config)
    state = vae.state_dict()
    for i, (name, value) in enumerate(sorted(state.items())):
        if value.ndim:
            state[name] = (numbers(tuple(value.shape), i) * ((24 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1)).float()
    vae.load_state_dict(state)
    return vae.eval()


# mean, deviation and every quarter's first value of moments and video that Lightricks/LTX-Video at 5260738 computes, in fp32
Figures = tuple[float, float, list[float]]
GOLDEN: dict[str, tuple[LTXConfig, Figures, Figures]] = {
    "own": (
        OWN.model_copy(update={"decoder_blocks": (*OWN.decoder_blocks[:-1], OWN.decoder_blocks[0])}),
        (-0.027350452, 0.422099892, [-0.26274377, 0.33189532, 0.99329472, 0.35696903]),
        (-0.026688553, 1.177046103, [-0.1281004, 0.91421676, -0.93478715, 0.71889949]),
    ),
    "causal": (
        CAUSAL.model_copy(update={"latent_log_var": "uniform"}),
        (-0.085236589, 0.616352104, [0.02451616, -0.29306746, -0.23630191, -0.23630191]),
        (0.006557857, 0.710891462, [-0.13170886, -0.36532214, 0.50743324, -0.80028212]),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", GOLDEN)
def test_the_numbers_of_the_original_where_diffusers_has_no_words(name: str) -> None:
    config, encoded, decoded = GOLDEN[name]
    vae = known(config.model_copy(update={"latents_mean": (), "latents_std": ()}))
    time, height, width = config.stride
    mean, logvar = vae.moments((2 * numbers((1, 3, 1 + 2 * time, 2 * height, 3 * width), 1)).float())
    assert logvar is not None
    video = vae.decode_step((4 * numbers((1, 4, 3, 2, 3), 2)).float(), LTXState(carry=False))
    for got, (center, deviation, values) in ((torch.cat([mean, logvar], dim=1), encoded), (video, decoded)):
        assert got.double().mean() == pytest.approx(center, abs=1e-6)
        assert got.double().std() == pytest.approx(deviation, abs=2e-6)
        assert got.flatten()[:: got.numel() // 4].tolist()[:4] == pytest.approx(values, abs=2e-5)


# as scripts/convert_ltx_to_diffusers.py writes them, where they differ from the defaults of AutoencoderKLLTXVideo
TIMED: dict[str, Any] = {
    "decoder_block_out_channels": (256, 512, 1024), "decoder_spatio_temporal_scaling": (True,) * 3,
    "upsample_residual": (True,) * 3, "upsample_factor": (2,) * 3, "timestep_conditioning": True,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "ltx-video-0.9": {},
    "ltx-video-0.9.1": {**TIMED, "decoder_layers_per_block": (5, 6, 7, 8), "decoder_inject_noise": (True, True, True, False)},
    "ltx-video-0.9.5": {
        **TIMED, "block_out_channels": (128, 256, 512, 1024, 2048), "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "layers_per_block": (4, 6, 6, 2, 2), "decoder_layers_per_block": (5,) * 4, "spatio_temporal_scaling": (True,) * 4,
        "decoder_inject_noise": (False,) * 4, "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "spatial_compression_ratio": 32, "temporal_compression_ratio": 8,
    },
}  # fmt: skip
PUBLISHED["ltx-video-0.9.7"] = PUBLISHED["ltx-video-0.9.5"]


@pytest.mark.parametrize(("name", "space"), [(name, config.latent_space) for name, config in PRESETS.items()])
def test_presets_are_the_released_models(name: str, space: str) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        ours, theirs = LTXVAE(preset), AutoencoderKLLTXVideo(**PUBLISHED[name])
    state = {key: value.shape for key, value in ours.state_dict().items()}
    names = diffusers_names(preset, list(state))
    reference = {key: value.shape for key, value in theirs.state_dict().items() if not key.startswith("latents_")}
    assert {names[key]: shape for key, shape in state.items()} == reference
    assert LTXConfig(**from_diffusers(PUBLISHED[name]), latent_space=space).architecture == preset.architecture
    written = diffusers_config(preset)
    assert all(list(value) == written[key] if isinstance(value, tuple) else value == written[key] for key, value in PUBLISHED[name].items())
    latents = ours.encode(torch.empty(1, 3, 9, 64, 96, device="meta"))
    assert (latents.shape, ours.decode(latents).shape) == ((1, 128, 2, 2, 3), (1, 3, 9, 64, 96))
    assert ours.look_ahead == {"ltx-0.9": 191, "ltx-0.9.1": 241, "ltx-0.9.5": 173}[space]
    spec = find_vae(name)
    assert (spec.parameters, spec.resolve()) == (sum(parameter.numel() for parameter in ours.parameters()), LTXVAE)
    assert (spec.latent_space, spec.latent_channels, spec.stride) == (space, ours.spec.latent_channels, ours.spec.stride)


def test_what_is_not_interchangeable_has_another_tag() -> None:
    tags = [find_vae(f"ltx-video-{version}").latent_space for version in ("0.9", "0.9.1", "0.9.5", "0.9.7")]
    assert tags == ["ltx-0.9", "ltx-0.9.1", "ltx-0.9.5", "ltx-0.9.5"]  # 0.9.7 has the encoder of 0.9.5


class TestSmall(VAEContract):
    @pytest.fixture(scope="class", params=[*CONFIGS.values(), OWN, CAUSAL], ids=[*CONFIGS, "own", "causal"])
    @classmethod
    def vae(cls, request: pytest.FixtureRequest) -> Any:
        return drawn(request.param)


def test_noise_is_that_of_the_generator_and_of_nothing_else() -> None:
    vae, latents = drawn(CONFIGS["0.9.1"]), latents_of(CONFIGS["0.9.1"])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    fixed = vae.decode(latents)
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (vae.decode(latents, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert min((first - other).abs().max(), (first - fixed).abs().max()) > 1e-3
    generator = torch.Generator().manual_seed(1)
    vae.decode(latents, generator=generator)
    assert (vae.decode(latents, generator=generator) - first).abs().max() > 1e-3  # the generator has moved on
    batch = torch.cat([latents, -latents])
    together = vae.decode(batch, generator=torch.Generator().manual_seed(1))
    assert difference(together[:1], first) <= TOLERANCE  # a video's noise does not depend on its batch


def test_the_share_of_noise_and_the_timestep_are_those_of_the_config() -> None:
    vae, latents = drawn(CONFIGS["0.9.5"]), latents_of(CONFIGS["0.9.5"])
    assert (vae.config.decode_noise_scale, vae.config.decode_timestep) == (0.025, 0.05)
    told = vae.decode(latents)

    def changed(**fields: float) -> Tensor:
        other = drawn(CONFIGS["0.9.5"].model_copy(update=fields))
        return other.decode(latents, generator=torch.Generator().manual_seed(5))

    clean = drawn(CONFIGS["0.9.5"].model_copy(update={"decode_noise_scale": 0.0})).decode(latents)
    assert torch.equal(changed(decode_noise_scale=0.0), clean)  # no noise: the generator does not matter
    assert (told - clean).abs().max() > 1e-4
    state = LTXState(noise=Noise([7]))
    noise = Noise([7]).frames(latents)
    assert difference(vae.noised(latents, state), 0.975 * latents + 0.025 * noise) <= 1e-6
    assert noise.std() == pytest.approx(1, abs=0.2)
    assert (changed(decode_noise_scale=0.0, decode_timestep=0.2) - clean).abs().max() > 1e-3
    plain = drawn(CONFIGS["0.9"])
    assert torch.equal(
        plain.decode(latents_of(plain.config), generator=torch.Generator().manual_seed(1)), plain.decode(latents_of(plain.config))
    )


def test_what_reconstruct_decodes() -> None:
    vae = drawn(CONFIGS["0.9.1"])
    video = clip(vae.config, 2, batch=2)
    with torch.no_grad():
        output, _, _ = vae.reconstruct(video)
        assert difference(output.clamp(-1, 1), vae.decode(vae.encode(video))) <= TOLERANCE
        vae.train()
        own = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        together = vae.reconstruct(video, own)[0]
        alone = vae.reconstruct(video[1:], [torch.Generator().manual_seed(2)])[0]
        assert difference(together[1:], alone) <= TOLERANCE
        assert (vae.reconstruct(video)[0] - vae.reconstruct(video)[0]).abs().max() > 1e-3


def test_in_training_the_decoder_is_told_the_share_that_was_drawn() -> None:
    vae = drawn(CONFIGS["0.9.5"]).train()
    video, seen = clip(vae.config, 1, batch=3), []
    hook = vae.decoder.register_forward_pre_hook(lambda _, given: seen.append(given))
    with torch.no_grad():
        vae.reconstruct(video, [torch.Generator().manual_seed(seed) for seed in range(3)])
        hook.remove()
        ((z, _, levels),) = seen
        assert levels.unique().numel() == 3
        assert 0 <= levels.min() < levels.max() <= vae.config.max_timestep
        clean = vae.config.model_copy(update={"max_timestep": 1e-9})
        vae.config, seen = clean, []
        hook = vae.decoder.register_forward_pre_hook(lambda _, given: seen.append(given))
        vae.reconstruct(video, [torch.Generator().manual_seed(seed) for seed in range(3)])
        hook.remove()
    noise = vae.normalise(z) - (1 - levels.view(-1, 1, 1, 1, 1)) * vae.normalise(seen[0][0])
    ratio = noise.flatten(1).std(1) / levels
    assert ratio.tolist() == pytest.approx([1, 1, 1], abs=0.3)


def test_it_learns() -> None:
    vae = drawn(CONFIGS["0.9.1"]).train()
    video = clip(vae.config, 1)
    optimiser = torch.optim.Adam(vae.parameters(), 3e-3)
    losses = []
    for step in range(30):
        output, _, _ = vae.reconstruct(video, torch.Generator().manual_seed(step))
        loss = (output - video).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_fitted_statistics_normalise_and_change_no_frame() -> None:
    vae = drawn(CONFIGS["0.9"].model_copy(update={"latents_mean": (), "latents_std": ()}))
    video = clip(vae.config, 6, batch=2)
    before, frames = vae.encode(video), vae.decode(vae.encode(video))
    vae.fit_normaliser([video[:1], video[1:]])
    after = vae.encode(video).transpose(0, 1).flatten(1)
    assert difference(after.mean(1), torch.zeros(4)) <= 1e-4
    assert difference(after.std(1, correction=0), torch.ones(4)) <= 1e-4
    assert (vae.encode(video) - before).abs().max() > 1e-2
    assert difference(vae.decode(vae.encode(video)), frames) <= 1e-4
    assert vae.reinitialised().config.latents_std == ()
    with pytest.raises(ValueError, match="at least one batch"):
        vae.fit_normaliser([])


@torch.no_grad()
def test_kinds_of_log_variance() -> None:
    video = clip(CONFIGS["0.9"], 1)
    spread = {}
    for kind in ("uniform", "per_channel", "constant", "none"):
        vae = drawn(CONFIGS["0.9"].model_copy(update={"latent_log_var": kind}))
        mean, logvar = vae.moments(video)
        assert mean.shape[1] == 4
        if logvar is None:
            assert kind == "none"
            assert vae.train().reconstruct(video)[2] is None
        else:
            assert logvar.shape == mean.shape
            spread[kind] = (float(logvar.std(1).max()) > 1e-3, float(logvar.std((2, 3, 4)).max()) > 1e-3)
    assert spread == {"uniform": (False, True), "per_channel": (True, True), "constant": (False, False)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_blocks": [["res_x", 1], DOUBLE]}, "the encoder takes 4x8x8 pixels .* the decoder makes 2x4x4"),
        ({"latents_mean": (1.0,)}, "latents_mean has 1 values, expected 4"),
        ({"latents_std": (1.0, 0.0, 1.0, 1.0)}, "latents_std must be positive"),
        ({"encoder_blocks": [["attn_res_x", 1]]}, r"encoder_blocks\.0"),
        ({"encoder_blocks": [["res_x", {"num_layers": 1, "inject_noise": True}]]}, "neither residual nor inject_noise"),
        ({"encoder_blocks": [["compress_all", {"multiplier": 2}], ["compress_all", {}]]}, "keeps the width"),
        ({"encoder_blocks": [["compress_all_res", {}], ["compress_all_res", {"multiplier": 3}]]}, "does not divide"),
        ({"decoder_blocks": [["compress_all_res", {}], DOUBLE]}, "is a block of the encoder"),
        ({"decoder_blocks": [["res_x", {"num_layers": 1, "multiplier": 2}], DOUBLE, DOUBLE]}, "takes no multiplier"),
        ({"decoder_blocks": [["res_x_y", {"inject_noise": True}], DOUBLE, DOUBLE]}, "takes no inject_noise"),
        ({"decoder_blocks": [["compress_all", {"residual": True, "multiplier": 3}], DOUBLE]}, "does not divide"),
        ({"decode_noise_scale": 1.5}, "decode_noise_scale"),
    ],
)
def test_what_does_not_fit_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LTXConfig(**{**SMALL, "encoder_blocks": PLAIN, "decoder_blocks": PLAIN, **fields})


def test_one_architecture_has_one_configuration() -> None:
    said = [["res_x", {"num_layers": 2, "inject_noise": False}], ["compress_all", 1], ["res_x_y", {"multiplier": 2}], *PLAIN[3:]]
    assert LTXConfig(**SMALL, encoder_blocks=said, decoder_blocks=said) == CONFIGS["0.9"]
    for config in (*CONFIGS.values(), OWN):
        assert LTXConfig.model_validate_json(config.model_dump_json()) == config
