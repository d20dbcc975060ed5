"""Encoding from the file: the results of the loaded encoder, and memory that does not grow with the number of blocks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from wan_text import TextEncoder, load_text_encoder
from wan_text.cache import write_contexts
from wan_text.config import XXL
from wan_text.layouts import official_names
from wan_text.streaming import StreamingTextEncoder
from wan_text.tokenizer import train_tokenizer
from wan_text.umt5 import Block

MB = 1 << 20
CHILD = """
import json, sys, threading, time
from wan_text import load_text_encoder

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

encoder = load_text_encoder(sys.argv[1], stream=True)
most, done = anonymous(), False
before = most

def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.002)

thread, start = threading.Thread(target=watch), time.perf_counter()
thread.start()
contexts = encoder.encode(["a red circle", "a blue star moves left", "", "a red star moves up " * 5])
done = True
thread.join()
seconds, rows = time.perf_counter() - start, [len(context) for context in contexts]
print(json.dumps({"before": before, "most": most, "seconds": seconds, "rows": rows}))
"""


def write_xxl(folder: Path, blocks: int, rows: int = XXL.vocab_size) -> None:
    """Random weights of umT5-XXL's geometry in bf16, a shard a block, so that no more than one is in memory here."""
    config = XXL.model_copy(update={"num_layers": blocks, "vocab_size": rows})
    names, weight_map = official_names(config), {}
    parts = {"token_embedding.weight": (rows, config.dim), "norm.weight": (config.dim,)}
    with torch.device("meta"):
        block = Block(config)
    shards = [parts, *({f"blocks.{i}.{key}": value.shape for key, value in block.state_dict().items()} for i in range(blocks))]
    for number, shard in enumerate(shards):
        state = {names[key]: torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[-1] ** -0.5) for key, shape in shard.items()}
        save_file(state, folder / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(state, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "spiece.model").write_bytes(train_tokenizer(["a red circle", "a blue star moves left up"] * 9, 400))


def peak(folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder)], env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_streaming_gives_what_loading_gives(encoder: TextEncoder, tmp_path: Path, dtype: torch.dtype) -> None:
    encoder.to(torch.bfloat16).save_pretrained(tmp_path / "mine")
    loaded = load_text_encoder(str(tmp_path / "mine"), dtype=dtype)
    streamed = load_text_encoder(str(tmp_path / "mine"), dtype=dtype, stream=True)
    prompts = ["a red circle", "", "a blue star moves left", "a red circle", "a red circle moves up " * 6]
    for got, expected in zip(streamed.encode(prompts), loaded.encode(prompts), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, expected)
    assert streamed.encode([]) == []
    assert streamed.fingerprint() == loaded.fingerprint()
    assert (streamed.spec, streamed.cleaner) == (loaded.spec, loaded.cleaner)


def test_a_pickle_and_the_built_in_encoder_stream_too(encoder: TextEncoder, tmp_path: Path) -> None:
    names = official_names(encoder.config)
    state = {names[key]: value for key, value in encoder.umt5.state_dict().items()}
    torch.save(state, tmp_path / "models_t5_test.pth")
    (tmp_path / "spiece.model").write_bytes(encoder.tokenizer.model)
    streamed = StreamingTextEncoder.from_pretrained(tmp_path / "models_t5_test.pth")
    assert torch.equal(streamed.encode(["a red star"])[0], encoder.encode(["a red star"])[0])
    tiny = load_text_encoder("tiny", stream=True)
    assert torch.equal(tiny.encode(["a red star"])[0], load_text_encoder("tiny").encode(["a red star"])[0])
    assert tiny.spec.name == "tiny"


def test_the_file_is_read_once_for_all_prompts_of_a_context_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed, passes = load_text_encoder("tiny", stream=True), []
    embedded = streamed._embedded
    monkeypatch.setattr(streamed, "_embedded", lambda batches: passes.append(len(batches)) or embedded(batches))
    prompts = [f"a {colour} {shape} {i}" for colour in ("red", "blue") for shape in ("circle", "square") for i in range(30)]
    write_contexts(streamed, prompts, tmp_path / "streamed", name="tiny")
    assert len(passes) == 1
    write_contexts(load_text_encoder("tiny"), prompts, tmp_path / "loaded", name="tiny")
    files = [sorted((path.name, path.read_bytes()) for path in (tmp_path / name).glob("*.*")) for name in ("streamed", "loaded")]
    assert files[0] == files[1]


def test_a_misshapen_tensor_is_named(encoder: TextEncoder, tmp_path: Path) -> None:
    names = official_names(encoder.config)
    state = {names[key]: value for key, value in encoder.umt5.state_dict().items()} | {"blocks.1.attn.k.weight": torch.zeros(3, 3)}
    save_file(state, tmp_path / "a.safetensors")
    (tmp_path / "spiece.model").write_bytes(encoder.tokenizer.model)
    with pytest.raises(ValueError, match=r"'blocks.1.attn.k.weight' is \(3, 3\), expected \(32, 24\)"):
        StreamingTextEncoder.from_pretrained(tmp_path / "a.safetensors")


@pytest.mark.slow
def test_real_width_in_less_than_a_gigabyte_however_many_blocks(tmp_path: Path) -> None:
    """umT5-XXL's width with 1 and 3 of its 24 blocks; `WAN_BLOCKS=6` takes more of them and all rows of the embedding."""
    more = int(os.environ.get("WAN_BLOCKS", "3"))
    found = {}
    for blocks in (1, more):
        write_xxl(tmp_path, blocks, XXL.vocab_size if "WAN_BLOCKS" in os.environ else 1024)
        found[blocks] = row = peak(tmp_path)
        size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        megabytes = f"{size / 1e6:.0f} MB of weights, {row['most'] / 1e6:.0f} MB of memory ({row['before'] / 1e6:.0f} before)"
        print(f"{blocks} blocks: {megabytes}, {row['seconds']:.1f} s for prompts of {row['rows']} tokens")
    assert all(row["most"] < 1_000_000_000 for row in found.values())
    assert abs(found[more]["most"] - found[1]["most"]) < 50 * MB
