"""Kernels of self-attention besides the default one, and the probe that each has to pass before a backbone uses it.

Plugins of kind `wan_attentions`. Kernels of other packages are imported on first use.

Shape suffixes: B batch, L tokens, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention import Attention, sdpa
from .parallel.lse import PlainLse, returns_lse
from .parallel.sequence import is_split
from .plugins import find

if TYPE_CHECKING:
    import pluggy

TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # relative L2
SHAPES = ((1, 128), (2, 77), (1, 1025), (1, 5))  # (batch, tokens): a whole block, and counts that leave part of one


def use_attention(
    backbone: nn.Module, ref: str, pm: pluggy.PluginManager | None = None, *, device: torch.device | str | None = None
) -> float:
    """Let every block of a backbone attend by the kernel of kind `wan_attentions` that `ref` names.

    Before, it is probed in the type of the weights. To be called before `parallelize`, which keeps it.
    device: where the backbone is going to run; None is where its embeddings are now
    Returns the largest relative error of the probe.

    Raises LookupError where the name, or a package that it needs, is not installed; ValueError where the kernel does not run here or
    disagrees with exact attention.
    """
    trunk = getattr(backbone, "trunk", None)
    if not isinstance(trunk, nn.Module):
        raise ValueError(f"{type(backbone).__name__} has no `trunk` of blocks whose attention could be chosen")
    if is_split(trunk):
        raise ValueError(f"attention '{ref}' has to be chosen before the backbone is parallelized")
    spec = find("wan_attentions", ref, pm)
    try:
        attend: Attention = spec.resolve()
    except ImportError as missing:
        raise _missing(spec, missing) from missing
    blocks = [*cast(nn.ModuleList, trunk.blocks), *getattr(trunk, "vace_blocks", ())]
    if device is None:  # blocks may be offloaded
        device = next((value.device for name, value in backbone.named_parameters() if not name.startswith("trunk.")), torch.device("cpu"))
    worst = probe(spec, attend, blocks[0].self_attn, device)
    for block in blocks:
        block.self_attn.attend = attend
    return worst


@torch.no_grad()
def probe(spec: Any, attend: Attention, like: Any, device: torch.device | str = "cpu") -> float:
    """The largest relative L2 error against exact attention in fp32, of random tensors with the heads and type of `like`.

    like: the self-attention of a block
    The log-sum-exp is compared too, of an attention that returns it. Raises as `use_attention` does.
    """
    bias = like.v.bias  # of the type that is computed in, also where the weights have 8 bits
    width, worst = len(bias) // like.num_heads, 0.0
    bound = getattr(spec, "tolerance", None) or TOLERANCES.get(bias.dtype, TOLERANCES[torch.float32])
    generator = torch.Generator().manual_seed(0)
    for batch, tokens in SHAPES:
        q, k, v = (torch.randn(batch, tokens, like.num_heads, width, generator=generator).to(device, bias.dtype) for _ in range(3))
        k = k + 2 * torch.randn(width, generator=generator).to(k)  # keys have channels far from zero, which 8 bits feel
        expected = PlainLse().forward(q.float(), k.float(), v.float())
        for got, exact in zip(_call(spec, attend, q, k, v), expected, strict=False):
            if got.shape != exact.shape:
                raise ValueError(f"attention '{spec.name}' made {list(got.shape)} of {list(q.shape)}, not {list(exact.shape)}: refused")
            error = float((got.float() - exact).norm() / exact.norm())
            if not error <= bound:
                raise ValueError(
                    f"attention '{spec.name}' is off by {error:.2g} at {tokens} tokens, {like.num_heads} heads of {width} in "
                    f"{str(bias.dtype).removeprefix('torch.')}, where {bound:g} is allowed: refused, use another or the default, sdpa"
                )
            worst = max(worst, error)
    return worst


def _call(spec: Any, attend: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Its output, and where it has one its log-sum-exp."""
    try:
        out = attend(q, k, v)
        return (out, attend(q, k, v, with_lse=True)[1]) if returns_lse(attend) else (out,)
    except ImportError as error:
        raise _missing(spec, error) from error
    except Exception as error:  # a kernel may refuse in any way
        message = " ".join(str(error).split())[:200]
        raise ValueError(f"attention '{spec.name}' does not run on {q.device} in {q.dtype}: {type(error).__name__}: {message}") from error


def _missing(spec: Any, error: ImportError) -> LookupError:
    package = getattr(spec, "package", "")
    return LookupError(f"attention '{spec.name}' cannot be imported ({error})" + (f"; try: pip install {package}" if package else ""))


def _torch(backend: SDPBackend) -> Attention:
    def attend(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q_BLNH, k_BLNH, v_BLNH)

    return attend


sdpa_math = _torch(SDPBackend.MATH)
sdpa_flash = _torch(SDPBackend.FLASH_ATTENTION)
sdpa_efficient = _torch(SDPBackend.EFFICIENT_ATTENTION)
sdpa_cudnn = _torch(SDPBackend.CUDNN_ATTENTION)


def flash(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, *, with_lse: bool = False) -> Any:
    """FlashAttention 3 where its package `flash_attn_interface` is installed, else 2 (`flash_attn`)."""
    out = _flash()(q_BLNH, k_BLNH, v_BLNH, **({"return_attn_probs": True} if with_lse else {}))
    if not with_lse:
        return out[0] if isinstance(out, tuple) else out  # early releases of 3 always return both
    return out[0], out[1].transpose(1, 2)


@lru_cache
def _flash() -> Callable[..., Any]:
    try:
        found: Callable[..., Any] = resolve_name("flash_attn_interface:flash_attn_func")
    except ImportError:
        found = resolve_name("flash_attn:flash_attn_func")
    return found


def sage(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
    """SageAttention: queries and keys in 8 bits."""
    out: Tensor = _sage()(q_BLNH, k_BLNH, v_BLNH, tensor_layout="NHD", is_causal=False)
    return out


@lru_cache
def _sage() -> Callable[..., Any]:
    found: Callable[..., Any] = resolve_name("sageattention:sageattn")
    return found
