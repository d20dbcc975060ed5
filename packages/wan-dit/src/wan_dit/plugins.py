"""The kinds of this package, backbones to models: hooks, spec records and lookups. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ._shared.discover import Offer as Offer
from ._shared.discover import PluginManager as PluginManager
from ._shared.discover import discover as discover
from ._shared.discover import hookimpl as hookimpl
from ._shared.discover import hookspec, resolve
from ._shared.discover import plugin_manager as _plugin_manager
from ._shared.spec import ModelSpec, Spec

if TYPE_CHECKING:
    import pluggy

PART_KINDS = {"backbone": "wan_backbones", "vae": "wan_vaes", "text_encoder": "wan_text_encoders", "scheduler": "wan_schedulers"}
WAN_DIT = "wan_dit.model:WanDiT"
INSTALL = {"wan_vaes": "wan-vae", "wan_text_encoders": "wan-text"}


@dataclass(frozen=True)
class BackboneSpec(ModelSpec):
    """A diffusion backbone that predicts velocity.

    latent_space, latent_channels, stride: the VAE it was trained on
    embedding_space, text_dim, text_len: the text encoder it was trained on, and its longest context
    patch: latents per token in (time, height, width)
    in_channels: latent channels in, with those a task concatenates; 0 where it is not told (then those of the latents)
    image_dim: width of image tokens, None where it takes none; image_tokens: how many it needs, None for those of one image
    vace: whether it takes a VACE context
    parameters: how many it has, None where it is not told
    """

    latent_space: str
    latent_channels: int
    stride: tuple[int, int, int]
    embedding_space: str
    text_dim: int
    text_len: int
    patch: tuple[int, int, int] = field(default=(1, 2, 2), kw_only=True)
    in_channels: int = field(default=0, kw_only=True)
    image_dim: int | None = field(default=None, kw_only=True)
    image_tokens: int | None = field(default=None, kw_only=True)
    vace: bool = field(default=False, kw_only=True)
    parameters: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class SchedulerSpec(Spec):
    """A scheduler: `target()` returns an object with `schedule`, `start` and `step` (see wan_dit.contracts.Scheduler)."""

    def load(self) -> Any:
        return self.resolve()()


@dataclass(frozen=True)
class AttentionSpec(Spec):
    """Self-attention: `target` is a function `(q, k, v) -> out`, all `[B, tokens, heads, head_dim]`.

    One that takes `with_lse=True` returns `(out, lse)`, lse fp32 `[B, tokens, heads]` in natural units; a ring needs that
    tolerance: largest relative L2 error against exact attention in fp32 at which a probe lets it pass; None is what the type of the
    tensors explains
    package: what to install where the target's module is missing
    """

    tolerance: float | None = field(default=None, kw_only=True)
    package: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class CacheSpec(Spec):
    """A cache that trades quality for speed: `target(**settings)` returns an object with `start` (see wan_dit.contracts.Cache).

    Settings are keyword arguments of the target, of the types of their defaults.
    """


@dataclass(frozen=True)
class VideoModelSpec:
    """A model: which parts it is made of, by name, and the settings it is used with.

    backbone, vae, text_encoder, scheduler: names, best as `dist:name`, which no other package can make ambiguous
    task: `t2v`, `t2i`, `i2v`, `flf2v`, `vace` or `ti2v` (text to video, and a first frame where one is given)
    image_encoder: of the image tokens, where the backbone reads any
    low_noise_backbone: the second expert of Wan2.2 A14B, which takes over from `backbone` where the (truncated) timestep falls
    below 1000 * `boundary`; then `guidance` may be a pair (low-noise, high-noise)
    size: (width, height) in pixels
    frames: 1 + k * temporal stride
    guidance: classifier-free guidance scale; 1 runs the model once a step
    negative_prompt: the one used where none is given
    extra: `"words"`, words by group, is the vocabulary of a model that knows no others
    """

    name: str
    backbone: str
    vae: str
    text_encoder: str
    scheduler: str = "wan-dit:unipc"
    steps: int = 50
    shift: float = 5.0
    guidance: float | tuple[float, float] = 5.0
    size: tuple[int, int] = (832, 480)
    frames: int = 81
    fps: int = 16
    negative_prompt: str = ""
    task: str = field(default="t2v", kw_only=True)
    image_encoder: str | None = field(default=None, kw_only=True)
    low_noise_backbone: str | None = field(default=None, kw_only=True)
    boundary: float = field(default=0.0, kw_only=True)
    summary: str = field(default="", kw_only=True)
    extra: Mapping[str, Any] = field(default_factory=dict, kw_only=True)


class Hooks:
    """What a plugin of these kinds implements."""

    @hookspec
    def wan_backbones(self) -> Iterable[BackboneSpec]:  # type: ignore[empty-body]
        """Diffusion backbones, as specs."""

    @hookspec
    def wan_schedulers(self) -> Iterable[SchedulerSpec]:  # type: ignore[empty-body]
        """Schedulers, as specs."""

    @hookspec
    def wan_attentions(self) -> Iterable[AttentionSpec]:  # type: ignore[empty-body]
        """Kernels of self-attention, as specs."""

    @hookspec
    def wan_caches(self) -> Iterable[CacheSpec]:  # type: ignore[empty-body]
        """Caches that leave out part of the work of some evaluations, as specs."""

    @hookspec
    def wan_models(self) -> Iterable[VideoModelSpec]:  # type: ignore[empty-body]
        """Models: a backbone, a VAE, a text encoder, a scheduler and their defaults."""


def plugin_manager() -> PluginManager:
    """A fresh manager with every installed plugin, those of the sibling packages included."""
    return _plugin_manager(Hooks)


def find(kind: str, ref: str, pm: pluggy.PluginManager | None = None, *, typed: bool = True) -> Any:
    """The spec of `kind` that a path, name, Hub id or import string names; LookupError says what is installed."""
    return resolve(kind, ref, pm or plugin_manager(), typed=typed, install=INSTALL.get(kind, ""))


def load_backbone(
    ref: str = "wan-dit:tiny", *, dtype: Any = None, device: Any = None, quantise: str | None = None, pm: pluggy.PluginManager | None = None
) -> Any:
    """Load a backbone by path, name, Hub id or import string, in eval mode.

    quantise: `"fp8"` or `"int8"` keeps the weights of the blocks in 8 bits; of this package's transformer alone
    """
    return load_spec(find("wan_backbones", ref, pm), dtype=dtype, device=device, quantise=quantise)


def load_spec(spec: BackboneSpec, *, dtype: Any = None, device: Any = None, quantise: str | None = None) -> Any:
    """What `load_backbone` loads for a spec."""
    if quantise is None:
        return spec.load(dtype=dtype, device=device)
    weights = own_weights(spec)
    loaded = spec.resolve().from_pretrained(weights, dtype=dtype, device=device, quantise=quantise)
    loaded.name = None if spec.name == spec.weights else spec.name
    return loaded


def own_weights(spec: BackboneSpec) -> str:
    """Where the weights of this package's transformer are; ValueError for another backbone, and for one without weights."""
    if spec.target != WAN_DIT or spec.weights is None:
        raise ValueError(f"'{spec.name}' is no Wan transformer with weights: it can be neither quantised nor offloaded")
    return spec.weights
