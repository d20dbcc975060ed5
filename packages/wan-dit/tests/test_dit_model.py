"""The transformer by itself: sizes, rotary table, time, context, precision, initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from wan_dit import model as model_module
from wan_dit.config import T2V_1_3B, T2V_14B, TINY, DiTConfig
from wan_dit.contracts import Conditioning
from wan_dit.layers import time_sinusoid
from wan_dit.model import WanDiT
from wan_dit.plugins import find
from wan_dit.rope import axis_angles, axis_widths, rope_table, rotate

SMALL = DiTConfig(dim=48, ffn_dim=80, freq_dim=32, text_dim=20, text_len=40, num_heads=2, num_layers=2)


def small(config: DiTConfig = SMALL, seed: int = 0) -> WanDiT:
    """A model in which no tensor is zero or one."""
    model, generator = WanDiT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
            )
    return model.eval()


def inputs(config: DiTConfig = SMALL, batch: int = 2) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, config.in_dim, 3, 4, 6, generator=generator)
    text = [torch.randn(3 + 5 * i, config.text_dim, generator=generator) for i in range(batch)]
    return latents, torch.tensor([998.39, 417.25])[:batch], text


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().norm() / expected.detach().norm())


def closed_formula(c: DiTConfig) -> int:
    def linear(a: int, b: int) -> int:
        return a * b + b

    d = c.dim
    block = 8 * linear(d, d) + linear(d, c.ffn_dim) + linear(c.ffn_dim, d) + 4 * d + 2 * d + 6 * d
    time = linear(c.freq_dim, d) + linear(d, d) + linear(d, 6 * d)
    return c.num_layers * block + linear(4 * c.in_dim, d) + linear(c.text_dim, d) + linear(d, d) + time + linear(d, 4 * c.out_dim) + 2 * d


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"), [(TINY, 1_564_352, 177), (T2V_1_3B, 1_418_996_800, 825), (T2V_14B, 14_288_491_584, 1095)]
)
def test_sizes_are_those_of_the_released_models(config: DiTConfig, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        model = WanDiT(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters == closed_formula(config)
    assert len(model.state_dict()) == tensors


def test_forward_runs_on_meta() -> None:
    with torch.device("meta"):
        model = WanDiT(T2V_1_3B)
        context = model.encode_context([torch.empty(20, 4096)])
        assert model(torch.empty(1, 16, 21, 60, 104), torch.empty(1), context).shape == (1, 16, 21, 60, 104)


def test_config_refuses_what_cannot_be_built() -> None:
    for wrong in ({"num_heads": 5}, {"num_heads": 16}, {"freq_dim": 33}, {"width": 8}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DiTConfig(**{**SMALL.model_dump(), **wrong})


def test_rope_splits_a_head_as_released() -> None:
    assert axis_widths(128) == (44, 42, 42)
    assert axis_widths(32) == (12, 10, 10)
    assert axis_widths(12) == (4, 4, 4)
    assert float(axis_angles(1024, 44)[1023].cos().sum()) == pytest.approx(1.460414135, abs=1e-8)
    assert float(axis_angles(1024, 42)[1023].cos().sum()) == pytest.approx(6.062380064, abs=1e-8)


def test_rope_table_is_built_once_a_grid_and_turns_each_axis() -> None:
    grid = (2, 3, 5)
    table = rope_table(grid, 128, torch.device("cpu"))
    assert table is rope_table(grid, 128, torch.device("cpu"))
    assert table.dtype == torch.complex64
    assert table.shape == (30, 64)
    f, h, w = 1, 2, 4
    row = table[(f * 3 + h) * 5 + w].angle()
    for angles, position, width in zip(row.split([22, 21, 21]), (f, h, w), (44, 42, 42), strict=True):
        wrapped = torch.remainder(axis_angles(position + 1, width)[position] + torch.pi, 2 * torch.pi) - torch.pi
        assert torch.allclose(angles.double(), wrapped, atol=1e-6)


def test_rotation_equals_real_arithmetic_on_interleaved_pairs() -> None:
    grid = (2, 2, 3)
    table, x = rope_table(grid, 24, torch.device("cpu")), torch.randn(2, 12, 3, 24)
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], table.real[:, None], table.imag[:, None]
    expected = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    assert torch.allclose(rotate(x, table), expected, atol=1e-6)


def test_a_table_first_used_in_inference_serves_training() -> None:
    model, (latents, timestep, text) = small(), inputs()
    rope_table.cache_clear()
    with torch.inference_mode():
        model(latents, timestep, model.encode_context(text))
    model(latents, timestep, model.encode_context(text)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_sinusoid_is_cosines_then_sines_of_float64_angles() -> None:
    time = torch.tensor([0.0, 998.39])
    first, second = time_sinusoid(time, 8)
    assert first.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    angles = time[1].double() * torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64)
    assert torch.equal(second, torch.cat([angles.cos(), angles.sin()]).float())


@torch.no_grad()
def test_frames_at_their_own_times_equal_separate_runs() -> None:
    model, (latents, _, text) = small(), inputs()
    for block in model.trunk.blocks:
        block.self_attn.attend = lambda q, k, v: v  # no token sees another, so each frame can be run at its own time
    times = torch.tensor([[0.0, 500.5, 1000.0], [990.0, 3.25, 120.0]])
    context = model.encode_context(text)
    got = model(latents, times, context)
    for frame in range(3):
        separate = model(latents, times[:, frame], context)[:, :, frame]
        assert torch.allclose(got[:, :, frame], separate, atol=2e-6)


@torch.no_grad()
def test_the_time_mlp_never_runs_per_token() -> None:
    model, (latents, timestep, text) = small(), inputs()
    rows: list[int] = []
    model.time_projection.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    context = model.encode_context(text)
    model(latents, timestep, context)
    model(latents, timestep[:, None].expand(2, 3), context)
    assert rows == [2, 6]


@torch.no_grad()
def test_few_pad_rows_weigh_as_much_as_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (latents, timestep, _) = small(), inputs(batch=2)
    for lengths in ((3, 17), (0, 39), (40, 1), (40, 40)):
        text = [torch.randn(length, SMALL.text_dim) for length in lengths]
        short = model.encode_context(text)
        with monkeypatch.context() as patch:
            patch.setattr(model_module, "computes_in_fp32", lambda weight: False)
            full = model.encode_context(text)
        assert full.blocks[0].key.shape[1] == SMALL.text_len
        assert full.bias is None
        assert short.blocks[0].key.shape[1] == min(max(lengths) + 1, SMALL.text_len)
        assert relative(model(latents, timestep, short), model(latents, timestep, full)) <= 2e-6


@torch.no_grad()
def test_extra_latents_join_the_channels() -> None:
    config = SMALL.model_copy(update={"in_dim": 36})
    model, (latents, timestep, text) = small(config), inputs(config)
    context = model.encode_context(text)
    joined = model(latents, timestep, context)
    apart = model(latents[:, :16], timestep, context, Conditioning(extra_latents=latents[:, 16:]))
    assert apart.shape == (2, 16, 3, 4, 6)
    assert torch.equal(joined, apart)


def test_a_context_that_does_not_fit_is_refused() -> None:
    model = small()
    for shape in ((41, 20), (3, 21), (1, 3, 20)):
        with pytest.raises(ValueError, match=r"expected \[L, 20\] with L <= 40.*embedding space 'umt5-xxl'"):
            model.encode_context([torch.randn(shape)])


def test_self_attention_can_be_replaced() -> None:
    model, (latents, timestep, text) = small(), inputs()
    seen: list[tuple[int, ...]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(tuple(q.shape))
        return nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    expected = model(latents, timestep, model.encode_context(text))
    for block in model.trunk.blocks:
        block.self_attn.attend = attend
    assert torch.equal(model(latents, timestep, model.encode_context(text)), expected)
    assert seen == [(2, 18, 2, 24)] * 2


@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_bf16_keeps_the_fp32_islands(autocast: bool) -> None:
    model, (latents, timestep, text) = small(), inputs()
    expected = model(latents, timestep, model.encode_context(text))
    if not autocast:
        model = model.bfloat16()
    seen: dict[str, set[torch.dtype]] = {}
    parts = {"time": model.time_embedding, "modulation": model.time_projection, "head": model.head}
    parts |= {f"residual {i}": block for i, block in enumerate(model.trunk.blocks)}
    for name, module in parts.items():
        module.register_forward_hook(lambda _, args, output, name=name: seen.setdefault(name, set()).update({args[0].dtype, output.dtype}))
    model.trunk.blocks[0].ffn.register_forward_hook(lambda _, args, output: seen.setdefault("ffn", set()).add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = model(latents, timestep, model.encode_context(text))
    assert seen.pop("ffn") == {torch.bfloat16}
    assert seen == {name: {torch.float32} for name in parts}
    assert 1e-4 < relative(got, expected) < 1e-2
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rounded = model(latents, timestep.bfloat16(), model.encode_context(text))  # 998.39 becomes 1000
    assert relative(got, rounded) > 1e-3


def test_initial_weights_are_the_official_ones() -> None:
    model = WanDiT(SMALL.model_copy(update={"dim": 96}))
    model.init_weights(torch.Generator().manual_seed(3))
    latents, timestep, text = inputs()
    assert model(latents, timestep, model.encode_context(text)).abs().max() == 0
    block = model.trunk.blocks[0]
    bound = (6 / (96 + 96)) ** 0.5
    assert 0.95 * bound < block.self_attn.q.weight.abs().max() <= bound
    assert model.patch_embedding.weight.abs().max() <= (6 / (64 + 96)) ** 0.5
    for layer in (*model.context_embedder[::2], *model.time_embedding[::2]):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(block.modulation.detach().std()) == pytest.approx(96**-0.5, rel=0.15)
    assert all(parameter.abs().max() == 0 for name, parameter in model.named_parameters() if name.endswith("bias"))
    assert block.norm3.weight.detach().unique().tolist() == block.self_attn.norm_q.weight.detach().unique().tolist() == [1]


def test_a_reinitialised_model_is_ready_to_train() -> None:
    model = small().reinitialised(num_layers=3, dim=64)
    assert (model.config.num_layers, model.config.dim, model.config.text_dim) == (3, 64, SMALL.text_dim)
    assert model.head.proj.weight.abs().max() == 0
    assert model.trunk.blocks[2].modulation.abs().max() > 0


def test_the_same_seed_draws_the_same_weights() -> None:
    prints = []
    for seed in (5, 5, 6):
        model = WanDiT(SMALL)
        model.init_weights(torch.Generator().manual_seed(seed))
        prints.append(model.fingerprint())
    assert prints[0] == prints[1] != prints[2]


def test_rotation_is_the_same_in_real_numbers_and_finer_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, cpu = (2, 2, 3), torch.device("cpu")
    table, exact, x = rope_table(grid, 24, cpu), rope_table(grid, 24, cpu, torch.complex128), torch.randn(2, 12, 3, 24)
    turned = rotate(x, table)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert torch.allclose(rotate(x, table), turned, atol=1e-6)
    assert rotate(x, exact).dtype == torch.float64
    assert 0 < (rotate(x, exact) - turned).abs().max() < 1e-6


def test_strict_precision_moves_the_result_by_its_last_digits() -> None:
    model = find("wan_backbones", "tiny").load()
    latents, context = torch.randn(1, 16, 5, 8, 8), model.encode_context([torch.randn(5, 96)])
    with torch.no_grad():
        official = model(latents, torch.tensor([900.0]), context)
        model.precision = "strict"
        strict = model(latents, torch.tensor([900.0]), context)
    assert 0 < (strict - official).abs().max() < 1e-4


def test_hints_have_a_strength_each() -> None:
    model = WanDiT(TINY.model_copy(update={"vace_layers": (0, 3), "vace_in_dim": 8}))
    for scale in ((1.0,), (1.0, 0.5, 0.2)):
        with pytest.raises(ValueError, match=rf"vace_scale has {len(scale)} numbers, the backbone 2 VACE blocks"):
            model.encode_context([torch.randn(5, 96)], Conditioning(vace_scale=scale))
