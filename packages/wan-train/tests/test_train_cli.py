"""The command wan-train: runs, listings, evaluations, and one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wan_train.cli import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_says_where_things_are_and_resumes(vae_toml: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["run", str(vae_toml), "steps=2", "preview_every=2", "save_every=1"]) == 0
    out, _ = capsys.readouterr()
    folder = tmp_path / "run"
    for path in (folder / "export", folder / "log.jsonl", folder / "previews"):
        assert str(path) in out
        assert path.exists()
    assert main(["run", "--resume", str(vae_toml), "--debug", "steps=3"]) == 0
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines() if '"loss"' in line] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-vea"], "no recipe 'tiny-vea': give a .toml file or one of dc-ae, ltx-vae, residual-vae, tiny-t2v, tiny-t2v-polish"),
        (["broken.toml"], "'broken.toml' is not TOML"),
        (["vae.toml", "steps=none"], "steps: "),
        (["vae.toml", "steps"], "override 'steps' must read dotted.key=value"),
        (["vae.toml", "optimizer.lr=1"], "optimizer: Extra inputs are not permitted"),
        (["vae.toml", "objective.settings.phase=1"], "'objective.settings': phase: Extra inputs are not permitted (got 1)"),
        (["vae.toml", "objective.settings.vae=tinny"], "no vae named 'tinny'"),
        (["vae.toml", "objective.settings.architecture.depth=3"], "architecture of 'tiny': depth"),
        (["vae.toml", "objective.name=gan"], "no objective named 'gan' (installed: rectified-flow, vae)"),
        (["vae.toml", "data.settings.split=test"], "no split named 'test'"),
        (["vae.toml", "data.settings.frames=6"], "frames must be 1 + 4k"),
        (["vae.toml", "data.settings.sizes=3"], "data.settings of 'shapes'"),
        (["vae.toml", "device=nowhere"], "device 'nowhere' cannot be used here"),
        (["vae.toml", "optimiser.betas=[2, 3]"], "beta"),
        (["vae.toml", "--resume"], "checkpoints': start the run without --resume"),
        (["vae.toml", "output=broken.toml/run"], "cannot write to output 'broken.toml/run': Not a directory"),
        (["vae.toml", "output=broken.toml"], "cannot write to output 'broken.toml': File exists"),
        (
            ["flow.toml", "objective.settings.vae=wan2.1", "objective.settings.architecture.latent_space=tiny-2"],
            "latent_space is wan2.1, the backbone needs tiny-2",
        ),
    ],
)
@pytest.mark.usefixtures("vae_toml", "flow_toml")
def test_what_is_wrong_is_one_line_and_leaves_nothing(arguments: list[str], message: str, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "broken.toml").write_text("steps = = 3")
    before = sorted(tmp_path.rglob("*"))
    assert main(["run", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("wan-train: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vae", "tiny", "--backbone", "tiny"], "--vae measures a VAE alone: leave out --backbone"),
        (["--context-embedder", "missing.safetensors"], "missing.safetensors"),
        (["--lora", "missing.safetensors"], "missing.safetensors"),
        (["--text-encoder", "umt5-xxl"], "its embedding_space is umt5-xxl"),
        (["--backbone", "wan2.1-t2v-1.3b"], "latent_space"),
    ],
)
def test_what_is_wrong_with_the_parts_to_evaluate_is_one_line(arguments: list[str], message: str, capsys: Captured) -> None:
    assert main(["evaluate", "--count", "2", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(capsys: Captured) -> None:
    assert main(["run", "tiny-vea", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_list_has_recipes_objectives_and_data_sets(capsys: Captured) -> None:
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    named = {(row["kind"], row["name"], row["from"]) for row in rows}
    assert {("objectives", "vae", "wan-train"), ("objectives", "rectified-flow", "wan-train"), ("datasets", "shapes", "wan-train")} <= named
    assert {("recipes", "tiny-vae", "wan-train"), ("recipes", "tiny-t2v", "wan-train")} <= named
    assert main(["list"]) == 0
    table = capsys.readouterr().out
    assert all(row["name"] in table for row in rows)


def test_the_tiny_model_is_evaluated(capsys: Captured) -> None:
    assert main(["evaluate", "--count", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["prompts"], row["count"]) for row in rows] == [("all", 2), ("seen", 1), ("held out", 1)]


def test_the_tiny_vae_is_evaluated(capsys: Captured) -> None:
    assert main(["evaluate", "--vae", "tiny", "--count", "2", "--json"]) == 0
    true, coded = json.loads(capsys.readouterr().out)
    assert (true["count"], coded["count"], true["all_right"]) == (2, 2, 1.0)
    assert coded["psnr"] > 0


@pytest.mark.parametrize("arguments", [["--count", "1"], ["--vae", "tiny", "--count", "0"], ["--model", "tinny"], ["--vae", "tinny"]])
def test_a_wrong_evaluation_is_one_line(arguments: list[str], capsys: Captured) -> None:
    assert main(["evaluate", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
