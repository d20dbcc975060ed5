"""The parts of a pipeline: found by name, checked by their specs, read on first use, and let go where memory is short."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import torch

from . import compat
from ._shared.hub import revision_of
from ._shared.weights import locate
from .checkpoint import HUB_FILES
from .listing import origin
from .manifest import Part
from .manifest import Parts as PartsRecord
from .plugins import PART_KINDS, PluginManager, VideoModelSpec, find
from .schedulers.diffusers import as_scheduler
from .setup import BackboneSetup

KINDS = {**PART_KINDS, "low_noise_backbone": "wan_backbones", "image_encoder": "wan_image_encoders"}
EXPERTS = {"backbone": "high", "low_noise_backbone": "low"}


class Parts:
    """Specs of all parts of a model, and the parts that are loaded.

    specs: part -> spec; an optional part (`low_noise_backbone`, `image_encoder`) that the model lacks is not there
    """

    def __init__(
        self,
        model: VideoModelSpec,
        given: dict[str, Any],
        pm: PluginManager,
        *,
        dtype: torch.dtype | None,
        device: torch.device,
        setup: BackboneSetup,
    ) -> None:
        """given: part -> what stands in place of the model's own: a path, name, Hub id, import string, spec or loaded object."""
        self.model, self.pm, self.dtype, self.device, self.setup = model, pm, dtype, device, setup
        self.specs: dict[str, Any] = {}
        self._loaded: dict[str, Any] = {}
        self._kept: set[str] = set()  # given as objects: nothing could read them again
        self._asked: set[str] = set()  # to be read ahead
        self._weights: dict[str, str | None] = {}
        for part in KINDS:
            self._add(part, given.get(part))
        self._name_context_embedder()
        self.check()

    @property
    def experts(self) -> tuple[str, ...]:
        """The backbones, in the order in which they run."""
        return tuple(part for part in EXPERTS if part in self.specs)

    def is_loaded(self, part: str) -> bool:
        return part in self._loaded

    def __getitem__(self, part: str) -> Any:
        """A part, read first where it is not there."""
        self.load(part)
        return self._loaded[part]

    def load(self, part: str) -> None:
        """Read a part, unless it is there; a backbone is set up as the pipeline was asked to.

        With offload a large part lets the others go first: what another run left here, or reads at the same time.
        """
        if part in self._loaded:
            return
        if self.setup.offload != "none" and part != "vae":
            self.release(*(self.specs.keys() - {"vae", "scheduler"}))
        if part not in EXPERTS:
            spec = self.specs[part]
            load = getattr(spec, "load_streamed", spec.load) if self.setup.offload == "stream" else spec.load
            self._loaded[part] = load(dtype=self.dtype, device=self.device)
            return
        backbone = self.setup.load(self.specs[part], dtype=self.dtype, device=self.device)
        self._note_weights(part, backbone)
        expert = EXPERTS[part] if len(self.experts) > 1 else None
        self._loaded[part] = self.setup.apply(backbone, expert, device=self.device, pm=self.pm)

    def read_ahead(self, part: str) -> None:
        """Ask the system to read the files of a part that will soon be needed into its cache, while other work goes on."""
        weights = getattr(self.specs[part], "weights", None)
        if weights and not self.is_loaded(part) and part not in self._asked and hasattr(os, "posix_fadvise"):
            self._asked.add(part)
            Thread(target=_read_ahead, args=(weights,), daemon=True).start()

    def release(self, *parts: str) -> None:
        """Let parts go, to be read again when they are needed; those that were given as objects stay."""
        self._asked -= set(parts)
        for part in set(parts) & self._loaded.keys() - self._kept:
            self._note_weights(part, self._loaded.pop(part))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def check(self) -> None:
        """Do the parts fit, by the specs of what is loaded, and by what was promised for the rest? ValueError where they do not."""
        specs = {part: getattr(self._loaded.get(part), "spec", None) or spec for part, spec in self.specs.items()}
        for part in self.experts:
            compat.check(specs[part], specs["vae"], specs["text_encoder"], specs.get("image_encoder"), pm=self.pm)

    def record(self) -> PartsRecord:
        """Name, origin and fingerprint of every part."""
        return PartsRecord(**{part: self._record(KINDS[part], spec, part) for part, spec in self.specs.items()})

    def model_record(self) -> Part:
        return self._record("wan_models", self.model, None)

    def _record(self, kind: str, spec: Any, part: str | None) -> Part:
        dist, version = origin(kind, spec, self.pm)
        if part in self._loaded and part is not None:
            self._note_weights(part, self._loaded[part])
        return Part(name=spec.name, dist=dist, version=version, weights=self._weights.get(part or ""), revision=revision(spec))

    def _note_weights(self, part: str, loaded: Any) -> None:
        """Fingerprint of the weights as read; taken once, since a large model takes seconds."""
        if part not in self._weights:
            self._weights[part] = loaded.fingerprint() if hasattr(loaded, "fingerprint") else None

    def _add(self, part: str, ref: Any) -> None:
        """Note the spec of a part; a loaded object is kept beside the spec it carries."""
        if ref is None:
            name = getattr(self.model, part, None)
            if name is None:
                return
            ref = find(KINDS[part], name, self.pm, typed=False)
        elif isinstance(ref, str | os.PathLike):
            ref = find(KINDS[part], os.fspath(ref), self.pm)
        is_spec = hasattr(ref, "load") and hasattr(ref, "name")
        self.specs[part] = ref if is_spec else getattr(ref, "spec", None) or SimpleNamespace(name=type(ref).__name__)
        if part == "scheduler":  # has no weights, so what is wrong with it is said at once
            self._loaded[part] = as_scheduler(ref.load() if is_spec else ref)
        elif not is_spec:
            if part in EXPERTS and self.setup.changes_backbone:
                raise ValueError(
                    f"{part.replace('_', ' ')} '{self.specs[part].name}' is an object, used as it is: set it up before it is given"
                )
            self._loaded[part] = ref
            self._kept.add(part)

    def _name_context_embedder(self) -> None:
        """A context embedder changes which text encoders fit."""
        if (facts := self.setup.text_facts()) is not None:
            for part in self.experts:
                self.specs[part] = replace(self.specs[part], **facts)


def revision(spec: Any) -> str | None:
    """The commit in the Hub's cache that a part was read from; None where it is of no repository there.

    It is read as the cache keeps it, since `snapshot_download` refuses a repository of which only some files were fetched.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    weights = getattr(spec, "weights", None) or ""
    if not weights.startswith("hub:"):
        return revision_of(Path(weights)) if weights and not weights.startswith("pkg:") else None
    org, name, *_ = weights.removeprefix("hub:").split("/")
    name, _, wanted = name.partition("@")
    reference = Path(HF_HUB_CACHE) / f"models--{org}--{name}" / "refs" / (wanted or "main")
    return reference.read_text().strip() if reference.is_file() else wanted or None


def _read_ahead(weights: str) -> None:
    """What goes wrong here is said where the part is loaded."""
    with suppress(OSError, ValueError, LookupError):
        path = locate(weights, HUB_FILES)
        for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
