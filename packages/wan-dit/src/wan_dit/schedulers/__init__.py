"""Schedulers: a sigma grid and a solver behind `schedule`, `start` and `step` (see wan_dit.contracts.Scheduler)."""

from __future__ import annotations

from .diffusers import DiffusersScheduler as DiffusersScheduler
from .diffusers import as_scheduler as as_scheduler
from .dpm import DPMpp as DPMpp
from .euler import Euler as Euler
from .heun import Heun as Heun
from .lcm import LCM as LCM
from .step_list import StepList as StepList
from .trigflow import TrigFlow as TrigFlow
from .unipc import UniPC as UniPC
