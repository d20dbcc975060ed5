"""Whole models on disk: which files are found, which model they are, and what is asked where that is not told."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from wan_dit.checkpoint import read_checkpoint
from wan_dit.config import FLF2V_14B, I2V_14B, I2V_A14B, T2V_1_3B, T2V_14B, TI2V_5B, VACE_14B, DiTConfig
from wan_dit.layouts import DIFFUSERS_FIELDS, names
from wan_dit.model import WanDiT
from wan_dit.plugins import plugin_manager
from wan_dit.sources import FoundModel, open_model

T5, CLIP = "models_t5_umt5-xxl-enc-bf16.pth", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def opened(path: Path, preset: str | None = None, **options: Any) -> FoundModel:
    return open_model(path, preset, plugin_manager(), **options)


def sparse(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A safetensors file of these bf16 tensors whose numbers are a hole in it: it takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)
    return file


def backbone(file: Path, config: DiTConfig, layout: Any = "official") -> Path:
    with torch.device("meta"):
        state = WanDiT(config).state_dict()
    return sparse(file, {theirs: tuple(state[own].shape) for own, theirs in names(config, layout).items()})


def touch(root: Path, *files: str) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def release(root: Path, config: DiTConfig, *files: str) -> Path:
    """An official folder: its config.json tells neither a CLIP branch nor a patch."""
    backbone(root / WEIGHTS, config)
    fields = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "text_len")
    (root / "config.json").write_text(json.dumps({"_class_name": "WanModel", **{name: getattr(config, name) for name in fields}}))
    touch(root, *files)
    return root


def pipeline_folder(root: Path, config: DiTConfig, kind: str = "WanPipeline", *, experts: int = 1, **index: Any) -> Path:
    fields = {theirs: getattr(config, own) for own, theirs in DIFFUSERS_FIELDS.items()}
    for name in ("transformer", "transformer_2")[:experts]:
        (root / name).mkdir(parents=True)
        written = {"_class_name": "WanTransformer3DModel", "attention_head_dim": config.head_dim, **fields}
        (root / name / "config.json").write_text(json.dumps(written))
        index[name] = ["diffusers", "WanTransformer3DModel"]
    touch(root, "vae/config.json", "text_encoder/config.json", "tokenizer/spiece.model")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}))
    (root / "model_index.json").write_text(json.dumps({"_class_name": kind, **index}))
    return root


SHARED = (T5, "google/umt5-xxl/spiece.model")
RELEASES = (  # folder, its backbone, other files, model, parts but backbone and text encoder
    ("Wan2.1-T2V-1.3B", T2V_1_3B, (*SHARED, "Wan2.1_VAE.pth"), "wan2.1-t2v-1.3b", {"vae"}),
    ("Wan2.1-T2V-14B", T2V_14B, (*SHARED, "Wan2.1_VAE.pth"), "wan2.1-t2v-14b", {"vae"}),
    ("Wan2.1-I2V-14B-480P", I2V_14B, (*SHARED, "Wan2.1_VAE.pth", CLIP), "wan2.1-i2v-14b-480p", {"vae", "image_encoder"}),
    ("Wan2.1-I2V-14B-720P", I2V_14B, (*SHARED, "Wan2.1_VAE.pth", CLIP), "wan2.1-i2v-14b-720p", {"vae", "image_encoder"}),
    ("whatever", FLF2V_14B, (*SHARED, "Wan2.1_VAE.pth", CLIP), "wan2.1-flf2v-14b", {"vae", "image_encoder"}),
    ("whatever", VACE_14B, (*SHARED, "Wan2.1_VAE.pth"), "wan2.1-vace-14b", {"vae"}),
    ("whatever", TI2V_5B, (*SHARED, "Wan2.2_VAE.pth"), "wan2.2-ti2v-5b", {"vae"}),
)


@pytest.mark.parametrize(("name", "config", "files", "model", "parts"), RELEASES)
def test_official_releases(name: str, config: DiTConfig, files: tuple[str, ...], model: str, parts: set[str], tmp_path: Path) -> None:
    root = release(tmp_path / name, config, *files)
    if config == VACE_14B:
        written = json.loads((root / "config.json").read_text())
        (root / "config.json").write_text(json.dumps({**written, "_class_name": "VaceWanModel", "vace_layers": config.vace_layers}))
    found = opened(root)
    assert found.model.name == model
    assert set(found.parts) == {"backbone", "text_encoder", *parts}
    assert found.parts["backbone"] == found.parts["text_encoder"] == str(root)
    assert found.parts["vae"] == str(root / next(file for file in files if "VAE" in file))
    assert found.notes[0] == f"model: an official release, used with the settings of {model}"


@pytest.mark.parametrize(("config", "model"), [(T2V_14B, "wan2.2-t2v-a14b"), (I2V_A14B, "wan2.2-i2v-a14b")])
def test_two_experts_of_a_release(config: DiTConfig, model: str, tmp_path: Path) -> None:
    for name in ("high_noise_model", "low_noise_model"):
        release(tmp_path / name, config)
    touch(tmp_path, *SHARED, "Wan2.1_VAE.pth")
    found = opened(tmp_path)
    assert found.model.name == model
    assert found.parts["backbone"] == str(tmp_path / "high_noise_model")
    assert found.parts["low_noise_backbone"] == str(tmp_path / "low_noise_model")
    assert "image_encoder" not in found.parts


def test_half_a_release_is_refused(tmp_path: Path) -> None:
    release(tmp_path / "high_noise_model", T2V_14B)
    with pytest.raises(ValueError, match="one expert of two: 'low_noise_model' is missing"):
        opened(tmp_path)
    release(tmp_path / "low_noise_model", I2V_A14B)
    with pytest.raises(ValueError, match="experts of different models: in_dim 16 and 36"):
        opened(tmp_path)


def test_what_shapes_leave_open_is_asked(tmp_path: Path) -> None:
    root = release(tmp_path / "mine", I2V_14B)
    with pytest.raises(ValueError, match=r"--preset NAME\): wan2.1-i2v-14b-480p, wan2.1-i2v-14b-720p$"):
        opened(root)
    assert opened(root, "wan2.1-i2v-14b-720p").model.name == "wan2.1-i2v-14b-720p"
    with pytest.raises(ValueError, match=r"'wan2.2-i2v-a14b' has two experts"):
        opened(root, "wan2.2-i2v-a14b")
    with pytest.raises(ValueError, match=r"several models have the shapes of .*: wan2.1-t2v-14b, wan2.1-t2i-14b$"):
        opened(release(tmp_path / "other", T2V_14B))
    with pytest.raises(ValueError, match=r"one expert of wan2.2-t2v-a14b"):
        opened(release(tmp_path / "Wan2.2-T2V-A14B", T2V_14B))
    with pytest.raises(ValueError, match=r"no installed model has the shapes of"):
        opened(release(tmp_path / "small", T2V_1_3B.model_copy(update={"num_layers": 2})))


def test_a_diffusers_pipeline_folder(tmp_path: Path) -> None:
    found = opened(pipeline_folder(tmp_path / "Wan2.2-T2V-A14B-Diffusers", T2V_14B, experts=2, boundary_ratio=0.8))
    root = tmp_path / "Wan2.2-T2V-A14B-Diffusers"
    assert found.parts == {
        "backbone": str(root / "transformer"),
        "low_noise_backbone": str(root / "transformer_2"),
        "vae": str(root / "vae"),
        "text_encoder": str(root / "text_encoder"),
    }
    assert (found.model.name, found.model.boundary, found.model.shift) == ("wan2.2-t2v-a14b", 0.8, 12.0)
    assert "scheduler: shift 3 in scheduler_config.json, the model's official shift 12 is used" in found.notes
    assert "boundary: 0.8 of model_index.json is used, the model's official one is 0.875" in found.notes


def test_what_a_pipeline_folder_lacks_is_told(tmp_path: Path) -> None:
    root = pipeline_folder(tmp_path / "p", FLF2V_14B, "WanImageToVideoPipeline", image_encoder=["transformers", "CLIPVisionModel"])
    notes = opened(root).notes
    assert "image_encoder: model_index.json lists 'image_encoder', which is missing" in notes
    assert f"image_encoder: none in '{root}', the model's own is used (wan-text:clip-vit-h-14)" in notes
    broken = pipeline_folder(tmp_path / "q", T2V_14B, transformer_2=["diffusers", "WanTransformer3DModel"])
    with pytest.raises(ValueError, match="its 'transformer_2' folder is missing"):
        opened(broken)


COMFY_PAIRS = (
    ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"),
    ("Wan2_2-T2V-A14B_HIGH_bf16.safetensors", "Wan2_2-T2V-A14B_LOW_bf16.safetensors"),
    ("HighNoise/Wan2.2-T2V-A14B-HighNoise-BF16.safetensors", "LowNoise/Wan2.2-T2V-A14B-LowNoise-BF16.safetensors"),
)


@pytest.mark.parametrize("files", COMFY_PAIRS)
@pytest.mark.parametrize("folder", ["diffusion_models", "unet"])
def test_a_pair_in_a_comfy_tree(files: tuple[str, str], folder: str, tmp_path: Path) -> None:
    high, low = (backbone(tmp_path / "models" / folder / name, T2V_14B) for name in files)
    for path in (tmp_path, tmp_path / "models", high, low):
        found = opened(path)
        assert found.model.name == "wan2.2-t2v-a14b"
        assert found.parts == {"backbone": str(high), "low_noise_backbone": str(low)}
    low.unlink()
    with pytest.raises(ValueError, match="one expert of two, the low-noise one is missing"):
        opened(tmp_path)


def test_several_models_in_a_comfy_tree_are_listed(tmp_path: Path) -> None:
    i2v = backbone(tmp_path / "diffusion_models" / "wan2.1_i2v_480p_14B_fp16.safetensors", I2V_14B)
    t2v = backbone(tmp_path / "diffusion_models" / "Wan2_1-T2V-1_3B_bf16.safetensors", T2V_1_3B)
    sparse(tmp_path / "diffusion_models" / "flux1-dev.safetensors", {"img_in.weight": (4, 4)})
    with pytest.raises(ValueError, match=f"several models.*{re.escape(t2v.name)}.*{re.escape(i2v.name)}"):
        opened(tmp_path)
    assert opened(i2v).model.name == "wan2.1-i2v-14b-480p"
    assert opened(tmp_path, "wan2.1-t2v-1.3b").parts["backbone"] == str(t2v)
    with pytest.raises(ValueError, match=r"no Wan backbone that fits wan2.1-vace-14b"):
        opened(tmp_path, "wan2.1-vace-14b")


def comfy_parts(root: Path) -> tuple[Path, Path]:
    """The VAE of Wan2.1 and umT5-XXL under names that say nothing, beside files of other models."""
    from wan_text.config import XXL
    from wan_text.layouts import HUGGING_FACE, OWN, table
    from wan_text.umt5 import UMT5Encoder
    from wan_vae.config import WAN21
    from wan_vae.model import WanVAE
    from wan_vae.names import official_names

    with torch.device("meta"):
        vae, text = WanVAE(WAN21).state_dict(), UMT5Encoder(XXL).state_dict()
    vae_names, text_names = official_names(WAN21), table(XXL.num_layers, OWN, HUGGING_FACE)
    sparse(root / "vae" / "flux_ae.safetensors", {"decoder.conv_in.weight": (8, 8)})
    sparse(root / "clip" / "clip_l.safetensors", {"text_model.final_layer_norm.weight": (8,)})
    return (
        sparse(root / "vae" / "a.safetensors", {vae_names[key]: tuple(value.shape) for key, value in vae.items()}),
        sparse(root / "clip" / "b.safetensors", {text_names[key]: tuple(value.shape) for key, value in text.items()}),
    )


def test_parts_of_a_comfy_tree_are_those_that_fit(tmp_path: Path) -> None:
    backbone(tmp_path / "diffusion_models" / "wan2.1_t2v_1.3B_bf16.safetensors", T2V_1_3B)
    vae, text = comfy_parts(tmp_path)
    found = opened(tmp_path)
    assert (found.parts["vae"], found.parts["text_encoder"]) == (str(vae), str(text))
    assert [note.split(" is left out")[0] for note in found.notes if "left out" in note] == [
        "vae: 'vae/flux_ae.safetensors'",
        "text_encoder: 'clip/clip_l.safetensors'",
    ]
    vae.with_name("copy.safetensors").hardlink_to(vae)
    with pytest.raises(ValueError, match=r"several for vae: say which with --vae: 'vae/a.safetensors', 'vae/copy.safetensors'"):
        opened(tmp_path)
    assert "vae" not in opened(tmp_path, given=("vae",)).parts


@pytest.mark.skipif(sys.platform != "linux", reason="the mapping that reserves no memory is Linux's")
def test_a_file_larger_than_memory_is_read(tmp_path: Path) -> None:
    config, state = read_checkpoint(backbone(tmp_path / "wan.safetensors", VACE_14B))
    assert config == VACE_14B
    assert sum(value.shape.numel() for value in state.values() if isinstance(value, torch.Tensor)) == 17_337_592_896
    assert float(state["trunk.blocks.39.ffn.0.weight"][:2].float().sum()) == 0
