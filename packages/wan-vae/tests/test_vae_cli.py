"""The command: what it prints, what it leaves on disk, and one clear line with exit code 2 for everything bad."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shuffle_vae import ShuffleVAE
from signing import save_signed
from wan_vae import VideoCodec, WanVAE
from wan_vae.commands.coding import TINY_NOTE
from wan_vae.latents import LatentFile
from wan_vae.plugin import wan_vaes
from wan_vae.plugins import VAESpec, hookimpl, plugin_manager
from wan_vae.video import probe, read_frames

Film = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
README = Path(__file__).parents[1] / "README.md"
SHUFFLE = "shuffle_vae:ShuffleVAE"
INSTALLED = ", ".join(sorted(spec.name for spec in wan_vaes()))


def test_film_to_latents_and_back_with_the_built_in_vae(run: Run, film: Film) -> None:
    film(6, 36, 20)
    code, out, err = run("encode", "film.mp4")
    assert (code, err) == (0, TINY_NOTE + "\n")
    assert out == "film.safetensors: 6 frames of 36x20 at 24 fps, codec 'tiny'\n"
    assert run("decode", "film.safetensors")[0] == 0
    info = probe("film.decoded.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (6, 36, 20, 24)


def test_options_of_encode_and_decode(run: Run, film: Film) -> None:
    frames = np.stack(list(read_frames(film(9, 21, 16))))
    line = ("encode", "film.mp4", "a.safetensors", "--codec", SHUFFLE, "--frames", "7", "--latent-dtype", "bf16", "--chunk", "2")
    assert run(*line, "--device", "cpu", "--dtype", "fp32")[::2] == (0, "")
    file = LatentFile.open("a.safetensors")
    assert (file.dtype, file.info.frames, file.info.codec) == ("BF16", 7, "shuffle")
    code, _, err = run("decode", "a.safetensors", "b.mkv", "--codec", SHUFFLE, "--lossless", "--progress")
    assert code == 0
    assert "7/7" in err
    back = np.stack(list(read_frames("b.mkv")))
    assert np.abs(back.astype(int) - frames[:7]).max() <= 1  # bfloat16 has 8 bits of mantissa
    assert run("decode", "a.safetensors", "c.mp4", "--codec", SHUFFLE, "--crf", "40")[0] == 0
    assert Path("c.mp4").stat().st_size < Path("b.mkv").stat().st_size


def test_codec_of_a_latent_file_is_looked_up_by_name_only(run: Run, film: Film, tmp_path: Path) -> None:
    film()
    torch.manual_seed(0)
    WanVAE().save_pretrained(tmp_path / "mine")
    code, _, err = run("encode", "film.mp4", "a.safetensors", "--codec", "./mine")
    assert (code, err) == (0, "")
    assert LatentFile.open("a.safetensors").info.codec == "tiny-2", "a path means nothing elsewhere"
    code, _, err = run("decode", "a.safetensors", "a.mp4")  # no registered name, but tiny shares its latent space
    assert code == 0
    assert "was encoded with other weights" in err
    assert run("decode", "a.safetensors", "b.mp4", "--codec", "./mine")[::2] == (0, "")


def test_import_string_in_a_latent_file_is_refused(run: Run, film: Film, tmp_path: Path) -> None:
    film()
    run("encode", "film.mp4", "film.safetensors")
    metadata = LatentFile.open("film.safetensors").info.to_metadata()
    (tmp_path / "intruder.py").write_text("raise SystemExit('imported')")
    save_signed(load_file("film.safetensors"), "film.safetensors", {**metadata, "codec": "intruder:VAE"})
    code, _, err = run("decode", "film.safetensors")
    assert code == 2
    assert "'intruder:VAE' is an import string" in err
    assert "--codec" in err
    assert "intruder" not in sys.modules


def test_outputs_are_not_overwritten_unasked(run: Run, film: Film) -> None:
    film()
    Path("film.safetensors").write_bytes(b"precious")
    code, _, err = run("encode", "film.mp4", "--codec", SHUFFLE)
    assert (code, err) == (2, "wan-vae: error: 'film.safetensors' exists; name another output or pass --overwrite\n")
    assert Path("film.safetensors").read_bytes() == b"precious"
    assert run("encode", "film.mp4", "--codec", SHUFFLE, "--overwrite")[0] == 0
    assert LatentFile.open("film.safetensors").info.frames == 7
    code, _, err = run("encode", "film.mp4", "film.mp4", "--codec", SHUFFLE, "--overwrite")
    assert (code, err) == (2, "wan-vae: error: 'film.mp4' is the input; name another output\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("encode nothing.mp4", "no video file at 'nothing.mp4'"),
        ("encode words.mp4", "'words.mp4' is not a readable video"),
        ("encode folder", "'folder' is a folder without pictures"),
        ("encode film.mp4 --codec wan2.7", f"no vae named 'wan2.7' (installed: {INSTALLED}; did you mean"),
        ("encode film.mp4 --codec nowhere:VAE", "cannot import vae 'nowhere:VAE'"),
        ("encode film.mp4 --codec words.mp4", "words.mp4"),
        ("encode film.mp4 no/folder/x.safetensors", "cannot write 'no/folder/x.safetensors': there is no folder"),
        ("encode film.mp4 folder --overwrite", "cannot write 'folder': it exists and is not a file"),
        ("encode film.mp4 --device abacus", "device 'abacus' cannot be used here"),
        ("encode film.mp4 --chunk 0", "argument --chunk: '0' is not a whole number from 1 to 9999 (see wan-vae encode --help)"),
        ("encode film.mp4 --codec=", "the argument '--codec=' is empty"),
        ("encode film.mp4 --tile off --tile-mode blend", "--tile off works without tiles: leave out --tile-mode blend"),
        ("encode film.mp4 --frames few", "argument --frames: 'few' is not a whole number of at least 1"),
        ("decode film.safetensors --crf 52", "argument --crf: '52' is not a whole number from 0 to 51"),
        ("", "wan-vae: error: the following arguments are required: COMMAND"),
        ("encode film.mp4 --latent-dtype int8", "invalid choice: 'int8'"),
        ("decode nothing.safetensors", "no latent file at 'nothing.safetensors'"),
        ("decode film.mp4", "'film.mp4' is not a latent file"),
        ("decode folder", "'folder' is not a latent file: it is a folder"),
        ("decode latents.safetensors --lossless --crf 3", "argument --crf: not allowed with argument --lossless"),
        ("decode latents.safetensors --codec tiny", "latents of the space 'shuffle-1', but 'tiny' decodes 'tiny-2'"),
        ("decode latents.safetensors", f"no vae named 'shuffle' (installed: {INSTALLED})"),
        (f"decode latents.safetensors film.xyz --codec {SHUFFLE}", "cannot write a video to 'film.xyz'"),
        ("info nothing.mp4", "no video file at 'nothing.mp4'"),
        ("info nothing.pth", "no file at 'nothing.pth'"),
        ("info folder", "'folder' is a folder without pictures"),
        ("info --codec tine", "did you mean 'tiny'?"),
        ("info", "is required"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, film: Film, tmp_path: Path, line: str, message: str) -> None:
    VideoCodec(ShuffleVAE()).encode_file(film(), tmp_path / "latents.safetensors")
    (tmp_path / "words.mp4").write_text("words")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*line.split())
    errors = [text for text in err.splitlines() if "error:" in text]
    assert (code, out, len(errors)) == (2, "", 1)
    assert message in errors[0]
    assert "Traceback" not in err
    assert set(err.splitlines()) - set(errors) <= {TINY_NOTE}
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_argument_is_no_default(run: Run, film: Film, tmp_path: Path) -> None:
    film()
    for line in (("encode", "film.mp4", "--codec", ""), ("encode", ""), ("info", "--codec", ""), ("eval", "film.mp4", "--out", "")):
        code, out, err = run(*line)
        assert (code, out) == (2, "")
        assert "the argument '' is empty, expected a value" in err
    assert [file.name for file in tmp_path.iterdir()] == ["film.mp4"]


def test_the_working_folder_gives_an_output_no_name(run: Run, film: Film) -> None:
    VideoCodec(ShuffleVAE()).encode_file(film(), "film.safetensors")
    Path("pictures").mkdir()
    assert run("decode", "film.safetensors", "pictures", "--codec", SHUFFLE, "--overwrite")[0] == 0
    os.chdir("pictures")
    assert run("encode", ".", "--codec", SHUFFLE)[::2] == (2, "wan-vae: error: '.' gives the output no name; name one\n")
    assert run("encode", "..", "--codec", SHUFFLE)[0] == 2
    assert run("encode", ".", "../again.safetensors", "--codec", SHUFFLE)[::2] == (0, "")
    assert LatentFile.open("../again.safetensors").info.frames == 7


def test_where_nothing_can_be_written_is_told_before_a_codec_is_loaded(run: Run, film: Film, monkeypatch: pytest.MonkeyPatch) -> None:
    VideoCodec(ShuffleVAE()).encode_file(film(), "film.safetensors")
    Path("mine").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "mine" and access(path, mode))  # whoever runs this test
    monkeypatch.setattr(VAESpec, "load", None)
    for line in (
        "encode film.mp4 mine/a.safetensors",
        "decode film.safetensors mine/a.mp4 --codec " + SHUFFLE,
        "decode film.safetensors mine/%05d.png --codec " + SHUFFLE,
        "eval film.mp4 --out mine/report",
        "eval film.mp4 --out mine",
        "convert tiny mine/a.pth --to official",
    ):
        code, out, err = run(*line.split())
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "no permission to write into '" in err


def test_no_more_is_computed_at_a_time_than_the_film_has(run: Run, film: Film, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan_vae.plan.free_budget", lambda device: 100_000_000)
    film(6)
    assert run("encode", "film.mp4", "--chunk", "9999", "--frames", str(10**20))[::2] == (0, TINY_NOTE + "\n")
    assert run("decode", "film.safetensors", "--chunk", "9999")[::2] == (0, "")


def test_a_warning_is_told_once(run: Run, film: Film) -> None:
    VideoCodec(ShuffleVAE()).encode_file(film(), "film.safetensors")
    Path("pictures").mkdir()
    assert run("decode", "film.safetensors", "pictures", "--codec", SHUFFLE, "--overwrite")[0] == 0
    Path("pictures/notes.txt").touch()
    code, _, err = run("encode", "pictures", "--codec", SHUFFLE)
    assert (code, err) == (0, "wan-vae: warning: 'pictures' holds 1 files that are no pictures; left out\n")


def test_debug_shows_the_traceback(run: Run) -> None:
    code, _, err = run("encode", "nothing.mp4", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_info(run: Run, film: Film, tmp_path: Path) -> None:
    VideoCodec(ShuffleVAE()).encode_file(film(), tmp_path / "film.safetensors")
    (facts,) = json.loads(run("info", "film.mp4", "--json")[1])
    assert (facts["kind"], facts["frames"], facts["fps"], facts["width"], facts["rotation"]) == ("video", 7, "24", 48, 0)
    (facts,) = json.loads(run("info", "film.safetensors", "--json")[1])
    assert (facts["kind"], facts["shape"], facts["codec"], facts["pad_frames"]) == ("latents", [3, 768, 4, 6], "shuffle", "2")
    (facts,) = json.loads(run("info", "--codec", "wan2.1", "--json")[1])
    assert (facts["kind"], facts["latent_space"], facts["channels"], facts["stride"]) == ("codec", "wan2.1", 16, "4x8x8")
    WanVAE().save_pretrained(tmp_path / "mine")
    for path in ("mine", "mine/model.safetensors"):
        (facts,) = json.loads(run("info", path, "--json")[1])
        assert (facts["kind"], facts["latent_space"], facts["channels"]) == ("checkpoint", "tiny-2", 16)
    assert re.search(r"^frames +7$", run("info", "film.mp4")[1], re.MULTILINE)
    run("decode", "film.safetensors", "pictures", "--codec", SHUFFLE)
    (facts,) = json.loads(run("info", "pictures", "--json")[1])
    assert (facts["kind"], facts["frames"], facts["fps"], facts["width"]) == ("video", 7, "24", 48)


def test_info_does_not_wait_for_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    line = [sys.executable, "-m", "wan_vae", "info", "pipe.safetensors"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_list(run: Run) -> None:
    rows = {row["name"]: row for row in json.loads(run("list", "--json")[1])}
    assert rows["wan2.2"] | {"latent_space": "wan2.2", "channels": 48, "stride": "4x16x16", "distribution": "wan-vae"} == rows["wan2.2"]
    assert {"wan2.1", "wan2.2", "tiny"} <= set(rows)
    assert "4x8x8" in run("list")[1]


def test_list_shows_what_is_broken(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Raising:
        @hookimpl
        def wan_vaes(self) -> list[VAESpec]:
            raise RuntimeError("half installed")

    pm = plugin_manager()
    pm.register(Raising(), name="wan-raising")
    pm.broken["wan-broken"] = ImportError("no module named gone")
    monkeypatch.setattr("wan_vae.commands.listing.plugin_manager", lambda: pm)
    code, out, err = run("list", "--json")
    assert (code, err) == (0, "wan-vae: warning: plugin 'wan-raising' failed (RuntimeError: half installed)\n")
    status = {row["distribution"]: row["status"] for row in json.loads(out)}
    assert status == {"wan-vae": "ok", "wan-raising": "RuntimeError: half installed", "wan-broken": "ImportError: no module named gone"}
    assert "half installed" in run("list")[1]


@pytest.mark.parametrize("line", [["list"], ["--help"], ["encode", "--help"], ["plan", "--help"]])
def test_listing_and_help_import_no_torch(line: list[str]) -> None:
    code = f"import sys; from wan_vae.cli import run, main\ntry: main({line})\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "wan" in done.stdout


def test_readme_does_what_it_says(run: Run, film: Film) -> None:
    film()
    blocks = re.findall(r"```(sh|python)\n(.*?)```", README.read_text(), re.DOTALL)
    lines = [shlex.split(line, comments=True) for kind, text in blocks if kind == "sh" for line in text.splitlines()]
    commands = [line[1:] for line in lines if line[0] == "wan-vae"]
    assert {"encode", "decode", "info", "list", "eval"} <= {command[0] for command in commands}
    for command in commands:
        if "wan2.1" not in command:  # its weights are a download
            assert run(*command)[0] == 0, command
    snippets = [text for kind, text in blocks if kind == "python"]
    assert len(snippets) >= 4
    for snippet in snippets:
        exec(snippet, {})
