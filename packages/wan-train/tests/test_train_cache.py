"""Latents and contexts made once: named by all that decides them, whole or not there, by any number of processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from wan_train import cli
from wan_train.data.buckets import Bucket, Buckets, Budget
from wan_train.data.cache import BucketOf, Cache
from wan_train.data.folder import Folder
from wan_train.data.mix import Mix
from wan_train.data.sampler import Position, Sampler
from wan_train.data.shapes import Shapes
from wan_train.data.tensor_files import TensorFiles, key_of
from wan_vae.model import WanVAE

BUCKET = Bucket(1, 16, 16)
Make = Callable[..., Cache]


class Encoder(nn.Module):
    """A text encoder of one table: a row a byte; `calls` tells what it was asked."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Parameter(scale * torch.arange(256.0)[:, None].expand(256, 3))
        self.calls: list[str] = []

    def encode(self, prompts: list[str]) -> list[Tensor]:
        self.calls += prompts
        return [self.table[torch.tensor([*prompt.encode(), 0])] for prompt in prompts]


@pytest.fixture(autouse=True)
def _own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture(scope="session")
def vae(micro_vae: Path) -> WanVAE:
    return WanVAE.from_pretrained(micro_vae)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder of 6 pictures; three share a caption, and two are the same picture."""
    folder = tmp_path / "clips"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("the same" if i < 3 else f"caption {i}\nand another")
    (folder / "5.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "5.txt").write_text("caption 3")
    return folder


def bucket_of(index: int) -> Bucket:
    return BUCKET


def filled(tmp_path: Path, clips: Path, vae: Any, encoder: Any = None) -> Cache:
    cache = Cache(tmp_path / "cache", vae=vae, text_encoder=encoder or Encoder())
    cache.fill(Folder(clips), bucket_of)
    return cache


def test_each_picture_and_caption_is_made_once(tmp_path: Path, clips: Path, vae: WanVAE) -> None:
    encoder, data = Encoder(), Folder(clips)
    cache, ticks = Cache(tmp_path / "cache", vae=vae, text_encoder=encoder), []
    done = cache.fill(data, bucket_of, lambda: ticks.append(1))
    assert (done.made, done.present, done.failed) == (5 + 5, 0, {})
    assert sorted(encoder.calls) == ["", "and another", "caption 3", "caption 4", "the same"]
    assert len(ticks) == 10
    again = cache.fill(data, bucket_of)
    assert (again.made, again.present) == (0, 10)
    assert len(encoder.calls) == 5


def test_a_tensor_is_the_same_bits_however_it_came_about(tmp_path: Path, clips: Path, vae: WanVAE) -> None:
    data, before = Folder(clips), filled(tmp_path, clips, vae)
    on_the_fly = Cache(tmp_path / "other", vae=vae, text_encoder=Encoder())
    for index in range(len(data)):
        fresh = vae.encode(data.clip(index, BUCKET)[None])[0]
        assert fresh.shape[:2] == (4, 1)
        assert torch.equal(before.latents(data, index, BUCKET), fresh)
        assert torch.equal(on_the_fly.latents(data, index, BUCKET), fresh)  # made
        assert torch.equal(on_the_fly.latents(data, index, BUCKET), fresh)  # read
    assert torch.equal(before.context("the same"), on_the_fly.context("the same"))
    assert before.context("the same").shape == (9, 3)


def test_what_decides_a_tensor_is_in_its_name(tmp_path: Path, clips: Path, vae: WanVAE) -> None:
    data, other = Folder(clips), vae.reinitialised()
    moved = vae.reinitialised()
    moved.load_state_dict(vae.state_dict())
    moved.config = vae.config.model_copy(update={"latents_mean": (1.0,) * 4})
    one = Cache(tmp_path, vae=vae, text_encoder=Encoder())
    keys = [
        key_of(cache.latent_facts(data, index, bucket))
        for cache, index, bucket in (
            (one, 0, BUCKET),
            (one, 1, BUCKET),
            (one, 0, Bucket(1, 16, 32)),
            (Cache(tmp_path, vae=other), 0, BUCKET),
            (Cache(tmp_path, vae=moved), 0, BUCKET),
            (Cache(tmp_path, vae=WanVAE(vae.config).to(torch.bfloat16)), 0, BUCKET),
        )
    ]
    assert len(set(keys)) == len(keys)
    assert key_of(one.latent_facts(data, 5, BUCKET)) == keys[0]  # another file of the same bytes
    contexts = [one.context_facts("a"), one.context_facts("b"), Cache(tmp_path, text_encoder=Encoder(2.0)).context_facts("a")]
    assert len({key_of(facts) for facts in contexts}) == 3


def test_damage_is_found_on_reading_and_mended(tmp_path: Path, clips: Path, vae: WanVAE) -> None:
    data, cache = Folder(clips), filled(tmp_path, clips, vae)
    whole = cache.latents(data, 0, BUCKET).clone()  # the file is damaged in its place, where it is mapped
    path = cache.files.path(key_of(cache.latent_facts(data, 0, BUCKET)))
    bytes_ = bytearray(path.read_bytes())
    bytes_[-1] ^= 1
    path.write_bytes(bytes_)
    assert cache.status(data, bucket_of).damaged == {}  # headers alone are read
    found = cache.status(data, bucket_of, verify=True)
    assert list(found.damaged) == [path.stem]
    assert len(found.present) == 9
    with pytest.warns(RuntimeWarning, match="does not match its checksum; it is made anew"):
        assert torch.equal(cache.latents(data, 0, BUCKET), whole)
    assert cache.status(data, bucket_of, verify=True).damaged == {}
    path.write_bytes(b"")
    assert "damaged" in cache.status(data, bucket_of).damaged[path.stem]
    with pytest.warns(RuntimeWarning, match="made anew"):
        assert torch.equal(cache.latents(data, 0, BUCKET), whole)


def test_a_file_under_another_name_is_not_believed(tmp_path: Path) -> None:
    files = TensorFiles(tmp_path)
    files.write({"a": 1}, torch.ones(2))
    assert torch.equal(files.read(key_of({"a": 1})), torch.ones(2))
    other = files.path(key_of({"a": 2}))
    other.parent.mkdir(exist_ok=True)
    files.path(key_of({"a": 1})).rename(other)
    with pytest.raises(ValueError, match="does not match"):
        files.read(other.stem)
    with pytest.raises(KeyError):
        files.read(key_of({"a": 1}))
    state = load_file(other)
    save_file({"tensor": state["tensor"] + 1}, other)  # without a header
    with pytest.raises(ValueError, match="damaged"):
        files.read(other.stem)


def test_what_is_stale_is_told_with_its_reason_and_pruned(tmp_path: Path, clips: Path, vae: WanVAE) -> None:
    cache = filled(tmp_path, clips, vae)
    (clips / "4.txt").write_text("new words")
    Image.new("RGB", (24, 20)).save(clips / "3.png")
    changed = Cache(tmp_path / "cache", vae=vae, text_encoder=Encoder())
    found = changed.status(Folder(clips), bucket_of)
    assert sorted(found.stale.values()) == ["no sample has this caption", "no sample has this source, part and bucket"]
    assert (len(found.present), len(found.missing)) == (8, 2)
    retrained = Cache(tmp_path / "cache", vae=vae.reinitialised(), text_encoder=Encoder(2.0))
    stale = retrained.status(Folder(clips), bucket_of).stale
    assert sorted(stale.values()) == ["made by another text_encoder"] * 5 + ["made by another vae"] * 5
    only_text = Cache(tmp_path / "cache", text_encoder=Encoder())
    assert set(only_text.status(Folder(clips), bucket_of).stale.values()) == {"no sample has this caption"}  # latents are not judged
    scratch = cache.files.path("ab" * 32).with_name(".abab.1234.safetensors")
    scratch.parent.mkdir(exist_ok=True)
    scratch.write_bytes(b"half")
    assert changed.prune(found) == 3
    assert not scratch.exists()
    assert changed.status(Folder(clips), bucket_of).stale == {}
    assert len(list(cache.files.keys())) == 8


def test_a_sample_that_cannot_be_read_is_noted_and_the_rest_goes_on(tmp_path: Path, clips: Path, vae: WanVAE) -> None:
    data = Folder(clips)
    data.identity(2)
    (clips / "2.png").write_bytes((clips / "2.png").read_bytes()[:200])
    cache = Cache(tmp_path / "cache", vae=vae)
    done = cache.fill(data, bucket_of)
    assert list(done.failed) == [2]
    assert "2.png" in done.failed[2]
    assert done.made == 4


def test_numbers_that_are_none_are_not_kept(tmp_path: Path, clips: Path) -> None:
    cache = Cache(tmp_path / "cache", text_encoder=Encoder(float("nan")))
    with pytest.raises(ValueError, match="text encoder makes NaN"):
        cache.context("x")
    assert list(cache.files.keys()) == []


def test_what_another_process_made_between_two_looks_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder()
    cache = Cache(tmp_path, text_encoder=encoder)
    claimed = cache.files.claimed

    def late(key: str, *, wait: bool = False) -> Any:
        facts = next(facts for facts, _ in cache.needed(Prompts(), bucket_of) if key_of(facts) == key)
        cache.files.write(facts, torch.ones(1))
        return claimed(key, wait=wait)

    monkeypatch.setattr(cache.files, "claimed", late)
    done = cache.fill(Prompts(), bucket_of)
    assert (done.made, done.present, encoder.calls) == (0, 41, [])


class Slow(Encoder):
    """Writes a line before and after each prompt, and takes its time in between."""

    def __init__(self, log: Path, seconds: float) -> None:
        super().__init__()
        self.log, self.seconds = log, seconds

    def encode(self, prompts: list[str]) -> list[Tensor]:
        with self.log.open("a") as file:
            file.write(f"{prompts[0]}\n")
        time.sleep(self.seconds)
        return super().encode(prompts)

    def fingerprint(self) -> str:
        return "slow"


class Prompts:
    """A data set of captions."""

    def __len__(self) -> int:
        return 40

    def captions(self, index: int) -> list[str]:
        return [f"prompt {index}"]


def work(folder: Path, log: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    Cache(folder, text_encoder=Slow(log, seconds)).fill(Prompts(), bucket_of)


@pytest.fixture
def started() -> Any:
    """Starts `work` in processes that begin with torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    running: list[Any] = []

    def start(count: int, *args: Any) -> list[Any]:
        new = [context.Process(target=work, args=args) for _ in range(count)]
        running.extend(new)
        for process in new:
            process.start()
        return new

    yield start
    for process in running:
        process.kill()
        process.join()


@pytest.mark.xdist_group("distributed")
def test_processes_share_the_work_and_none_of_it_is_done_twice(tmp_path: Path, started: Any) -> None:
    log = tmp_path / "log"
    for process in started(3, tmp_path / "cache", log, 0.02):
        process.join()
        assert process.exitcode == 0
    assert sorted(log.read_text().splitlines()) == sorted(["", *(f"prompt {i}" for i in range(40))])
    found = Cache(tmp_path / "cache", text_encoder=Slow(log, 0)).status(Prompts(), bucket_of, verify=True)
    assert (len(found.present), found.missing, found.stale, found.damaged) == (41, [], {}, {})


@pytest.mark.xdist_group("distributed")
def test_a_killed_process_leaves_nothing_half_done_and_its_work_is_taken_up(tmp_path: Path, started: Any) -> None:
    log, cache = tmp_path / "log", Cache(tmp_path / "cache", text_encoder=Slow(tmp_path / "none", 0))
    for moment in (1, 5, 6, 12):
        (process,) = started(1, tmp_path / "cache", log, 0.05)
        while len(log.read_text().splitlines() if log.exists() else []) < moment:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert cache.status(Prompts(), bucket_of, verify=True).damaged == {}
    (last,) = started(1, tmp_path / "cache", log, 0.0)
    last.join()
    found = cache.status(Prompts(), bucket_of, verify=True)
    assert (len(found.present), found.missing, found.damaged) == (41, [], {})
    assert len(log.read_text().splitlines()) <= 41 + 4  # at most the one that each was at is done again
    assert torch.equal(cache.context("prompt 7"), Encoder().encode(["prompt 7"])[0])


def test_a_joint_stage_draws_stacks_and_keeps_pictures_films_and_rendered_clips(tmp_path: Path, clips: Path, vae: WanVAE) -> None:
    mix = Mix({"shapes": Shapes(frames=9, size=(16, 32), length=12), "stills": Shapes(frames=1, length=8, seed=1), "web": Folder(clips)})
    shapes, cache = Buckets(video=(16, 32), image=(16, 16), frames=(5, 9)), Cache(tmp_path / "cache", vae=vae)

    def bucket(index: int) -> Bucket:
        return shapes.of(mix.info(index))

    sampler = Sampler(mix.groups({"shapes": 0.5}), bucket, Budget(tokens=12), batch_size=10)
    micros, following = sampler.step(Position())
    again, _ = sampler.step(following)
    assert len(sampler) == 6 + 8 + 6
    drawn = [index for micro in (*micros, *again) for index in micro.samples]
    assert len(set(drawn)) == 20
    assert {index for index in drawn if index >= 12} == set(range(12, 26))
    for micro in micros:
        latents = torch.stack([cache.latents(mix, index, micro.bucket) for index in micro.samples])
        assert latents.shape == (len(micro.samples), 4, 1 + (micro.bucket.frames - 1) // 4, *latents.shape[3:])
    before = set(cache.files.keys())
    assert cache.fill(mix, bucket).present == len(before)
    alone = Cache(tmp_path / "cache", vae=vae)
    assert alone.fill(Folder(clips), shapes_of(shapes, Folder(clips))).made == 0  # the same files outside the mix


def shapes_of(shapes: Buckets, data: Folder) -> BucketOf:
    return lambda index: shapes.of(data.info(index))


# commands


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
    import av
    from wan_vae.video import VideoWriter

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
