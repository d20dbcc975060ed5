"""Checkpoint layouts: names, configurations, strict errors, round trips."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from wan_dit import config as presets
from wan_dit.checkpoint import HUB_FILES, config_of, describe
from wan_dit.config import T2V_1_3B, T2V_14B, TINY, DiTConfig
from wan_dit.layouts import DIFFUSERS_FIELDS, names
from wan_dit.model import WanDiT

SMALL = DiTConfig(
    dim=128, ffn_dim=40, freq_dim=16, text_dim=12, num_heads=1, num_layers=2, latent_space="wan2.1", embedding_space="unknown"
)
VARIANTS = {
    "tiny": TINY,
    "t2v-1.3b": T2V_1_3B,
    "t2v-14b": T2V_14B,
    "no-qk-norm": SMALL.model_copy(update={"qk_norm": False}),
    "no-cross-norm": SMALL.model_copy(update={"cross_attn_norm": False}),
    "i2v": SMALL.model_copy(update={"in_dim": 36, "image_dim": 20}),
    "i2v-2.2": SMALL.model_copy(update={"in_dim": 36}),
    "flf2v": SMALL.model_copy(update={"in_dim": 36, "image_dim": 20, "pos_embed_seq_len": 514}),
    "vace": SMALL.model_copy(update={"vace_layers": (0, 1)}),
    "ti2v": SMALL.model_copy(update={"in_dim": 48, "out_dim": 48, "latent_space": "wan2.2", "stride": (4, 16, 16)}),
    "fun-camera": SMALL.model_copy(update={"in_dim": 32, "image_dim": 20, "camera_dim": 24}),
    "fun-control": SMALL.model_copy(update={"in_dim": 48, "image_dim": 20, "ref_dim": 16}),
}
IN_DIFFUSERS = {"t2v": SMALL} | {name: config for name, config in VARIANTS.items() if name in ("i2v", "i2v-2.2", "flf2v", "vace", "ti2v")}
State = dict[str, torch.Tensor]


def model(config: DiTConfig = SMALL, seed: int = 0) -> WanDiT:
    made = WanDiT(config)
    made.init_weights(torch.Generator().manual_seed(seed))
    torch.nn.init.normal_(made.head.proj.weight, std=0.1)
    return made.eval()


def state_in(made: WanDiT, layout: Any) -> State:
    table = names(made.config, layout)
    return {table[key]: value for key, value in made.state_dict().items()}


def official_config(config: DiTConfig) -> dict[str, Any]:
    """What official folders write: neither the patch, the text width nor the norms."""
    fields = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "text_len")
    return {"_class_name": "WanModel", "model_type": "t2v", "text_dim": config.text_dim, **{name: getattr(config, name) for name in fields}}


def diffusers_config(config: DiTConfig) -> dict[str, Any]:
    fields = {theirs: getattr(config, own) for own, theirs in DIFFUSERS_FIELDS.items()}
    kind = "WanVACETransformer3DModel" if config.vace_layers else "WanTransformer3DModel"
    return {"_class_name": kind, "attention_head_dim": config.head_dim, **fields}


def write(folder: Path, state: State, config: dict[str, Any] | None = None, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def own_folder(folder: Path, made: WanDiT) -> Path:
    made.save_pretrained(folder)
    return folder


def official_folder(folder: Path, made: WanDiT) -> Path:
    return write(folder, state_in(made, "official"), official_config(made.config), "diffusion_pytorch_model.safetensors")


def official_sharded(folder: Path, made: WanDiT) -> Path:
    state = state_in(made, "official")
    shards = [f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    index = {key: shards[i % 2] for i, key in enumerate(state)}
    for shard in shards:
        write(folder, {key: value for key, value in state.items() if index[key] == shard}, official_config(made.config), shard)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def diffusers_pipeline(folder: Path, made: WanDiT) -> Path:
    write(folder / "transformer", state_in(made, "diffusers"), diffusers_config(made.config), "diffusion_pytorch_model.safetensors")
    (folder / "model_index.json").write_text("{}")
    return folder


def comfy_file(folder: Path, made: WanDiT) -> Path:
    prefixed = {f"model.diffusion_model.{key}": value for key, value in state_in(made, "official").items()}
    return write(folder, prefixed, name="wan.safetensors") / "wan.safetensors"


def short_prefix_file(folder: Path, made: WanDiT) -> Path:
    prefixed = {f"diffusion_model.{key}": value for key, value in state_in(made, "official").items()}
    return write(folder, prefixed, name="wan.safetensors") / "wan.safetensors"


def diffusers_file(folder: Path, made: WanDiT) -> Path:
    return write(folder, state_in(made, "diffusers"), name="wan.safetensors") / "wan.safetensors"


def pickled_file(folder: Path, made: WanDiT) -> Path:
    folder.mkdir()
    torch.save({"state_dict": state_in(made, "official")}, folder / "wan.pth")
    return folder / "wan.pth"


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
    assert describe(tmp_path).latent_space == "tiny-1"


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
