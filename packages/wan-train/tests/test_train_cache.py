"""Latents and contexts made once: named by all that decides them, whole or not there, by any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from wan_train.data.buckets import Bucket, Buckets, Budget
from wan_train.data.cache import Cache, Wanted
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


@pytest.fixture(scope="session")
def vae(micro_vae: Path) -> WanVAE:
    return WanVAE.from_pretrained(micro_vae)


def wanted(data: Any) -> Wanted:
    return [(index, BUCKET) for index in range(len(data))]


def filled(tmp_path: Path, clips: Path, vae: Any, encoder: Any = None) -> Cache:
    cache = Cache(tmp_path / "cache", vae=vae, text_encoder=encoder or Encoder())
    cache.fill(Folder(clips), wanted(Folder(clips)))
    return cache


def test_each_picture_and_caption_is_made_once(tmp_path: Path, clips: Path, vae: WanVAE) -> None:
    encoder, data = Encoder(), Folder(clips)
    cache, ticks = Cache(tmp_path / "cache", vae=vae, text_encoder=encoder), []
    done = cache.fill(data, wanted(data), lambda: ticks.append(1))
    assert (done.made, done.present, done.failed) == (5 + 5, 0, {})
    assert sorted(encoder.calls) == ["", "and another", "caption 3", "caption 4", "the same"]
    assert len(ticks) == 10
    again = cache.fill(data, wanted(data))
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
    assert cache.status(data, wanted(data)).damaged == {}  # headers alone are read
    found = cache.status(data, wanted(data), verify=True)
    assert list(found.damaged) == [path.stem]
    assert len(found.present) == 9
    with pytest.warns(RuntimeWarning, match="does not match its checksum; it is made anew"):
        assert torch.equal(cache.latents(data, 0, BUCKET), whole)
    assert cache.status(data, wanted(data), verify=True).damaged == {}
    path.write_bytes(b"")
    assert "damaged" in cache.status(data, wanted(data)).damaged[path.stem]
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
    found = changed.status(Folder(clips), wanted(Folder(clips)))
    assert sorted(found.stale.values()) == ["no sample has this caption", "no sample has this source, part and bucket"]
    assert (len(found.present), len(found.missing)) == (8, 2)
    retrained = Cache(tmp_path / "cache", vae=vae.reinitialised(), text_encoder=Encoder(2.0))
    stale = retrained.status(Folder(clips), wanted(Folder(clips))).stale
    assert sorted(stale.values()) == ["made by another text_encoder"] * 5 + ["made by another vae"] * 5
    only_text = Cache(tmp_path / "cache", text_encoder=Encoder())
    assert set(only_text.status(Folder(clips), wanted(Folder(clips))).stale.values()) == {
        "no sample has this caption"
    }  # latents are not judged
    scratch = cache.files.path("ab" * 32).with_name(".abab.1234.safetensors")
    scratch.parent.mkdir(exist_ok=True)
    scratch.write_bytes(b"half")
    assert changed.prune(found) == 3
    assert not scratch.exists()
    assert changed.status(Folder(clips), wanted(Folder(clips))).stale == {}
    assert len(list(cache.files.keys())) == 8


def test_a_sample_that_cannot_be_read_is_noted_and_the_rest_goes_on(tmp_path: Path, clips: Path, vae: WanVAE) -> None:
    data = Folder(clips)
    data.identity(2)
    (clips / "2.png").write_bytes((clips / "2.png").read_bytes()[:200])
    cache = Cache(tmp_path / "cache", vae=vae)
    done = cache.fill(data, wanted(data))
    assert list(done.failed) == [2]
    assert "2.png" in done.failed[2]
    assert done.made == 4


def test_numbers_that_are_none_are_not_kept(tmp_path: Path, clips: Path) -> None:
    cache = Cache(tmp_path / "cache", text_encoder=Encoder(float("nan")))
    with pytest.raises(ValueError, match="text encoder makes NaN"):
        cache.context("x")
    assert list(cache.files.keys()) == []


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
    assert cache.fill(mix, wanted_in(shapes, mix)).present == len(before)
    alone = Cache(tmp_path / "cache", vae=vae)
    assert alone.fill(Folder(clips), wanted_in(shapes, Folder(clips))).made == 0  # the same files outside the mix


def wanted_in(shapes: Buckets, data: Any) -> Wanted:
    return [(index, shapes.of(data.info(index))) for index in range(len(data))]


class Unknown:
    """An encoder that nothing tells from another one of its class."""

    def __init__(self, value: float) -> None:
        self.value = value

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        return [torch.full((2, 3), self.value) for _ in prompts]


def test_contexts_of_an_encoder_that_cannot_be_told_from_others_are_not_kept(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        assert torch.equal(Cache(tmp_path, text_encoder=Unknown(value)).context("a"), torch.full((2, 3), value))


class Plain:
    """A data set of one shape, without `clip`."""

    def video(self, indices: list[int]) -> torch.Tensor:
        return torch.zeros(len(indices), 3, 1, 16, 16) + indices[0] / 10

    def key(self) -> str:
        return "plain"


def test_latents_of_a_data_set_of_one_shape_are_those_of_its_clips(tmp_path: Path, vae: WanVAE) -> None:
    cache = Cache(tmp_path, vae=vae)
    assert torch.equal(cache.latents(Plain(), 3, Bucket(1, 16, 16)), vae.encode(Plain().video([3]))[0])
    with pytest.raises(ValueError, match="'Plain' has clips of 1x16x16 alone, got 5x16x16"):
        cache.latents(Plain(), 3, Bucket(5, 16, 16))
