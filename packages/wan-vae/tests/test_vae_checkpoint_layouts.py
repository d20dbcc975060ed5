"""Every layout of the published models in small: precisions, prefixes, shards, whole-model files; and what is no whole Wan VAE."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_vae.checkpoint import describe, infer_config, save_diffusers, save_official
from wan_vae.config import PRESETS, WAN21, VAEConfig
from wan_vae.model import WanVAE
from wan_vae.names import diffusers_names, official_names
from wan_vae.plugins import find_vae
from wan_vae.testing import randomise

SMALL = {  # the published shapes at a 24th and a 40th of their width
    "2.1": VAEConfig(base_dim=4, decoder_base_dim=4, z_dim=16, dim_mult=(1, 2, 4, 4), temporal_downsample=(False, True, True),
                     latent_space="unknown"),
    "2.2": VAEConfig(base_dim=4, decoder_base_dim=8, z_dim=48, dim_mult=(1, 2, 4, 4), temporal_downsample=(False, True, True),
                     residual=True, patch_size=2, latent_space="unknown"),
}  # fmt: skip
Saved = Callable[[dict[str, Tensor]], Path]


@pytest.fixture(scope="module", params=SMALL)
def vae(request: pytest.FixtureRequest) -> WanVAE:
    vae = WanVAE(SMALL[request.param]).eval()
    randomise(vae)
    return vae


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    def save(state: dict[str, Tensor]) -> Path:
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "vae.safetensors")
        return tmp_path / "vae.safetensors"

    return save


def official(vae: WanVAE) -> dict[str, Tensor]:
    return {official_names(vae.config)[key]: value.clone() for key, value in vae.state_dict().items()}


def loads_as(path: Path, vae: WanVAE, dtype: torch.dtype = torch.float32) -> bool:
    back = WanVAE.from_pretrained(path)
    assert back.config == vae.config
    assert describe(path) == vae.spec
    assert find_vae(str(path)).load().config == vae.config
    expected = {key: value.to(dtype).float() for key, value in vae.state_dict().items()}
    return all(torch.equal(value, expected[key]) for key, value in back.state_dict().items())


def published_names(version: str) -> Iterator[str]:
    """The official names, written down from the published models and not from the tables."""
    for half, down, count, with_shortcut in (("encoder", "down", 2, (1, 2)), ("decoder", "up", 3, {"2.1": (1,), "2.2": (2, 3)}[version])):
        yield from (f"{half}.{name}" for name in ("conv1.weight", "conv1.bias", "head.0.gamma", "head.2.weight", "head.2.bias"))
        yield from (f"{half}.middle.1.{name}" for name in ("norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias"))
        blocks = [(f"{half}.middle.{i}", False) for i in (0, 2)]
        for level in range(4):
            for i in range(count + (level < 3)):
                name = (
                    f"{half}.{down}samples.{level}.{down}samples.{i}"
                    if version == "2.2"
                    else f"{half}.{down}samples.{level * (count + 1) + i}"
                )
                if i < count:
                    blocks.append((name, i == 0 and level in with_shortcut))
                    continue
                timed = level in ((1, 2) if half == "encoder" else (0, 1))
                parts = ("resample.1", "time_conv") if timed else ("resample.1",)
                yield from (f"{name}.{part}.{leaf}" for part in parts for leaf in ("weight", "bias"))
        for name, shortcut in blocks:
            yield from (f"{name}.residual.{i}.gamma" for i in (0, 3))
            convs = ("residual.2", "residual.6", "shortcut") if shortcut else ("residual.2", "residual.6")
            yield from (f"{name}.{conv}.{leaf}" for conv in convs for leaf in ("weight", "bias"))
    yield from (f"{name}.{leaf}" for name in ("conv1", "conv2") for leaf in ("weight", "bias"))


@pytest.mark.parametrize(("version", "count"), [("2.1", 194), ("2.2", 196)])
def test_the_names_of_the_published_files(version: str, count: int) -> None:
    names = list(published_names(version))
    assert len(names) == len(set(names)) == count
    assert set(official_names(PRESETS[f"wan{version}"]).values()) == set(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_repackaged_files_in_every_precision(vae: WanVAE, saved: Saved, dtype: torch.dtype) -> None:
    assert loads_as(saved({key: value.to(dtype) for key, value in official(vae).items()}), vae, dtype)


@pytest.mark.parametrize("prefix", ["model.", "vae.", "first_stage_model.", "model.vae.", "first_stage_model.model.", "model_state.model."])
def test_prefixes_and_their_combinations(vae: WanVAE, saved: Saved, prefix: str) -> None:
    assert loads_as(saved({prefix + key: value for key, value in official(vae).items()}), vae)


@pytest.mark.parametrize("containers", [("model_state",), ("state_dict",), ("model",)])
def test_pickles_with_a_container_and_a_prefix(vae: WanVAE, tmp_path: Path, containers: tuple[str, ...]) -> None:
    state = {f"model.{key}": value for key, value in official(vae).items()}
    for container in containers:
        state = {container: state, "epoch": 3}
    torch.save(state, tmp_path / "vae.pth")
    assert loads_as(tmp_path / "vae.pth", vae)


def test_of_a_file_with_a_whole_video_model_the_vae_is_taken(vae: WanVAE, saved: Saved) -> None:
    others = {"model.diffusion_model.patch_embedding.weight": torch.zeros(2), "text_encoders.umt5xxl.shared.weight": torch.zeros(2)}
    assert loads_as(saved({f"vae.{key}": value for key, value in official(vae).items()} | others), vae)
    with pytest.raises(ValueError, match="holds a diffusion transformer"):
        WanVAE.from_pretrained(saved(others))


def test_diffusers_names_in_one_file_without_a_config(vae: WanVAE, saved: Saved) -> None:
    assert loads_as(saved({diffusers_names(vae.config)[key]: value for key, value in vae.state_dict().items()}), vae)


def test_an_official_file_beside_a_config_of_diffusers(vae: WanVAE, saved: Saved, tmp_path: Path) -> None:
    save_diffusers(vae, tmp_path)
    assert loads_as(saved(official(vae)), vae)


def shard(vae: WanVAE, folder: Path) -> None:
    """A diffusers folder with its weights in three files."""
    save_diffusers(vae, folder)
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    files = {key: f"diffusion_pytorch_model-0000{i % 3 + 1}-of-00003.safetensors" for i, key in enumerate(sorted(state))}
    for file in sorted(set(files.values())):
        save_file({key: state[key] for key in state if files[key] == file}, folder / file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def test_shards_with_an_index(vae: WanVAE, tmp_path: Path) -> None:
    shard(vae, tmp_path)
    save_file({"stale": torch.zeros(1)}, tmp_path / "left-over.safetensors")
    assert loads_as(tmp_path, vae)
    assert loads_as(tmp_path / "diffusion_pytorch_model.safetensors.index.json", vae)
    (tmp_path / "config.json").unlink()
    assert loads_as(tmp_path, vae)
    (tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    for read in (WanVAE.from_pretrained, describe):
        with pytest.raises(FileNotFoundError, match="is not complete: there is no 'diffusion_pytorch_model-00002-of-00003"):
            read(tmp_path)


def test_the_pruned_model_of_lightx2v_is_read_with_the_statistics_of_wan21(tmp_path: Path) -> None:
    pruned = WanVAE(WAN21.model_copy(update={"base_dim": 24, "decoder_base_dim": 24}))
    save_file({key: value.bfloat16() for key, value in official(pruned).items()}, tmp_path / "lightvaew2_1.safetensors")
    back = WanVAE.from_pretrained(tmp_path / "lightvaew2_1.safetensors")
    assert back.config == pruned.config
    assert (back.spec.latent_space, back.config.latents_mean) == ("wan2.1", WAN21.latents_mean)
    assert describe(tmp_path / "lightvaew2_1.safetensors").parameters == sum(parameter.numel() for parameter in pruned.parameters())


def refused(path: Path, message: str, *, described: bool = True) -> None:
    for read in (WanVAE.from_pretrained, *([describe] if described else [])):
        with pytest.raises(ValueError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_mixed_types_are_named(vae: WanVAE, saved: Saved) -> None:
    refused(saved(official(vae) | {"conv1.bias": official(vae)["conv1.bias"].half()}), r"mixes types: .* fp32 and 1 fp16 \(conv1\.bias\)")


def test_our_folder_may_mix_types_by_half_and_an_export_does_not(vae: WanVAE, tmp_path: Path) -> None:
    mixed = WanVAE(vae.config).eval().set_precision(decode=torch.bfloat16)
    mixed.save_pretrained(tmp_path / "ours")
    assert loads_as(tmp_path / "ours", mixed)
    save_official(mixed, tmp_path / "vae.pth")
    assert loads_as(tmp_path / "vae.pth", mixed)
    save_diffusers(mixed, tmp_path / "theirs")
    assert loads_as(tmp_path / "theirs", mixed)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_one_half_alone_says_so(vae: WanVAE, saved: Saved, half: str) -> None:
    top = {"encoder": "conv1.", "decoder": "conv2."}[half]
    part = {key: value for key, value in official(vae).items() if key.startswith((f"{half}.", top))}
    refused(saved(part), f"holds the {half} of a Wan VAE alone")


def test_scaled_and_quantised_weights_are_refused(vae: WanVAE, saved: Saved) -> None:
    name = "decoder.conv1.weight"
    refused(saved(official(vae) | {name: torch.zeros(2, dtype=torch.float8_e4m3fn)}), f"'{name}' is float8_e4m3fn")
    refused(saved(official(vae) | {name: torch.zeros(2, dtype=torch.int8)}), f"scaled or quantised weights \\('{name}'")
    refused(saved(official(vae) | {"decoder.conv1.scale_weight": torch.ones(1)}), r"'decoder\.conv1\.scale_weight'")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(vae: WanVAE, saved: Saved, value: float) -> None:
    state = official(vae)
    state["encoder.head.2.weight"].view(-1)[7] = value
    refused(saved(state), r"'encoder\.head\.2\.weight' holds NaN or infinity", described=False)


def test_large_finite_weights_are_not_taken_for_infinity(vae: WanVAE, saved: Saved) -> None:
    state = official(vae)
    state["encoder.head.2.weight"].fill_(3e38)
    assert WanVAE.from_pretrained(saved(state)).config == vae.config


class Code:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def test_pickles_with_code_are_refused_and_not_run(vae: WanVAE, tmp_path: Path) -> None:
    torch.save({"state_dict": official(vae), "extra": Code(tmp_path / "ran")}, tmp_path / "vae.pth")
    refused(tmp_path / "vae.pth", "holds code or other objects beside tensors")
    assert not (tmp_path / "ran").exists()


def test_pickles_without_tensors_are_refused(vae: WanVAE, tmp_path: Path) -> None:
    for content, message in (
        (torch.zeros(3), "expected a state_dict"),
        ([1, 2], "expected a state_dict"),
        (official(vae) | {"epoch": 3}, "'epoch', which is not a tensor"),
    ):
        torch.save(content, tmp_path / "vae.pth")
        refused(tmp_path / "vae.pth", message)


OTHERS = {
    "a diffusion transformer": ("patch_embedding.weight", "blocks.0.self_attn.q.weight", "head.head.weight"),
    "a diffusion transformer;": ("model.diffusion_model.blocks.0.self_attn.q.weight",),
    "a text encoder": ("token_embedding.weight", "blocks.0.attn.q.weight", "norm.weight"),
    "a text encoder; wan-text reads it": ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    "an image encoder": ("visual.patch_embedding.weight", "textual.norm.weight"),
    "a LoRA": ("lora_unet_blocks_0_self_attn_q.lora_down.weight",),
    "a LoRA,": ("diffusion_model.blocks.0.self_attn.q.lora_A.weight",),
    "an image VAE": ("encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight"),
    "a tiny image autoencoder": ("encoder.1.conv.0.weight", "decoder.3.conv.0.weight"),
    "neither 'encoder.conv1.weight'": ("something.else",),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_model_says_what_it_is(saved: Saved, kind: str) -> None:
    refused(saved({name: torch.zeros(1) for name in OTHERS[kind]}), f"is not a Wan VAE: .*{kind}")


def test_an_image_vae_in_the_same_names_is_told_by_its_shapes() -> None:
    shapes = {"encoder.conv_in.weight": (128, 3, 3, 3), "encoder.down_blocks.0.resnets.0.conv1.weight": (128, 128, 3, 3)}
    with pytest.raises(ValueError, match="an image VAE"):
        infer_config(shapes)


def test_a_latent_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    save_file({"latents": torch.zeros(1, 16, 2, 2)}, tmp_path / "film.safetensors", metadata={"format": "wan-vae-latents/1"})
    refused(tmp_path / "film.safetensors", "is a latent file, not a checkpoint: `wan-vae decode`")


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"_class_name": "WanTransformer3DModel"}, "WanTransformer3DModel"),
        ({"format": "wan-text/1"}, "wan-text/1"),
        ({"model_type": "umt5"}, "umt5"),
    ],
)
def test_a_folder_of_another_model_says_what_it_is(tmp_path: Path, fields: dict[str, str], found: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path, f"is of a {found}, expected format wan-vae/1 or AutoencoderKLWan")
