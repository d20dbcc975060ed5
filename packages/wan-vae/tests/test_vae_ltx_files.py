"""Checkpoints of LTX-Video's VAE in every layout, there and back, and the commands with one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_vae import load_vae
from wan_vae.checkpoint import describe, save_diffusers, save_official
from wan_vae.codecs.ltx import LTXVAE
from wan_vae.codecs.ltx_config import PRESETS, LTXConfig
from wan_vae.codecs.ltx_diffusers import diffusers_names
from wan_vae.codecs.ltx_files import MEAN, STD, infer_config, read_configuration
from wan_vae.latents import LatentFile
from wan_vae.model import WanVAE
from wan_vae.testing import difference, randomise
from wan_vae.video import probe

Run = Callable[..., tuple[int, str, str]]
DOUBLE = ["compress_all", {"residual": True, "multiplier": 2}]
PLAIN = [["res_x", 1], ["compress_all", {}], ["res_x_y", {}], ["res_x", 1], ["compress_all", {}], ["res_x", 1], ["res_x", 1]]
FOLDED = [["res_x", 1], ["compress_space_res", {}], ["res_x", 1], ["compress_time_res", {}], ["res_x", 1], ["compress_all_res", {}]]
NOISY = [["res_x", {"num_layers": 1, "inject_noise": True}], DOUBLE, ["res_x", 2], DOUBLE, ["res_x", 1]]
SMALL: dict[str, Any] = {
    "latent_channels": 4, "encoder_base_channels": 8, "decoder_base_channels": 8, "patch_size": 1,
    "latents_mean": (0.5, -0.25, 0.1, 1.0), "latents_std": (0.5, 2.0, 1.3, 0.75),
}  # fmt: skip
SMALL |= {name: tuple(torch.tensor(SMALL[name]).tolist()) for name in ("latents_mean", "latents_std")}  # as fp32 has them
CONFIGS = {
    "plain": LTXConfig(**SMALL, encoder_blocks=PLAIN, decoder_blocks=PLAIN, latent_space="test"),
    "timed": LTXConfig(**SMALL, encoder_blocks=PLAIN, decoder_blocks=NOISY, timestep_conditioning=True, latent_space="test"),
    "folded": LTXConfig(
        **SMALL, encoder_blocks=[*FOLDED, ["res_x", 1]], decoder_blocks=NOISY, timestep_conditioning=True, latent_space="test"
    ),
}
OWN = {"latent_log_var": "per_channel", "spatial_padding_mode": "replicate", "decode_noise_scale": 0.1, "decode_timestep": 0.2}


def drawn(config: LTXConfig) -> LTXVAE:
    vae = LTXVAE(config).eval()
    randomise(vae)
    return vae


@pytest.fixture(params=CONFIGS)
def vae(request: pytest.FixtureRequest) -> LTXVAE:
    return drawn(CONFIGS[request.param])


@pytest.fixture
def timed() -> LTXVAE:
    return drawn(CONFIGS["timed"])


def content(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, bytes]]]:
    """Metadata and tensors of a file, to the bit."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return metadata, {key: (str(value.dtype), value.contiguous().numpy().tobytes()) for key, value in load_file(path).items()}


def rewritten(path: Path, *, config: dict[str, Any] | None = None, prefix: str = "", **changes: Tensor | None) -> None:
    """Write an official file anew, with other fields of its configuration, with a prefix, or with other tensors (None: without)."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = {key: value for key, value in {**load_file(path), **changes}.items() if value is not None}
    official = json.loads(metadata["config"])
    official["vae"] = {name: value for name, value in {**official["vae"], **(config or {})}.items() if value is not None}
    save_file({f"{prefix}{key}" if "." in key else key: value for key, value in state.items()}, path, {"config": json.dumps(official)})


def test_an_official_file_there_and_back(vae: LTXVAE, tmp_path: Path) -> None:
    vae.config = vae.config.model_copy(update={"decode_noise_scale": 0.1, "max_timestep": 0.3})
    save_official(vae, tmp_path / "a.safetensors")
    back = load_vae(str(tmp_path / "a.safetensors"))
    assert isinstance(back, LTXVAE)
    assert (back.config, back.fingerprint()) == (vae.config, vae.fingerprint())
    assert describe(tmp_path / "a.safetensors") == vae.spec
    state = load_file(tmp_path / "a.safetensors")
    assert set(state) == {*vae.state_dict(), MEAN, STD}
    assert state[STD].tolist() == list(vae.config.latents_std)
    save_official(back, tmp_path / "b.safetensors")
    assert content(tmp_path / "b.safetensors") == content(tmp_path / "a.safetensors")


def test_every_fact_of_a_configuration_is_in_the_metadata(tmp_path: Path) -> None:
    for blocks in (PLAIN, [*PLAIN, ["res_x_y", {"multiplier": 3}]]):
        config = CONFIGS["plain"].model_copy(update=OWN)
        config = LTXConfig(**{**config.model_dump(), "encoder_blocks": blocks, "causal_decoder": True, "latent_space": "mine-1"})
        save_official(drawn(config), tmp_path / "a.safetensors")
        assert LTXVAE.from_pretrained(tmp_path / "a.safetensors").config == config
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        fields = json.loads(file.metadata()["config"])["vae"]
    assert fields["_class_name"] == "CausalVideoAutoencoder"
    assert (fields["norm_layer"], fields["use_quant_conv"], fields["causal_decoder"], fields["dims"]) == ("pixel_norm", False, True, 3)
    assert fields["encoder_blocks"][-1] == ["res_x_y", {"multiplier": 3}]
    with pytest.raises(ValueError, match=r"has its configuration in the metadata of a \.safetensors file"):
        save_official(drawn(config), tmp_path / "a.pth")


def test_the_vae_within_the_file_of_a_whole_model(timed: LTXVAE, tmp_path: Path) -> None:
    path = tmp_path / "ltx-video-2b.safetensors"
    save_official(timed, path)
    extra = {f"per_channel_statistics.{name}": torch.ones(4) for name in ("mean-of-stds", "mean-of-stds_over_std-of-means")}
    extra["per_channel_statistics.channel"] = torch.arange(4)
    rewritten(path, prefix="vae.", **extra)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(
        {**load_file(path), "model.diffusion_model.patchify_proj.weight": torch.ones(2, 2, dtype=torch.float8_e4m3fn)}, path, metadata
    )
    back = load_vae(str(path))
    assert (back.config, back.fingerprint()) == (timed.config, timed.fingerprint())
    assert describe(path) == timed.spec


def test_the_oldest_configuration_lists_blocks_once_and_layers_as_numbers(tmp_path: Path) -> None:
    vae = drawn(CONFIGS["plain"])
    save_official(vae, tmp_path / "a.safetensors")
    blocks = [[kind, params.get("num_layers", 1)] for kind, params in vae.config.model_dump()["encoder_blocks"]]
    absent = ("encoder_blocks", "decoder_blocks", "spatial_padding_mode", "timestep_conditioning", "decode_timestep")
    absent += ("decode_noise_scale", "max_timestep", "latent_space", "normalize_latent_channels")
    rewritten(tmp_path / "a.safetensors", config={**dict.fromkeys(absent), "blocks": blocks, "latent_log_var": "uniform"})
    assert load_vae(str(tmp_path / "a.safetensors")).config == vae.config.model_copy(update={"latent_space": "unknown"})


def test_statistics_keep_every_bit_in_any_type(timed: LTXVAE, tmp_path: Path) -> None:
    rounded = tuple(torch.tensor(timed.config.latents_std).bfloat16().float().tolist())
    for std, dtype in ((timed.config.latents_std, torch.float32), (rounded, torch.bfloat16)):
        timed.config = timed.config.model_copy(update={"latents_std": std})
        save_official(timed.bfloat16(), tmp_path / "a.safetensors")
        assert load_file(tmp_path / "a.safetensors")[STD].dtype == dtype
        assert LTXVAE.from_pretrained(tmp_path / "a.safetensors").config == timed.config
    rewritten(tmp_path / "a.safetensors", **{MEAN: None})  # which the official code takes for zeros
    assert LTXVAE.from_pretrained(tmp_path / "a.safetensors").config.latents_mean == (0.0,) * 4
    rewritten(tmp_path / "a.safetensors", **{STD: None})
    assert LTXVAE.from_pretrained(tmp_path / "a.safetensors").config.latents_std == ()


@torch.no_grad()
def test_a_folder_of_diffusers_there_and_back(vae: LTXVAE, tmp_path: Path) -> None:
    save_diffusers(vae, tmp_path / "a")
    theirs = AutoencoderKLLTXVideo.from_pretrained(tmp_path / "a")
    assert theirs.latents_std.tolist() == list(vae.config.latents_std)
    theirs.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "LTXPipeline"}')
    expected = vae.config.model_copy(update={"latent_space": "unknown"})  # which diffusers does not say
    video = torch.rand(1, 3, 5, 8, 12) * 2 - 1
    for source in ("a", "pipeline", "pipeline/vae", "a/diffusion_pytorch_model.safetensors"):
        back = load_vae(str(tmp_path / source))
        assert isinstance(back, LTXVAE)
        assert back.config == expected
        assert all(torch.equal(value, vae.state_dict()[key]) for key, value in back.state_dict().items())
        assert difference(back.encode(video), vae.encode(video)) <= 1e-6
        assert describe(tmp_path / source) == back.spec


def test_a_folder_of_ours_there_and_back(timed: LTXVAE, tmp_path: Path) -> None:
    timed.config = timed.config.model_copy(update=OWN | {"latent_log_var": "uniform", "latent_space": "mine-1"})
    timed.save_pretrained(tmp_path / "mine")
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["format"] == "wan-ltx/1"
    for source in ("mine", "mine/model.safetensors"):
        back = load_vae(str(tmp_path / source))
        assert (back.config, back.fingerprint()) == (timed.config, timed.fingerprint())


@pytest.mark.parametrize("name", PRESETS)
def test_a_file_without_a_configuration_is_told_where_it_is_a_released_one(name: str) -> None:
    with torch.device("meta"):
        own = {key: tuple(value.shape) for key, value in LTXVAE(PRESETS[name]).state_dict().items()}
    theirs = {diffusers_names(PRESETS[name], list(own))[key]: shape for key, shape in own.items()}
    for shapes in (own | {MEAN: (128,), STD: (128,)}, theirs | {"latents_mean": (128,), "latents_std": (128,)}):
        assert infer_config(shapes, "a.safetensors") == PRESETS[name]
    with pytest.raises(ValueError, match="its tensors are of none of the released ones"):
        infer_config(own | {"decoder.conv_in.conv.bias": (3,)}, "a.safetensors")


def test_a_file_of_a_released_architecture_has_its_latent_space(tmp_path: Path) -> None:
    save_official(drawn(CONFIGS["plain"]), path := tmp_path / "a.safetensors")
    for preset in PRESETS.values():
        fields = json.loads(preset.model_dump_json())
        fields |= {"latent_space": None, "decode_timestep": None, "decode_noise_scale": None, "max_timestep": None}
        rewritten(path, config=fields)
        assert read_configuration(path) == preset
    rewritten(path, config={**fields, "decoder_base_channels": 64})
    found = read_configuration(path)
    assert found is not None
    assert found.latent_space == "unknown"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder.conv_in.conv.bias": None}, r"missing 1 \(decoder\.conv_in\.conv\.bias\)"),
        ({"decoder.extra.weight": torch.zeros(3)}, r"unexpected 1 \(decoder\.extra\.weight\)"),
        ({"decoder.conv_in.conv.bias": torch.zeros(3)}, r"'decoder\.conv_in\.conv\.bias' is \(3,\), expected \(32,\)"),
        ({"decoder.conv_in.conv.bias": torch.zeros(32, dtype=torch.float16)}, "mixes types"),
        ({"decoder.conv_in.conv.bias": torch.full((32,), torch.nan)}, "holds NaN"),
        ({STD: torch.zeros(4)}, "latents_std must be positive"),
        ({STD: torch.ones(5)}, "latents_std has 5 values, expected 4"),
        ({"config": {"norm_layer": "group_norm"}}, "norm_layer is 'group_norm', expected 'pixel_norm'"),
        ({"config": {"use_quant_conv": None}}, "use_quant_conv is True, expected False"),
        ({"config": {"_class_name": "VideoAutoencoder"}}, "_class_name is 'VideoAutoencoder', expected 'CausalVideoAutoencoder'"),
        ({"config": {"decoder_blocks": [["attn_res_x", {"num_layers": 1}]]}}, r"decoder_blocks\.0"),
        ({"config": {"decoder_spatial_padding_mode": "reflect"}}, "its configuration has decoder_spatial_padding_mode, as later"),
        ({"config": {"decoder_blocks": None}}, "its configuration has no list decoder_blocks"),
        ({"config": {"latent_channels": None}}, "the configuration in its metadata cannot be read: KeyError: 'latent_channels'"),
    ],
)
def test_what_does_not_fit_is_named(timed: LTXVAE, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_official(timed, tmp_path / "a.safetensors")
    rewritten(tmp_path / "a.safetensors", **changes)
    with pytest.raises(ValueError, match=message):
        LTXVAE.from_pretrained(tmp_path / "a.safetensors")


@pytest.mark.parametrize("said", ["[]", '{"vae": null}', "{}"])
def test_metadata_without_a_vae_are_one_line(timed: LTXVAE, tmp_path: Path, said: str) -> None:
    save_official(timed, path := tmp_path / "a.safetensors")
    save_file(load_file(path), path, {"config": said})
    with pytest.raises(ValueError, match="there is no object 'vae' in the configuration in its metadata"):
        LTXVAE.from_pretrained(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_causal": False}, "encoder_causal is False"),
        ({"patch_size_t": 2}, "patch_size_t is 2"),
        ({"layers_per_block": [1]}, "IndexError"),
        ({"down_block_types": ["Other"] * 3}, "down_block_types is"),
        ({"latent_channels": 5}, r"'.*conv.*' is \(.*\), expected|has 4 values, expected 5"),
    ],
)
def test_folders_of_diffusers_that_do_not_fit(timed: LTXVAE, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    save_diffusers(timed, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | fields))
    with pytest.raises(ValueError, match=message):
        LTXVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"causal_decoder": True, "spatial_padding_mode": "replicate"},
        {"latent_log_var": "per_channel"},
        {"decoder_blocks": [["res_x", 1], ["compress_time", {}], ["compress_space", {}], DOUBLE, ["res_x", 1]]},
        {"encoder_blocks": [["res_x", 1], ["compress_space", {}], ["res_x", 1], ["compress_all", {}], ["compress_time", {}], ["res_x", 1]]},
        {"encoder_blocks": [["compress_all", {}], ["res_x", 1], ["compress_all", {}], ["res_x", 1]]},
    ],
)
def test_what_diffusers_cannot_hold_is_not_written(change: dict[str, Any], tmp_path: Path) -> None:
    vae = LTXVAE(LTXConfig(**{**CONFIGS["timed"].model_dump(), **change}))
    with pytest.raises(ValueError, match="diffusers' AutoencoderKLLTXVideo cannot hold 'test'"):
        save_diffusers(vae, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_weights_for_the_other_class(timed: LTXVAE, tmp_path: Path) -> None:
    ltx, wan = tmp_path / "ltx.safetensors", tmp_path / "wan.safetensors"
    save_official(timed, ltx)
    save_official(WanVAE(), wan)
    with pytest.raises(ValueError, match=r"not a Wan VAE: it holds a VAE of LTX-Video; load it with wan_vae\.load_vae"):
        WanVAE.from_pretrained(ltx)
    with pytest.raises(ValueError, match="not a VAE of LTX-Video: it holds a Wan VAE"):
        LTXVAE.from_pretrained(wan)
    save_file({key: value for key, value in load_file(ltx).items() if key.startswith("decoder.")}, ltx)
    for read in (LTXVAE.from_pretrained, WanVAE.from_pretrained, describe):
        with pytest.raises(ValueError, match="holds the decoder of a VAE of LTX-Video alone"):
            read(ltx)


def test_convert_writes_every_layout_bit_for_bit(timed: LTXVAE, run: Run) -> None:
    save_official(timed, "a.safetensors")
    for line in ("a.safetensors b --to wan", "b c --to diffusers", "c d.safetensors --to comfy", "b e.safetensors --to official"):
        code, out, err = run("convert", *line.split())
        assert code == 0, err
        assert ("does not say latent_space, which" in err) == ("diffusers" in line)
        assert f"{sum(value.numel() for value in timed.parameters()):,} parameters" in out
    assert content(Path("e.safetensors")) == content(Path("a.safetensors"))
    assert content(Path("d.safetensors"))[1] == content(Path("a.safetensors"))[1]
    code, _, err = run("convert", "a.safetensors", "f.pth", "--to", "official")
    assert (code, "give a name" in err or "metadata of a .safetensors file" in err) == (2, True)
    assert not Path("f.pth").exists()
    code, out, err = run("convert", "a.safetensors", "g.safetensors", "--to", "official", "--dtype", "bf16")
    assert (code, "in bfloat16" in out) == (0, True)
    assert LTXVAE.from_pretrained("g.safetensors").config == timed.config


def test_list_and_info(timed: LTXVAE, run: Run) -> None:
    listed = {row["name"]: row for row in json.loads(run("list", "--json")[1])}
    assert listed["ltx-video-0.9.1"]["latent_space"] == "ltx-0.9.1"
    assert listed["ltx-video-0.9.5"]["stride"] == "8x32x32"
    assert json.loads(run("info", "ltx-video-0.9", "--json")[1])[0]["parameters"] == 419_193_649
    save_official(timed, "ltx.safetensors")
    facts = json.loads(run("info", "ltx.safetensors", "--json")[1])[0]
    assert (facts["kind"], facts["latent_space"], facts["channels"], facts["stride"]) == ("checkpoint", "test", 4, "4x4x4")
    assert facts["parameters"] == sum(value.numel() for value in timed.parameters())


def test_a_real_film_through_the_command(timed: LTXVAE, run: Run, real_clips: Path) -> None:
    shutil.copy(real_clips / "carphone_pristine.mp4", "film.mp4")
    save_official(timed, "ltx.safetensors")
    code, _, err = run("encode", "film.mp4", "--codec", "ltx.safetensors", "--frames", "11", "--logvar", "--crop", "50x34+20+30")
    assert code == 0, err
    file = LatentFile.open("film.safetensors")
    assert (file.info.latent_space, file.info.frames, file.info.padding.frames) == ("test", 11, 2)
    assert file.shape == (4, 4, 9, 13)
    for arguments in ([], ["--chunk", "3", "--overwrite"]):
        code, _, err = run("decode", "film.safetensors", "--codec", "ltx.safetensors", "--lossless", *arguments)
        assert code == 0, err
        back = probe("film.decoded.mp4")
        assert (back.frames, back.width, back.height) == (11, 50, 34)
    code, _, err = run("decode", "film.safetensors", "tiled.mp4", "--codec", "ltx.safetensors", "--tile", "24x24", "--tile-mode", "blend")
    assert code == 0, err
    assert probe("tiled.mp4").frames == 11
    code, _, err = run("decode", "film.safetensors", "b.mp4", "--codec", "tiny")
    assert (code, "holds latents of the space 'test'" in err) == (2, True)


def test_what_the_official_code_would_run_otherwise_is_neither_written_nor_read(tmp_path: Path) -> None:
    said = [["res_x", 1], ["compress_space", {"residual": True}], ["res_x", 1], ["compress_all", {}], ["res_x", 1]]
    down = [["res_x", 1], ["compress_space", {}], ["res_x", 1], ["compress_all", {}], ["res_x", 1]]
    vae = drawn(LTXConfig(**SMALL, encoder_blocks=down, decoder_blocks=said, latent_space="test"))
    with pytest.raises(ValueError, match="the official code heeds them in 'compress_all' alone"):
        save_official(vae, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
    vae.save_pretrained(tmp_path / "own")
    assert load_vae(str(tmp_path / "own")).config == vae.config
    save_official(drawn(CONFIGS["plain"]), path := tmp_path / "b.safetensors")
    rewritten(path, config={"encoder_blocks": down, "decoder_blocks": said})
    with pytest.raises(ValueError, match="the official code heeds them in 'compress_all' alone"):
        describe(path)


def test_facts_are_told_of_no_file_that_does_not_load(timed: LTXVAE, tmp_path: Path) -> None:
    save_official(timed, path := tmp_path / "a.safetensors")
    rewritten(path, **{"decoder.conv_in.conv.bias": None})
    with pytest.raises(ValueError, match=r"missing 1 \(decoder\.conv_in\.conv\.bias\)"):
        describe(path)


def test_the_parts_are_those_around_the_latents_and_the_pixels(timed: LTXVAE) -> None:
    names = {id(parameter): name for name, parameter in timed.named_parameters()}
    groups = {part: {names[id(parameter)] for parameter in own} for part, own in timed.parameter_groups().items()}
    assert groups["encoder_head"] == {"encoder.conv_out.conv.weight", "encoder.conv_out.conv.bias"}
    assert groups["decoder_input"] == {"decoder.conv_in.conv.weight", "decoder.conv_in.conv.bias"}
    assert {"decoder.conv_out.conv.weight", "decoder.last_scale_shift_table"} <= groups["decoder_head"]
    assert all(name.startswith(("decoder.conv_out.", "decoder.last_")) for name in groups["decoder_head"])
    assert all(name.startswith("encoder.") for name in groups["encoder"])
    assert sorted(set().union(*groups.values())) == sorted(names.values())
