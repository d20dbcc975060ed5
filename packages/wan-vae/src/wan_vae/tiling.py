"""A VAE over tiles of the picture, for pictures that do not fit into memory whole.

exact: convolutions run on tiles with as much of their surroundings as they can see, and what attends to the whole frame
runs untiled on the small grid of the latents; the result is that of the whole picture.
blend: the whole VAE on overlapping tiles, blended smoothly; less work and approximate, since no tile sees the others.

Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product, tee
from typing import Any, Literal, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from .chunks import Waiting
from .model import WanVAE
from .parking import Parking
from .plugins import VAESpec
from .sessions import joined, no_frames, no_latents, stream
from .stream import StreamState
from .tiles import Half, Span, blending_weights, kept_apart, overlapping, reach
from .timestep import FrameNoise, mixed, told

T = TypeVar("T")
Place = tuple[Span, Span]
MODES = ("exact", "blend")


class TiledVAE:
    """A VAE that works on tiles, to be used like the one it wraps.

    tile: height and width in pixels, multiples of the strides: in "exact" mode what a tile keeps (it computes the
    surroundings too, see `tiles.reach`), in "blend" mode all that it computes
    mode: "exact" for a `WanVAE`, "blend" for any
    overlap: pixels that blended tiles share at least; a quarter of the tile's smaller side by default
    Streams keep one history a tile; those of tiles not at work wait in a scratch file (`parking.Parking`), or, where the device
    is none but the CPU, in the host's memory.
    ValueError for tiles that do not divide or overlap by more than half.

    Example: `TiledVAE(load_vae("wan2.1"), (256, 256)).decode(latents)`
    """

    def __init__(
        self, vae: Any, tile: tuple[int, int], mode: Literal["exact", "blend"] | str = "exact", overlap: int | None = None
    ) -> None:
        self.vae, self.mode = vae, mode
        _, *strides = vae.spec.stride
        if mode not in MODES:
            raise ValueError(f"unknown tile mode '{mode}', expected one of {', '.join(MODES)}")
        if mode == "exact" and not isinstance(vae, WanVAE):
            raise ValueError(f"'{vae.spec.name}' cannot be tiled exactly, which takes a WanVAE: use the mode 'blend'")
        for name, size, stride in zip(("height", "width"), tile, strides, strict=True):
            if size < stride or size % stride:
                nearest = -(-max(size, 1) // stride) * stride
                raise ValueError(f"the tile's {name} is {size}, expected a multiple of {stride}, such as {nearest}")
        self.cells = tile[0] // strides[0], tile[1] // strides[1]
        overlap = min(tile) // 4 if overlap is None else overlap
        self.shared = tuple(-(-overlap // stride) for stride in strides)
        if mode == "blend" and not all(0 <= 2 * shared <= side for shared, side in zip(self.shared, self.cells, strict=True)):
            raise ValueError(f"tiles of {tile[0]}x{tile[1]} pixels cannot overlap by {overlap}: expected 0 to {min(tile) // 2}")

    @property
    def spec(self) -> VAESpec:
        return self.vae.spec  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        """Whatever tiles do not change, such as `fingerprint`, `parameters` and `backend`, is the wrapped VAE's."""
        if name in ("vae", "__setstate__", "moments", "reconstruct"):
            raise AttributeError(f"a tiled VAE has no '{name}'")
        return getattr(self.vae, name)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video `[B, 3, T, H, W]` to normalised latents."""
        self._check_video(video)
        time = self.spec.stride[0]
        return torch.cat(list(self.encode_stream(video.split([1, *[time] * ((video.shape[2] - 1) // time)], dim=2))), dim=2)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents to video, clamped to [-1, 1]; a conditioned `WanVAE` draws noise, of `generator` or a fixed seed."""
        if isinstance(self.vae, WanVAE):
            self.vae.check_latents(latents)
        return torch.cat(list(self.decode_stream(latents.split(1, dim=2), generator=generator)), dim=2)

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of frames to chunks of latents, as the wrapped VAE's."""
        if self.mode == "exact":
            return stream(self.encode_session(), chunks)
        return self._blended(chunks, "encoder")

    def decode_stream(self, chunks: Iterable[Tensor], *, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Chunks of latents to chunks of frames, as the wrapped VAE's."""
        if self.mode == "exact":
            return stream(self.decode_session(generator=generator), chunks)
        return self._blended(chunks, "decoder", generator)

    def encode_session(self) -> TiledEncodeSession:
        """A stream of frames to latents in exact tiles; ValueError in "blend" mode."""
        self._exact_only()
        return TiledEncodeSession(self.vae, self.cells)

    def decode_session(self, *, generator: torch.Generator | None = None) -> TiledDecodeSession:
        """A stream of latents to frames in exact tiles; ValueError in "blend" mode."""
        self._exact_only()
        return TiledDecodeSession(self.vae, self.cells, generator)

    def _exact_only(self) -> None:
        if self.mode != "exact":
            raise ValueError("blended tiles give no sessions, and with them no log-variance: use the tile mode 'exact'")

    def _check_video(self, video: Tensor) -> None:
        if isinstance(self.vae, WanVAE):
            self.vae.check_video(video)
        elif (video.shape[2] - 1) % self.spec.stride[0]:
            raise ValueError(f"video has {video.shape[2]} frames, expected 1 + {self.spec.stride[0]}k")

    @torch.no_grad()
    def _blended(self, chunks: Iterable[Tensor], half: Half, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        _, height, width = self.spec.stride
        into, out = ((height, width), (1, 1)) if half == "encoder" else ((1, 1), (height, width))
        chunks = iter(chunks)
        first = next(chunks, None)
        if first is None:
            return
        if half == "encoder" and (first.shape[-2] % height or first.shape[-1] % width):
            raise ValueError(f"video is {first.shape[-2]}x{first.shape[-1]}, expected multiples of {height}x{width}")
        grid = first.shape[-2] // into[0], first.shape[-1] // into[1]
        axes = [overlapping(*sizes) for sizes in zip(grid, self.cells, self.shared, strict=True)]
        masks = [blending_weights(spans, scale) for spans, scale in zip(axes, out, strict=True)]
        copies = tee(_chained(first, chunks), len(axes[0]) * len(axes[1]))
        places = list(product(axes[0], axes[1]))
        parking = Parking(len(places))
        cuts = [_cut(copy, place, into) for copy, place in zip(copies, places, strict=True)]
        streams = [self._stream(half, cut, place, parking, generator) for cut, place in zip(cuts, places, strict=True)]
        weights = [rows[:, None] * columns for rows, columns in product(*masks)]
        del first, copies
        while (part := next(streams[0], None)) is not None:
            shape = (*part.shape[:3], grid[0] * out[0], grid[1] * out[1])
            blended = part.new_zeros(shape, dtype=torch.promote_types(part.dtype, torch.float32))
            for i, (place, weight) in enumerate(zip(places, weights, strict=True)):
                part = next(streams[i]) if i else part
                _view(blended, place, out).add_(part * weight.to(part.device, blended.dtype))
            yield blended.to(part.dtype)

    def _stream(
        self, half: Half, chunks: Iterator[Tensor], place: Place, parking: Parking, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        """The wrapped VAE over one tile, its history parked between chunks."""
        if not isinstance(self.vae, WanVAE):
            yield from self.vae.encode_stream(chunks) if half == "encoder" else self.vae.decode_stream(chunks)
            return
        session: Any = self.vae.encode_session() if half == "encoder" else self.vae.decode_session(generator=generator)
        device = torch.device("cpu")
        for chunk in chunks:
            device = chunk.device
            part = _at_work(session.state, place, parking, partial(session.push, chunk), device)
            if part.shape[2]:
                yield part
        yield from _at_work(session.state, place, parking, session.finish, device)


class TiledSession:
    """What tiled encoding and decoding share: a state for the deepest part, and one for each tile of the rest.

    As with `Session`, what is pushed waits where the VAE takes chunks whole, and `finish` gives the rest.
    """

    half: Half

    def __init__(self, vae: WanVAE, cells: tuple[int, int]) -> None:
        self.vae, self.cells = vae, cells
        self.waiting, self.ended = Waiting(vae.config, self.half), False
        self.deep = StreamState(convolution=vae.convolution(self.half))
        self.tiles: dict[Place, StreamState] = {}
        self.parking = Parking(0)
        self.grid: tuple[int, int] | None = None

    @property
    def started(self) -> bool:
        """Whether a chunk has passed."""
        return self.deep.started

    def open(self, grid: tuple[int, int]) -> None:
        """Lay out the tiles over so many rows and columns; ValueError where the stream had others."""
        if self.grid not in (None, grid):
            raise ValueError(f"the stream has pictures of {self.grid} latents, got a chunk of {grid}")
        if self.grid is None:
            before, after = reach(self.vae.config, self.half)
            rows, columns = (kept_apart(size, side, before, after) for size, side in zip(grid, self.cells, strict=True))
            shared: dict[str, Any] = {"convolution": self.deep.convolution, "timestep": self.deep.timestep}
            self.tiles = {place: StreamState(**shared) for place in product(rows, columns)}
            self.parking = Parking(len(self.tiles))
            self.grid = grid

    def ready(self, x: Tensor) -> list[Tensor]:
        """The chunks that can be computed now. ValueError where the stream has ended."""
        if self.ended:
            raise ValueError("the stream has ended: start another session")
        return self.waiting.push(x)

    def rest(self) -> list[Tensor]:
        """The last chunk, where one waits; the stream ends."""
        self.ended = True
        return self.waiting.rest()

    def close(self) -> None:
        """Note that a chunk has passed."""
        for state in (self.deep, *self.tiles.values()):
            state.started = True


class TiledEncodeSession(TiledSession):
    """Frames to latents like `EncodeSession`, in tiles."""

    half = "encoder"

    @torch.no_grad()
    def push(self, video: Tensor, *, moments: bool = False) -> Any:
        """The latents of a chunk, normalised; with `moments` a pair of them and their log-variance."""
        _, height, width = self.vae.config.stride
        self.vae.check_video(video, started=self.started)
        self.open((video.shape[3] // height, video.shape[4] // width))
        made = [self._encoded(chunk) for chunk in self.ready(video)]
        latents, logvar = map(joined, zip(*made, strict=True)) if made else [no_latents(self.vae, video)] * 2
        return (latents, logvar) if moments else latents

    @torch.no_grad()
    def finish(self, *, moments: bool = False) -> list[Any]:
        """What was still waiting, as `push` gives it: one chunk of latents or none. The stream ends."""
        made = [self._encoded(chunk) for chunk in self.rest()]
        return made if moments else [latents for latents, _ in made]

    def _encoded(self, video: Tensor) -> tuple[Tensor, Tensor]:
        vae, (_, height, width) = self.vae, self.vae.config.stride
        video, p, features = video.to(vae.quant_conv.weight.dtype), vae.config.patch_size, None
        for (rows, columns), state in self.tiles.items():
            seen = video[..., rows.low * height : rows.high * height, columns.low * width : columns.high * width]
            patches = rearrange(seen, "b c t (h q) (w r) -> b (c r q) t h w", q=p, r=p)
            part = _kept(
                _at_work(state, (rows, columns), self.parking, partial(vae.encoder.trunk, patches, state), video.device), (rows, columns)
            )
            if features is None:
                features = part.new_empty(*part.shape[:3], *self._sizes())
            _view(features, (rows, columns))[:] = part
        assert features is not None
        mean, logvar = vae.quant_conv(vae.encoder.bottom(features, self.deep), self.deep).chunk(2, dim=1)
        self.close()
        return vae.normalise(mean), logvar

    def _sizes(self) -> tuple[int, int]:
        assert self.grid is not None
        return self.grid


class TiledDecodeSession(TiledSession):
    """Latents to frames like `DecodeSession`, in tiles."""

    half = "decoder"

    def __init__(self, vae: WanVAE, cells: tuple[int, int], generator: torch.Generator | None = None) -> None:
        super().__init__(vae, cells)
        self.noise = FrameNoise.of(generator) if vae.config.timestep_conditioning else None
        self.deep.timestep = told(vae.config, vae.last_layer.device)

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """The frames of a chunk, clamped to [-1, 1]."""
        self.vae.check_latents(latents)
        self.open((latents.shape[3], latents.shape[4]))
        made = [self._decoded(chunk) for chunk in self.ready(latents)]
        return joined(made) if made else no_frames(self.vae, latents)

    @torch.no_grad()
    def finish(self) -> list[Tensor]:
        """What was still waiting: one chunk of frames or none. The stream ends."""
        return [self._decoded(chunk) for chunk in self.rest()]

    def _decoded(self, latents: Tensor) -> Tensor:
        vae, (_, height, width) = self.vae, self.vae.config.stride
        if self.noise is not None:
            latents = mixed(latents, self.noise.frames(latents), vae.config.decode_noise_scale)
        latents = vae.denormalise(latents).to(vae.post_quant_conv.weight.dtype)
        features = vae.decoder.bottom(vae.post_quant_conv(latents, self.deep), self.deep)
        p, video = vae.config.patch_size, None
        for (rows, columns), state in self.tiles.items():
            seen = features[..., rows.low : rows.high, columns.low : columns.high]
            patches = _at_work(state, (rows, columns), self.parking, partial(vae.decoder.trunk, seen, state), latents.device)
            patches = _kept(patches, (rows, columns), (height // p, width // p))
            if video is None:
                sizes = latents.shape[3] * height, latents.shape[4] * width
                video = patches.new_empty(len(patches), 3, patches.shape[2], *sizes)
            picture = rearrange(patches, "b (c r q) t h w -> b c t (h q) (w r)", q=p, r=p)
            _view(video, (rows, columns), (height, width))[:] = picture
        assert video is not None
        self.close()
        return video.clamp_(-1, 1)


def _kept(x_BCTHW: Tensor, place: Place, scale: tuple[int, int] = (1, 1)) -> Tensor:
    """What a tile keeps of what it computed; `scale`: positions to a cell."""
    (top, bottom), (left, right) = (((s.start - s.low) * n, (s.stop - s.low) * n) for s, n in zip(place, scale, strict=True))
    return x_BCTHW[..., top:bottom, left:right]


def _view(x_BCTHW: Tensor, place: Place, scale: tuple[int, int] = (1, 1)) -> Tensor:
    """The part of the whole that a tile keeps."""
    (top, bottom), (left, right) = ((s.start * n, s.stop * n) for s, n in zip(place, scale, strict=True))
    return x_BCTHW[..., top:bottom, left:right]


def _cut(chunks: Iterable[Tensor], place: Place, scale: tuple[int, int]) -> Iterator[Tensor]:
    return (_view(chunk, place, scale) for chunk in chunks)


def _chained(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    del first
    yield from rest


def _at_work(state: StreamState, place: Place, parking: Parking, run: Callable[[], T], device: torch.device) -> T:
    """Run one tile with its history in place, which then gives way to that of the next."""
    if parking.tiles <= 1:
        return run()
    if device.type == "cpu":
        state.history = parking.fetch(place)
    else:
        _move(state, device)
    made = run()
    if device.type == "cpu":
        parking.store(place, state.history)
        state.history = {}
    else:
        _move(state, torch.device("cpu"))
    state.last, state.held = None, False  # stillness is not looked for: what it keeps would be for every tile
    state.traces.clear()
    return made


def _move(state: StreamState, device: torch.device) -> None:
    state.history = {slot: value.to(device) for slot, value in state.history.items()}
