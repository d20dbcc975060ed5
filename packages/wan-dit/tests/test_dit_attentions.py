"""Kernels of self-attention are probed before a backbone uses them; those that are wrong are refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import attention_kernels
import pytest
import torch
from torch import Tensor
from wan_dit import load_backbone
from wan_dit.attention import sdpa
from wan_dit.attentions import _flash, _sage, use_attention
from wan_dit.config import TINY
from wan_dit.model import Trunk, WanDiT
from wan_dit.parallel import sequence_parallel
from wan_dit.parallel.lse import GivenLse, PlainLse, ring_kernel
from wan_dit.plugins import AttentionSpec, PluginManager, find, hookimpl
from wan_dit.testing import AttentionContract, difference

Fake = Callable[..., ModuleType]


class TestDefault(AttentionContract):
    plugin = "sdpa"


class TestMath(AttentionContract):
    plugin = "sdpa-math"


class TestOfAnotherPackage(AttentionContract):
    plugin = "attention_kernels:plain"


class Plugin:
    @hookimpl
    def wan_attentions(self) -> list[AttentionSpec]:
        return [
            AttentionSpec("plain", "attention_kernels:plain"),
            AttentionSpec("eight-bit", "attention_kernels:eight_bit", tolerance=0.1),
            AttentionSpec("eight-bit-undeclared", "attention_kernels:eight_bit"),
            AttentionSpec("eight-bit-wrong", "attention_kernels:eight_bit_wrong_scale", tolerance=0.1),
            AttentionSpec("missing", "not_there:attend", package="not-there"),
            *(AttentionSpec(name, f"attention_kernels:{name}") for name in attention_kernels.WRONG),
        ]


@pytest.fixture
def pm() -> PluginManager:
    manager = PluginManager()
    manager.register(Plugin(), name="acme-attentions")
    return manager


def velocity(backbone: WanDiT) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, 3, 6, 6, generator=generator), [torch.randn(4, 96, generator=generator)]
    with torch.no_grad():
        return backbone(latents, torch.tensor([700.0]), backbone.encode_context(text))


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return velocity(load_backbone("tiny"))


@pytest.mark.parametrize("ref", ["sdpa", "sdpa-math", "sdpa-flash"])
def test_backends_of_torch_run_the_model(ref: str, expected: Tensor) -> None:
    backbone = load_backbone("tiny")
    assert use_attention(backbone, ref) <= 1e-5
    assert {block.self_attn.attend for block in backbone.trunk.blocks} == {find("wan_attentions", ref).resolve()}
    assert difference(velocity(backbone), expected) <= 1e-5


def test_a_registered_attention_is_used_by_all_blocks(pm: PluginManager, expected: Tensor) -> None:
    backbone = load_backbone("tiny")
    use_attention(backbone, "acme-attentions:plain", pm)
    assert difference(velocity(backbone), expected) <= 1e-5
    attention_kernels.CALLS.clear()
    velocity(backbone)
    assert attention_kernels.CALLS == [(1, 27, 4, 32)] * 6
    with_vace = WanDiT(TINY.model_copy(update={"vace_layers": (0, 2)}))
    use_attention(with_vace, "plain", pm)
    assert all(block.self_attn.attend is attention_kernels.plain for block in (*with_vace.trunk.blocks, *with_vace.trunk.vace_blocks))


def test_eight_bits_pass_where_they_are_declared(pm: PluginManager, expected: Tensor) -> None:
    backbone = load_backbone("tiny")
    assert 1e-3 < use_attention(backbone, "eight-bit", pm) < 0.1
    assert 1e-4 < difference(velocity(backbone), expected) < 0.2
    for ref in ("eight-bit-undeclared", "eight-bit-wrong"):
        with pytest.raises(ValueError, match=rf"'{ref}' is off by .* where (1e-05|0\.1) is allowed: refused"):
            use_attention(backbone, ref, pm)


@pytest.mark.parametrize(("ref", "message"), attention_kernels.WRONG.items(), ids=list(attention_kernels.WRONG))
def test_a_wrong_attention_is_refused_and_changes_nothing(ref: str, message: str, pm: PluginManager) -> None:
    backbone = load_backbone("tiny")
    with pytest.raises(ValueError, match=message) as told:
        use_attention(backbone, ref, pm)
    assert f"attention '{ref}'" in str(told.value)
    assert "\n" not in str(told.value)
    assert all(block.self_attn.attend is sdpa for block in backbone.trunk.blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bound_follows_the_type_of_the_weights(dtype: torch.dtype, pm: PluginManager) -> None:
    backbone = load_backbone("tiny", dtype=dtype)
    assert 1e-5 < use_attention(backbone, "sdpa") < 2e-2
    with pytest.raises(ValueError, match=f"in {str(dtype).removeprefix('torch.')}, where .* is allowed"):
        use_attention(backbone, "wrong_scale", pm)


def test_the_probe_runs_where_the_backbone_will(pm: PluginManager) -> None:
    backbone = load_backbone("tiny")
    backbone.trunk.blocks.to("meta")  # as blocks are that are streamed from a file
    assert use_attention(backbone, "plain", pm) <= 1e-5
    with pytest.raises(ValueError, match="does not run on meta"):
        use_attention(backbone, "for_gpus_only", pm, device="meta")


def test_what_is_not_installed_is_told(pm: PluginManager) -> None:
    backbone = load_backbone("tiny")
    with pytest.raises(LookupError, match=r"no attention named 'sgae' \(installed: flash, sage, sdpa, .*; did you mean 'sage'\?"):
        use_attention(backbone, "sgae")
    with pytest.raises(LookupError, match=r"'missing' cannot be imported \(No module named 'not_there'\); try: pip install not-there"):
        use_attention(backbone, "missing", pm)
    with pytest.raises(ValueError, match="Linear has no `trunk`"):
        use_attention(torch.nn.Linear(2, 2), "sdpa")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """`fake("flash_attn", flash_attn_func=...)`: a module of that name, for one test; None for one that is not there."""

    def install(name: str, **functions: Any) -> None:
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module if functions else None)

    for cached in (_flash, _sage):
        cached.cache_clear()
    yield install
    for cached in (_flash, _sage):
        cached.cache_clear()


def flash_2(q: Tensor, k: Tensor, v: Tensor, return_attn_probs: bool = False) -> Any:
    """As in flash-attn 2: the log-sum-exp is [B, N, L], and the probabilities come third."""
    out, lse = PlainLse().forward(q, k, v)
    return (out, lse.transpose(1, 2), None) if return_attn_probs else out


def flash_3(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """As in early releases of flash-attn 3."""
    out, lse = PlainLse().forward(q, k, v)
    return out, lse.transpose(1, 2)


@pytest.mark.parametrize("version", [2, 3])
def test_flash_attention_is_called_as_its_packages_want(version: int, fake: Fake, expected: Tensor) -> None:
    """The packages need a GPU: this shows that layouts and results are passed on, not that their kernels are right."""
    fake(
        "flash_attn_interface",
        **({"flash_attn_func": lambda *qkv, **more: flash_2(*qkv, **more) if more else flash_3(*qkv)} if version == 3 else {}),
    )
    fake("flash_attn", flash_attn_func=flash_2)
    backbone = load_backbone("tiny")
    assert use_attention(backbone, "flash") <= 1e-5
    assert difference(velocity(backbone), expected) <= 1e-5
    assert isinstance(ring_kernel(backbone.trunk.blocks[0].self_attn.attend), GivenLse)


def test_sage_attention_is_called_as_its_package_wants(fake: Fake, expected: Tensor) -> None:
    def sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = True) -> Tensor:
        assert not is_causal
        return attention_kernels.eight_bit(q, k, v) if tensor_layout == "NHD" else v

    fake("sageattention", sageattn=sageattn)
    backbone = load_backbone("tiny")
    assert use_attention(backbone, "sage") < 0.1
    assert difference(velocity(backbone), expected) < 0.2


def test_packages_that_are_not_there_are_named(fake: Fake) -> None:
    for name in ("flash_attn_interface", "flash_attn", "sageattention"):
        fake(name)
    for ref, package in (("flash", "flash-attn"), ("sage", "sageattention")):
        with pytest.raises(LookupError, match=f"pip install {package}"):
            use_attention(load_backbone("tiny"), ref)


def test_a_ring_uses_attentions_that_return_their_log_sum_exp() -> None:
    assert ring_kernel(sdpa) is None, "torch's own kernels"
    q, k, v = (torch.randn(1, 9, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    kernel = ring_kernel(attention_kernels.with_log_sum_exp)
    assert kernel is not None
    for got, exact in zip(kernel.forward(q, k, v), PlainLse().forward(q, k, v), strict=True):
        assert difference(got, exact) <= 1e-5
    with pytest.raises(ValueError, match=r"attention plain takes no `with_lse`, .*: use the default attention, or Ulysses"):
        ring_kernel(attention_kernels.plain)


def test_a_ring_refuses_other_attentions_before_anything_is_changed() -> None:
    class Group:
        def size(self) -> int:
            return 2

    trunk = Trunk(TINY)
    trunk.blocks[3].self_attn.attend = attention_kernels.plain
    with pytest.raises(ValueError, match="takes no `with_lse`"):
        sequence_parallel(trunk, ring=Group())
    assert trunk.blocks[0].self_attn.attend is sdpa
    assert not trunk._forward_pre_hooks
