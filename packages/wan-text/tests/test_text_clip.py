"""The CLIP vision tower: the official numbers, transformers on random configurations, every layout, clear errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig as Reference
from transformers import CLIPVisionModelWithProjection
from wan_text import load_image_encoder
from wan_text.cli import main
from wan_text.clip_checkpoint import describe, official_names, read_tower
from wan_text.clip_vision import CLIPVision, preprocess
from wan_text.config import VIT_H_14, CLIPVisionConfig
from wan_text.plugins import find_image_encoder
from wan_text.testing import ImageEncoderContract, difference

State = dict[str, Tensor]
SMALL = CLIPVisionConfig(image_size=42, patch_size=14, dim=24, dim_ffn=40, num_heads=4, num_layers=2, image_space="test")
HF_NAMES = {"hidden_size": "dim", "intermediate_size": "dim_ffn", "num_attention_heads": "num_heads"}


def randomised(module: nn.Module, seed: int = 0) -> None:
    """Every tensor re-drawn: nothing is hidden by zeros or ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=max(1, parameter[0].numel() if parameter.ndim > 1 else 9) ** -0.5, generator=generator)


def reference(config: CLIPVisionConfig, seed: int = 0) -> Any:
    """transformers' tower, with the block that Wan leaves out."""
    fields = {theirs: getattr(config, ours) for theirs, ours in HF_NAMES.items()}
    fields |= {name: getattr(config, name) for name in ("image_size", "patch_size")}
    sizes = {"num_hidden_layers": config.num_layers + 1, "hidden_act": config.activation, "layer_norm_eps": config.norm_eps}
    model = CLIPVisionModelWithProjection(Reference(**fields, **sizes, projection_dim=8)).eval()
    randomised(model, seed)
    return model


@pytest.fixture
def tower() -> CLIPVision:
    module = CLIPVision(SMALL).eval()
    randomised(module)
    return module


def official_case(golden: Path, folder: Path) -> tuple[list[tuple[Tensor, Tensor]], dict[str, float]]:
    """What we compute of the official case beside what it holds, preprocessing and all, and its tolerance."""
    case, tensors = json.loads((golden / "clip_vision.json").read_text()), load_file(golden / "clip_vision.safetensors")
    weights = {f"visual.{key.removeprefix('weights/')}": value for key, value in tensors.items() if key.startswith("weights/")}
    other = {"textual.token_embedding.weight": torch.zeros(3), "log_scale": torch.zeros(())}
    torch.save(weights | other, folder / "models_clip_test.pth")
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": case["config"]["num_heads"]}))
    loaded = CLIPVision.from_pretrained(folder / "models_clip_test.pth")
    assert loaded.config.num_layers == case["config"]["num_layers"] - 1
    frames = [tensors[f"inputs/frames/{i}"][:, 0] for i in range(2)]
    with torch.no_grad():
        pairs = [(loaded(tensors[call["args"]["x"]]), tensors[f"outputs/{call['name']}/tokens"]) for call in case["calls"]]
        made = torch.cat([preprocess(frame, case["config"]["image_size"]) for frame in frames])
        pairs += [(made, tensors["inputs/preprocessed/x"]), (loaded.encode(frames), tensors["outputs/preprocessed/tokens"])]
    return pairs, {name: case["tolerance"][name] for name in ("atol", "rtol")}


@pytest.mark.golden
def test_the_official_numbers(golden: Path, tmp_path: Path) -> None:
    pairs, near = official_case(golden, tmp_path)
    assert len(pairs) == 4
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, **near)


CONFIGS = [(42, 14, 24, 4, 2), (32, 8, 40, 5, 4), (224, 14, 32, 2, 1)]


@torch.no_grad()
def off_transformers(folder: Path, config: tuple[int, int, int, int, int], activation: str) -> float:
    """Largest difference to transformers' tower with the same random weights, read from the folder that it saves."""
    size, patch, dim, heads, layers = config
    sizes = {"image_size": size, "patch_size": patch, "dim": dim, "dim_ffn": 3 * dim, "num_heads": heads, "num_layers": layers}
    theirs = reference(CLIPVisionConfig(**sizes, activation=activation, image_space="test"), seed=dim)  # type: ignore[arg-type]
    theirs.save_pretrained(folder / "image_encoder")
    ours = CLIPVision.from_pretrained(folder)
    assert ours.config.model_dump(include=set(sizes)) == sizes
    assert ours.config.activation == activation
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return difference(ours(x), theirs(pixel_values=x, output_hidden_states=True).hidden_states[-2])


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("config", CONFIGS)
def test_equals_transformers(tmp_path: Path, config: tuple[int, int, int, int, int], activation: str) -> None:
    assert off_transformers(tmp_path, config, activation) <= 1e-5


def test_the_released_tower_by_its_numbers() -> None:
    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    with torch.device("meta"):
        ours = CLIPVision(VIT_H_14)
        theirs = CLIPVisionModelWithProjection(Reference(**sizes, image_size=224, patch_size=14, projection_dim=1024))
    unused = [theirs.vision_model.encoder.layers[31], theirs.vision_model.post_layernorm, theirs.visual_projection]
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 632_076_800
    assert count == 632_076_800 - sum(parameter.numel() for module in unused for parameter in module.parameters()) == 611_086_080
    assert VIT_H_14.tokens == 257
    assert len(set(official_names(VIT_H_14).values())) == len(ours.state_dict()) == 377
    listed = find_image_encoder("clip-vit-h-14")
    assert (ours.spec.image_space, ours.spec.image_dim, ours.spec.tokens) == (listed.image_space, listed.image_dim, listed.tokens)


def official(tower: CLIPVision) -> State:
    names = official_names(tower.config)
    after = {"post_norm.weight": torch.ones(24), "post_norm.bias": torch.ones(24), "head": torch.ones(24, 8)}
    last = {f"transformer.2.{key}": value.clone() for key, value in tower.blocks[0].state_dict().items()}
    last = {key.replace("qkv", "to_qkv").replace("ffn.up", "mlp.0").replace("ffn.down", "mlp.2"): value for key, value in last.items()}
    return {names[key]: value for key, value in tower.state_dict().items()} | last | after


LAYOUTS: dict[str, Callable[[State], State]] = {
    "tower alone": lambda s: s,
    "both towers": lambda s: {f"visual.{k}": v for k, v in s.items()} | {"textual.x": torch.ones(1), "log_scale": torch.ones(())},
    "cut": lambda s: {k: v for k, v in s.items() if not k.startswith(("transformer.2.", "post_norm", "head"))},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_official_file_is_the_same_tower(tower: CLIPVision, tmp_path: Path, layout: str) -> None:
    save_file(LAYOUTS[layout](official(tower)), tmp_path / "clip.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    loaded = CLIPVision.from_pretrained(tmp_path / "clip.safetensors")
    assert loaded.config == SMALL.model_copy(update={"image_space": "clip-24x2"})
    for key, value in tower.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_comfy_file_and_own_folder(tower: CLIPVision, tmp_path: Path) -> None:
    theirs = reference(SMALL)
    save_file({key: value.half() for key, value in theirs.state_dict().items()}, tmp_path / "clip_vision_h.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    comfy = CLIPVision.from_pretrained(tmp_path / "clip_vision_h.safetensors")
    q = theirs.vision_model.encoder.layers[1].self_attn.q_proj.weight
    assert torch.equal(comfy.blocks[1].attn.qkv.weight[:24], q.half().float())
    comfy.save_pretrained(tmp_path / "mine")
    again = load_image_encoder(str(tmp_path / "mine"), dtype=torch.float16)
    assert again.config == comfy.config
    assert again.encode(torch.zeros(1, 3, 8, 8)).dtype == torch.float16
    assert CLIPVision.from_pretrained(tmp_path / "mine").fingerprint() == comfy.fingerprint()
    assert describe(tmp_path / "mine").image_dim == 24


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: s.pop("transformer.1.mlp.0.bias"), r"missing 1 \(transformer.1.mlp.0.bias\)"),
        (lambda s: s.update({"transformer.0.attn.bias": torch.ones(1)}), r"unexpected 1 \(transformer.0.attn.bias\)"),
        (lambda s: s.update({"transformer.0.norm1.bias": torch.ones(3)}), r"'blocks.0.norm1.bias' is \(3,\), expected \(24,\)"),
    ],
)
def test_what_does_not_fit_is_named(tower: CLIPVision, tmp_path: Path, break_it: Callable[[State], Any], message: str) -> None:
    state = official(tower)
    break_it(state)
    save_file(state, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    with pytest.raises(ValueError, match=message):
        CLIPVision.from_pretrained(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no .safetensors"):
        read_tower(tmp_path / "..")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"expected images \[3, H, W\]"),
        ([torch.zeros(1, 8, 8)], r"got \[1, 8, 8\]"),
        (["a.png"], "got str"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"got torch.uint8: scale 0..255"),
        (torch.full((1, 3, 8, 8), 255.0), "got values from 255 to 255"),
        (torch.full((1, 3, 8, 8), float("nan")), "got values from nan to nan"),
        ([torch.zeros(3, 0, 8)], r"got \[3, 0, 8\]"),
    ],
)
def test_wrong_images_are_refused(tower: CLIPVision, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tower.encode(images)


class TestTower(ImageEncoderContract):
    @pytest.fixture(scope="class")
    @classmethod
    def encoder(cls) -> CLIPVision:
        module = CLIPVision(SMALL).eval()
        randomised(module)
        return module


def test_image_encoders_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["clip-vit-h-14"]["kind"] == "image encoder"
    assert (rows["clip-vit-h-14"]["space"], rows["clip-vit-h-14"]["dim"], rows["clip-vit-h-14"]["tokens"]) == ("clip-vit-h-14", 1280, 257)
    assert rows["umt5-xxl"]["kind"] == "text encoder"
    assert main(["info", "clip-vit-h-14", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["image_dim"] == 1280
