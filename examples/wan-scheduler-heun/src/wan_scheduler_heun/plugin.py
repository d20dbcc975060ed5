"""What this distribution offers. Imports no torch: the class is named, and imported only when it is used."""

from __future__ import annotations

from wan_dit import SchedulerSpec, hookimpl


@hookimpl
def wan_schedulers() -> list[SchedulerSpec]:
    return [SchedulerSpec("heun-example", "wan_scheduler_heun.solver:Heun", summary="second order, 2 * steps - 1 evaluations")]
