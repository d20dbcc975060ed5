"""The record of a run: complete, strict, and enough to repeat it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from wan_dit import manifest
from wan_dit._shared.weights import best_device
from wan_dit.cli import main
from wan_dit.manifest import Manifest
from wan_dit.pipeline import Pipeline, Result

PROMPT = "a red circle moves left"
SMALL: dict[str, Any] = {"steps": 2, "frames": 5, "size": (32, 16)}


@pytest.fixture(scope="module")
def result() -> Result:
    return Pipeline("tiny")(PROMPT, **SMALL, seed=4)


@pytest.fixture
def saved(result: Result, tmp_path: Path) -> Path:
    return result.save(tmp_path / "a.mp4")[-1]


def test_everything_that_decides_the_pixels_is_recorded(result: Result, saved: Path) -> None:
    record = manifest.read(saved)
    assert (record.prompt, record.negative_prompt, record.seed, record.noise_device) == (PROMPT, "", 4, "cpu")
    assert (record.steps, record.shift, record.guidance, record.frames, record.size, record.fps) == (2, 2.0, 2.0, 5, (32, 16), 8)
    assert {part: (made.name, made.dist, made.version) for part, made in record.parts if made} == {
        "backbone": ("tiny", "wan-dit", "0.1.0"),
        "vae": ("tiny", "wan-vae", "0.1.0"),
        "text_encoder": ("tiny", "wan-text", "0.1.0"),
        "scheduler": ("unipc", "wan-dit", "0.1.0"),
    }
    assert all(len(getattr(record.parts, part).weights or "") == 64 for part in ("backbone", "vae", "text_encoder"))
    assert {"python", "torch", "wan-dit"} <= set(record.versions)
    assert record.frames_sha256 == manifest.frames_sha256(result.video)
    assert set(record.timings) == {"load", "text", "denoise", "decode", "write"}
    assert sorted(file.name for file in saved.parent.iterdir()) == ["a.json", "a.mp4", "a.png"]


def test_settings_change_the_record_where_they_change_the_run(result: Result) -> None:
    before = Manifest(**result.manifest)
    after = Manifest(**Pipeline("tiny", scheduler="euler")(PROMPT, **SMALL, seed=4, shift=5).manifest)
    changed = {line.partition(":")[0] for line in manifest.differences(before, after)}
    assert changed == {"frames_sha256", "parts.scheduler.name", "shift", "sigmas"}
    assert manifest.differences(before, before) == []


def test_a_replay_finds_the_same_frames_and_writes_none(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    before = {file.name: file.read_bytes() for file in saved.parent.iterdir()}
    assert main(["replay", str(saved)]) == 0
    assert "identical: 5 frames" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in saved.parent.iterdir()} == before


def test_a_replay_says_what_differs(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(saved.read_text())
    saved.write_text(json.dumps({**record, "frames_sha256": "0" * 64, "versions": {**record["versions"], "torch": "1.0"}}))
    assert main(["replay", str(saved)]) == 1
    out = capsys.readouterr().out
    assert f"frames_sha256: {'0' * 64} -> {record['frames_sha256']}" in out
    assert "versions.torch: 1.0 -> " in out
    assert "seed" not in out


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        ("vae", "os:system", "'os:system' is an import string; those are taken only from the command line"),
        (
            "text_encoder",
            "/models/mine",
            "the run used text encoder '/models/mine', which no package offers: give it again with --text-encoder",
        ),
    ],
)
def test_a_manifest_names_installed_parts_only(saved: Path, capsys: pytest.CaptureFixture[str], part: str, name: str, message: str) -> None:
    record = json.loads(saved.read_text())
    record["parts"][part] = {"name": name, "dist": None, "version": None, "weights": None}
    saved.write_text(json.dumps(record))
    assert main(["replay", str(saved)]) == 2
    assert message in capsys.readouterr().err
    assert main(["replay", str(saved), f"--{part.replace('_', '-')}", "tiny"]) == 0, "a person may name it"


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "prompt: Field required"), ("no json", "Invalid JSON"), (None, "extra: Extra inputs are not permitted")],
)
def test_what_is_no_manifest_is_refused_in_one_line(
    saved: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    saved.write_text(content or json.dumps({**json.loads(saved.read_text()), "extra": 1}))
    assert main(["replay", str(saved)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("wan-dit: error: ")
    assert err.count("\n") == 1


BROKEN: list[tuple[str, Any, str]] = [
    ("steps", 0, "steps: Input should be greater than or equal to 1"),
    ("steps", 10**30, "steps: "),
    ("steps", "many", "steps: Input should be a valid integer"),
    ("frames", -4, "frames: "),
    ("frames", 18, "frames must be 1 + a multiple of 4"),
    ("size", [64], "size.1: Field required"),
    ("size", [64, 0], "size.1: Input should be greater than or equal to 1"),
    ("size", [10**18, 16], "size.0: "),
    ("fps", 0, "fps: "),
    ("seed", -1, "seed: "),
    ("seed", 2**63, "seed: "),
    ("shift", 0, "shift: Input should be greater than 0"),
    ("shift", float("nan"), "shift: "),
    ("guidance", float("inf"), "guidance."),
    ("dtype", "nn", "dtype: Input should be 'float32', 'bfloat16' or 'float16'"),
    ("dtype", "load", "dtype: "),
    ("noise_device", "cuda", "noise_device: Input should be 'cpu'"),
    ("device", "toaster", "device 'toaster' cannot be used here"),
    ("device", "meta", "device 'meta' cannot be used here"),
    ("device", "cpu\n", "device: control characters are not permitted"),
    ("prompt", "", "the prompt is empty"),
    ("prompt", 7, "prompt: Input should be a valid string"),
    ("parts", {}, "parts.backbone: Field required"),
    ("parts", [], "parts: "),
    ("parts.vae", None, "parts.vae: "),
    ("parts.extra", {"name": "x"}, "parts.extra: Extra inputs are not permitted"),
    ("parts.vae.name", "a\nb\x1b[2J", "parts.vae.name: control characters are not permitted"),
    ("parts.vae.name", "", "no vae named 'wan-vae:'"),
    ("parts.scheduler.dist", "os", "'os:unipc' is an import string"),
    ("model", "tiny", "model: "),
    ("model.name", "nope", "no model named 'wan-dit:nope'"),
    ("versions", {"a\nb": "1"}, "control characters are not permitted"),
    ("context", "/somewhere", "which a manifest cannot open: give it again with --context"),
    ("new\nfield\x1b", 1, "new?field?: Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("field", "value", "message"), BROKEN, ids=[f"{field!a}-{i}" for i, (field, *_) in enumerate(BROKEN)])
def test_a_broken_or_hostile_manifest_is_one_line_about_the_field(
    saved: Path, capsys: pytest.CaptureFixture[str], field: str, value: Any, message: str
) -> None:
    record = json.loads(saved.read_text())
    *path, last = field.split(".")
    inner = record
    for name in path:
        inner = inner[name]
    inner[last] = value
    saved.write_text(json.dumps(record))
    assert main(["replay", str(saved)]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.rstrip("\n").isprintable()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"null", b"[" * 10_000, b'{"prompt": "' + b"a" * 100])
def test_junk_is_no_manifest(saved: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    saved.write_bytes(content)
    assert main(["replay", str(saved)]) == 2
    err = capsys.readouterr().err
    assert f"'{saved}' is not a run manifest: content: " in err
    assert len(err.splitlines()) == 1


def test_a_run_of_another_machine_says_how_to_replay_it_here(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved.write_text(json.dumps({**json.loads(saved.read_text()), "device": "cuda:63"}))
    assert main(["replay", str(saved)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("wan-dit: error: device 'cuda:63' cannot be used here: ")
    assert err.endswith(f"; replay with --device {best_device()}\n")
    assert len(err.splitlines()) == 1
    assert main(["replay", str(saved), "--device", "cpu"]) == 0
