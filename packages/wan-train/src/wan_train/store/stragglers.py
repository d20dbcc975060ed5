"""How long a step takes on each process, and the share of the device's rate that the model gets of it."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, median

from wan_dit import plan
from wan_dit.config import DiTConfig

from .ranks import Ranks

TRAINING = 3  # forwards that a training step is counted as: one, and two for the backward; what is recomputed is not work
PEAKS = {  # by what a device's name holds: dense bf16 operations a second, from NVIDIA's data sheets
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


class StepTimes:
    """Seconds of the steps of this process since they were last told."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def add(self, seconds: float) -> None:
        """Time of a step up to the point where it waits for others; afterwards all processes have the same."""
        self._seconds.append(seconds)

    def figures(self, ranks: Ranks) -> dict[str, float]:
        """Means of the processes since the last call: median, slowest, their ratio, and who is slowest. Collective.

        Empty where no process has made a step.
        """
        means = [mean for mean in ranks.gather(fmean(self._seconds) if self._seconds else None) if mean is not None]
        self._seconds.clear()
        if not means:
            return {}
        middle, slowest = median(means), max(means)
        return {
            "step_seconds": middle,
            "step_seconds_max": slowest,
            "straggling": slowest / middle if middle else 1.0,
            "slowest_rank": means.index(slowest),
        }


def training_operations(config: DiTConfig, samples: Iterable[tuple[int, int, int]], *, text: int | None = None) -> int:
    """Floating-point operations of a training step: three forwards of each sample, matrix products and attention.

    samples: (frames, height, width) in pixels; text: rows that prompts are padded to, None for all of `text_len`
    """
    total = 0
    for frames, height, width in samples:
        work = plan.operations(config, plan.tokens(config, (width, height), frames), text=text)
        total += TRAINING * (work.products + work.attention + work.context)
    return total


def peak_rate(device: str) -> float | None:
    """Dense bf16 operations a second of a device by its name (`torch.cuda.get_device_name()`); None for one that is not known."""
    return next((rate for name, rate in PEAKS.items() if name in device), None)


def mfu(operations: float, seconds: float, processes: int, rate: float) -> float:
    """Model FLOPs utilisation: the share of `processes` devices of `rate` operations a second that a step's operations make up."""
    return operations / (seconds * processes * rate)
