"""DC-AE, pictures as a codec of films: the numbers of diffusers' AutoencoderDC, the contract of a VAE, and what training asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dcae_pairs import CELLS, CONFIGS, DEEP, LOOSE, TOLERANCE, made, pair, parity, pictures
from diffusers import AutoencoderDC
from pydantic import ValidationError
from torch import Tensor, nn
from wan_vae.codecs.dcae import DCAE
from wan_vae.codecs.dcae_config import PRESETS, DCAEConfig
from wan_vae.codecs.dcae_diffusers import DIFFUSERS_CLASS, diffusers_config, from_diffusers, to_tensors
from wan_vae.codecs.dcae_layers import BatchNorm
from wan_vae.plugins import find_vae
from wan_vae.testing import VAEContract, difference


@pytest.mark.parametrize("cells", CELLS)
@pytest.mark.parametrize("name", CONFIGS)
def test_encode_decode_and_gradients_agree(name: str, cells: str) -> None:
    far = parity(CONFIGS[name], CELLS[cells])
    assert far.pop(LOOSE) <= 10 * TOLERANCE
    assert max(far.values()) <= TOLERANCE, far


def test_a_training_step_agrees_and_learns_the_same_statistics() -> None:
    vae, theirs = pair(DEEP)
    video = pictures(vae, (3, 4))
    output, _, logvar = vae.train().reconstruct(video)
    expected = theirs.train()(video[0].transpose(0, 1)).sample
    assert logvar is None
    assert difference(output[0].transpose(0, 1), expected) <= TOLERANCE
    ours, learned = vae.to_diffusers()[1], theirs.state_dict()
    names = [name for name in learned if "running" in name or "num_batches" in name]
    assert names
    assert max(difference(ours[name], learned[name]) for name in names) <= TOLERANCE
    assert {int(ours[name]) for name in names if "num_batches" in name} == {70_002}


# the fields of the published config.json, as diffusers/scripts/convert_dcae_to_diffusers.py at f7c4706 and the folders have them
RESIDUAL, ATTENTION = "ResBlock", "EfficientViTBlock"
WIDTHS = {32: [128, 256, 512, 512, 1024, 1024], 64: [128, 256, 512, 512, 1024, 1024, 2048]}
WIDTHS[128] = [*WIDTHS[64], 2048]


def published_deep(side: int, channels: int, factor: float) -> dict[str, Any]:
    deeper = len(WIDTHS[side]) - 3
    halves = {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in {
            "block_types": [RESIDUAL] * 3 + [ATTENTION] * deeper,
            "block_out_channels": WIDTHS[side],
            "qkv_multiscales": [[]] * (3 + deeper),
        }.items()
    }
    return {
        **halves,
        "latent_channels": channels,
        "encoder_layers_per_block": [0, 4, 8] + [2] * deeper,
        "decoder_layers_per_block": [0, 5, 10] + [2] * deeper,
        "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * deeper,
        "decoder_act_fns": ["relu"] * 3 + ["silu"] * deeper,
        "scaling_factor": factor,
    }


PUBLISHED_SANA = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": [RESIDUAL] * 3 + [ATTENTION] * 3,
    "decoder_block_types": [RESIDUAL] * 3 + [ATTENTION] * 3,
    "encoder_block_out_channels": WIDTHS[32],
    "decoder_block_out_channels": WIDTHS[32],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}
PUBLISHED = {
    "dc-ae-f32c32-in-1.0": published_deep(32, 32, 0.3189),
    "dc-ae-f32c32-mix-1.0": published_deep(32, 32, 0.4552),
    "dc-ae-f64c128-in-1.0": published_deep(64, 128, 0.2889),
    "dc-ae-f64c128-mix-1.0": published_deep(64, 128, 0.4538),
    "dc-ae-f128c512-in-1.0": published_deep(128, 512, 0.4883),
    "dc-ae-f128c512-mix-1.0": published_deep(128, 512, 0.3620),
    "dc-ae-f32c32-sana-1.0": PUBLISHED_SANA,
    "dc-ae-f32c32-sana-1.1": PUBLISHED_SANA,
}
LISTED = [name for name in PUBLISHED if "mix" not in name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_model(name: str) -> None:
    config = PRESETS[name]
    assert from_diffusers({"_class_name": DIFFUSERS_CLASS, **PUBLISHED[name]}, Path(name)) == config
    with torch.device("meta"):
        ours, theirs = DCAE(config), AutoencoderDC(**PUBLISHED[name])
    shapes = {key: tuple(value.shape) for key, value in to_tensors(ours.state_dict(), config).items()}
    assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    side = int(name.split("-f")[1].split("c")[0])
    assert config.stride == (1, side, side)
    assert config.latent_space == name.rpartition("-")[0]


@pytest.mark.parametrize("name", LISTED)
def test_the_list_says_what_it_is(name: str) -> None:
    spec = find_vae(name)
    with torch.device("meta"):
        vae = spec.resolve()(PRESETS[name])
    assert spec.parameters == sum(parameter.numel() for parameter in vae.parameters())
    assert spec.weights == f"hub:mit-han-lab/{name}-diffusers"
    facts = ("latent_space", "latent_channels", "stride", "format", "describe")
    assert [getattr(spec, fact) for fact in facts] == [getattr(vae.spec, fact) for fact in facts]


class TestSmall(VAEContract):
    @pytest.fixture(scope="class", params=CONFIGS)
    @classmethod
    def vae(cls, request: pytest.FixtureRequest) -> Any:
        return made(CONFIGS[request.param])


@pytest.fixture(scope="module")
def vae() -> DCAE:
    return made(DEEP)


def test_a_frame_is_a_picture_of_its_own(vae: DCAE) -> None:
    video = pictures(vae, (2, 3), frames=3)
    latents = vae.encode(video)
    alone = torch.cat([vae.encode(video[:, :, t : t + 1]) for t in range(3)], 2)
    assert torch.equal(latents, alone)
    changed = video.clone()
    changed[:, :, 0] *= -1
    assert torch.equal(vae.encode(changed)[:, :, 1:], latents[:, :, 1:])
    assert [chunk.shape[2] for chunk in vae.decode_stream(latents.split([2, 1], 2))] == [2, 1]


def test_latents_are_scaled_once(vae: DCAE) -> None:
    video = pictures(vae, (2, 3))
    mean, logvar = vae.moments(video)
    assert logvar is None
    assert difference(vae.encode(video), 0.37 * mean) <= TOLERANCE
    assert difference(vae.decode(0.37 * mean), vae.reconstruct(video)[0].clamp(-1, 1)) <= TOLERANCE


def test_a_normaliser_makes_the_root_mean_square_one() -> None:
    vae = made(DEEP.model_copy(update={"scaling_factor": 1.0}))
    before, batches = vae.fingerprint(), [pictures(vae, (2, 3), frames=count, seed=count) for count in (1, 3)]
    shown = vae.decode(vae.encode(batches[0]))
    vae.fit_normaliser(iter(batches))
    latents = torch.cat([vae.encode(video) for video in batches], 2)
    assert latents.square().mean().sqrt() == pytest.approx(1, abs=1e-5)
    assert difference(vae.decode(vae.encode(batches[0])), shown) <= TOLERANCE
    assert vae.fingerprint() != before
    assert vae.reinitialised(z_dim=8).config == vae.config.model_copy(update={"scaling_factor": 1.0, "z_dim": 8})
    with pytest.raises(ValueError, match="at least one batch"):
        vae.fit_normaliser([])


def test_statistics_are_learned_where_the_weights_are() -> None:
    vae = made(DEEP).train()
    video = pictures(vae, (2, 3))
    norms = [module for module in vae.modules() if isinstance(module, BatchNorm)]
    assert len(norms) == 2

    def moved(call: Any) -> bool:
        before = [norm.running_mean.clone() for norm in norms]
        call()
        return not all(torch.equal(old, norm.running_mean) for old, norm in zip(before, norms, strict=True))

    assert not moved(lambda: vae.decode(vae.encode(video)))
    assert torch.equal(vae.decode(vae.encode(video)), vae.eval().decode(vae.encode(video)))
    assert moved(lambda: vae.train().reconstruct(video))
    vae.requires_grad_(False)
    for name in ("encoder_head", "decoder_input"):  # as DC-AE is adapted to large pictures
        for parameter in vae.parameter_groups()[name]:
            parameter.requires_grad_(True)
    assert not moved(lambda: vae.reconstruct(video)[0].mean().backward())


def test_the_parts_are_where_the_paper_trains(vae: DCAE) -> None:
    groups = {name: {id(parameter) for parameter in group} for name, group in vae.parameter_groups().items()}
    of = {id(parameter): name for name, parameter in vae.named_parameters()}
    assert {of[key] for key in groups["encoder_head"]} == {f"encoder.project_out.main.op_list.0.conv.{kind}" for kind in ("weight", "bias")}
    assert {of[key] for key in groups["decoder_input"]} == {f"decoder.project_in.main.conv.{kind}" for kind in ("weight", "bias")}
    assert {of[key].rpartition(".")[0] for key in groups["decoder_head"]} == {
        "decoder.project_out.op_list.0",
        "decoder.project_out.op_list.2.conv.conv",
    }
    assert vae.last_layer is vae.decoder.project_out.op_list[2].conv.conv.weight


@pytest.mark.parametrize("name", CONFIGS)
def test_in_half_precision_it_is_near(name: str) -> None:
    vae, half = made(CONFIGS[name]), made(CONFIGS[name]).bfloat16()
    video = pictures(vae, (6, 5))
    latents = half.encode(video)
    assert latents.dtype == torch.bfloat16
    assert difference(latents.float(), vae.encode(video)) < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        mixed = vae.reconstruct(video)[0]
    assert difference(mixed.float(), vae.reconstruct(video)[0]) < 0.1


@pytest.mark.parametrize("cells", CELLS.values())
def test_attention_is_in_fp32_under_autocast(cells: tuple[int, int]) -> None:
    layer = made(DEEP).decoder.stages[3].op_list[0].context_module.main
    seen: dict[str, Tensor] = {}
    layer.qkv.register_forward_hook(lambda module, args, output: seen.update(qkv=output))
    layer.proj.register_forward_pre_hook(lambda module, args: seen.update(attended=args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(1, 32, *cells, generator=torch.Generator().manual_seed(0)))
    assert seen["qkv"].dtype == torch.bfloat16
    q, k, v = seen["qkv"].double().flatten(2).unflatten(1, (-1, 24)).split(8, dim=2)
    weights = nn.functional.relu(k).mT @ nn.functional.relu(q)
    expected = v @ (weights / (weights.sum(2, keepdim=True) + 1e-15))
    assert difference(seen["attended"].double(), expected.flatten(1, 2).unflatten(2, cells)) <= TOLERANCE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_depths": (0, 1, 1)}, "decoder_depths has 3 stages, encoder_dims has 4"),
        ({"decoder_depths": (0, 1, 0, 1)}, "stage 2 of the decoder has 0 blocks, expected 1 or more"),
        ({"encoder_dims": (8, 16, 18, 32)}, "16 and 18 have no shortcut"),
        ({"encoder_dims": (8, 14, 14, 28), "head_dim": 4}, "14 is what pixel_unshuffle makes, expected a multiple of 4"),
        ({"z_dim": 5}, "32 at last is no multiple of z_dim 5"),
        ({"head_dim": 12}, "stage 3 of the encoder is 32 wide, expected a multiple of head_dim 12"),
        ({"encoder_scales": ((5,), (), (), ())}, "stage 0 of the encoder has scales"),
        ({"encoder_scales": ((), (), (), (4,))}, "expected odd sizes"),
        ({"decoder_norms": ("batch_norm",) * 4}, "attention blocks with batch_norm"),
        ({"decoder_norms": ("group_norm",) * 4}, "'rms_norm' or 'batch_norm'"),
        ({"scaling_factor": 0}, "greater than 0"),
        ({"width": 3}, "Extra inputs"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DCAEConfig.model_validate({**DEEP.model_dump(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 2}, "for 2 channels"),
        ({"upsample_block_type": "nearest"}, "upsample: Input should be 'pixel_shuffle' or 'interpolate'"),
        ({"encoder_block_types": "MambaBlock"}, "encoder_blocks.0: Input should be 'residual' or 'attention'"),
        ({"latent_channels": None}, "z_dim: Input should be a valid integer"),
    ],
)
def test_a_configuration_of_diffusers_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_diffusers({**diffusers_config(DEEP), **change}, Path("folder"))
