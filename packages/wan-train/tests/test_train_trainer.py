"""The training loop on models of a few thousand weights: it learns, resumes to the bit, survives a kill, and leaves what it says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from wan_dit import Pipeline
from wan_train import TrainConfig, Trainer
from wan_train.data.shapes import Shapes
from wan_train.plugins import find
from wan_train.randomness import generator
from wan_train.store import shards
from wan_train.store.manifest import VALUES, folder_name, steps

Recipe = Callable[..., TrainConfig]

AWKWARD = '''
"""The shapes, whose clips stall or break at one call."""
import time
from pathlib import Path

from wan_train.data.shapes import Shapes


class Awkward(Shapes):
    def __init__(self, stall_at=0, break_at=0, marker="", **settings):
        super().__init__(**settings)
        self.calls, self.stall_at, self.break_at, self.marker = 0, stall_at, break_at, marker

    def video(self, indices):
        self.calls += 1
        if self.calls == self.stall_at:
            Path(self.marker).touch()
            time.sleep(600)
        video = super().video(indices)
        return video * float("inf") if self.calls == self.break_at else video
'''


@pytest.fixture(params=["vae", "flow"])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return request.getfixturevalue(f"{request.param}_recipe")


@pytest.fixture
def awkward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a module with the data set `awkward:Awkward`."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "awkward.py").write_text(AWKWARD)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log without the times."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def newest(output: Path) -> Path:
    """The folder of a run's last checkpoint."""
    return output / "checkpoints" / folder_name(steps(output / "checkpoints")[0])


def saved(output: Path) -> dict[str, Any]:
    """Every tensor and value of a run's last checkpoint, by its path."""
    return {**shards.read_whole(newest(output), ""), **json.loads((newest(output) / VALUES).read_text())}


def differences(first: Path, second: Path) -> set[str]:
    """The parts of two runs' checkpoints that are not equal to the bit."""
    a, b = saved(first), saved(second)
    assert set(a) == set(b)
    same = {name: torch.equal(a[name], b[name]) if isinstance(a[name], Tensor) else a[name] == b[name] for name in a}
    return {name.split("/")[0] for name, equal in same.items() if not equal}


def exported(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted((folder / "export").rglob("*")) if file.is_file()}


@pytest.mark.parametrize("lr", [1e-2, 1e-12])
def test_the_loss_falls(recipe: Recipe, lr: float) -> None:
    trainer = Trainer(recipe("steps=16", f"optimiser.lr={lr}", f"optimiser.muon_lr={4 * lr}", "save_every=0"))

    @torch.no_grad()
    def loss() -> float:
        found = []
        for seed in range(4):
            batch = trainer.objective.batch(range(3), lambda sample, stream, seed=seed: generator(seed, 0, sample, stream), 0.0)
            found.append(trainer.objective.losses(batch)[0].mean().item())
        return sum(found) / 4

    trainer.objective.prepare()
    before = loss()
    trainer.run()
    assert (loss() < 0.8 * before) is (lr > 1e-6)  # and does not where nothing is learned


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_ends_with_the_same_bits(recipe: Recipe, tmp_path: Path, precision: str) -> None:
    settings = [f"precision={precision}", "optimiser.schedule=cosine", "optimiser.warmup=2", "preview_every=6"]
    whole, half = recipe(*settings, f"output={tmp_path / 'whole'}"), recipe(*settings, f"output={tmp_path / 'half'}")
    Trainer(whole).run()
    Trainer(half).run(until=3)
    assert [record["step"] for record in lines(half.output)] == [1, 2, 3]
    assert not (half.output / "export").exists()
    torch.manual_seed(123)  # a new process has another state
    Trainer(half).run(resume=True)
    assert differences(whole.output, half.output) == set()
    assert lines(whole.output) == lines(half.output)
    assert exported(whole.output) == exported(half.output)
    assert (whole.output / "previews" / "000006.png").read_bytes() == (half.output / "previews" / "000006.png").read_bytes()


def test_a_resume_restores_the_random_state_that_parts_may_draw_from(vae_recipe: Recipe) -> None:
    config = vae_recipe()
    Trainer(config).run(until=3)
    state = torch.get_rng_state()
    torch.rand(3)
    Trainer(config).run(resume=True, until=3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("forgotten", ["optimisers", "ema", "seed", "taken"])
def test_a_resume_that_forgets_something_ends_with_other_bits(
    vae_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    whole, half = vae_recipe(f"output={tmp_path / 'whole'}"), vae_recipe(f"output={tmp_path / 'half'}")
    Trainer(whole).run()
    Trainer(half).run(until=3)
    resumed = Trainer(half if forgotten != "seed" else vae_recipe(f"output={tmp_path / 'half'}", "seed=1"))
    take_up = resumed._take_up

    def forgetful(store: Any) -> None:
        before = {name: {key: value.clone() for key, value in state.items()} for name, state in resumed.ema.state.items()}
        take_up(store)
        if forgotten == "ema":
            for name, state in resumed.ema.state.items():
                for key, value in state.items():
                    value.copy_(before[name][key])
        if forgotten == "optimisers":
            for optimiser, _ in resumed.optimiser.parts:
                optimiser.state.clear()
        if forgotten == "taken":
            resumed.curriculum.taken = 0

    monkeypatch.setattr(resumed, "_take_up", forgetful)
    resumed.run(resume=True)
    changed = differences(whole.output, half.output)
    assert changed >= ({"ema"} if forgotten == "ema" else {"modules", "ema", "optimisers"})


def test_a_killed_run_resumes_to_the_bits_of_one_that_was_not(vae_toml: Path, vae_recipe: Recipe, tmp_path: Path, awkward: Path) -> None:
    marker, killed, whole = tmp_path / "stalled", tmp_path / "killed", tmp_path / "whole"
    data = ["data.name=awkward:Awkward", "save_every=2"]
    stall = [f"data.settings.marker={marker}", "data.settings.stall_at=7"]  # one call at the start and one a step: within step 6
    command = [sys.executable, "-m", "wan_train", "run", str(vae_toml), *data, *stall, f"output={killed}"]
    with subprocess.Popen(command, env={"PYTHONPATH": str(awkward), "PATH": "", "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE) as process:
        try:
            while not (marker.exists() and (killed / "checkpoints" / folder_name(4)).exists()):  # which is written in the background
                assert process.poll() is None, process.stderr and process.stderr.read().decode()
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert newest(killed).name == folder_name(4)
    assert [record["step"] for record in lines(killed)] == [1, 2, 3, 4, 5]
    Trainer(vae_recipe(*data, f"output={killed}")).run(resume=True)
    Trainer(vae_recipe(*data, f"output={whole}")).run()
    assert [record["step"] for record in lines(killed)] == [1, 2, 3, 4, 5, 6]
    assert lines(killed) == lines(whole)
    assert differences(whole, killed) == set()
    assert exported(whole) == exported(killed)


def points(folder: Path, name: str = "loss") -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_logs_have_each_step_once_after_a_resume(vae_recipe: Recipe) -> None:
    config = vae_recipe("save_every=2")
    Trainer(config).run(until=3)
    with pytest.raises(ValueError, match="holds a run"):
        Trainer(config).run(until=5)
    Trainer(config).run(until=5, overwrite=True)  # from the start again, into the same folder
    assert newest(config.output).name == folder_name(5)
    with (config.output / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "loss": 0.5}\n{"step": 7, "lo')  # of a step that was not saved, and one cut short by a kill
    Trainer(config).run(resume=True)
    assert [record["step"] for record in lines(config.output)] == [1, 2, 3, 4, 5, 6]
    assert lines(config.output)[5]["loss"] != 0.5
    assert [step for step, _ in points(config.output)] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in points(config.output)] == pytest.approx([record["loss"] for record in lines(config.output)], abs=1e-5)


def test_figures_are_logged_when_they_are_due(vae_recipe: Recipe) -> None:
    config = vae_recipe("log_every=2", "preview_every=4", "save_every=4", "steps=5", "optimiser.warmup=10")
    Trainer(config).run()
    records = lines(config.output)
    assert [record["step"] for record in records if "loss" in record] == [2, 4, 5]
    assert [record["step"] for record in records if "val_psnr" in record] == [4, 5]
    assert [record["lr_share"] for record in records if "loss" in record] == pytest.approx([0.2, 0.4, 0.5])
    assert {"loss", "l1", "kl", "psnr", "grad_norm", "lr_share", "step"} == set(records[0])
    assert newest(config.output).name == folder_name(5)
    assert json.loads((config.output / "config.json").read_text())["steps"] == 5


def test_a_preview_is_a_grid_of_clips_by_frames(vae_recipe: Recipe) -> None:
    config = vae_recipe("preview_every=2", "steps=3", "ema=0")
    trainer = Trainer(config)
    modes: list[bool] = []
    preview = trainer.objective.preview

    def watched(modules: dict[str, Any], indices: Any) -> Any:
        modes.append(modules["vae"].training)
        return preview(modules, indices)

    trainer.objective.preview = watched  # type: ignore[method-assign]
    trainer.run()
    assert modes == [False, False]  # without averages the live model is previewed, in eval mode
    assert trainer.objective.modules["vae"].training
    assert sorted(file.name for file in (config.output / "previews").iterdir()) == ["000002.png", "000003.png"]
    with Image.open(config.output / "previews" / "000002.png") as sheet:
        tile, gap = 160, 4  # 16 pixels, enlarged
        assert sheet.size == (6 * (tile + gap) + gap, 4 * (tile + gap) + gap)  # 2 clips, 2 reconstructions, 6 frames of each
        clip = Shapes(frames=5, size=(16, 16), length=4).video([4])[0]
        for column, frame in enumerate((0, 1, 2, 2, 3, 4)):
            left = gap + column * (tile + gap)
            expected = ((clip[:, frame, 5, 8] + 1) * 127.5).round().tolist()
            assert sheet.getpixel((left + 85, gap + 55)) == tuple(int(value) for value in expected)


def test_the_export_of_a_vae_is_its_averaged_weights(vae_recipe: Recipe) -> None:
    config = vae_recipe()
    folder = Trainer(config).run()
    assert folder == config.output / "export"
    own = find("wan_vaes", str(folder / "vae")).load().state_dict()
    averaged, live = (shards.read_whole(newest(config.output), f"{kind}/vae/") for kind in ("ema", "modules"))
    assert all(torch.equal(own[name], value.half().float()) for name, value in averaged.items())
    assert not all(torch.equal(own[name], value.half().float()) for name, value in live.items())


def test_the_exported_parts_of_a_text_to_video_run_generate(flow_recipe: Recipe, micro_vae: Path) -> None:
    config = flow_recipe("optimiser.lr=0.01")
    folder = Trainer(config).run()
    for part, kind in (("backbone", "wan_backbones"), ("text_encoder", "wan_text_encoders")):
        own = find(kind, str(folder / part)).load().state_dict()
        averaged, live = (shards.read_whole(newest(config.output), f"{state}/{part}/") for state in ("ema", "modules"))
        assert all(torch.equal(own[name], value.half().float()) for name, value in averaged.items())
        assert not all(torch.equal(own[name], value.half().float()) for name, value in live.items())
    parts = {"vae": str(micro_vae), "backbone": str(folder / "backbone"), "text_encoder": str(folder / "text_encoder")}
    result = Pipeline("tiny", **parts)("a red circle moves left", steps=2, frames=5, size=(16, 16))
    assert result.video.shape == (1, 3, 5, 16, 16)


def test_a_frozen_text_encoder_is_not_exported(flow_recipe: Recipe) -> None:
    config = flow_recipe("steps=1", "objective.settings.train_text_encoder=false", "objective.settings.text_architecture={}")
    assert [file.name for file in Trainer(config).run().iterdir()] == ["backbone"]


def test_a_second_run_reuses_the_latents(flow_recipe: Recipe) -> None:
    config = flow_recipe("steps=1")
    Trainer(config).run()
    files = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (config.output / "cache").rglob("*") if path.is_file()}
    assert files
    Trainer(config).run(resume=True)
    again = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (config.output / "cache").rglob("*") if path.is_file()}
    assert again == files


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change(vae_recipe: Recipe, awkward: Path) -> None:
    never = ["guard.skips=0", "guard.rollbacks=0"]
    config = vae_recipe("data.name=awkward:Awkward", "data.settings.break_at=4", "save_every=1", "log_every=1", *never)
    trainer = Trainer(config)
    with pytest.raises(ValueError, match=r"^the loss is (nan|inf) at step 3: lower optimiser\.lr.*--resume$"):
        trainer.run()
    assert newest(config.output).name == folder_name(2)
    kept = shards.read_whole(newest(config.output), "modules/vae/")
    assert all(torch.equal(kept[name], value) for name, value in trainer.ema.live["vae"].items())
    assert all(value.isfinite().all() for value in kept.values())
    assert [record["step"] for record in lines(config.output)] == [1, 2]


@pytest.mark.parametrize(
    ("limits", "seen", "told"),
    [
        (["guard.skips=1", "save_every=1"], [1, 2, 3, 4, 5, 6], "at step 3: left out"),
        (["guard.skips=1", "save_every=0"], [1, 2, 3, 4, 5, 6], "at step 3: left out"),
        (["guard.skips=0", "save_every=1"], [1, 2, 2, 3, 4, 5, 6], "at step 3: taken back to step 2"),
    ],
)
def test_a_step_that_goes_wrong_is_left_out_or_taken_back(
    vae_recipe: Recipe, awkward: Path, limits: list[str], seen: list[int], told: str
) -> None:
    config = vae_recipe("data.name=awkward:Awkward", "data.settings.break_at=4", "log_every=1", *limits)
    trainer = Trainer(config)
    with pytest.warns(UserWarning, match=rf"^the loss is (nan|inf) {told}$"):
        trainer.run()
    assert [record["step"] for record in lines(config.output)] == seen
    assert (trainer.step, trainer.curriculum.taken) == (6, 2 * (len(seen)))
    assert all(value.isfinite().all() for value in trainer.ema.live["vae"].values())
    if config.save_every:
        assert all(value.isfinite().all() for value in shards.read_whole(newest(config.output), "").values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps=2"], r"is at step 3, past the 2 steps of this recipe"),
        (["objective.settings.architecture.z_dim=6"], r"resume a run with the settings it was started with"),
        (["optimiser.name=adamw"], r"resume a run with the settings it was started with"),
        (["output=nowhere"], r"no checkpoint in 'nowhere/checkpoints': start the run without --resume"),
    ],
)
def test_a_resume_that_does_not_fit_says_so(
    vae_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Trainer(vae_recipe()).run(until=3)
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises((ValueError, OSError), match=message) as caught:
        Trainer(vae_recipe(*overrides)).run(resume=True)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    assert not Path("nowhere").exists()


def test_what_the_machine_or_the_data_cannot_do_is_said_at_once(vae_recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=r"device 'nowhere' cannot be used here: .*"):
        Trainer(vae_recipe("device=nowhere"))
    with pytest.raises(ValueError, match=r"data\.settings of 'shapes': .*'colour'"):
        Trainer(vae_recipe("data.settings.colour=red"))
    with pytest.raises(LookupError, match=r"no dataset named 'shape'.*did you mean 'shapes'"):
        Trainer(vae_recipe("data.name=shape"))
    with pytest.raises(LookupError, match=r"no objective named 'vea'.*did you mean 'vae'"):
        Trainer(vae_recipe("objective.name=vea"))
