"""Checkpoint layouts: names, round trips to the bit, inferred configurations, refusals that name the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_vae.checkpoint import describe, diffusers_config, infer_config, save_diffusers, save_official
from wan_vae.config import PRESETS, TINY, WAN21, WAN22, VAEConfig
from wan_vae.model import WanVAE
from wan_vae.names import diffusers_names, official_names
from wan_vae.plugins import find_vae
from wan_vae.testing import randomise

FLAT = VAEConfig(
    base_dim=6, decoder_base_dim=10, z_dim=3, dim_mult=(1, 2, 2, 4), temporal_downsample=(True, False, True),
    num_res_blocks=2, latent_space="unknown",
)  # fmt: skip
NESTED = VAEConfig(
    base_dim=4, decoder_base_dim=8, z_dim=5, dim_mult=(2, 2, 2), temporal_downsample=(False, True),
    num_res_blocks=1, residual=True, patch_size=2, latent_space="unknown",
)  # fmt: skip


@pytest.fixture(scope="module", params=[FLAT, NESTED], ids=["flat", "nested"])
def vae(request: pytest.FixtureRequest) -> WanVAE:
    vae = WanVAE(request.param).eval()
    randomise(vae)
    return vae


def same(one: WanVAE, other: WanVAE) -> bool:
    states = one.state_dict(), other.state_dict()
    return set(states[0]) == set(states[1]) and all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def official(vae: WanVAE) -> dict[str, Tensor]:
    return {official_names(vae.config)[key]: value for key, value in vae.state_dict().items()}


@pytest.mark.parametrize("name", PRESETS)
def test_names_are_bijections(name: str) -> None:
    with torch.device("meta"):
        keys = set(WanVAE(PRESETS[name]).state_dict())
    for names in (official_names(PRESETS[name]), diffusers_names(PRESETS[name])):
        assert set(names) == keys
        assert len(set(names.values())) == len(keys)


@pytest.mark.parametrize(
    ("config", "own", "theirs", "diffusers"),
    [
        (WAN21, "quant_conv.weight", "conv1.weight", "quant_conv.weight"),
        (WAN21, "encoder.conv_in.weight", "encoder.conv1.weight", "encoder.conv_in.weight"),
        (
            WAN21,
            "encoder.levels.1.blocks.0.shortcut.bias",
            "encoder.downsamples.3.shortcut.bias",
            "encoder.down_blocks.3.conv_shortcut.bias",
        ),
        (WAN21, "encoder.levels.1.resample.time_conv.bias", "encoder.downsamples.5.time_conv.bias", "encoder.down_blocks.5.time_conv.bias"),
        (WAN21, "decoder.middle.attention.norm.gamma", "decoder.middle.1.norm.gamma", "decoder.mid_block.attentions.0.norm.gamma"),
        (
            WAN21,
            "decoder.levels.2.resample.conv.weight",
            "decoder.upsamples.11.resample.1.weight",
            "decoder.up_blocks.2.upsamplers.0.resample.1.weight",
        ),
        (
            WAN21,
            "decoder.levels.3.blocks.2.norm2.gamma",
            "decoder.upsamples.14.residual.3.gamma",
            "decoder.up_blocks.3.resnets.2.norm2.gamma",
        ),
        (
            WAN22,
            "encoder.levels.2.resample.conv.bias",
            "encoder.downsamples.2.downsamples.2.resample.1.bias",
            "encoder.down_blocks.2.downsampler.resample.1.bias",
        ),
        (
            WAN22,
            "decoder.levels.0.blocks.1.conv2.bias",
            "decoder.upsamples.0.upsamples.1.residual.6.bias",
            "decoder.up_blocks.0.resnets.1.conv2.bias",
        ),
        (
            WAN22,
            "decoder.levels.1.resample.time_conv.bias",
            "decoder.upsamples.1.upsamples.3.time_conv.bias",
            "decoder.up_blocks.1.upsampler.time_conv.bias",
        ),
        (WAN22, "decoder.head.norm.gamma", "decoder.head.0.gamma", "decoder.norm_out.gamma"),
    ],
)
def test_names_of_the_published_models(config: VAEConfig, own: str, theirs: str, diffusers: str) -> None:
    assert official_names(config)[own] == theirs
    assert diffusers_names(config)[own] == diffusers


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
@pytest.mark.parametrize("names", [official_names, diffusers_names])
def test_published_models_are_recognised_by_their_shapes(name: str, names: object) -> None:
    with torch.device("meta"):
        state = WanVAE(PRESETS[name]).state_dict()
    table = names(PRESETS[name])  # type: ignore[operator]
    assert infer_config({table[key]: tuple(value.shape) for key, value in state.items()}) == PRESETS[name]


def test_a_pruned_model_shares_the_latents_of_the_full_one() -> None:
    pruned = WAN21.model_copy(update={"base_dim": 24, "decoder_base_dim": 24})
    with torch.device("meta"):
        shapes = {official_names(pruned)[key]: tuple(value.shape) for key, value in WanVAE(pruned).state_dict().items()}
    assert infer_config(shapes) == pruned


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_file_there_and_back(vae: WanVAE, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"vae{suffix}"
    save_official(vae, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    back = WanVAE.from_pretrained(path)
    assert back.config == vae.config
    assert same(back, vae)
    assert describe(path) == vae.spec


def test_official_file_needs_a_known_suffix(vae: WanVAE, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vae\.bin.*\.pth or \.safetensors"):
        save_official(vae, tmp_path / "vae.bin")


@pytest.mark.parametrize("prefix", ["model.", "vae.", "first_stage_model."])
@pytest.mark.parametrize("names", [official_names, diffusers_names])
def test_prefixed_files(vae: WanVAE, tmp_path: Path, prefix: str, names: object) -> None:
    table = names(vae.config)  # type: ignore[operator]
    save_file({prefix + table[key]: value for key, value in vae.state_dict().items()}, tmp_path / "vae.safetensors")
    back = WanVAE.from_pretrained(tmp_path / "vae.safetensors")
    assert back.config == vae.config
    assert same(back, vae)
    assert describe(tmp_path / "vae.safetensors") == vae.spec


def test_wrapped_pickle(vae: WanVAE, tmp_path: Path) -> None:
    torch.save({"model_state": official(vae)}, tmp_path / "vae.pth")
    assert same(WanVAE.from_pretrained(tmp_path / "vae.pth"), vae)


def test_own_folder_there_and_back(vae: WanVAE, tmp_path: Path) -> None:
    config = vae.config.model_copy(update={"latents_mean": (0.1,) * vae.config.z_dim, "latents_std": (1.7,) * vae.config.z_dim})
    full = WanVAE(config)
    full.load_state_dict(vae.state_dict())
    full.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["format"] == "wan-vae/1"
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(official_names(config).values())
    for source in (tmp_path / "saved", tmp_path / "saved" / "model.safetensors"):
        back = WanVAE.from_pretrained(source)
        assert back.config == config
        assert same(back, full)
    assert describe(tmp_path / "saved") == full.spec


def test_diffusers_folder_and_pipeline_folder(vae: WanVAE, tmp_path: Path) -> None:
    save_diffusers(vae, tmp_path / "vae")
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    for source in (tmp_path / "vae", tmp_path):
        back = WanVAE.from_pretrained(source)
        assert same(back, vae)
        assert describe(source).stride == vae.spec.stride


def test_published_diffusers_configs_name_their_latent_space(tmp_path: Path) -> None:
    for preset in (WAN21, WAN22):
        (tmp_path / "config.json").write_text(json.dumps(diffusers_config(preset)))
        assert describe(tmp_path).latent_space == preset.latent_space
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLWan", "base_dim": 96, "z_dim": 16}')
    with torch.device("meta"):
        assert describe(tmp_path) == WanVAE(WAN21).spec


def test_official_model_folder(vae: WanVAE, tmp_path: Path) -> None:
    save_official(vae, tmp_path / "Wan2.1_VAE.pth")
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel"}')
    assert same(WanVAE.from_pretrained(tmp_path), vae)


def test_dtype_is_kept_or_changed_on_request(vae: WanVAE, tmp_path: Path) -> None:
    save_file({key: value.half() for key, value in official(vae).items()}, tmp_path / "vae.safetensors")
    assert {value.dtype for value in WanVAE.from_pretrained(tmp_path / "vae.safetensors").state_dict().values()} == {torch.float32}
    half = WanVAE.from_pretrained(tmp_path / "vae.safetensors", dtype=torch.bfloat16)
    assert {value.dtype for value in half.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("lost", ["decoder.middle.1.proj.weight", "encoder.head.2.bias", "conv1.weight"])
def test_a_missing_tensor_is_named(vae: WanVAE, tmp_path: Path, lost: str) -> None:
    state = official(vae)
    del state[lost]
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=f"missing 1 .*{lost}"):
        WanVAE.from_pretrained(tmp_path / "vae.safetensors")


def test_a_tensor_lost_within_a_level_is_named(vae: WanVAE, tmp_path: Path) -> None:
    block = official_names(vae.config)["encoder.levels.1.blocks.0.conv1.weight"]
    state = official(vae)
    del state[block]
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=f"missing 1 .*{block}"):
        WanVAE.from_pretrained(tmp_path / "vae.safetensors")


def test_extra_and_misshapen_tensors_are_named(vae: WanVAE, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_file(official(vae) | {"decoder.extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"unexpected 1 \(decoder\.extra\)"):
        WanVAE.from_pretrained(path)
    save_file(official(vae) | {"decoder.middle.1.proj.bias": torch.zeros(999)}, path)
    with pytest.raises(ValueError, match=r"'decoder\.middle\.attention\.proj\.bias' is \(999,\)"):
        WanVAE.from_pretrained(path)


def test_files_of_other_models_are_refused(tmp_path: Path) -> None:
    save_file({"blocks.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for read in (WanVAE.from_pretrained, describe):
        with pytest.raises(ValueError, match="not a Wan VAE"):
            read(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of use")
    for read in (WanVAE.from_pretrained, describe):
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            read(tmp_path / "broken.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet3D"}')
    with pytest.raises(ValueError, match="UNet3D"):
        WanVAE.from_pretrained(tmp_path)


def test_own_config_is_validated_strictly(tmp_path: Path) -> None:
    fields = {"format": "wan-vae/1", **TINY.model_dump(mode="json")}
    for change, message in (({"z_dimm": 8}, "z_dimm"), ({"z_dim": -1}, "z_dim"), ({"format": "wan-vae/2"}, "wan-vae/1")):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(ValueError, match=message):
            describe(tmp_path)


def test_the_built_in_weights_load_by_name() -> None:
    spec = find_vae("tiny")
    vae = spec.load()
    assert not vae.training
    assert (vae.spec.latent_space, vae.spec.latent_channels, vae.spec.stride) == (spec.latent_space, spec.latent_channels, spec.stride)
    assert next(vae.parameters()).dtype == torch.float32


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A Hub that serves the files in `tmp_path / "repo"` by pattern; the call gives what was fetched since the last one."""
    fetched: list[str] = []

    def snapshot_download(repo: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        (tmp_path / "cache").mkdir(exist_ok=True)
        for file in sorted((tmp_path / "repo").rglob("*.*")):
            name = file.relative_to(tmp_path / "repo").as_posix()
            if any(fnmatch(name, pattern) for pattern in allow_patterns or ["*"]) and not (tmp_path / "cache" / name).exists():
                (tmp_path / "cache" / name).parent.mkdir(exist_ok=True)
                shutil.copy(file, tmp_path / "cache" / name)
                fetched.append(name)
        return str(tmp_path / "cache")

    def since() -> list[str]:
        names = fetched.copy()
        fetched.clear()
        return names

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return since


def other_parts(folder: Path) -> None:
    """What of a video model is no VAE."""
    for name in ("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"many gigabytes")
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-00001-of-00002.safetensors"):
        (folder / name).write_bytes(b"many gigabytes")


@pytest.mark.parametrize("kind", ["ours", "diffusers"])
def test_of_a_vae_on_the_hub_the_facts_need_no_weights(vae: WanVAE, tmp_path: Path, hub: Callable[[], list[str]], kind: str) -> None:
    vae.save_pretrained(tmp_path / "repo") if kind == "ours" else save_diffusers(vae, tmp_path / "repo")
    weights = "model.safetensors" if kind == "ours" else "diffusion_pytorch_model.safetensors"
    assert find_vae("org/repo").stride == vae.spec.stride
    assert hub() == ["config.json"]
    assert same(WanVAE.from_pretrained("org/repo"), vae)
    assert hub() == [weights]


def test_of_a_video_model_on_the_hub_the_vae_alone_is_fetched(vae: WanVAE, tmp_path: Path, hub: Callable[[], list[str]]) -> None:
    other_parts(tmp_path / "repo")
    (tmp_path / "repo" / "config.json").write_text('{"_class_name": "WanModel"}')
    save_official(vae, tmp_path / "repo" / "Wan2.1_VAE.pth")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "diffusion_pytorch_model.safetensors").write_bytes(b"fetched for a transformer")
    assert describe("hub:org/repo").stride == vae.spec.stride
    assert same(find_vae("org/repo").load(), vae)
    assert hub() == ["config.json", "Wan2.1_VAE.pth"]


def test_of_a_diffusers_pipeline_on_the_hub_the_vae_alone_is_fetched(vae: WanVAE, tmp_path: Path, hub: Callable[[], list[str]]) -> None:
    other_parts(tmp_path / "repo")
    (tmp_path / "repo" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    save_diffusers(vae, tmp_path / "repo" / "vae")
    assert describe("hub:org/repo").stride == vae.spec.stride
    assert hub() == ["model_index.json", "vae/config.json"]
    assert same(WanVAE.from_pretrained("hub:org/repo"), vae)
    assert hub() == ["vae/diffusion_pytorch_model.safetensors"]


def test_a_part_knows_the_registered_name_it_was_loaded_by(tmp_path: Path) -> None:
    vae = find_vae("tiny").load()
    assert (vae.name, vae.spec.name) == ("tiny", "tiny")
    vae.save_pretrained(tmp_path / "mine")
    for other in (find_vae(str(tmp_path / "mine")).load(), find_vae("wan_vae.model:WanVAE").load(), vae.reinitialised()):
        assert (other.name, other.spec.name) == (None, "tiny-2")


def test_the_fingerprint_covers_weights_and_statistics(vae: WanVAE, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "saved")
    same, moved = WanVAE.from_pretrained(tmp_path / "saved"), WanVAE.from_pretrained(tmp_path / "saved")
    assert same.fingerprint() == vae.fingerprint()
    moved.config = vae.config.model_copy(update={"latents_mean": (0.1,) * vae.config.z_dim})
    assert moved.fingerprint() != vae.fingerprint()
    with torch.no_grad():
        same.last_layer[0, 0] += 1
    assert same.fingerprint() != vae.fingerprint()
