"""The command `wan-dit`: files, listings, and one clear line for bad input."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from PIL import Image
from wan_dit.cli import main
from wan_dit.events import Decoding, Loading, Step
from wan_dit.progress import progress

PROMPT = "a red circle moves left"
SMALL = ["--steps", "2", "--frames", "5", "--size", "32x16"]
Install = Callable[..., None]
pytestmark = pytest.mark.usefixtures("here")  # every command runs in an empty folder


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_generate_writes_a_video_a_contact_sheet_and_a_manifest(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "A red circle, moves left!", *SMALL, "--seed", "5", "--device", "cpu"]) == 0
    name = "outputs/a-red-circle-moves-left-5"
    assert files(here) == ["outputs", f"{name}.json", f"{name}.mp4", f"{name}.png"]
    with av.open(f"{name}.mp4") as video:
        assert [(frame.width, frame.height) for frame in video.decode(video=0)] == [(32, 16)] * 5
    with Image.open(f"{name}.png") as sheet:
        assert sheet.width > 5 * 160
    assert json.loads(Path(f"{name}.json").read_text())["seed"] == 5
    out, err = capsys.readouterr()
    assert all(f"{name}.{suffix}" in out for suffix in ("mp4", "png", "json"))
    assert all(phase in out for phase in ("took:", "load ", "text ", "denoise ", "decode ", "write ", "try next: wan-dit generate"))
    phases = ["loading text encoder tiny", "encoding", "loading backbone tiny", "loading vae tiny", "denoising", "decoding"]
    assert err.splitlines() == [f"wan-dit: {phase}" for phase in phases], "no bar where stderr is no terminal"


def test_output_is_a_file_or_a_folder(here: Path) -> None:
    small = ["--steps", "1", "--frames", "5", "--size", "16x16", "--device", "cpu"]
    assert main(["generate", PROMPT, *small, "--output", "a/b.mp4"]) == 0
    assert main(["generate", *PROMPT.split(), *small, "--output", "a"]) == 0
    assert {"a/b.mp4", "a/a-red-circle-moves-left-0.mp4"} <= set(files(here))


def test_a_named_file_is_replaced_only_on_demand_and_a_made_up_name_is_numbered(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["generate", PROMPT, "--steps", "1", "--frames", "5", "--size", "16x16", "--device", "cpu"]
    (here / "package.json").write_text("{}")
    (here / "sheet.png").write_text("")
    for name, taken in (("package", "package.json"), ("sheet", "sheet.png")):
        with monkeypatch.context() as patch:
            patch.setattr("wan_dit.pipeline.Pipeline", None)  # refused before anything is made
            assert main([*small, "--output", f"{name}.mp4"]) == 2
        assert f"wan-dit: error: '{taken}' exists: choose another name, or replace it with --overwrite" in capsys.readouterr().err
    assert files(here) == ["package.json", "sheet.png"]
    assert main([*small, "--output", "sheet.mp4", "--overwrite"]) == 0
    assert (here / "sheet.png").stat().st_size > 0
    assert (here / "package.json").read_text() == "{}"

    for options in ([], ["--output", "outputs"], [], ["--overwrite"]):
        assert main([*small, *options]) == 0
    name = "outputs/a-red-circle-moves-left-0"
    assert [file for file in files(here) if file.endswith(".mp4")] == [f"{name}-2.mp4", f"{name}-3.mp4", f"{name}.mp4", "sheet.mp4"]
    assert len(files(here / "outputs")) == 9


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress() as follow:
        assert sys.stderr.getvalue() == ""
        for event in (Loading("vae", "tiny"), Step(1, 2, 0.1, 0.5), Step(2, 2, 0.1, 0.0), Decoding(5)):
            follow(event)
    shown = sys.stderr.getvalue()
    assert "loading vae tiny" in shown
    assert shown.split("\r")[-1].startswith("decoding")
    assert "2/2" in shown


def test_settings_reach_the_run(here: Path) -> None:
    options = [
        "--shift",
        "4",
        "--guidance",
        "1.5",
        "--negative-prompt",
        "a star",
        "--scheduler",
        "euler",
        "--dtype",
        "bf16",
        "--device",
        "cpu",
    ]
    assert main(["generate", PROMPT, *SMALL, *options, "--output", "a.mp4"]) == 0
    record = json.loads((here / "a.json").read_text())
    assert (record["shift"], record["guidance"], record["negative_prompt"], record["dtype"]) == (4.0, 1.5, "a star", "bfloat16")
    assert (record["steps"], record["frames"], record["size"], record["parts"]["scheduler"]["name"]) == (2, 5, [32, 16], "euler")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([PROMPT, "--model", "tinny"], "no model named 'tinny' (installed: tiny, wan2.1-flf2v-14b, "),
        ([PROMPT, "--vae", "wan2.3"], "taew2_1, taew2_2, tiny, wan2.1, wan2.2; did you mean 'wan2.2'?)"),
        ([PROMPT, "--text-encoder", "clip"], "no text encoder named 'clip'"),
        (
            [PROMPT, "--backbone", "no/such/file.safetensors"],
            "cannot fetch 'no/such/file.safetensors' from the Hub, and it is not in the cache",
        ),
        ([PROMPT, "--scheduler", "euller"], "did you mean 'euler'?"),
        ([PROMPT, "--vae", "wan2.1"], "vae 'wan2.1' does not fit backbone 'tiny': its latent_space is wan2.1, the backbone needs tiny-2"),
        ([PROMPT, "--text-encoder", "umt5-xxl"], "its embedding_space is umt5-xxl, the backbone needs tiny-2; installed and fitting: tiny"),
        ([PROMPT, "--vae", "not_there:X"], "cannot import vae 'not_there:X'"),
        ([PROMPT, "--size", "70x64"], "size 70x64 does not divide"),
        ([PROMPT, "--size", "large"], "size 'large' is not WIDTHxHEIGHT, such as 64x64"),
        ([PROMPT, "--frames", "16"], "frames must be 1 + a multiple of 4 for backbone 'tiny', got 16; nearest: 17"),
        ([PROMPT, "--steps", "0"], "steps must be at least 1 and at most 10000, got 0"),
        ([], "give a prompt, such as 'a red circle moves left'"),
        ([""], "the prompt is empty"),
        (["  "], "the prompt is empty"),
        ([" ".join(["red"] * 10_000)], "the prompt has 10000 words, text encoder 'tiny' reads at most 32 tokens: shorten it"),
        ([PROMPT, "--output", "file/a.mp4"], "cannot write 'file/a.mp4'"),
        ([PROMPT, "--output", "/dev/null/a.mp4"], "cannot write '/dev/null/a.mp4': Not a directory"),
        ([PROMPT, "--output", "a.webm"], "cannot write 'a.webm': give a name such as FILE.mp4, FILE.gif, "),
        ([PROMPT, "--context", "nowhere"], "no context folder at 'nowhere'"),
        ([PROMPT, "--device", "toaster"], "device 'toaster' cannot be used here"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (here / "file").write_text("")
    assert main(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("wan-dit: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert files(here) == ["file"]


@pytest.mark.parametrize("arguments", [["generate", PROMPT, "--steps", "few"], ["generate", PROMPT, "--what"], [], ["nope"]])
def test_usage_errors_are_one_line_too(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.startswith("wan-dit: error: ")
    assert err.count("\n") == 1


def test_a_missing_package_comes_with_what_to_install(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAN_DISABLE_PLUGINS", "wan-vae")
    assert main(["generate", PROMPT]) == 2
    assert capsys.readouterr().err == (
        "wan-dit: error: no vae named 'wan-vae:tiny' (installed: none); wan-vae is disabled by WAN_DISABLE_PLUGINS\n"
    )
    assert files(here) == []


def test_a_broken_plugin_stops_only_those_who_ask_for_it(here: Path, capsys: pytest.CaptureFixture[str], install: Install) -> None:
    install("wan-broken", "import not_there")
    failure = "plugin 'wan-broken' failed (ModuleNotFoundError: No module named 'not_there')"
    assert main(["generate", PROMPT, "--vae", "wan-broken:x"]) == 2
    assert capsys.readouterr().err.splitlines() == [f"wan-dit: warning: {failure}", f"wan-dit: error: {failure}"]
    assert files(here) == []
    install("wan-worse", "import not_there")
    assert main(["generate", PROMPT, *SMALL, "--device", "cpu"]) == 0
    assert capsys.readouterr().err.count("plugin 'wan-worse' failed") == 1, "warned of once"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", PROMPT, "--vae", "nope", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_during_a_run_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str], install: Install, acme: Path) -> None:
    source = """
from dataclasses import replace
from acme_wan.plugin import VAE, hookimpl
from acme_wan.parts import AcmeVAE

class Bad(AcmeVAE):
    def decode(self, latents, *, generator=None):
        return latents[:, :3]

@hookimpl
def wan_vaes():
    return [replace(VAE, name="bad", target="wan_bad:Bad")]
"""
    install("wan-bad", source)
    assert main(["generate", PROMPT, *SMALL, "--vae", "bad", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert "wan-dit: error: vae 'bad' decoded" in err
    assert "Traceback" not in err
    assert files(here) == []


def test_plugins_lists_every_part_and_what_failed(capsys: pytest.CaptureFixture[str], install: Install, acme: Path) -> None:
    install("wan-broken", "import not_there")
    assert main(["plugins", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert err == ""
    assert {"kind", "name", "distribution", "version", "target", "status"} == set(rows[0])
    listed = {(row["kind"], row["name"], row["distribution"], row["version"], row["status"]) for row in rows}
    assert {
        ("wan_vaes", "acme", "acme-wan", "1.0", "ok"),
        ("wan_text_encoders", "tiny", "wan-text", "0.1.0", "ok"),
        ("wan_datasets", "shapes", "wan-train", "0.1.0", "ok"),
        ("-", "-", "wan-broken", "1.0", "failed: ModuleNotFoundError: No module named 'not_there'"),
    } <= listed
    assert main(["plugins"]) == 0
    out = capsys.readouterr().out
    assert "acme_wan.parts:AcmeVAE" in out
    assert "Traceback" not in out


def test_check_passes_on_what_is_installed(capsys: pytest.CaptureFixture[str], acme: Path) -> None:
    assert main(["plugins", "--check"]) == 0
    assert "failed" not in capsys.readouterr().out


def test_check_finds_misspelt_hooks_and_targets(capsys: pytest.CaptureFixture[str], install: Install) -> None:
    head = "from wan_dit import SchedulerSpec, VideoModelSpec, hookimpl\n\n@hookimpl\ndef "
    install("wan-typo", head + "wan_schedular():\n    return [SchedulerSpec('a', 'wan_dit.schedulers.euler:Euler')]\n")
    install("wan-lost", head + "wan_schedulers():\n    return [SchedulerSpec('b', 'wan_dit.schedulers.euler:Nope')]\n")
    install("wan-made", head + "wan_models():\n    return [VideoModelSpec('c', 'tiny', 'nope', 'tiny')]\n")
    install("wan-twin", head + "wan_schedulers():\n    return [SchedulerSpec('euler', 'wan_dit.schedulers.euler:Euler')]\n")
    assert main(["plugins"]) == 0
    capsys.readouterr()
    assert main(["plugins", "--check", "--json"]) == 1
    status = {row["distribution"]: row["status"] for row in json.loads(capsys.readouterr().out)}
    assert status["wan-typo"] == "no such hook, did you mean wan_schedulers?"
    assert status["wan-lost"].startswith("failed: AttributeError")
    assert "no vae named 'nope'" in status["wan-made"]
    assert status["wan-twin"] == "ok, offered twice: say wan-twin:euler"
    assert status["wan-vae"] == "ok"


def test_models_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    models = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert (models["tiny"]["backbone"], models["tiny"]["size"], models["tiny"]["frames"]) == ("wan-dit:tiny", "64x64", 17)
    assert main(["models"]) == 0
    table = capsys.readouterr().out
    assert "wan-dit:" not in table, "a table has the short names"
    assert main(["info", "tiny", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["kind"] for record in records] == ["wan_vaes", "wan_text_encoders", "wan_backbones", "wan_models"]
    assert main(["info", "wan-dit:unipc"]) == 0
    assert "wan_dit.schedulers.unipc:UniPC" in capsys.readouterr().out
    assert main(["info", "unipcc"]) == 2
    assert "did you mean 'unipc'?" in capsys.readouterr().err


def test_another_authors_vae_and_text_encoder_make_a_video(here: Path, acme: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "wan_dit",
        "generate",
        PROMPT,
        "--vae",
        "acme",
        "--text-encoder",
        "acme",
        "--steps",
        "2",
        "--output",
        "a.mp4",
    ]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(acme)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with av.open("a.mp4") as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 17
    for frame in frames:
        assert frame[0, 0].min() > 200, "the mark of the plugin's VAE"
        assert frame[1:7, 2:7].max() < 60
    assert frames[0][16:].std() > 5, "and a picture beside it"
