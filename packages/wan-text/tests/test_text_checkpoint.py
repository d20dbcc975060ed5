"""Layouts: official, Hugging Face, diffusers and our own; round trips to the bit, errors that name tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_text import TextEncoder, load_text_encoder
from wan_text.checkpoint import describe, load_tokenizer
from wan_text.config import TINY, XXL
from wan_text.layouts import BLOCK_NAMES, GLOBAL_NAMES, hf_names, official_names

State = dict[str, Tensor]
PREFIX = "umt5."


def named(encoder: TextEncoder, names: dict[str, str]) -> State:
    return {names[key.removeprefix(PREFIX)]: value.contiguous() for key, value in encoder.state_dict().items()}


def assert_same(folder: Path, encoder: TextEncoder) -> TextEncoder:
    loaded = TextEncoder.from_pretrained(folder)
    for key, value in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert torch.equal(loaded.encode(["a red circle"])[0], encoder.encode(["a red circle"])[0])
    return loaded


def hf_json(encoder: TextEncoder) -> str:
    c = encoder.config
    sizes = {"vocab_size": c.vocab_size, "d_model": c.dim, "d_kv": c.dim_attn // c.num_heads, "d_ff": c.dim_ffn, "num_heads": c.num_heads}
    depth = {"num_layers": c.num_layers, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
    return json.dumps({"model_type": "umt5", **sizes, **depth})


def test_key_map_is_a_bijection() -> None:
    for column in range(3):
        rows = [*GLOBAL_NAMES, *BLOCK_NAMES]
        assert len({row[column] for row in rows}) == len(rows) == 12
    assert len(set(official_names(XXL).values())) == len(set(hf_names(XXL).values())) == 242


def test_own_folder_round_trip(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "mine")
    loaded = assert_same(tmp_path / "mine", encoder)
    assert loaded.config == encoder.config
    assert loaded.fingerprint() == encoder.fingerprint()
    written = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert written["format"] == "wan-text/1"
    assert set(load_file(tmp_path / "mine" / "model.safetensors")) == set(official_names(encoder.config).values())
    spec = describe(tmp_path / "mine")
    assert (spec.embed_dim, spec.max_tokens, spec.embedding_space) == (24, 128, "test-1")
    assert load_text_encoder(str(tmp_path / "mine"), dtype=torch.bfloat16).encode(["red"])[0].dtype == torch.bfloat16


@pytest.mark.parametrize("prefix", ["", "encoder.", "text_encoders.umt5xxl.transformer."])
def test_official_release(encoder: TextEncoder, spiece: bytes, tmp_path: Path, prefix: str) -> None:
    state = {prefix + key: value for key, value in named(encoder, official_names(encoder.config)).items()}
    torch.save(state, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    (tmp_path / "google/umt5-xxl").mkdir(parents=True)
    (tmp_path / "google/umt5-xxl/spiece.model").write_bytes(spiece)
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel", "dim": 1536}')
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = assert_same(tmp_path, encoder)
    assert loaded.config.max_tokens == 512
    assert loaded.spec.embedding_space == "umt5-24x2"
    assert describe(tmp_path).embedding_space == "umt5-xxl"
    assert_same(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", encoder)


@pytest.mark.parametrize("embedding", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_hugging_face_folder(encoder: TextEncoder, spiece: bytes, tmp_path: Path, embedding: str) -> None:
    state = named(encoder, hf_names(encoder.config))
    table = state.pop("shared.weight")
    places = ["shared.weight", "encoder.embed_tokens.weight"] if embedding == "both" else [embedding]
    state |= {place: table.clone() for place in places}
    state |= {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2), "lm_head.weight": torch.zeros(2)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(hf_json(encoder))
    (tmp_path / "spiece.model").write_bytes(spiece)
    assert_same(tmp_path, encoder)
    assert describe(tmp_path).embed_dim == 24


def test_diffusers_folder_with_shards(encoder: TextEncoder, spiece: bytes, tmp_path: Path) -> None:
    state = named(encoder, hf_names(encoder.config))
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    shards: dict[str, Any] = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(state.items())[i::2]) for i in range(2)}
    for name, shard in shards.items():
        save_file(shard, folder / name)
    index = {"weight_map": {key: name for name, shard in shards.items() for key in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(hf_json(encoder))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/spiece.model").write_bytes(spiece)
    assert_same(tmp_path, encoder)
    assert_same(folder, encoder)
    assert describe(tmp_path).embed_dim == 24
    assert load_tokenizer(folder).model == spiece


def test_two_different_embedding_tables_are_refused(encoder: TextEncoder, spiece: bytes, tmp_path: Path) -> None:
    state = named(encoder, hf_names(encoder.config))
    state["encoder.embed_tokens.weight"] = torch.zeros_like(state["shared.weight"])
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "spiece.model").write_bytes(spiece)
    with pytest.raises(ValueError, match=r"'shared.weight' and 'encoder.embed_tokens.weight' differ"):
        TextEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: s.pop("blocks.1.ffn.fc1.weight"), r"missing 1 \(blocks.1.ffn.fc1.weight\)"),
        (lambda s: s.update({"blocks.0.attn.q.bias": torch.zeros(2)}), r"unexpected 1 \(blocks.0.attn.q.bias\)"),
        (
            lambda s: s.update({"blocks.1.attn.k.weight": torch.zeros(3, 3)}),
            r"'umt5.blocks.1.attn.k.weight' is \(3, 3\), expected \(32, 24\)",
        ),
        (lambda s: s.update({"norm.weight": torch.zeros(24).to(torch.int8)}), r"'norm.weight' is torch.int8 and has no scale"),
        (lambda s: [s.pop(key) for key in list(s) if key != "norm.weight"], r"missing 1 \(token_embedding.weight\)"),
        (lambda s: s.clear() or s.update({"x": torch.zeros(1)}), r"missing 2 .*unexpected 1 \(x\)"),
    ],
)
def test_broken_checkpoints_name_the_tensor(encoder: TextEncoder, tmp_path: Path, break_it: Any, message: str) -> None:
    encoder.save_pretrained(tmp_path / "mine")
    file = tmp_path / "mine" / "model.safetensors"
    state = {key: value.clone() for key, value in load_file(file).items()}
    break_it(state)
    save_file(state, file)
    with pytest.raises(ValueError, match="is damaged: its content is not what was saved"):
        TextEncoder.from_pretrained(tmp_path / "mine")
    config = tmp_path / "mine" / "config.json"
    config.write_text(json.dumps({key: value for key, value in json.loads(config.read_text()).items() if key != "sha256"}))
    with pytest.raises(ValueError, match=message):
        TextEncoder.from_pretrained(tmp_path / "mine")


def test_a_config_that_does_not_fit_is_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "mine")
    config = tmp_path / "mine" / "config.json"
    written = json.loads(config.read_text())
    config.write_text(json.dumps({**written, "dims": 3, "dim": "x"}))
    with pytest.raises(ValueError, match=r"config.json of .* is not valid: dim: .*; dims: Extra inputs"):
        TextEncoder.from_pretrained(tmp_path / "mine")
    config.write_text(json.dumps({**written, "num_layers": 3}))
    with pytest.raises(ValueError, match=r"missing 10 \(umt5.blocks.2"):
        TextEncoder.from_pretrained(tmp_path / "mine")


def test_missing_files_say_where_they_were_looked_for(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "spiece.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer for .*google/umt5-xxl/spiece.model"):
        TextEncoder.from_pretrained(tmp_path / "mine")
    (tmp_path / "spiece.model").write_bytes(encoder.tokenizer.model)
    with pytest.raises(FileNotFoundError, match=r"no .safetensors"):
        TextEncoder.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        TextEncoder.from_pretrained(tmp_path / "nowhere" / "else")
    shutil.copy(tmp_path / "mine" / "config.json", tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        TextEncoder.from_pretrained(tmp_path / "weights.safetensors")


def test_the_hub_is_asked_for_the_text_encoder_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoder: TextEncoder) -> None:
    import fnmatch

    import huggingface_hub

    encoder.save_pretrained(tmp_path / "mine")
    asked: list[list[str]] = []

    def fake_download(repo: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        asked.append(allow_patterns or ["*"])
        return str(tmp_path / "mine")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake_download)
    TextEncoder.from_pretrained("hub:org/repo")
    describe("hub:org/repo")
    weights, facts = asked

    def fetched(patterns: list[str], name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    wanted = ("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/spiece.model", "text_encoder/model-00001-of-00005.safetensors")
    others = ("diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth", "transformer/diffusion_pytorch_model-00001-of-00002.safetensors")
    assert all(fetched(weights, name) for name in wanted)
    assert not any(fetched(weights, name) for name in others)
    assert not any(fetched(facts, name) for name in (wanted[0], wanted[2], *others))


def test_the_built_in_checkpoint_is_the_tiny_preset() -> None:
    assert load_text_encoder("tiny").config == TINY


def test_an_encoder_knows_the_registered_name_it_was_loaded_by(encoder: TextEncoder, tmp_path: Path) -> None:
    assert load_text_encoder("tiny").spec.name == "tiny"
    encoder.save_pretrained(tmp_path / "mine")
    assert load_text_encoder(str(tmp_path / "mine")).spec.name == "test-1"
