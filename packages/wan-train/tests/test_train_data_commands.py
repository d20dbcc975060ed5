"""The commands `wan-train cache` and `wan-train validate`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
from wan_train import cli
from wan_train.data.tensor_files import TensorFiles
from wan_vae.video import VideoWriter


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_the_command_fills_tells_and_prunes(tmp_path: Path, clips: Path, micro_vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cache", clips, "fps=8", "frames=5", "--output", tmp_path / "cache", "--size", "32x16", "--vae", micro_vae, "--json"]
    assert run(*words, "--status") == 0
    assert {row["state"]: row["files"] for row in json.loads(capsys.readouterr().out)} == {"present": 0, "missing": 10}
    assert run(*words) == 0
    assert json.loads(capsys.readouterr().out) == [{"made": 10, "present": 0, "failed": 0, "failures": []}]
    (clips / "4.txt").unlink()
    assert run(*words) == 2
    assert "4.png: it has no caption" in capsys.readouterr().err
    (clips / "4.txt").write_text("new words")
    assert run(*words, "--prune") == 0
    told = {row["state"]: (row["files"], row["why"]) for row in json.loads(capsys.readouterr().out)}
    assert told["stale"] == (1, "no sample has this caption")
    assert told["removed"][0] == 1
    assert run(*words) == 0
    assert json.loads(capsys.readouterr().out)[0]["made"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--output DIR"),
        (["--output", "x"], "--size WxH"),
        (["--output", "x", "--size", "32"], "--size is '32', expected NxN"),
        (["--output", "x", "--frames", "5"], "go with --size"),
        (["--output", "x", "--size", "32x20"], "multiples of 16"),
        (["--output", "x", "--size", "32x16", "--frames", "6"], r"1 \+ 4k"),
        (["--output", "x", "--size", "32x16", "--vae", "gone"], "gone"),
    ],
)
def test_a_command_that_cannot_be_done_says_why(
    clips: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("cache", clips, "frames=5", *words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


def test_validate_tells_what_a_run_sees(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate", clips, "frames=5", "--size", "32x32", "--json", "--frames", "5") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["counts"] == {"files": 6, "samples": 6, "problems": {}}
    assert told["files"][3] == {
        "file": "3.png", "samples": 1, "frames": "1", "size": "24x20", "seconds": "", "fps": "", "captions": 2, "buckets": "1x32x32",
    }  # fmt: skip
    (clips / "1.txt").unlink()
    assert run("validate", clips, "frames=5") == 2
    out = capsys.readouterr().out
    assert "1.png  caption  it has no caption" in out
    assert "5 files, 5 samples, 1 problems: 1 caption" in out


def test_validate_decodes_where_asked(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = clips / "a.mp4"
    rng = np.random.default_rng(0)
    with VideoWriter(film, fps=8, size=(64, 48)) as writer:
        for _ in range(16):
            writer.write(rng.integers(0, 256, (48, 64, 3), np.uint8))
    film.with_suffix(".txt").write_text("noise")
    with av.open(str(film)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(film.read_bytes())
    data[packets[9][0] + 4 : sum(packets[9])] = bytes(packets[9][1] - 4)
    film.write_bytes(data)
    assert run("validate", clips, "fps=8", "frames=5") == 0
    assert "a.mp4" in capsys.readouterr().out
    assert run("validate", clips, "fps=8", "frames=5", "--decode") == 2
    assert "is damaged" in capsys.readouterr().out


def test_validate_takes_recipes(vae_toml: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate", vae_toml) == 0
    assert "shapes" in capsys.readouterr().out
    assert run("validate", vae_toml, "data.name=folder", f"data.settings={{path = '{clips}', ftps = 1}}") == 2
    assert "ftps" in capsys.readouterr().err
    assert run("validate", vae_toml, "data.name=folder", f"data.settings={{path = '{clips}', frames = 5}}") == 0
    assert "6 samples" in capsys.readouterr().out


def test_a_recipe_is_cached_beside_its_output(vae_toml: Path, tmp_path: Path, micro_vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cache", vae_toml, f"objective.settings.vae={micro_vae}", "--text-encoder", "none", "--json"]
    assert run(*words) == 0
    assert json.loads(capsys.readouterr().out)[0]["made"] == 4
    assert len(list(TensorFiles(tmp_path / "run" / "cache").keys())) == 4
    assert run(*words, "--size", "32x16", "--frames", "5") == 0  # another bucket: others are made
    assert json.loads(capsys.readouterr().out)[0] == {"made": 4, "present": 0, "failed": 0, "failures": []}
    assert run(*words, "--verify") == 0
    assert {row["state"]: row["files"] for row in json.loads(capsys.readouterr().out)} == {"present": 4, "missing": 0, "stale": 4}
