"""Attention with its log-sum-exp, in one process: kernels agree, parts of the keys merge to the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from wan_dit.attention import sdpa
from wan_dit.parallel import LseAttention
from wan_dit.parallel import lse as lse_module
from wan_dit.parallel.lse import CpuFlash, CudaFlash, PlainLse, lse_attention, merge
from wan_dit.testing import difference

KERNELS = {"flash": CpuFlash(), "plain": PlainLse()}


def draw(queries: int, keys: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    lengths = queries, keys, keys, queries
    q, k, v, grad = (torch.randn(2, length, 3, 8, generator=generator).to(dtype) for length in lengths)
    return q, k, v, grad


@pytest.mark.parametrize("name", KERNELS)
@settings(deadline=None, max_examples=25)
@given(queries=st.integers(1, 40), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_attention_to_parts_of_the_keys_merges_to_that_to_all(name: str, queries: int, sizes: list[int], seed: int) -> None:
    kernel: LseAttention = KERNELS[name]
    q, k, v, grad = draw(queries, sum(sizes), seed=seed)
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    expected = sdpa(q, k, v)
    expected.backward(grad)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)
    with torch.no_grad():
        parts = list(zip(k.split(sizes, dim=1), v.split(sizes, dim=1), strict=True))
        for part in parts:
            out, lse = merge(out, lse, *kernel.forward(q, *part))
        gradients = [kernel.backward(grad, q, *part, out, lse) for part in parts]
    assert difference(out, expected.detach()) <= 1e-5
    assert difference(lse, torch.einsum("blnh,bmnh->blnm", q * 8**-0.5, k).logsumexp(-1).detach()) <= 1e-5
    assert difference(sum(dq for dq, _, _ in gradients), q.grad) <= 1e-5
    assert difference(torch.cat([dk for _, dk, _ in gradients], dim=1), k.grad) <= 1e-5
    assert difference(torch.cat([dv for _, _, dv in gradients], dim=1), v.grad) <= 1e-5


def test_plain_attention_a_slice_of_the_queries_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, grad = draw(23, 17)
    whole = PlainLse().forward(q, k, v)
    gradients = PlainLse().backward(grad, q, k, v, *whole)
    monkeypatch.setattr(lse_module, "QUERIES", 5)
    sliced = PlainLse().forward(q, k, v)
    for got, expected in zip((*sliced, *PlainLse().backward(grad, q, k, v, *sliced)), (*whole, *gradients), strict=True):
        assert difference(got, expected) <= 1e-6


@pytest.mark.parametrize("name", KERNELS)
def test_half_precision_keeps_its_type_and_an_fp32_log_sum_exp(name: str) -> None:
    kernel, (q, k, v, grad) = KERNELS[name], draw(9, 12, torch.bfloat16)
    out, lse = kernel.forward(q, k, v)
    gradients = kernel.backward(grad, q, k, v, out, lse)
    assert {x.dtype for x in (out, *gradients)} == {torch.bfloat16}
    assert lse.dtype == torch.float32
    exact = kernel.forward(q.float(), k.float(), v.float())
    assert difference(out.float(), exact[0]) < 2e-2
    assert difference(lse, exact[1]) < 2e-2


def test_the_kernel_suits_device_and_type() -> None:
    assert isinstance(lse_attention(torch.empty(1, 2, 3, 8)), CpuFlash)
    assert isinstance(lse_attention(torch.empty(1, 2, 3, 8, device="meta")), PlainLse)


def test_the_gpu_kernel_is_called_as_torch_declares_it() -> None:
    """Shapes alone, on the meta device: what can be said without a GPU."""
    q, k, v, grad = (x.to("meta") for x in draw(9, 12, torch.bfloat16))
    out, lse = CudaFlash().forward(q, k, v)
    gradients = CudaFlash().backward(grad, q, k, v, out, lse)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
