"""Latents and text embeddings that are made once: by `wan-train cache` before a run, or when a run first asks for them.

What a tensor was made from is its name: the bytes of the source file, the part and rate that are read, the bucket, and the
weights of the VAE or text encoder. Nothing that changed can be taken for what it was.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from wan_dit._shared.weights import fingerprint

from .buckets import Bucket
from .mix import clip_of, identity
from .tensor_files import Facts, TensorFiles, key_of

Wanted = Iterable[tuple[int, Bucket]]  # samples, each with a bucket that it is brought to; one sample may be brought to several


@dataclass
class Filled:
    """What `fill` did: tensors made, and present before; samples that could not be read, by what was wrong."""

    made: int = 0
    present: int = 0
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Status:
    """A cache beside a data set: keys that are needed and there, needed and missing, stale (with the reason) and damaged."""

    present: list[str]
    missing: list[str]
    stale: dict[str, str]
    damaged: dict[str, str]


class Cache:
    """Latents `[C, T', H', W']` of samples and contexts `[L, D]` of prompts, in `folder`.

    A tensor that is missing or damaged is made and kept, by the same calls that made the others: one sample and one prompt at a
    time, so that a tensor is the same bits however it came about.
    """

    def __init__(self, folder: str | Path, *, vae: Any = None, text_encoder: Any = None) -> None:
        self.files, self.vae, self.text_encoder = TensorFiles(Path(folder)), vae, text_encoder
        self._parts = {"vae": _identity(vae), "text_encoder": _identity(text_encoder)}
        self._known = text_encoder is None or hasattr(text_encoder, "fingerprint") or bool(getattr(text_encoder, "state_dict", dict)())

    def latents(self, dataset: Any, index: int, bucket: Bucket) -> Tensor:
        """The latents of a sample in a bucket, on the CPU."""
        return self._get(self.latent_facts(dataset, index, bucket), lambda: encode_clip(self.vae, clip_of(dataset, index, bucket)))

    def context(self, prompt: str) -> Tensor:
        """The embedding of a prompt, on the CPU; not kept where nothing tells the encoder from another one."""
        if not self._known:
            return encode_prompt(self.text_encoder, prompt)
        return self._get(self.context_facts(prompt), lambda: encode_prompt(self.text_encoder, prompt))

    def latent_facts(self, dataset: Any, index: int, bucket: Bucket) -> Facts:
        return {"kind": "latents", "source": identity(dataset, index), "bucket": list(bucket), "vae": self._parts["vae"]}

    def context_facts(self, prompt: str) -> Facts:
        return {"kind": "context", "text": prompt, "text_encoder": self._parts["text_encoder"]}

    def needed(self, dataset: Any, wanted: Wanted) -> Iterator[tuple[Facts, int | str]]:
        """What a run over samples asks for, each once: the facts of latents with the sample, those of contexts with the prompt."""
        seen, samples = set[str](), dict[int, None]()
        for index, bucket in wanted:
            samples[index] = None
            if self.vae is None:
                continue
            facts = self.latent_facts(dataset, index, bucket)
            if (key := key_of(facts)) not in seen:
                seen.add(key)
                yield facts, index
        if self.text_encoder is not None:
            prompts = (caption for index in samples for caption in dataset.captions(index))
            for prompt in dict.fromkeys(("", *prompts)):  # the empty one for guidance
                yield self.context_facts(prompt), prompt

    def fill(self, dataset: Any, wanted: Wanted, progress: Callable[[], object] = lambda: None) -> Filled:
        """Make what is missing; other processes may do so at the same time, each takes what no other has begun.

        A sample that cannot be read is noted, and the rest goes on. `progress` is called after each tensor.
        """
        done, waiting = Filled(), list(self.needed(dataset, wanted))
        for wait in (False, True):  # at the end for what other processes are at, which may be killed
            later = []
            for facts, what in waiting:
                if self._settle(facts, what, dataset, done, wait=wait):
                    progress()
                else:
                    later.append((facts, what))
            waiting = later
        return done

    def _settle(self, facts: Facts, what: int | str, dataset: Any, done: Filled, *, wait: bool) -> bool:
        """Make a tensor that is not there; False where another process is at it."""
        key = key_of(facts)
        if key in self.files:
            done.present += 1
            return True
        with self.files.claimed(key, wait=wait) as mine:
            if mine and key in self.files:
                done.present += 1
            elif mine and isinstance(what, str):
                self.context(what)
                done.made += 1
            elif mine:
                try:
                    self.latents(dataset, int(what), Bucket(*facts["bucket"]))
                    done.made += 1
                except (ValueError, OSError) as error:
                    done.failed[int(what)] = str(error)
        return mine

    def status(self, dataset: Any, wanted: Wanted, *, verify: bool = False) -> Status:
        """What is there, missing, stale and damaged; `verify` reads all data, else headers alone are read."""
        needed = {key_of(facts) for facts, _ in self.needed(dataset, wanted)}
        stale, damaged, present = dict[str, str](), dict[str, str](), list[str]()
        for key in sorted(self.files.keys()):
            try:
                facts = self.files.facts(key)
                if key in needed and verify:
                    self.files.read(key)
            except ValueError as error:
                damaged[key] = str(error)
                continue
            if key in needed:
                present.append(key)
            elif reason := self._stale(facts):
                stale[key] = reason
        return Status(present, sorted(needed - set(present) - set(damaged)), stale, damaged)

    def prune(self, status: Status) -> int:
        """Remove what is stale and damaged, and what killed processes left. Returns the number of files."""
        for key in (*status.stale, *status.damaged):
            self.files.remove(key)
        return len(status.stale) + len(status.damaged) + self.files.sweep()

    def _stale(self, facts: Facts) -> str:
        """Why a tensor is not needed; nothing where this cache has no part to judge it by."""
        part = "vae" if facts["kind"] == "latents" else "text_encoder"
        if self._parts[part] is None:
            return ""
        if facts[part] != self._parts[part]:
            return f"made by another {part}"
        return "no sample has this source, part and bucket" if part == "vae" else "no sample has this caption"

    def _get(self, facts: Facts, make: Callable[[], Tensor]) -> Tensor:
        key = key_of(facts)
        if key in self.files:
            try:
                return self.files.read(key)
            except ValueError as error:
                warnings.warn(f"{error}; it is made anew", RuntimeWarning, stacklevel=3)
        tensor = make()
        self.files.write(facts, tensor)
        return tensor


@torch.no_grad()
def encode_clip(vae: Any, clip: Tensor) -> Tensor:
    """Latents `[C, T', H', W']` of a clip `[3, T, H, W]`, on the CPU."""
    found: Tensor = vae.encode(clip[None].to(next(vae.parameters()).device))[0].cpu()
    return _finite(found, "VAE")


@torch.no_grad()
def encode_prompt(text_encoder: Any, prompt: str) -> Tensor:
    """The context `[L, D]` of a prompt, on the CPU."""
    found: Tensor = text_encoder.encode([prompt])[0].cpu()
    return _finite(found, "text encoder")


def _finite(tensor: Tensor, what: str) -> Tensor:
    if not tensor.isfinite().all():
        raise ValueError(f"the {what} makes NaN or infinite numbers of it: use another type, such as fp32")
    return tensor


def _identity(part: Any) -> str | None:
    """What decides what a part makes: weights, config, type; None where there is no part."""
    if part is None:
        return None
    state = part.state_dict() if hasattr(part, "state_dict") else {}
    weights = part.fingerprint() if hasattr(part, "fingerprint") else fingerprint(state)
    dtype = getattr(part, "dtype", None) or next(iter(state.values()), torch.empty(0)).dtype
    spec, kind = getattr(part, "spec", None), f"{type(part).__module__}.{type(part).__qualname__}"
    kind += "".join(f" {getattr(spec, name, '')}" for name in ("embedding_space", "embed_dim", "max_tokens"))
    text = f"{kind} {weights} {getattr(part, 'config', '')} {getattr(part, 'cleaner', '')} {dtype}"
    return hashlib.sha256(text.encode()).hexdigest()
