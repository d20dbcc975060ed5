"""How much memory the codecs take that are no Wan VAEs: their streams run on torch's meta device, and the tensors are counted.

Measured on Linux in fp32, one thread: what is predicted beside the weights is 0.8 to 1.4 of what small networks of the three kinds took,
and 1.1 to 1.5 of what `ltx-video-0.9`, `dc-ae-f32c32-sana-1.0` and `taew2_1` took at full width. Not measured on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .codecs.dcae import DCAE
from .codecs.dcae_config import PRESETS as DEEP
from .codecs.dcae_config import DCAEConfig
from .codecs.ltx import LTXVAE
from .codecs.ltx_config import PRESETS as LTX
from .codecs.ltx_config import LTXConfig
from .codecs.taehv import TAEHV
from .codecs.taehv_config import TAEW21, TAEW22, TAEHVConfig
from .footprint import Footprint, FusedAttention, Meter
from .tiles import Half

KINDS: dict[type, Any] = {DCAEConfig: DCAE, LTXConfig: LTXVAE, TAEHVConfig: TAEHV}
PRESETS: dict[str, Any] = {**DEEP, **LTX, "taew2_1": TAEW21, "taew2_2": TAEW22}
SMALL = 20480  # channels x frames x rows up to which torch's `use_mkldnn` (aten/src/ATen/native/Convolution.cpp) says no
CONVOLUTIONS = (torch.conv2d, torch.conv3d)


class CopyingConvolutions(TorchFunctionMode):
    """On a CPU oneDNN works on copies of input, output and weight in its own layout.

    Torch leaves small inputs of one sample to its own kernel, which writes out what every position of the output sees.
    """

    def __init__(self, cpu: bool) -> None:
        super().__init__()
        self.cpu = cpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not self.cpu or func not in CONVOLUTIONS or args[1].shape[-1] == 1:
            return made
        x, weight, *_ = args
        if func is torch.conv3d and len(x) == 1 and x[..., 0].numel() <= SMALL:
            copies = [made.new_empty(weight[0].numel(), made[0, 0].numel())]
        else:
            copies = [torch.empty_like(tensor) for tensor in (x, weight, made)]
        del copies
        return made


def streamed(config: Any, half: Half, cells: tuple[int, int], *, chunks: Sequence[int], dtype: torch.dtype, cpu: bool) -> Footprint:
    """Of a stream over pictures of `cells` (rows, columns) of the latent grid.

    chunks: latent frames of the first chunks, as in `footprint`; a film goes on with the last one's until nothing changes any more
    """
    vae = meta_codec(config, dtype)
    time, height, width = vae.spec.stride
    if len(chunks) > 1 and half == "decoder":
        chunks = [*chunks, *[chunks[-1]] * -(-getattr(vae, "look_ahead", 0) // (time * chunks[-1]))]

    def given() -> Iterator[Tensor]:
        for i, frames in enumerate(chunks):
            if half == "decoder":
                shape = 1, vae.spec.latent_channels, frames, *cells
            else:
                shape = 1, 3, frames * time if i else 1, cells[0] * height, cells[1] * width
            yield torch.empty(shape, device="meta", dtype=dtype)

    known, history = [*vae.parameters(), *vae.buffers()], 0
    with torch.no_grad(), FusedAttention(), CopyingConvolutions(cpu), Meter(known) as meter:
        for made in vae.encode_stream(given()) if half == "encoder" else vae.decode_stream(given()):
            del made
            history = max(history, meter.now)
    return Footprint(sum(tensor.nbytes for tensor in known), 0, history, meter.peak - history, 0)


@lru_cache(maxsize=8)
def meta_codec(config: Any, dtype: torch.dtype) -> Any:
    """A VAE with shapes and no weights."""
    with torch.device("meta"):
        return KINDS[type(config)](config).to(dtype).requires_grad_(False).eval()
