"""One adapter for the flow-matching schedulers of diffusers, which is not imported: signatures say what a class takes.

The run's shift is applied once. A scheduler whose `set_timesteps` takes `sigmas` is built with shift 1 and given our
shifted grid; one that does not take them gets the shift in its constructor, runs on its own grid, and a warning says so.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contracts import Schedule, Scheduler
from .schedule import Grid, linear_sigmas, make_schedule, next_index, shift_sigmas, start_state, training_sigmas

# what makes a multistep solver of diffusers one for flow matching
FLOW_FIELDS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# the schedulers of diffusers whose solver is one of ours, by the name of ours
OURS = {
    "UniPCMultistepScheduler": "unipc",
    "DPMSolverMultistepScheduler": "dpm++",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "FlowMatchLCMScheduler": "lcm",
}


def config_differences(config: Mapping[str, Any], *, scheduler: str, shift: float) -> list[str]:
    """How the `scheduler_config.json` of a pipeline folder, parsed, differs from what the model is run with; a line each.

    scheduler, shift: registered name and shift of the run, which are the ones used: converted folders often carry the converter's
    settings, as shift 3 for Wan2.2 T2V-A14B. Its own 12 gives the high-noise expert 26 of 40 steps, 3 gives it 12.
    ValueError where the file names no class or its shift is not a positive number.
    """
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"a scheduler_config.json names its class in `_class_name`, got {name!r}: is it the right file?")
    if other := [f"{field} {config[field]!r}" for field, flow in FLOW_FIELDS.items() if config.get(field, flow) != flow]:
        return [f"{name} in scheduler_config.json has {' and '.join(other)}, which is not flow matching; {scheduler} is used"]
    lines = []
    if OURS.get(name) != scheduler:
        same = f" (here: {OURS[name]})" if name in OURS else ""
        lines.append(f"{name}{same} in scheduler_config.json, {scheduler} is used")
    written = config.get("flow_shift", config.get("shift", 1.0))  # 1: diffusers' own default
    if isinstance(written, bool) or not isinstance(written, int | float) or not 0 < written < float("inf"):
        raise ValueError(f"the shift of scheduler_config.json is {written!r}; it must be a positive number")
    if config.get("use_dynamic_shifting"):
        lines.append(f"a shift that depends on the size in scheduler_config.json, the model's official shift {shift:g} is used")
    elif written != shift:
        lines.append(f"shift {written:g} in scheduler_config.json, the model's official shift {shift:g} is used")
    return lines


def as_scheduler(scheduler: Any) -> Scheduler:
    """A scheduler of this package's protocol: as given where it has `schedule`, `start` and `step`, else adapted.

    Takes an instance or a class. ValueError where it is neither ours nor a flow-matching scheduler of diffusers.
    """
    if all(callable(getattr(scheduler, name, None)) for name in ("schedule", "start", "step")):
        return scheduler() if isinstance(scheduler, type) else scheduler
    return DiffusersScheduler(scheduler)


class DiffusersScheduler:
    """A diffusers scheduler without state: what it would keep on itself lies in `state["solver"]`.

    scheduler: a class or an instance, of which only the configuration is used
    config: constructor fields to set, such as `solver_order=3`

    Its own shift is not used, since the run brings one. A state holds plain values (tensors, numbers, None, lists of
    them), so `torch.save` writes it and `torch.load(weights_only=True)` reads it; only a solver that rewrites its own
    configuration (DPMSolverSinglestepScheduler, unless `lower_order_final=True`) adds that to it.
    """

    def __init__(self, scheduler: Any, **config: Any) -> None:
        self._class = _class_of(scheduler)
        self._name = self._class.__name__
        fields = inspect.signature(self._class).parameters if hasattr(self._class, "set_timesteps") else {}
        shift_field = next((name for name in ("flow_shift", "shift") if name in fields), None)
        if shift_field is None:
            raise ValueError(
                f"{self._name} is not a flow-matching scheduler: it needs `set_timesteps` and a constructor field `shift` or "
                "`flow_shift`, such as FlowMatchEulerDiscreteScheduler or UniPCMultistepScheduler"
            )
        if unknown := set(config) - set(fields):
            raise ValueError(f"{self._name} has no field {', '.join(sorted(unknown))}; it takes {', '.join(fields)}")
        written = {} if isinstance(scheduler, type) else getattr(scheduler, "config", {})
        own = {name: value for name, value in written.items() if name in fields}
        forced = {**FLOW_FIELDS, "use_dynamic_shifting": False}
        self._config = {**own, **config, **{name: value for name, value in forced.items() if name in fields}}
        self._is_multistep = "use_flow_sigmas" in fields
        self._shift_field = shift_field
        self._own_shift = self._config.pop(self._shift_field, 1.0)
        self._takes_sigmas = "sigmas" in inspect.signature(self._class.set_timesteps).parameters
        self._takes_generator = "generator" in inspect.signature(self._class.step).parameters
        self._template = self._build(1.0)

    def schedule(self, steps: int, shift: float) -> Schedule:
        """The official grid where the scheduler takes it; a warning says where it runs on another.

        ValueError for steps < 1, shift <= 0 or a scheduler that does not run from noise (1) to data (0).
        """
        ours = shift_sigmas(self._grid(steps), shift)
        if self._own_shift not in (1.0, shift):
            warnings.warn(f"{self._name} was made with shift {self._own_shift:g}; the run's shift {shift:g} is used", stacklevel=2)
        solver = self._solver({}) if self._takes_sigmas else self._build(shift)
        self._set_timesteps(solver, steps, ours)
        found, official = Schedule(solver.sigmas.to("cpu", torch.float32), solver.timesteps.cpu()), make_schedule(ours)
        try:
            start_state(found)
        except ValueError as error:
            raise ValueError(f"{self._name} cannot be used: {error}") from error
        if not self._takes_sigmas:
            warnings.warn(f"{self._name} takes no sigmas: it runs on its own grid, {_summary(found)}", stacklevel=2)
        elif found.sigmas.shape != official.sigmas.shape or not torch.allclose(found.sigmas, official.sigmas, rtol=0, atol=2e-6):
            warnings.warn(f"{self._name} changes the sigmas it is given: {_summary(found)}, not {_summary(official)}", stacklevel=2)
        return found

    def start(self, schedule: Schedule) -> dict[str, Any]:
        """`{"i", "sigmas", "solver"}`, the last one the attributes of a fresh diffusers scheduler on this schedule."""
        state, solver = start_state(schedule), self._solver({})
        evaluations = len(schedule.timesteps)
        for steps in (evaluations, (evaluations + 1) // 2):  # the second: two evaluations a step, but one in the last
            self._set_timesteps(solver, steps, schedule.sigmas[:-1].double().numpy())
            if len(solver.timesteps) == evaluations:
                break
        else:
            raise ValueError(f"{self._name} has no run of {evaluations} evaluations; use a schedule of its own `schedule`")
        solver.sigmas, solver.timesteps = state["sigmas"].clone(), schedule.timesteps.cpu().clone()
        if hasattr(solver, "set_begin_index"):
            solver.set_begin_index(0)
        return {**state, "solver": self._changes(solver)}

    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The sample at the next sigma, as diffusers' `step` returns it."""
        i, solver = next_index(state), self._solver(state["solver"])
        chance = {"generator": generator} if self._takes_generator else {}
        (result,) = solver.step(velocity, solver.timesteps[i], sample, return_dict=False, **chance)[:1]
        state.update(i=i + 1, solver=self._changes(solver))
        return result

    def _grid(self, steps: int) -> Grid:
        """Multistep solvers take log(1 - sigma), so their grid stays below 1."""
        return training_sigmas(steps) if self._is_multistep else linear_sigmas(steps)

    def _build(self, shift: float) -> Any:
        return self._class(**self._config, **{self._shift_field: shift})

    def _set_timesteps(self, solver: Any, steps: int, sigmas: Grid) -> None:
        solver.set_timesteps(steps, **({"sigmas": sigmas} if self._takes_sigmas else {}))

    def _solver(self, changes: dict[str, Any]) -> Any:
        """A diffusers scheduler of its own, with `changes` in place; lists are copied, since solvers shift them in place."""
        solver = copy.copy(self._template)
        values = {**vars(self._template), **changes}
        vars(solver).update({name: list(value) if isinstance(value, list) else value for name, value in values.items()})
        return solver

    def _changes(self, solver: Any) -> dict[str, Any]:
        """The attributes that are no longer the template's: what has to be kept between steps."""
        kept = vars(self._template)
        return {name: value for name, value in vars(solver).items() if name not in kept or value is not kept[name]}


def _summary(schedule: Schedule) -> str:
    return f"{len(schedule.timesteps)} sigmas from {schedule.sigmas[0]:.5f} to {schedule.sigmas[-2]:.5f}"


def _class_of(scheduler: Any) -> Any:
    return scheduler if isinstance(scheduler, type) else type(scheduler)
