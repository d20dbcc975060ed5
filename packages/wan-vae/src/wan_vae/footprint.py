"""How much memory a chunk takes, found without computing it: the model runs on torch's meta device and its tensors are counted.

An allocator takes more than it is asked for. glibc maps every block beyond 32 MB by itself and gives it back whole, so what lies
idle between smaller ones is a share of what is alive only up to an amount (GAPS), which Winograd's many bands raise. Measured on
Linux in fp32, one thread, Wan2.1 at a third of its width, 256x448 and 384x640, encoded and decoded, whole, in exact and in blended
tiles: by the direct backend the predictions are 0 to +24 % off, by Winograd's -12 % to +12 %; +1 % at full width (240x416).
Not measured on GPUs.

Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .config import VAEConfig
from .convolution import Convolution
from .model import WanVAE
from .stream import StreamState
from .tiles import Half
from .transformed_filters import BUDGET, PRODUCTS
from .winograd import BAND, DOUBLED, PLAIN, TILE, Winograd

WASTE = {"cpu": 0.45, "parked": 0.8, "cuda": 0.25}  # what lies idle in the allocator, as a share of what is alive, weights apart
GAPS = {"direct": 250_000_000, "winograd": 400_000_000}  # and the most bytes of it on a CPU
LIBRARIES = 20_000_000  # bytes of code and buffers that kernels bring along
HELD = 6  # transformed bands of the input that are alive at once, and half as many of the output


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it that are alive, views of `known` ones apart; `peak` is the most there were."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class FusedAttention(TorchFunctionMode):
    """On the meta device attention is written out with all its scores; real devices never hold them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


@dataclass
class CountedConvolution(Convolution):
    """A convolution on the meta device that also makes what the kernels of a real one hold beside input and output.

    filters: bytes of Winograd's transformed filters, by layer
    """

    cpu: bool = True
    filters: dict[str, int] = field(default_factory=dict)

    def __call__(self, layer: nn.Conv2d | nn.Conv3d, x_BCTHW: Tensor, past_BCTHW: Tensor | None, rows: int) -> Tensor:
        if self._suited(layer, x_BCTHW):
            return self._transformed(layer, x_BCTHW, past_BCTHW)
        made = super().__call__(layer, x_BCTHW, past_BCTHW, rows)
        if self.cpu and layer.kernel_size[-1] > 1:  # oneDNN works on copies of its own layout
            frames = x_BCTHW.shape[2] + (0 if past_BCTHW is None else past_BCTHW.shape[2])
            copies = torch.empty_like(x_BCTHW[:, :, :1]).repeat(1, 1, frames, 1, 1), torch.empty_like(made), torch.empty_like(layer.weight)
            del copies
        return made

    def doubled(self, layer: nn.Conv2d, x_BCTHW: Tensor) -> Tensor:
        return self._transformed(layer, x_BCTHW, None, doubled=True) if self._suited(layer, x_BCTHW) else super().doubled(layer, x_BCTHW)

    def _suited(self, layer: nn.Conv2d | nn.Conv3d, x_BCTHW: Tensor) -> Winograd | None:
        return self.winograd if self.backend == "winograd" and self.winograd is not None and self.winograd.takes(layer) else None

    def _transformed(self, layer: nn.Conv2d | nn.Conv3d, x_BCTHW: Tensor, past_BCTHW: Tensor | None, doubled: bool = False) -> Tensor:
        form, (batch, _, frames, height, width) = DOUBLED if doubled else PLAIN, x_BCTHW.shape
        single = layer.weight.ndim == 4 or frames == 1
        variant = "doubled" if doubled else "last" if single else "pairs" if frames % 2 == 0 else "taps"
        slot: str = layer.slot  # type: ignore[assignment]
        size = 4 * PRODUCTS[variant] * layer.in_channels * layer.out_channels
        self.filters[slot] = max(size, self.filters.get(slot, 0))
        h, w = -(-height // form.step), -(-width // form.step)
        past = None if past_BCTHW is None else past_BCTHW.permute(2, 3, 4, 1, 0).contiguous()
        copy = x_BCTHW.permute(2, 3, 4, 1, 0).contiguous()
        made = x_BCTHW.new_empty(batch, frames, TILE * h, TILE * w, layer.out_channels)
        tiles = min(h, max(1, round(BAND / w))) * w
        band = x_BCTHW.new_empty(form.combinations**2, tiles, HELD * layer.in_channels + HELD // 2 * layer.out_channels)
        del past, copy, band
        scale = TILE // form.step
        return made.permute(0, 4, 1, 2, 3)[..., : scale * height, : scale * width]


@dataclass(frozen=True)
class Footprint:
    """Bytes: the model's `weights`, transformed `filters` kept, the stream's `history`, and the most beside them (`work`).

    still: kept in addition where the film stands still, so that nothing is computed twice
    """

    weights: int
    filters: int
    history: int
    work: int
    still: int

    @property
    def peak(self) -> int:
        """All but `still`."""
        return self.weights + self.filters + self.history + self.work

    def predicted(self, cpu: bool = True, still: bool = False, parked: bool = False) -> int:
        """The peak above what Python and torch take, with the allocator's waste; `parked`: histories come and go, tile after tile."""
        dynamic = self.peak - self.weights + still * self.still
        idle = WASTE["cuda" if not cpu else "parked" if parked else "cpu"] * dynamic
        if cpu:
            idle = min(idle, GAPS["winograd" if self.filters else "direct"])
        return round(self.weights + dynamic + idle + LIBRARIES)


@lru_cache(maxsize=8)
def meta_model(config: VAEConfig, dtype: torch.dtype) -> WanVAE:
    """A model with shapes and no weights."""
    with torch.device("meta"):
        return WanVAE(config).to(dtype).requires_grad_(False)


Step = Callable[[WanVAE, Tensor, StreamState], Any]


def _encode(vae: WanVAE, x: Tensor, state: StreamState) -> Any:
    return vae.normalise(vae.encode_step(x, state)[0])


def _decode(vae: WanVAE, z: Tensor, state: StreamState) -> Any:
    return vae.decode_step(vae.denormalise(z), state).clamp(-1, 1)


def footprint(
    config: VAEConfig,
    half: Half,
    cells: tuple[int, int],
    *,
    chunks: Sequence[int] = (1, 1, 1),
    dtype: torch.dtype,
    backend: str = "direct",
    cpu: bool = True,
) -> Footprint:
    """Of a stream over pictures of `cells` (rows, columns) of the latent grid; `chunks`: latent frames of each chunk."""
    time, height, width = config.stride
    if half == "decoder":
        shapes = [(1, config.z_dim, frames, *cells) for frames in chunks]
    else:
        shapes = [(1, 3, 1 if i == 0 else frames * time, cells[0] * height, cells[1] * width) for i, frames in enumerate(chunks)]
    return count(config, _encode if half == "encoder" else _decode, shapes, dtype=dtype, backend=backend, cpu=cpu)


def count(
    config: VAEConfig, step: Step, shapes: Sequence[tuple[int, ...]], *, dtype: torch.dtype, backend: str = "direct", cpu: bool = True
) -> Footprint:
    """Of `step` over a stream of chunks of these shapes."""
    vae = meta_model(config, dtype)
    convolution = CountedConvolution(backend, Winograd(), cpu)
    state, work = StreamState(convolution=convolution), 0
    with torch.no_grad(), FusedAttention(), Meter(vae.parameters()) as meter:
        for shape in shapes:
            chunk = torch.empty(shape, device="meta", dtype=dtype)
            meter.peak = 0
            step(vae, chunk, state)
            state.started = True
            history = sum(value.nbytes for value in state.history.values())
            work = max(work, meter.peak - history)
        still = _traces(vae, step, chunk, state) if len(shapes) > 1 else 0
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    return Footprint(weights, min(BUDGET, sum(convolution.filters.values())), history, work, still)


def _traces(vae: WanVAE, step: Step, chunk: Tensor, state: StreamState) -> int:
    """Bytes of what blocks took in and put out, each counted once."""
    kept: dict[int, int] = {}

    def run(block: nn.Module, x: Tensor) -> Tensor:
        made: Tensor = block(x, state)
        alive.extend((x, made))
        kept.update((tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()) for tensor in (x, made))
        return made

    alive: list[Tensor] = []
    state.run = run  # type: ignore[method-assign, assignment]
    step(vae, chunk, state)
    return sum(kept.values())
