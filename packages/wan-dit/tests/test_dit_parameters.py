"""Parameter counts: by formula, on meta, and in the listing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wan_dit import config as presets
from wan_dit.checkpoint import describe
from wan_dit.cli import main
from wan_dit.config import DiTConfig
from wan_dit.model import WanDiT
from wan_dit.parameters import count_parameters
from wan_dit.plugin import wan_backbones, wan_models
from wan_dit.recognition import ARCHITECTURES

PRESETS = {name: value for name, value in vars(presets).items() if isinstance(value, DiTConfig)}


def on_meta(config: DiTConfig) -> int:
    with torch.device("meta"):
        return sum(value.numel() for value in WanDiT(config).state_dict().values())


@pytest.mark.parametrize("name", PRESETS)
def test_the_formula_counts_the_tensors_of_every_preset(name: str) -> None:
    assert count_parameters(PRESETS[name]) == on_meta(PRESETS[name])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_formula_counts_the_tensors_of_any_configuration(data: st.DataObject) -> None:
    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    heads, layers, image = number(1, 3), number(1, 4), data.draw(st.none() | st.integers(1, 20))
    config = DiTConfig(
        patch_size=(1, number(1, 3), number(1, 3)),
        in_dim=number(1, 9),
        out_dim=number(1, 9),
        dim=heads * 2 * number(1, 8),
        ffn_dim=number(1, 40),
        freq_dim=2 * number(1, 8),
        text_dim=number(1, 30),
        num_heads=heads,
        num_layers=layers,
        qk_norm=data.draw(st.booleans()),
        cross_attn_norm=data.draw(st.booleans()),
        image_dim=image,
        pos_embed_seq_len=data.draw(st.none() | st.integers(1, 9)) if image else None,
        vace_layers=tuple(sorted(data.draw(st.sets(st.integers(0, layers - 1))))),
        vace_in_dim=number(1, 9),
        ref_dim=number(0, 5),
        camera_dim=number(0, 5),
    )
    assert count_parameters(config) == on_meta(config)


def test_registered_backbones_state_their_count() -> None:
    backbones = {f"wan-dit:{spec.name}": spec for spec in wan_backbones()}
    configs = {"tiny": presets.TINY, **ARCHITECTURES}
    for model in wan_models():
        for name in filter(None, (model.backbone, model.low_noise_backbone)):
            assert backbones[name].parameters == count_parameters(configs[model.name]), name
    assert all(spec.parameters for spec in backbones.values())


def test_a_checkpoint_is_counted_by_its_header(tmp_path: Any) -> None:
    model = WanDiT(presets.TINY)
    model.save_pretrained(tmp_path / "model")
    assert describe(tmp_path / "model").parameters == sum(value.numel() for value in model.parameters())


def test_models_as_json_tell_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    models = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(models) == {model.name for model in wan_models()}
    pair = models["wan2.2-t2v-a14b"]
    assert (pair["task"], pair["parameters"], pair["experts"], pair["boundary"]) == ("t2v", 2 * 14_288_491_584, 2, 0.875)
    assert (pair["guidance"], pair["steps"], pair["shift"], pair["size"], pair["frames"], pair["fps"]) == (
        [3, 4],
        40,
        12,
        "1280x720",
        81,
        16,
    )
    assert pair["hub"] == {
        "backbone": "Wan-AI/Wan2.2-T2V-A14B/high_noise_model",
        "low_noise_backbone": "Wan-AI/Wan2.2-T2V-A14B/low_noise_model",
        "vae": pair["hub"]["vae"],
        "text_encoder": pair["hub"]["text_encoder"],
    }
    assert pair["hub"]["vae"].startswith("Wan-AI/")
    single = models["wan2.1-i2v-14b-480p"]
    assert (single["parameters"], single["experts"], single["boundary"]) == (16_394_878_784, 1, None)
    assert single["image_encoder"] == "wan-text:clip-vit-h-14"
    assert single["negative_prompt"].startswith("镜头晃动")
    assert (models["tiny"]["hub"], models["tiny"]["distribution"]) == ({}, "wan-dit")
    assert models["tiny"]["parameters"] == count_parameters(presets.TINY)


def test_models_as_a_table_fit_120_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].split()[:3] == ["name", "task", "parameters"]
    rows = {line.split()[0]: line for line in lines[1:]}
    assert "2 x 14,288,901,184" in rows["wan2.2-i2v-a14b"]
    assert " 4,999,787,712 " in rows["wan2.2-ti2v-5b"]


def test_a_model_of_another_author_is_counted_by_its_backbone(install: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = """
from wan_dit import BackboneSpec, VideoModelSpec, hookimpl

@hookimpl
def wan_backbones():
    return [BackboneSpec("own", "own:Own", "a", 4, (4, 8, 8), "b", 8, 9)]

@hookimpl
def wan_models():
    return [
        VideoModelSpec("theirs", "wan-dit:wan2.1-t2v-14b", "wan-vae:wan2.1", "wan-text:umt5-xxl"),
        VideoModelSpec("own", "wan-own:own", "wan-vae:not-there", "wan-text:umt5-xxl"),
        VideoModelSpec("lost", "wan-own:not-there", "wan-vae:wan2.1", "wan-text:umt5-xxl"),
    ]
"""
    install("wan-own", source)
    assert main(["models", "--json"]) == 0
    models = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {name: models[name]["parameters"] for name in ("theirs", "own", "lost")} == {"theirs": 14_288_491_584, "own": None, "lost": None}
    assert "vae" not in models["own"]["hub"]
    assert main(["models"]) == 0
    assert "lost" in capsys.readouterr().out
