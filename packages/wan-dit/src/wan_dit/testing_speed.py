"""Conformance kits of caches and of attentions, offered by `wan_dit.testing`. Both run the built-in backbone on a CPU."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from .attentions import probe
from .caching import Trial, find_cache, measured_error
from .contracts import CacheRun
from .guidance import guided_velocity
from .parallel.lse import PlainLse, returns_lse
from .plugins import find, load_backbone


class CacheContract:
    """What every cache must do.

    plugin: the cache with settings, as a person types it, under which it leaves something out in a run of 8 steps
    off: the same with settings under which it leaves nothing out
    """

    plugin: ClassVar[str]
    off: ClassVar[str]
    steps: ClassVar[int] = 8

    @pytest.fixture(scope="class")
    @classmethod
    def trial(cls) -> Trial:
        return cls.make_trial()

    @classmethod
    def make_trial(cls) -> Trial:
        backbone, scheduler = load_backbone("wan-dit:tiny"), find("wan_schedulers", "wan-dit:euler").load()
        generator = torch.Generator().manual_seed(0)
        text = [torch.randn(length, backbone.spec.text_dim, generator=generator) for length in (7, 2)]
        with torch.no_grad():
            context, negative = (backbone.encode_context([tokens]) for tokens in text)
        noise = torch.randn(1, backbone.spec.latent_channels, 2, 4, 6, generator=generator)
        return Trial(backbone, scheduler, scheduler.schedule(cls.steps, 2.0), noise, context, negative, 3.0)

    def start(self, trial: Trial) -> CacheRun:
        return find_cache(self.plugin).start(trial.schedule.timesteps)

    @torch.no_grad()
    def velocities(
        self, trial: Trial, run: CacheRun, steps: range, expert: str = "high", guided: Callable[..., Tensor] = guided_velocity
    ) -> list[Tensor]:
        """At latents that do not depend on the cache."""
        velocities = []
        for step in steps:
            latents = torch.lerp(trial.noise, trial.noise.flip(-1), step / self.steps / 4)
            given = latents, trial.schedule.timesteps[step].float().reshape(1), trial.context, trial.negative_context, trial.scale
            velocities.append(run.velocity(trial.backbone, *given, step=step, expert=expert, guided=guided))
        return velocities

    def test_off_is_the_uncached_run_to_the_bit(self, trial: Trial) -> None:
        measured = measured_error(find_cache(self.off), trial)
        assert measured.report["skipped"] == 0
        assert measured.error == 0
        assert torch.equal(trial.latents(find_cache(self.off).start(trial.schedule.timesteps)), trial.latents())

    def test_something_is_left_out_and_counted(self, trial: Trial) -> None:
        measured = measured_error(find_cache(self.plugin), trial)
        report = measured.report
        assert report["evaluations"] == 2 * self.steps
        assert 0 < report["skipped"] < report["evaluations"]
        for name in ("evaluations", "skipped"):
            assert sum(counts[name] for counts in report["branches"].values()) == report[name]
        assert 0 < measured.error < 1, f"relative error {measured.error:.2g}"

    def test_branches_of_guidance_do_not_meet(self, trial: Trial) -> None:
        def prompt_only(forward: Any, latents: Tensor, timestep: Tensor, context: Any, negative: Any, scale: float, given: Any) -> Tensor:
            velocity: Tensor = forward(latents, timestep, context, given)
            if negative is not None:
                forward(latents, timestep, negative, given)
            return velocity

        expected, got = (
            self.velocities(each, self.start(trial), range(self.steps), guided=prompt_only)
            for each in (trial, replace(trial, negative_context=trial.context))
        )
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a, b), "what the prompt gives depends on the negative prompt"

    def test_another_expert_starts_anew(self, trial: Trial) -> None:
        run, switch = self.start(trial), self.steps - 2
        self.velocities(trial, run, range(switch))
        (got,) = self.velocities(trial, run, range(switch, switch + 1), expert="low")
        (expected,) = self.velocities(trial, find_cache(self.off).start(trial.schedule.timesteps), range(switch, switch + 1))
        assert torch.equal(got, expected), "the first evaluation of an expert has to be computed"

    def test_requests_of_one_cache_do_not_meet(self, trial: Trial) -> None:
        assert trial.negative_context is not None
        trials, cache = (trial, replace(trial, context=trial.negative_context, negative_context=trial.context)), find_cache(self.plugin)
        runs = [cache.start(trial.schedule.timesteps) for _ in trials]
        expected = [self.velocities(each, self.start(trial), range(self.steps)) for each in trials]
        for step in range(self.steps):
            for each, run, alone in zip(trials, runs, expected, strict=True):
                (got,) = self.velocities(each, run, range(step, step + 1))
                assert torch.equal(got, alone[step]), "the cache keeps something of a request on itself"

    def test_a_saved_run_goes_on_to_the_same_bits(self, trial: Trial) -> None:
        expected, run = self.velocities(trial, whole := self.start(trial), range(self.steps)), self.start(trial)
        for step in range(self.steps):
            file = io.BytesIO()
            torch.save(run.state_dict(), file)
            file.seek(0)
            run = self.start(trial)
            run.load_state_dict(torch.load(file, weights_only=True))
            (got,) = self.velocities(trial, run, range(step, step + 1))
            assert torch.equal(got, expected[step]), f"a run saved before evaluation {step} does not resume"
        assert run.report() == whole.report()


class AttentionContract:
    """What every attention must do, on a CPU in fp32. `plugin` is a name or an import string."""

    plugin: ClassVar[str]

    def tensors(self, batch: int, tokens: int, heads: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(batch, tokens, heads, 32, generator=generator) for _ in range(3))

    def tolerance(self) -> float:
        return getattr(find("wan_attentions", self.plugin), "tolerance", None) or 1e-5

    def close(self, got: Tensor, expected: Tensor) -> bool:
        return bool((got - expected).norm() <= self.tolerance() * expected.norm())

    def test_it_is_exact_within_its_tolerance(self) -> None:
        spec = find("wan_attentions", self.plugin)
        probe(spec, spec.resolve(), load_backbone("wan-dit:tiny").trunk.blocks[0].self_attn)

    def test_samples_and_heads_are_apart(self) -> None:
        attend, qkv = find("wan_attentions", self.plugin).resolve(), self.tensors(2, 33, 4)
        whole = attend(*qkv)
        assert self.close(attend(*(x[1:] for x in qkv)), whole[1:])
        assert self.close(attend(*(x[:, :, 2:].contiguous() for x in qkv)), whole[:, :, 2:]), "Ulysses gives a process some of the heads"

    def test_inputs_stay_as_they_are(self) -> None:
        qkv = self.tensors(1, 17, 2)
        copies = [x.clone() for x in qkv]
        find("wan_attentions", self.plugin).resolve()(*qkv)
        assert all(torch.equal(x, copy) for x, copy in zip(qkv, copies, strict=True))

    def test_fewer_keys_than_queries(self) -> None:
        """As where parallel attention has cut off padding."""
        q, k, v = self.tensors(1, 24, 2)
        got = find("wan_attentions", self.plugin).resolve()(q, k[:, :19], v[:, :19])
        assert self.close(got, PlainLse().forward(q, k[:, :19], v[:, :19])[0])

    def test_its_log_sum_exp_merges_parts(self) -> None:
        attend = find("wan_attentions", self.plugin).resolve()
        if not returns_lse(attend):
            pytest.skip("it returns none")
        q, k, v = self.tensors(1, 21, 2)
        (first, lse), (second, other) = (attend(q, k[:, part], v[:, part], with_lse=True) for part in (slice(9), slice(9, None)))
        both = torch.logaddexp(lse, other)
        merged = first * (lse - both).exp()[..., None] + second * (other - both).exp()[..., None]
        assert self.close(merged, attend(q, k, v))
