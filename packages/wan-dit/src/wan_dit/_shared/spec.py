"""Records a plugin returns: plain data with a lazy target, so that listing imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import Any, Self

UNKNOWN = "unknown"  # the tag of a space that a checkpoint does not name; it equals nothing, itself included


@dataclass(frozen=True)
class Spec:
    """One named part. `target` is an import string `module:attr`, resolved only when the part is used."""

    name: str
    target: str
    summary: str = field(default="", kw_only=True)

    def resolve(self) -> Any:
        """The class or factory behind `target`; imports its module, touches no weights."""
        return resolve_name(self.target)


@dataclass(frozen=True)
class ModelSpec(Spec):
    """A part with weights.

    weights: nothing (the target is called without arguments), `"pkg:package/folder"` or `"hub:org/repo[@revision][/path]"`
    format: the `"format"` value of the `config.json` files this part reads, such as `"wan-vae/1"`
    describe: import string of a function `(path) -> spec` that reads the facts of a checkpoint without its weights
    footprint: import string of a function `(spec, *, size, frames, dtype, device) -> {"weights": bytes, "work": bytes}`, what
    the part takes in memory: for its weights, and at most beside them where it encodes a prompt or an image, or decodes a video
    of `size` (width, height); dtype is a name such as `"bfloat16"`; `wan-dit plan` asks it. A text encoder may add `"streamed"`,
    what it takes for weights that stay in their file
    """

    weights: str | None = field(default=None, kw_only=True)
    format: str | None = field(default=None, kw_only=True)
    describe: str | None = field(default=None, kw_only=True)
    footprint: str | None = field(default=None, kw_only=True)

    def load(self, weights: str | None = None, *, dtype: Any = None, device: Any = None) -> Any:
        """An instance in eval mode, ready to run.

        dtype None is fp32 on a CPU and the checkpoint's own on a GPU (bf16 where that is fp32); device None is the CPU.
        """
        from .weights import Pretrained, load_part

        part = load_part(self.resolve(), weights or self.weights, dtype=dtype, device=device)
        if isinstance(part, Pretrained) and weights is None and self.name not in (self.weights, self.target):
            part.name = self.name
        return part

    def at(self, path: str) -> Self:
        """This spec for the checkpoint at `path`, its fields read from the file where `describe` is set."""
        found = resolve_name(self.describe)(path) if self.describe else self
        footprint = self.footprint if found.target == self.target else found.footprint
        return replace(found, name=str(path), weights=str(path), footprint=footprint)
