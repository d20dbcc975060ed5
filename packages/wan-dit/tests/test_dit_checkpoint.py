"""Checkpoint layouts: names, configurations, strict errors, round trips."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_layouts import (
    SMALL,
    VARIANTS,
    State,
    comfy_file,
    diffusers_file,
    diffusers_pipeline,
    model,
    official_config,
    official_folder,
    official_sharded,
    own_folder,
    pickled_file,
    short_prefix_file,
    state_in,
    write,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from wan_dit import config as presets
from wan_dit.checkpoint import HUB_FILES, config_of, describe
from wan_dit.config import TINY, DiTConfig
from wan_dit.layouts import names
from wan_dit.model import WanDiT

IN_DIFFUSERS = {"t2v": SMALL} | {name: config for name, config in VARIANTS.items() if name in ("i2v", "i2v-2.2", "flf2v", "vace", "ti2v")}
LAYOUTS = (own_folder, official_folder, official_sharded, diffusers_pipeline, comfy_file, short_prefix_file, diffusers_file, pickled_file)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_names_are_a_bijection_of_every_tensor(config: DiTConfig, layout: Any) -> None:
    with torch.device("meta"):
        own = set(WanDiT(config).state_dict())
    table = names(config, layout)
    assert set(table) == own
    assert len(set(table.values())) == len(own)


@pytest.mark.parametrize("config", IN_DIFFUSERS.values(), ids=IN_DIFFUSERS)
@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
def test_every_layout_loads_to_the_same_bits(make: Callable[[Path, WanDiT], Path], config: DiTConfig, tmp_path: Path) -> None:
    made = model(config)
    path = make(tmp_path / "checkpoint", made)
    again = WanDiT.from_pretrained(path)
    assert again.config == made.config
    assert again.fingerprint() == made.fingerprint()
    spec = describe(path)
    assert (spec.name, spec.weights) == (str(path), str(path))
    assert spec == again.config.spec(spec.name, weights=spec.weights)


@pytest.mark.parametrize("name", ["fun-camera", "fun-control"])
@pytest.mark.parametrize("make", [own_folder, official_folder, comfy_file], ids=lambda make: make.__name__)
def test_fun_parts_are_told_by_their_tensors(make: Callable[[Path, WanDiT], Path], name: str, tmp_path: Path) -> None:
    made = model(VARIANTS[name])
    again = WanDiT.from_pretrained(make(tmp_path / "checkpoint", made))
    assert again.config == made.config
    assert again.fingerprint() == made.fingerprint()


RELEASED = (  # name, changes to the preset, parameters and tensors of the official classes
    ("T2V_1_3B", {}, 1_418_996_800, 825),
    ("T2V_14B", {}, 14_288_491_584, 1095),
    ("I2V_14B", {}, 16_394_878_784, 1303),
    ("FLF2V_14B", {}, 16_395_536_704, 1304),
    ("I2V_A14B", {}, 14_288_901_184, 1095),
    ("TI2V_5B", {}, 4_999_787_712, 825),
    ("VACE_1_3B", {}, 2_153_972_032, 1264),
    ("VACE_14B", {}, 17_337_592_896, 1331),
    ("T2V_1_3B", {"in_dim": 36, "image_dim": 1280}, 1_564_428_608, None),
    ("T2V_1_3B", {"in_dim": 48, "image_dim": 1280}, 1_564_502_336, None),
    ("T2V_1_3B", {"in_dim": 48, "image_dim": 1280, "ref_dim": 16}, 1_564_602_176, None),
    ("T2V_1_3B", {"in_dim": 32, "image_dim": 1280, "camera_dim": 24}, 1_616_313_152, None),
    ("I2V_14B", {"in_dim": 48}, 16_395_124_544, None),
    ("I2V_14B", {"in_dim": 48, "ref_dim": 16}, 16_395_457_344, None),
    ("I2V_14B", {"in_dim": 32, "camera_dim": 24}, 16_898_128_704, None),
    ("T2V_14B", {"in_dim": 52, "ref_dim": 16}, 14_289_561_664, None),
    ("T2V_14B", {"in_dim": 36, "camera_dim": 24}, 14_792_233_024, None),
)


@pytest.mark.parametrize(("name", "changes", "parameters", "tensors"), RELEASED)
def test_counts_are_those_of_the_released_models(name: str, changes: dict[str, Any], parameters: int, tensors: int | None) -> None:
    with torch.device("meta"):
        state = WanDiT(DiTConfig(**{**getattr(presets, name).model_dump(), **changes})).state_dict()
    assert sum(value.numel() for value in state.values()) == parameters
    assert tensors is None or len(state) == tensors


@pytest.mark.parametrize("name", ["T2V_14B", "I2V_14B", "FLF2V_14B", "I2V_A14B", "TI2V_5B", "VACE_1_3B", "VACE_14B"])
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_released_model_is_told_by_its_shapes(name: str, layout: Any, tmp_path: Path) -> None:
    config = getattr(presets, name)
    with torch.device("meta"):
        state = state_in(WanDiT(config), layout)
    assert config_of(tmp_path / "file.safetensors", {key: tuple(value.shape) for key, value in state.items()}) == config


def test_an_index_alone_tells_i2v_of_21_from_22(tmp_path: Path) -> None:
    for config in (presets.I2V_14B, presets.I2V_A14B, presets.FLF2V_14B):
        written = {**official_config(config), "model_type": "i2v", "text_dim": 4096}
        (tmp_path / "config.json").write_text(json.dumps(written))
        index = {"weight_map": dict.fromkeys(names(config, "official").values(), "a.safetensors")}
        (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        found = describe(tmp_path)
        assert found == config.spec(found.name, weights=found.weights)


def test_describe_reads_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"format": "wan-dit/1", **TINY.model_dump(mode="json")}))
    assert describe(tmp_path).latent_space == "tiny-2"


def test_the_built_in_model_is_what_the_plugin_lists() -> None:
    made = WanDiT.from_pretrained("pkg:wan_dit/weights/tiny")
    assert made.config == TINY
    assert made.head.proj.weight.abs().max() > 0


def test_a_saved_folder_has_official_names_and_our_config(tmp_path: Path) -> None:
    made = model()
    made.save_pretrained(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(names(SMALL, "official").values())
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (written.pop("format"), list(written.pop("sha256"))) == ("wan-dit/1", ["model.safetensors"])
    assert DiTConfig.model_validate(written) == SMALL


@pytest.mark.parametrize(
    ("channels", "text_dim", "expected"),
    [
        (16, 4096, ("wan2.1", (4, 8, 8), "umt5-xxl")),
        (48, 12, ("wan2.2", (4, 16, 16), "unknown")),
        (8, 12, ("unknown", (4, 8, 8), "unknown")),
    ],
)
def test_spaces_follow_from_channels_and_text_width(channels: int, text_dim: int, expected: tuple[Any, ...], tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"in_dim": channels, "out_dim": channels, "text_dim": text_dim})
    spec = describe(official_folder(tmp_path, model(config)))
    assert (spec.latent_space, spec.stride, spec.embedding_space) == expected


def drop(state: State) -> None:
    del state["blocks.1.ffn.0.bias"]


def add(state: State) -> None:
    state["blocks.0.extra.weight"] = torch.zeros(2)


def misshape(state: State) -> None:
    state["blocks.1.ffn.2.weight"] = torch.zeros(128, 41)


def image_branch(state: State) -> None:
    state["img_emb.proj.0.weight"] = torch.zeros(4)


def vace_alone(state: State) -> None:
    state.clear()
    state["vace_blocks.0.before_proj.weight"] = torch.zeros(4, 4)


def animate(state: State) -> None:
    state["pose_patch_embedding.weight"] = torch.zeros(4)


def scaled(state: State) -> None:
    state["blocks.0.self_attn.q.scale_weight"] = torch.full((1,), 2.0)


def nothing_known(state: State) -> None:
    state.clear()
    state["encoder.weight"] = torch.zeros(1)


DEFECTS = (
    (drop, r"missing 1 \(blocks\.1\.ffn\.0\.bias\)"),
    (add, r"unexpected 1 \(blocks\.0\.extra\.weight\)"),
    (misshape, r"trunk\.blocks\.1\.ffn\.2\.weight' is \(128, 41\), expected \(128, 40\)"),
    (image_branch, r"missing 17 \(blocks\.0\.cross_attn\.k_img\.bias"),
    (vace_alone, r"holds VACE blocks alone"),
    (animate, r"pose_patch_embedding\.weight': Wan2.2 Animate is not supported yet"),
    (scaled, r"scale_weight' is the scale of a weight in torch.float32, expected one in float8 or int8"),
    (nothing_known, r"no Wan backbone.*encoder\.weight"),
)


@pytest.mark.parametrize(("damage", "message"), DEFECTS, ids=[damage.__name__ for damage, _ in DEFECTS])
@pytest.mark.parametrize("with_config", [True, False], ids=["folder", "file"])
def test_what_does_not_fit_is_named(damage: Callable[[State], None], message: str, with_config: bool, tmp_path: Path) -> None:
    state = state_in(model(), "official")
    damage(state)
    folder = write(tmp_path, state, official_config(SMALL) if with_config else None)
    with pytest.raises(ValueError, match=message):
        WanDiT.from_pretrained(folder)


WRONG_CONFIGS = (
    ({"format": "wan-vae/1"}, "says 'wan-vae/1', expected one of 'wan-dit/1'"),
    ({"format": "wan-dit/1", **SMALL.model_dump(), "num_heads": "many"}, "num_heads: Input should be a valid integer"),
    ({"format": "wan-dit/1", **SMALL.model_dump(), "surprise": 1}, "surprise: Extra inputs are not permitted"),
    ({**official_config(SMALL), "model_type": "animate"}, "model_type 'animate' is not supported yet"),
    ({**official_config(SMALL), "window_size": [8, 8]}, "attend globally"),
    ({**official_config(SMALL), "vace_layers": [0, 2]}, "vace_layers must be rising numbers of blocks below 2"),
)


@pytest.mark.parametrize(("written", "message"), WRONG_CONFIGS, ids=[message[:30] for _, message in WRONG_CONFIGS])
def test_a_config_that_does_not_fit_is_named(written: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, state_in(model(), "official"), written)
    with pytest.raises(ValueError, match=message):
        describe(tmp_path)


def test_two_experts_are_told_apart(tmp_path: Path) -> None:
    official_folder(tmp_path / "high_noise_model", model())
    official_folder(tmp_path / "low_noise_model", model(seed=1))
    with pytest.raises(ValueError, match=r"two experts: give .*high_noise_model' or .*low_noise_model'"):
        WanDiT.from_pretrained(tmp_path)
    assert WanDiT.from_pretrained(tmp_path / "low_noise_model").fingerprint() != model().fingerprint()


def test_only_the_transformer_is_fetched_from_the_hub() -> None:
    official = ("config.json", "diffusion_pytorch_model-00001-of-00006.safetensors", "diffusion_pytorch_model.safetensors.index.json")
    diffusers = ("model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors")
    others = (
        *("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "assets/logo.png", "google/umt5-xxl/spiece.model", "README.md"),
        *("vae/diffusion_pytorch_model.safetensors", "text_encoder/model-00001-of-00005.safetensors", "text_encoder/config.json"),
    )
    fetched = set(filter_repo_objects([*official, *diffusers, *others, "model.safetensors"], allow_patterns=list(HUB_FILES)))
    assert fetched == {*official, *diffusers, "model.safetensors"}
