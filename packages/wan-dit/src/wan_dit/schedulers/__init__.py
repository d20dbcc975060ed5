"""Schedulers: a sigma grid and a solver behind `schedule`, `start` and `step` (see wan_dit.contracts.Scheduler)."""

from __future__ import annotations

from .diffusers import DiffusersScheduler as DiffusersScheduler
from .diffusers import as_scheduler as as_scheduler
from .euler import Euler as Euler
from .unipc import UniPC as UniPC
