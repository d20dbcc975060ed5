"""The record of a run: complete, strict, and enough to repeat it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from wan_dit import manifest
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
    assert (record.steps, record.shift, record.guidance, record.frames, record.size, record.fps) == (2, 3.0, 2.0, 5, (32, 16), 8)
    assert {part: (made.name, made.dist, made.version) for part, made in record.parts.items()} == {
        "backbone": ("tiny", "wan-dit", "0.1.0"),
        "vae": ("tiny", "wan-vae", "0.1.0"),
        "text_encoder": ("tiny", "wan-text", "0.1.0"),
        "scheduler": ("unipc", "wan-dit", "0.1.0"),
    }
    assert all(len(record.parts[part].weights or "") == 64 for part in ("backbone", "vae", "text_encoder"))
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


def test_a_replay_finds_the_same_frames(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(saved)]) == 0
    assert "identical: 5 frames" in capsys.readouterr().out


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
