"""The account of every key of a LoRA file: what it changed, or why it changed nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, get_args

Status = Literal["applied", "skipped", "other expert", "no such module", "shape mismatch", "not understood"]
STATUSES: tuple[Status, ...] = get_args(Status)
UNMATCHED: tuple[Status, ...] = ("no such module", "shape mismatch", "not understood")
SHOWN = 3


@dataclass(frozen=True)
class Entry:
    """One key of a file.

    status: `skipped` is of a part that other variants of Wan have and this model has not (the CLIP branch of Wan2.1,
    VACE, Fun), `other expert` of the other model of Wan2.2 A14B
    tensor: what it changes, in the model's own names
    """

    lora: str
    key: str
    status: Status
    tensor: str = ""
    why: str = ""


@dataclass(frozen=True)
class Ledger:
    """Every key of every file, once.

    Example:
        >>> print(ledger.summary())
        style.safetensors: 478 of 480 keys applied; no such module 2 (diffusion_model.blocks.40.ffn.0.alpha, ...)
    """

    entries: tuple[Entry, ...]

    def of(self, *statuses: Status) -> tuple[Entry, ...]:
        """The entries with one of these statuses."""
        return tuple(entry for entry in self.entries if entry.status in statuses)

    @property
    def unmatched(self) -> tuple[Entry, ...]:
        """What should have been applied and was not."""
        return self.of(*UNMATCHED)

    def counts(self) -> dict[Status, int]:
        """Number of keys by status, those that occur."""
        found = Counter(entry.status for entry in self.entries)
        return {status: found[status] for status in STATUSES if found[status]}

    def summary(self) -> str:
        """One line a file: how many keys were applied, and the first of all others."""
        return "\n".join(self.lines())

    def lines(self, *statuses: Status) -> list[str]:
        """The lines of the summary; of the files with an entry of one of these statuses, where any are given."""
        return [self._line(lora) for lora in dict.fromkeys(entry.lora for entry in (self.of(*statuses) if statuses else self.entries))]

    def _line(self, lora: str) -> str:
        entries = [entry for entry in self.entries if entry.lora == lora]
        line = f"{lora}: {sum(entry.status == 'applied' for entry in entries)} of {len(entries)} keys applied"
        for status in STATUSES[1:]:
            found = [entry for entry in entries if entry.status == status]
            if found:
                reasons = list(dict.fromkeys(entry.why for entry in found if entry.why))[:1]
                keys = [entry.key for entry in found[:SHOWN]] + (["..."] if len(found) > SHOWN else [])
                line += f"; {status} {len(found)} ({', '.join(keys)}{': ' + reasons[0] if reasons else ''})"
        return line

    def rows(self) -> list[dict[str, Any]]:
        """A row a key, for a table or JSON."""
        return [{"key": entry.key, "status": entry.status, "tensor": entry.tensor, "why": entry.why} for entry in self.entries]
