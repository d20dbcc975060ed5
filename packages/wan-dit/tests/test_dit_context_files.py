"""Context folders: prompts that were encoded elsewhere take the place of a text encoder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from wan_dit.context_files import ContextFiles
from wan_dit.pipeline import Pipeline
from wan_dit.plugins import find, plugin_manager

PROMPT = "a red circle moves left"
DIM = find("wan_text_encoders", "tiny").embed_dim
SMALL: dict[str, Any] = {"steps": 2, "frames": 5, "size": (32, 16)}


@pytest.fixture(scope="module")
def contexts() -> dict[str, torch.Tensor]:
    encoder = find("wan_text_encoders", "tiny").load()
    return {prompt: encoder.encode([prompt])[0] for prompt in (PROMPT, "")}


def write(folder: Path, contexts: dict[str, torch.Tensor], **facts: Any) -> Path:
    """A context folder, written by hand."""
    folder.mkdir()
    encoder = {"fingerprint": "f" * 64, "embedding_space": "tiny-2", "embed_dim": DIM, "max_tokens": 32, "cleaner": "x", "dtype": "float32"}
    (folder / "encoder.json").write_text(json.dumps({**encoder, **facts}))
    rows = []
    for i, (prompt, context) in enumerate(contexts.items()):
        save_file({"context": context}, folder / f"{i:08x}.safetensors")
        rows.append({"sha256": hashlib.sha256(prompt.encode()).hexdigest(), "key": f"{i:08x}", "tokens": len(context), "truncated": False})
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_video_needs_no_text_encoder(tmp_path: Path, contexts: dict[str, torch.Tensor]) -> None:
    folder = write(tmp_path / "contexts", contexts)
    pm = plugin_manager()
    pm.unregister(name="wan-text")
    result = Pipeline("tiny", context=folder, pm=pm)(PROMPT, **SMALL)
    assert torch.equal(result.video, Pipeline("tiny")(PROMPT, **SMALL).video)
    assert result.manifest["context"] == str(folder)
    assert result.manifest["parts"]["text_encoder"]["weights"] == "f" * 64
    Pipeline("tiny", context=folder / "00000000.safetensors", pm=pm).stream(PROMPT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_contexts_may_be_stored_in_half_precision(tmp_path: Path, contexts: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    folder = write(tmp_path / "contexts", {prompt: context.to(dtype) for prompt, context in contexts.items()})
    assert Pipeline("tiny", context=folder)(PROMPT, **SMALL).video.isfinite().all()


def test_a_missing_prompt_comes_with_the_line_that_adds_it(tmp_path: Path, contexts: dict[str, torch.Tensor]) -> None:
    folder = write(tmp_path / "contexts", {PROMPT: contexts[PROMPT]})
    pipe = Pipeline("tiny", context=folder)
    with pytest.raises(LookupError, match="prompt 'a blue star' is not in"):
        pipe("a blue star", **SMALL)
    with pytest.raises(LookupError) as error:
        ContextFiles(folder).encode(["it's blue"])
    assert f"wan-text encode 'it'\"'\"'s blue' --output {folder}" in str(error.value)
    with pytest.raises(LookupError, match=r"prompt '' is not in .*wan-text encode '' --output"):
        pipe(PROMPT, **SMALL)
    assert pipe(PROMPT, **SMALL, guidance=1).video.isfinite().all(), "without guidance the negative prompt is not needed"


def test_prompts_are_looked_up_by_their_raw_text(tmp_path: Path, contexts: dict[str, torch.Tensor]) -> None:
    files = ContextFiles(write(tmp_path / "contexts", contexts))
    assert torch.equal(files.encode([PROMPT])[0], contexts[PROMPT])
    with pytest.raises(LookupError):
        files.encode([PROMPT + " "])


def test_contexts_of_another_space_are_refused_before_loading(tmp_path: Path, contexts: dict[str, torch.Tensor]) -> None:
    folder = write(tmp_path / "contexts", contexts, embedding_space="umt5-xxl")
    with pytest.raises(ValueError, match=r"text encoder '.*contexts' does not fit backbone 'tiny': its embedding_space is umt5-xxl"):
        Pipeline("tiny", context=folder)


def test_a_truncated_prompt_is_warned_of(tmp_path: Path, contexts: dict[str, torch.Tensor]) -> None:
    folder = write(tmp_path / "contexts", contexts)
    index = folder / "index.jsonl"
    index.write_text(index.read_text().replace("false", "true"))
    with pytest.warns(UserWarning, match="prompt 'a red circle moves left' was cut to 32 tokens when it was encoded"):
        ContextFiles(folder).encode([PROMPT])


def test_what_is_no_context_folder_is_refused(tmp_path: Path, contexts: dict[str, torch.Tensor]) -> None:
    with pytest.raises(OSError, match=r"no context folder at '.*nowhere'"):
        ContextFiles(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a context folder"):
        ContextFiles(tmp_path)
    folder = write(tmp_path / "contexts", contexts)
    (folder / "index.jsonl").write_text('{"sha256": "00"}\n')
    with pytest.raises(ValueError, match=r"is not a context folder \('key' is None, expected a text\)"):
        ContextFiles(folder)
    wrong = write(tmp_path / "wrong", {PROMPT: torch.zeros(3, 5)})
    with pytest.raises(ValueError, match=rf"it holds float32 \[3, 5\], expected floating-point numbers \[up to 32, {DIM}\]"):
        ContextFiles(wrong).encode([PROMPT])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"junk", "header"),
        (b"", "header"),
        ({"other": torch.zeros(3, DIM)}, "does not contain tensor context"),
        ({"context": torch.zeros(3, DIM, dtype=torch.int64)}, r"it holds int64 \[3, \d+\], expected floating-point"),
        ({"context": torch.zeros(0, DIM)}, r"it holds float32 \[0, "),
        ({"context": torch.zeros(33, DIM)}, r"it holds float32 \[33, "),
        ({"context": torch.full((3, DIM), float("nan"))}, "NaN or infinite"),
    ],
)
def test_a_damaged_context_comes_with_what_to_do(tmp_path: Path, contexts: dict[str, torch.Tensor], content: Any, reason: str) -> None:
    folder = write(tmp_path / "contexts", contexts)
    file = folder / "00000000.safetensors"
    file.write_bytes(content) if isinstance(content, bytes) else save_file(content, file)
    advice = f"delete it and encode the prompt again: wan-text encode '{PROMPT}' --output "
    with pytest.raises(ValueError, match=f"00000000.safetensors' is no context .*{reason}.*{advice}"):
        Pipeline("tiny", context=folder)(PROMPT, **SMALL)
    file.unlink()
    with pytest.raises(LookupError, match=f"is missing; encode it again: wan-text encode '{PROMPT}' --output "):
        ContextFiles(folder).encode([PROMPT])


@pytest.mark.parametrize("key", ["../00000000", "/etc/passwd", "00/00", "", "key0", "AB", None, 7])
def test_a_key_leads_to_no_other_folder(tmp_path: Path, contexts: dict[str, torch.Tensor], key: Any) -> None:
    folder = write(tmp_path / "contexts", contexts)
    rows = [json.loads(line) | {"key": key} for line in (folder / "index.jsonl").read_text().splitlines()]
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"is not a context folder \((key '.*' is not a hexadecimal name|'key' is .*expected a text)"):
        ContextFiles(folder)


@pytest.mark.parametrize(
    "facts", [{"embed_dim": "96"}, {"embed_dim": 0}, {"max_tokens": True}, {"embedding_space": None}, {"fingerprint": 3}]
)
def test_an_encoder_that_is_badly_described_is_refused(tmp_path: Path, contexts: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"is not a context folder .'{next(iter(facts))}' is "):
        ContextFiles(write(tmp_path / "contexts", contexts, **facts))


def test_lines_that_other_writers_append_are_read(tmp_path: Path, contexts: dict[str, torch.Tensor]) -> None:
    folder = write(tmp_path / "contexts", contexts)
    index = folder / "index.jsonl"
    twice = index.read_text() * 2
    index.write_text(twice + twice.splitlines()[0][:50] + "\n\n" + twice[:70])
    files = ContextFiles(folder)
    assert len(files.rows) == len(contexts)
    assert torch.equal(files.encode([PROMPT])[0], contexts[PROMPT])


def test_a_context_folder_and_an_encoder_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not both"):
        Pipeline("tiny", context=tmp_path, text_encoder="tiny")


def test_folders_of_wan_text_are_read(tmp_path: Path, contexts: dict[str, torch.Tensor]) -> None:
    from wan_text.cli import main

    assert main(["encode", PROMPT, "", "--output", str(tmp_path / "contexts"), "--device", "cpu"]) == 0
    files = ContextFiles(tmp_path / "contexts")
    for prompt, expected in contexts.items():
        assert torch.allclose(files.encode([prompt])[0], expected, atol=1e-5)
    assert files.fingerprint() == find("wan_text_encoders", "tiny").load().fingerprint()
