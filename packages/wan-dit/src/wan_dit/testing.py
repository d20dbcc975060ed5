"""Conformance kits, as plain pytest classes: subclass one, name your plugin, run pytest.

Example:
    >>> class TestMine(BackboneContract):
    ...     plugin = "my-backbone"
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from .contracts import Schedule, Scheduler
from .plugins import find
from .schedulers.diffusers import as_scheduler
from .testing_speed import AttentionContract as AttentionContract
from .testing_speed import CacheContract as CacheContract


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over max(1, largest absolute value)."""
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1))


class BackboneContract:
    """What every backbone must do. `plugin` is a name, path or import string; or override `backbone`.

    grid: latents (frames, height, width) of the trial inputs, multiples of the patch
    tolerance: on `difference`, in fp32 on a CPU
    """

    plugin: ClassVar[str]
    grid: ClassVar[tuple[int, int, int]] = (3, 4, 4)
    tolerance: ClassVar[float] = 1e-5

    @pytest.fixture(scope="class")
    @classmethod
    def backbone(cls) -> Any:
        return find("wan_backbones", cls.plugin).load(dtype=torch.float32)

    def inputs(self, backbone: Any, batch: int = 2) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Random latents, timesteps that differ and prompts of different lengths."""
        spec, generator = backbone.spec, torch.Generator().manual_seed(0)
        latents = torch.randn(batch, spec.latent_channels, *self.grid, generator=generator)
        lengths = [min(3 + 4 * i, spec.text_len) for i in range(batch)]
        text = [torch.randn(length, spec.text_dim, generator=generator) for length in lengths]
        return latents, torch.tensor([900.0 - 321.5 * i for i in range(batch)]), text

    @torch.no_grad()
    def run(self, backbone: Any, latents: Tensor, timestep: Tensor, text: list[Tensor]) -> Tensor:
        return backbone(latents, timestep, backbone.encode_context(text))

    def test_spec_describes_the_model(self, backbone: Any) -> None:
        spec = backbone.spec
        assert spec.latent_space
        assert spec.embedding_space
        assert len(spec.stride) == len(spec.patch) == 3
        for size, patch in zip(self.grid, spec.patch, strict=True):
            assert size % patch == 0, f"grid {self.grid} must divide by the patch {spec.patch}"
        if getattr(self, "plugin", None):
            listed = find("wan_backbones", self.plugin)
            for name in ("latent_space", "latent_channels", "stride", "embedding_space", "text_dim", "text_len", "patch", "image_dim"):
                assert getattr(spec, name) == getattr(listed, name), f"{name} differs between the plugin's spec and the loaded model's"

    def test_velocity_has_the_shape_of_the_latents_in_fp32(self, backbone: Any) -> None:
        latents, timestep, text = self.inputs(backbone)
        velocity = self.run(backbone, latents, timestep, text)
        assert velocity.shape == latents.shape
        assert velocity.dtype == torch.float32
        assert velocity.isfinite().all()

    def test_a_batch_equals_its_samples(self, backbone: Any) -> None:
        latents, timestep, text = self.inputs(backbone)
        together = self.run(backbone, latents, timestep, text)
        for i in range(len(latents)):
            alone = self.run(backbone, latents[i : i + 1], timestep[i : i + 1], text[i : i + 1])
            assert difference(together[i : i + 1], alone) <= self.tolerance, f"sample {i} depends on its batch"

    def test_one_timestep_a_frame_equals_one_a_sample(self, backbone: Any) -> None:
        latents, timestep, text = self.inputs(backbone)
        expected = self.run(backbone, latents, timestep, text)
        got = self.run(backbone, latents, timestep[:, None].expand(-1, latents.shape[2]), text)
        assert difference(got, expected) <= self.tolerance

    def test_every_input_matters(self, backbone: Any) -> None:
        latents, timestep, text = self.inputs(backbone)
        expected = self.run(backbone, latents, timestep, text)
        for changed in (
            self.run(backbone, latents + 0.1, timestep, text),
            self.run(backbone, latents, timestep - 300, text),
            self.run(backbone, latents, timestep, [tokens.flip(-1) for tokens in text]),
        ):
            assert difference(changed, expected) > 10 * self.tolerance

    @torch.no_grad()
    def test_a_context_serves_all_steps(self, backbone: Any) -> None:
        latents, timestep, text = self.inputs(backbone)
        context = backbone.encode_context(text)
        for step in (timestep, timestep - 200, timestep):
            assert torch.equal(backbone(latents, step, context), self.run(backbone, latents, step, text))

    def test_the_same_call_gives_the_same_bits(self, backbone: Any) -> None:
        assert torch.equal(self.run(backbone, *self.inputs(backbone)), self.run(backbone, *self.inputs(backbone)))

    def test_gradients_reach_latents_and_text(self, backbone: Any) -> None:
        latents, timestep, text = self.inputs(backbone)
        leaves = [latents.requires_grad_(), *(tokens.requires_grad_() for tokens in text)]
        velocity = backbone(latents, timestep, backbone.encode_context(text))
        for grad in torch.autograd.grad(velocity.square().mean(), leaves):
            assert grad.abs().max() > 0

    def test_a_saved_model_loads_to_the_same_bits(self, backbone: Any, tmp_path: Path) -> None:
        backbone.save_pretrained(tmp_path / "saved")
        again = type(backbone).from_pretrained(tmp_path / "saved", dtype=torch.float32)
        assert torch.equal(self.run(again, *self.inputs(backbone)), self.run(backbone, *self.inputs(backbone)))


class StepListContract:
    """What every scheduler must do, one of a fixed list of steps or with fresh noise too. `plugin` is a name or an import string; or
    override `make`.

    runs: the (steps, shift) it is tried with; of a fixed list its own
    tolerance: on `difference` to the known end of a flow
    """

    plugin: ClassVar[str]
    runs: ClassVar[tuple[tuple[int, float], ...]]
    tolerance: ClassVar[float] = 1e-5

    def make(self) -> Scheduler:
        return as_scheduler(find("wan_schedulers", self.plugin).load())

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Noise and data, `[1, 4, 2, 3, 4]`."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, 4, 2, 3, 4, generator=generator), 3 * torch.randn(1, 4, 2, 3, 4, generator=generator)

    def evaluate(self, scheduler: Scheduler, state: dict[str, Any], schedule: Schedule, sample: Tensor) -> Tensor:
        """One evaluation of a made-up curved flow, and the step it leads to."""
        i = state["i"]
        velocity = torch.sin(3 * sample) * (0.5 + schedule.timesteps[i].float() / 1000) + 0.1 * sample
        return scheduler.step(state, velocity, sample, torch.Generator().manual_seed(i))

    def trajectory(self, scheduler: Scheduler, steps: int, shift: float, sample: Tensor) -> list[Tensor]:
        schedule = scheduler.schedule(steps, shift)
        state, samples = scheduler.start(schedule), [sample]
        for _ in schedule.timesteps:
            samples.append(self.evaluate(scheduler, state, schedule, samples[-1]))
        return samples

    def test_sigmas_fall_from_noise_to_zero(self) -> None:
        for steps, shift in self.runs:
            sigmas = self.make().schedule(steps, shift).sigmas
            assert sigmas.dtype == torch.float32, f"sigmas must be float32, not {sigmas.dtype}"
            assert sigmas.dim() == 1
            assert len(sigmas) >= steps + 1
            assert 0.9 < sigmas[0] <= 1, f"the first sigma is {sigmas[0]}, not noise (1)"
            assert sigmas[-1] == 0, "the last sigma is 0, where nothing is left of the noise"
            assert (sigmas[:-1] > 0).all(), "only the last sigma is 0"
            assert (sigmas[1:] <= sigmas[:-1]).all(), "sigmas must not rise"

    def test_timesteps_are_a_thousand_sigmas(self) -> None:
        for steps, shift in self.runs:
            schedule = self.make().schedule(steps, shift)
            assert schedule.timesteps.shape == schedule.sigmas[:-1].shape, "one timestep an evaluation, and one sigma more"
            assert (schedule.timesteps >= 0).all()
            assert (schedule.timesteps <= 1000).all()
            assert (schedule.timesteps - 1000 * schedule.sigmas[:-1]).abs().max() <= 1, "timesteps are 1000 * sigma, truncated at most"

    def test_the_data_a_model_is_sure_of_is_reached(self) -> None:
        noise, data = self.inputs()
        for steps, shift in self.runs:
            scheduler = self.make()
            schedule = scheduler.schedule(steps, shift)
            state, sample = scheduler.start(schedule), noise * schedule.noise_scale
            for i, sigma in enumerate(schedule.sigmas[:-1]):
                sample = scheduler.step(state, (sample - data) / sigma, sample, torch.Generator().manual_seed(i))
            error = difference(sample, data)
            assert error <= self.tolerance, f"{steps} steps, shift {shift:g}: off by {error:.2g}"

    def test_a_step_advances_and_changes_only_the_state(self) -> None:
        scheduler = self.make()
        schedule = scheduler.schedule(*self.runs[-1])
        state, sample = scheduler.start(schedule), self.inputs()[0]
        assert state["i"] == 0
        for i in range(len(schedule.timesteps)):
            velocity = torch.sin(sample)
            given = sample.clone(), velocity.clone()
            result = scheduler.step(state, velocity, sample)
            assert state["i"] == i + 1, "step must advance state['i'] by one"
            for tensor, copy in zip((sample, velocity), given, strict=True):
                assert torch.equal(tensor, copy), "step must not write into its inputs"
            assert (result.shape, result.dtype) == (sample.shape, sample.dtype)
            assert result.isfinite().all()
            sample = result

    def test_interleaved_requests_do_not_meet(self) -> None:
        requests = [(*run, sign * self.inputs()[0]) for run, sign in zip((self.runs * 2)[-2:], (1, -1), strict=True)]
        alone = [self.trajectory(self.make(), *request)[-1] for request in requests]
        scheduler = self.make()
        schedules = [scheduler.schedule(steps, shift) for steps, shift, _ in requests]
        states, samples = [scheduler.start(schedule) for schedule in schedules], [request[-1] for request in requests]
        for i in range(max(len(schedule.timesteps) for schedule in schedules)):
            for k, schedule in enumerate(schedules):
                if i < len(schedule.timesteps):
                    samples[k] = self.evaluate(scheduler, states[k], schedule, samples[k])
        for got, expected in zip(samples, alone, strict=True):
            assert torch.equal(got, expected), "the scheduler keeps something of a request on itself"

    def test_a_saved_state_resumes_to_the_same_bits(self) -> None:
        scheduler, run = self.make(), self.runs[-1]
        schedule, expected = scheduler.schedule(*run), self.trajectory(scheduler, *run, self.inputs()[0])
        state, sample = scheduler.start(schedule), expected[0]
        for i in range(len(schedule.timesteps)):
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state, fresh = torch.load(file, weights_only=True), self.make()
            sample = self.evaluate(fresh, state, schedule, sample)
            assert torch.equal(sample, expected[i + 1]), f"a state saved at i = {i} does not resume"


class SchedulerContract(StepListContract):
    """What every deterministic scheduler must do that runs any number of steps.

    order: of the method, 2 where half the step leaves a quarter of the error
    """

    runs: ClassVar[tuple[tuple[int, float], ...]] = ((1, 1.0), (2, 5.0), (7, 3.0), (16, 12.0))
    order: ClassVar[int] = 1

    def test_shift_moves_the_grid_towards_noise(self) -> None:
        plain, shifted = self.make().schedule(8, 1.0).sigmas, self.make().schedule(8, 6.0).sigmas
        assert plain.shape == shifted.shape
        assert (shifted[1:-1] > plain[1:-1]).all()

    def test_straight_flow_is_exact_at_every_sigma(self) -> None:
        noise, data = self.inputs()
        for steps, shift in self.runs:
            scheduler = self.make()
            schedule = scheduler.schedule(steps, shift)
            state, sample = scheduler.start(schedule), torch.lerp(data, noise, schedule.sigmas[0].item())
            for i, sigma in enumerate(schedule.sigmas[1:].tolist()):
                sample = scheduler.step(state, noise - data, sample)
                error = difference(sample, torch.lerp(data, noise, sigma))
                assert error <= self.tolerance, (
                    f"{steps} steps, shift {shift:g}: off by {error:.2g} after evaluation {i}, at sigma {sigma:.4g}"
                )

    def curved_flow_errors(self, steps: int, shift: float) -> tuple[Tensor, Tensor]:
        """Sigmas after each evaluation, and there the difference to the exact sample, where the data are drawn from N(0, 1/4): that
        flow scales every sample by the standard deviation at its sigma."""

        def deviation(sigma: Tensor) -> Tensor:
            return ((1 - sigma) ** 2 / 4 + sigma**2).sqrt()

        scheduler = self.make()
        schedule = scheduler.schedule(steps, shift)
        state, noise = scheduler.start(schedule), self.inputs()[0]
        sample, errors = noise, []
        for sigma, following in zip(schedule.sigmas[:-1], schedule.sigmas[1:], strict=True):
            sample = scheduler.step(state, sample * (sigma - (1 - sigma) / 4) / deviation(sigma) ** 2, sample)
            errors.append(difference(sample, noise * deviation(following) / deviation(schedule.sigmas[0])))
        return schedule.sigmas[1:], torch.tensor(errors)

    def test_more_steps_come_closer_on_a_curved_flow(self) -> None:
        few, many = (float(self.curved_flow_errors(steps, 3.0)[1][-1]) for steps in (6, 96))
        assert many < 0.05, f"off by {many:.2g} after 96 steps"
        assert many < few / 4, f"off by {few:.2g} after 6 steps and {many:.2g} after 96"

    def test_the_error_falls_with_the_order(self) -> None:
        """Down to sigma 0.2: below, steps are large in log(sigma), and many solvers take a last one of order 1."""
        worst = []
        for steps in (40, 80):
            sigmas, errors = self.curved_flow_errors(steps, 1.0)
            worst.append(float(errors[sigmas >= 0.2].max()))
        assert worst[1] < worst[0] * 1.25 / 2**self.order, (
            f"off by {worst[0]:.2g} after 40 steps and {worst[1]:.2g} after 80: not of order {self.order}"
        )
