"""Caches that leave out part of the work of some evaluations, and change the result: plugins of kind `wan_caches`.

A cache is a policy without state, which serves many requests; `start` gives the run of one request, whose `velocity` takes the
place of `wan_dit.guidance.guided_velocity` and counts what was skipped.

Example:
    >>> run = find_cache("teacache:threshold=0.2").start(schedule.timesteps)
    >>> velocity = run.velocity(backbone, latents, timestep, context, negative_context, 5.0, step=i)
    >>> run.report()["skipped"]
"""

from __future__ import annotations

from .attention_cache import AttentionCache
from .base import CacheRun, Position
from .cfg_gate import CfgGate
from .combined import Combined
from .easycache import EasyCache
from .find import find_cache
from .firstblock import FirstBlockCache
from .magcache import MagCache, read_ratios, write_ratios
from .measure import Measured, Trial, calibrate, measured_error, measured_run, relative_error
from .teacache import TeaCache
from .trunk import TrunkRun

__all__ = [
    "AttentionCache",
    "CacheRun",
    "CfgGate",
    "Combined",
    "EasyCache",
    "FirstBlockCache",
    "MagCache",
    "Measured",
    "Position",
    "TeaCache",
    "Trial",
    "TrunkRun",
    "calibrate",
    "find_cache",
    "measured_error",
    "measured_run",
    "read_ratios",
    "relative_error",
    "write_ratios",
]
