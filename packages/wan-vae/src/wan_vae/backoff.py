"""A VAE that goes over to tiles, once, where memory runs out at the start of a stream."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .model import WanVAE
from .plan import make_plan
from .plugins import VAESpec
from .setting import free_budget, setting_of
from .tiles import Half
from .tiling import TiledVAE

CHUNKS = 2  # the second has more frames than the first and all the history; what follows takes no more
ALLOCATORS = ("DefaultCPUAllocator", "out of memory", "not enough memory", "can't allocate memory")

Make = Callable[[Half, tuple[int, int]], Any]


class BackingOff:
    """A VAE whose streams start again in tiles where one of the first chunks does not fit into memory.

    vae: any VAE
    smaller: `(half, size)` to the VAE in tiles to go over to, with size in pixels (height, width); see `smaller_tiles`

    What was given out before stands, and the chunks so far are computed again in tiles. A second failure is the caller's.
    Example: `BackingOff(vae, smaller_tiles(vae)).decode(latents)`
    """

    def __init__(self, vae: Any, smaller: Make) -> None:
        self.vae, self.smaller = vae, smaller

    @property
    def spec(self) -> VAESpec:
        return self.vae.spec  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        """Whatever memory does not touch, such as `fingerprint` and `parameters`, is the wrapped VAE's; so are sessions."""
        if name in ("vae", "__setstate__", "moments", "reconstruct"):
            raise AttributeError(f"a VAE that backs off has no '{name}'")
        return getattr(self.vae, name)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video `[B, 3, T, H, W]` to normalised latents."""
        try:
            return self.vae.encode(video)  # type: ignore[no-any-return]
        except (RuntimeError, MemoryError) as error:
            return self._instead("encoder", video, error).encode(video)  # type: ignore[no-any-return]

    @torch.no_grad()
    def decode(self, latents: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents to video, clamped to [-1, 1]."""
        try:
            return self.vae.decode(latents, generator=generator)  # type: ignore[no-any-return]
        except (RuntimeError, MemoryError) as error:
            return self._instead("decoder", latents, error).decode(latents, generator=generator)  # type: ignore[no-any-return]

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of frames to chunks of latents."""
        return self._stream("encoder", iter(chunks))

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of latents to chunks of frames."""
        return self._stream("decoder", iter(chunks))

    def _stream(self, half: Half, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        kept: list[Tensor] = []
        made = 0

        def given() -> Iterator[Tensor]:
            for chunk in chunks:
                if made < CHUNKS:
                    kept.append(chunk)
                yield chunk

        def again() -> Iterator[Tensor]:
            while kept:
                yield kept.pop(0)
            yield from chunks

        try:
            for part in self._run(self.vae, half, given()):
                made += 1
                if made >= CHUNKS:
                    kept.clear()
                yield part
            return
        except (RuntimeError, MemoryError) as error:
            if made >= CHUNKS or not kept:
                raise
            tiled = self._instead(half, kept[0], error)
        for index, part in enumerate(self._run(tiled, half, again())):
            if index >= made:
                yield part

    def _run(self, vae: Any, half: Half, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        return vae.encode_stream(chunks) if half == "encoder" else vae.decode_stream(chunks)  # type: ignore[no-any-return]

    def _instead(self, half: Half, chunk: Tensor, error: BaseException) -> Any:
        """The VAE in tiles; the error itself where it is not about memory."""
        if not out_of_memory(error):
            raise error
        _, height, width = self.spec.stride if half == "decoder" else (1, 1, 1)
        size = chunk.shape[3] * height, chunk.shape[4] * width
        tiled = self.smaller(half, size)
        where = "x".join(map(str, size))
        warnings.warn(f"memory ran out at {where} pixels; going on in {describe(tiled)}", RuntimeWarning, stacklevel=3)
        error.__traceback__ = None  # its frames hold what did not fit
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return tiled


def smaller_tiles(vae: Any, chunk: int = 1) -> Make:
    """What `BackingOff` takes: tiles planned at half the memory, or half as large where memory cannot be predicted.

    chunk: latent frames at a time
    """

    def make(half: Half, size: tuple[int, int]) -> TiledVAE:
        if setting := setting_of(vae, half, size, chunk):
            whole = make_plan(setting, "whole").memory
            halved = replace(setting, memory=min(whole, free_budget(setting.device)) // 2)
            plan = make_plan(halved, "exact" if setting.is_wan else "blend")
            plan = plan if plan.fits else make_plan(halved)
            if plan.mode != "whole":
                return TiledVAE(vae, plan.tile, plan.mode, plan.overlap or None)
        inner, mode = (vae.vae, vae.mode) if isinstance(vae, TiledVAE) else (vae, "exact" if isinstance(vae, WanVAE) else "blend")
        strides = vae.spec.stride[1:]
        cells = vae.cells if isinstance(vae, TiledVAE) else tuple(side // stride for side, stride in zip(size, strides, strict=True))
        longer = 0 if cells[0] * strides[0] > cells[1] * strides[1] else 1
        halves = [-(-side // 2) if axis == longer else side for axis, side in enumerate(cells)]
        return TiledVAE(inner, (halves[0] * strides[0], halves[1] * strides[1]), mode)

    return make


def describe(tiled: TiledVAE) -> str:
    """Tiles in words, and whether they are exact."""
    _, height, width = tiled.spec.stride
    size = f"{tiled.cells[0] * height}x{tiled.cells[1] * width}"
    return f"exact tiles of {size}" if tiled.mode == "exact" else f"blended tiles of {size}, which is approximate"


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator said so."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ALLOCATORS)
