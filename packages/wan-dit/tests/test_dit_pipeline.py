"""One generation, from a prompt to a result: reproducible, validated at the door, told as events."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_dit.events import Decoding, Done, Encoding, Event, Loading, Step
from wan_dit.pipeline import DTYPES, Pipeline, Result
from wan_dit.plugins import PART_KINDS, find, plugin_manager
from wan_dit.schedulers.euler import Euler

PROMPT = "a red circle moves left"
SMALL: dict[str, Any] = {"steps": 2, "frames": 5, "size": (32, 16)}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline("tiny")


def test_a_result_has_the_shape_range_and_rate_it_promises(pipe: Pipeline) -> None:
    result = pipe(PROMPT, **SMALL, seed=3)
    assert result.video.shape == (1, 3, 5, 16, 32)
    assert result.video.dtype == torch.float32
    assert -1 <= result.video.min() < result.video.max() <= 1
    assert (result.fps, result.seed) == (8, 3)
    assert set(result.timings) == {"load", "text", "denoise", "decode"}


def test_settings_come_from_the_model(pipe: Pipeline) -> None:
    result = pipe(PROMPT)
    manifest = result.manifest
    assert result.video.shape == (1, 3, 17, 64, 64)
    assert (manifest["steps"], manifest["shift"], manifest["guidance"]) == (15, 2.0, 2.0)


def test_one_seed_gives_the_same_bits_and_another_gives_others(pipe: Pipeline) -> None:
    first, again, other = (pipe(PROMPT, **SMALL, seed=seed).video for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)
    assert torch.equal(first, Pipeline("tiny")(PROMPT, **SMALL, seed=1).video), "whatever was generated before"


def test_the_noise_is_the_seeds_on_the_cpu(recorder: Any) -> None:
    Pipeline("tiny", backbone=recorder)(PROMPT, **SMALL, seed=7, guidance=1)
    expected = torch.randn(1, recorder.spec.latent_channels, 2, 2, 4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(recorder.latents[0], expected)


def test_timesteps_are_float32_and_those_of_the_schedule(recorder: Any) -> None:
    Pipeline("tiny", backbone=recorder, scheduler="euler")(PROMPT, **SMALL | {"steps": 3}, shift=5, guidance=1)
    assert [(t.dtype, t.shape) for t in recorder.timesteps] == [(torch.float32, (1,))] * 3
    assert torch.equal(torch.cat(recorder.timesteps), Euler().schedule(3, 5.0).timesteps)


def test_guidance_1_runs_the_backbone_once_a_step(recorder: Any) -> None:
    pipe = Pipeline("tiny", backbone=recorder)
    events = list(pipe.stream(PROMPT, **SMALL, guidance=1))
    assert len(recorder.latents) == 2
    assert Encoding((PROMPT,)) in events, "no negative prompt is encoded"
    pipe(PROMPT, **SMALL, guidance=3)
    assert len(recorder.latents) == 2 + 4


def test_prompt_negative_prompt_and_guidance_all_matter(pipe: Pipeline) -> None:
    videos = [
        pipe(prompt, **SMALL, negative_prompt=negative, guidance=guidance).video
        for prompt, negative, guidance in ((PROMPT, "", 2), ("a blue star", "", 2), (PROMPT, "a blue star", 2), (PROMPT, "", 3))
    ]
    assert all(not torch.equal(videos[0], video) for video in videos[1:])


def test_events_tell_the_run_in_order() -> None:
    pipe = Pipeline("tiny")
    events = list(pipe.stream(PROMPT, **SMALL))
    kinds = [type(event) for event in events]
    assert kinds == [Loading, Encoding, Loading, Loading, Step, Step, Decoding, Done]
    assert [event.part for event in events if isinstance(event, Loading)] == ["text_encoder", "backbone", "vae"]
    steps = [event for event in events if isinstance(event, Step)]
    assert [(step.i, step.n) for step in steps] == [(1, 2), (2, 2)]
    assert steps[0].sigma > steps[1].sigma == 0
    assert all(step.seconds > 0 for step in steps)
    seen: list[Event] = []
    result = pipe(PROMPT, **SMALL, on_event=seen.append)
    assert [type(event) for event in seen] == [Step, Step, Decoding, Done], "parts and contexts are kept"
    assert isinstance(seen[-1], Done)
    assert seen[-1].result is result


def test_a_stream_that_is_left_does_not_switch_gradients_off(pipe: Pipeline) -> None:
    stream = pipe.stream(PROMPT, **SMALL)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", {}, "the prompt is empty"),
        (" \n", {}, "the prompt is empty"),
        ("red " * 10_000, {}, "the prompt has 10000 words, text encoder 'tiny' reads at most 32 tokens"),
        (PROMPT, {"negative_prompt": "red " * 33}, "the negative prompt has 33 words"),
        ("caf\udce9", {}, r"the prompt is no text in UTF-8: '\\udce9' at character 4"),
        (PROMPT, {"frames": 18}, "frames must be 1 \\+ a multiple of 4 for backbone 'tiny', got 18; nearest: 17"),
        (PROMPT, {"frames": 20}, "nearest: 21"),
        (PROMPT, {"frames": 0}, "nearest: 1"),
        (PROMPT, {"frames": -8}, "nearest: 1"),
        (PROMPT, {"size": (65, 64)}, "size 65x64 does not divide.*nearest: 64x64"),
        (PROMPT, {"size": (64, 8)}, "multiples of 16.*nearest: 64x16"),
        (PROMPT, {"size": (0, 64)}, "nearest: 16x64"),
        (PROMPT, {"steps": 0}, "steps must be at least 1 and at most 10000, got 0"),
        (PROMPT, {"steps": 10**19}, "steps must be at least 1 and at most 10000, got 1"),
        (PROMPT, {"size": (16 * 10**9, 16)}, "are too many: at most 1000000 frames of 65536 pixels a side"),
        (PROMPT, {"frames": 1 + 4 * 10**9}, "are too many"),
        (PROMPT, {"shift": 0.0}, "shift must be a positive number, got 0"),
        (PROMPT, {"guidance": -1.0}, "guidance must be 0 or more .*, got -1"),
        (PROMPT, {"guidance": float("nan")}, "guidance must be"),
        (PROMPT, {"seed": -1}, "seed must be between 0 and"),
    ],
)
def test_bad_settings_are_refused_at_once(pipe: Pipeline, prompt: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.stream(prompt, **settings)  # not even iterated


def test_nearest_suggestions_are_valid(pipe: Pipeline) -> None:
    for settings in ({"frames": 17}, {"frames": 21}, {"frames": 1}, {"size": (64, 16)}, {"size": (16, 64)}):
        pipe.stream(PROMPT, **settings)


def test_words_that_the_built_in_model_does_not_know_are_named(pipe: Pipeline, recwarn: pytest.WarningsRecorder) -> None:
    pipe.stream("A red circle moves LEFT on a black background.")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="does not know: elephant, slowly. It knows colours red, .*shapes circle, .*motions left"):
        pipe.stream("an elephant moves slowly")


def test_parts_may_be_specs_or_loaded_objects(pipe: Pipeline) -> None:
    expected = pipe(PROMPT, **SMALL).video
    vae = find("wan_vaes", "tiny")
    mixed = Pipeline(find("wan_models", "tiny"), vae=vae, text_encoder=find("wan_text_encoders", "tiny").load(), scheduler="unipc")
    assert torch.equal(mixed(PROMPT, **SMALL).video, expected)
    assert not torch.equal(Pipeline("tiny", scheduler=Euler())(PROMPT, **SMALL).video, expected)


def test_a_vae_that_breaks_its_promise_is_named() -> None:
    class Wrong:
        spec = replace(find("wan_vaes", "tiny"), name="wrong")

        def decode(self, latents: Tensor, *, generator: Any = None) -> Tensor:
            return latents[:, :3]

    with pytest.raises(
        ValueError, match=r"vae 'wrong' decoded \[1, \d+, 2, 2, 4\] to \[1, 3, 2, 2, 4\], its spec promises \[1, 3, 5, 16, 32\]"
    ):
        Pipeline("tiny", vae=Wrong())(PROMPT, **SMALL)


def test_weights_that_are_not_what_their_spec_says_are_found_before_denoising() -> None:
    promised = find("wan_vaes", "tiny")

    class Loaded:
        spec = replace(promised, name="other", latent_channels=5)

    class Promising:
        name, latent_space, latent_channels, stride = "x", promised.latent_space, promised.latent_channels, promised.stride

        def load(self, *, dtype: Any, device: Any) -> Loaded:
            return Loaded()

    events = Pipeline("tiny", vae=Promising()).stream(PROMPT, **SMALL)
    seen = []
    with pytest.raises(ValueError, match=r"vae 'other' does not fit backbone .*: its latent_channels is 5"):
        seen.extend(events)
    assert not any(isinstance(event, Step) for event in seen)


def test_streams_of_one_pipeline_may_be_interleaved(pipe: Pipeline) -> None:
    runs = [("a red circle moves left", {"seed": 1}), ("a blue star", {"seed": 2, "steps": 3}), (PROMPT, {"guidance": 1, "frames": 9})]
    alone = [pipe(prompt, **SMALL | settings).video for prompt, settings in runs]
    together = Pipeline("tiny")
    streams = [together.stream(prompt, **SMALL | settings) for prompt, settings in runs]
    results: dict[int, Tensor] = {}
    while len(results) < len(streams):
        for i, stream in enumerate(streams):
            if isinstance(event := next(stream, None), Done):
                results[i] = event.result.video
    assert all(torch.equal(results[i], expected) for i, expected in enumerate(alone))


def test_interleaved_streams_load_a_part_once(pipe: Pipeline) -> None:
    loads = []

    class Counting:
        name = "counting"

        def load(self, **options: Any) -> Any:
            loads.append(options)
            return inner.load(**options)

        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

    inner = find("wan_backbones", "tiny")
    together = Pipeline("tiny", backbone=Counting())
    for _ in zip(together.stream(PROMPT, **SMALL), together.stream("a blue star", **SMALL), strict=False):
        pass
    assert len(loads) == 1


@pytest.mark.parametrize(("part", "what"), [("text_encoder", "context"), ("backbone", "latents"), ("vae", "frames")])
@pytest.mark.parametrize(("dtype", "advice"), [("fp16", "in float16: try --dtype bf16 or fp32"), ("bf16", "in bfloat16: try --dtype fp32")])
def test_what_overflows_is_named_with_what_to_try(part: str, what: str, dtype: str, advice: str) -> None:
    kind = PART_KINDS[part]
    loaded = find(kind, "tiny").load(dtype=DTYPES[dtype])
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(float("inf"))  # weights of 0 become NaN, as a sum that overflows does
    with pytest.raises(ValueError, match=f"{part.replace('_', ' ')} '.*' made {what} that are NaN or infinite, {advice}"):
        Pipeline("tiny", **{part: loaded})(PROMPT, **SMALL)


def test_a_backbone_that_overflows_is_told_after_its_first_step() -> None:
    backbone = find("wan_backbones", "tiny").load()
    with torch.no_grad():
        backbone.head.proj.bias.mul_(float("nan"))
    seen = []
    with pytest.raises(ValueError, match="backbone 'tiny' made latents that are NaN"):
        seen.extend(Pipeline("tiny", backbone=backbone).stream(PROMPT, **SMALL))
    assert not any(isinstance(event, Step) for event in seen), "and no state of it is kept"


def test_a_result_is_saved_whole_and_replaces_nothing_unasked(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = pipe(PROMPT, **SMALL)
    (tmp_path / "package.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"package.json' exists: choose another name, or .*overwrite=True"):
        result.save(tmp_path / "package.mp4")
    assert [file.name for file in tmp_path.iterdir()] == ["package.json"]
    files = result.save(tmp_path / "a" / "b.mp4")
    assert [file.name for file in files] == ["b.mp4", "b.png", "b.json"]
    with pytest.raises(FileExistsError, match=r"b.mp4' exists"):
        result.save(files[0])
    files[0].write_bytes(b"old")
    assert result.save(files[0], overwrite=True) == files
    assert files[0].stat().st_size > 3
    before = [file.read_bytes() for file in files]
    for broken in ("wan_dit.media.contact_sheet", "wan_dit.manifest.Manifest"):
        with monkeypatch.context() as patch:
            patch.setattr(broken, lambda *_, **__: exec("raise OSError('disk full')"))
            for target in (tmp_path / "c.mp4", files[0]):
                with pytest.raises(OSError, match="disk full"):
                    result.save(target, overwrite=True)
    assert [file.read_bytes() for file in files] == before, "nothing is replaced by half a run"
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a", "b.json", "b.mp4", "b.png", "package.json"]


def test_bfloat16_weights_change_the_video_a_little(pipe: Pipeline) -> None:
    exact = pipe(PROMPT, **SMALL).video
    rough = Pipeline("tiny", dtype="bf16")(PROMPT, **SMALL)
    assert rough.manifest["dtype"] == "bfloat16"
    assert 0 < (rough.video - exact).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp4"}, "dtype 'fp4' is not one of fp32"),
        ({"dtype": torch.int64}, "dtype 'torch.int64' is not one of fp32"),
        ({"device": "toaster"}, "device 'toaster' cannot be used here: .*; the best there is: "),
        ({"device": "meta"}, "device 'meta' cannot be used here"),
    ],
)
def test_unknown_dtypes_and_devices(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pipeline("tiny", **options)


def test_another_authors_parts_are_used_by_name(acme: Any) -> None:
    events = list(Pipeline.from_pretrained("tiny", vae="acme", text_encoder="acme-wan:acme").stream(PROMPT, **SMALL))
    result = events[-1].result if isinstance(events[-1], Done) else None
    assert isinstance(result, Result)
    assert (result.video[..., 0, 0] == 1).all()
    assert (result.video[..., 1:8, :8] == -1).all()
    assert result.manifest["parts"]["vae"] == {"name": "acme", "dist": "acme-wan", "version": "1.0", "weights": None, "revision": None}


def test_a_lookup_uses_the_manager_it_is_given() -> None:
    pm = plugin_manager()
    pm.unregister(name="wan-vae")
    with pytest.raises(LookupError, match=r"no vae named 'wan-vae:tiny'.*pip install wan-vae"):
        Pipeline("tiny", pm=pm)
    Pipeline("tiny")
