"""LoRAs on a model: merged equals live, what is removed is gone, and the ledger has every key once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from wan_dit.config import TINY, DiTConfig
from wan_dit.contracts import Conditioning
from wan_dit.layouts import names
from wan_dit.lora import LoraSpec, apply, load_lora, match
from wan_dit.model import WanDiT

SMALL = DiTConfig(dim=32, ffn_dim=48, freq_dim=16, text_dim=12, text_len=16, num_heads=2, num_layers=2)
I2V = SMALL.model_copy(update={"in_dim": 36, "image_dim": 20})
VACE = SMALL.model_copy(update={"vace_layers": (0, 1)})
State = dict[str, torch.Tensor]


def model(config: DiTConfig = SMALL, dtype: torch.dtype = torch.float32) -> WanDiT:
    torch.manual_seed(0)
    made = WanDiT(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return made.to(dtype).eval()


@torch.no_grad()
def velocity(made: WanDiT) -> torch.Tensor:
    torch.manual_seed(2)
    config = made.config
    given_images = torch.randn(1, 5, config.image_dim) if config.image_dim else None
    vace = torch.randn(1, 96, 2, 4, 4) if config.vace_layers else None
    conditioning = Conditioning(image_context=given_images, vace=vace)
    dtype = made.patch_embedding.weight.dtype
    context = made.encode_context([torch.randn(3, config.text_dim).to(dtype)], conditioning)
    return made(torch.randn(1, config.in_dim, 2, 4, 4), torch.tensor([500.0]), context, conditioning)


def shapes(config: DiTConfig = SMALL) -> dict[str, tuple[int, ...]]:
    """Official names of all tensors."""
    with torch.device("meta"):
        state = WanDiT(config).state_dict()
    table = names(config, "official")
    return {table[own]: tuple(value.shape) for own, value in state.items()}


def every_kind(config: DiTConfig = SMALL, dtype: torch.dtype = torch.float32) -> State:
    """Something for every tensor of a model: LoRA, LoHa, LoKr by turns, and differences of what has no matrix."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.3).to(dtype)

    state = {}
    for i, (name, shape) in enumerate(shapes(config).items()):
        layer, _, leaf = name.rpartition(".")
        key = f"diffusion_model.{layer}"
        if leaf == "modulation":
            state[f"{key}.diff_m"] = randn(*shape)
        elif leaf == "bias":
            state[f"{key}.diff_b"] = randn(*shape)
        elif leaf != "weight":
            state[f"{key}.{leaf}.diff"] = randn(*shape)
        elif len(shape) == 1 or i % 11 == 0:
            state[f"{key}.diff"] = randn(*shape)
        elif i % 3 == 0 or len(shape) > 2:
            state |= {f"{key}.lora_down.weight": randn(4, *shape[1:]), f"{key}.lora_up.weight": randn(shape[0], 4, *[1] * len(shape[2:]))}
            state[f"{key}.alpha"] = torch.tensor(2.0)
        elif i % 3 == 1:
            state |= {f"{key}.hada_w{j}_a": randn(shape[0], 3) for j in (1, 2)} | {f"{key}.hada_w{j}_b": randn(3, shape[1]) for j in (1, 2)}
        else:
            state |= {
                f"{key}.lokr_w1": randn(4, 4),
                f"{key}.lokr_w2_a": randn(shape[0] // 4, 2),
                f"{key}.lokr_w2_b": randn(2, shape[1] // 4),
            }
    return state


def written(state: State, path: Path, name: str = "lora") -> Path:
    file = path / f"{name}.safetensors"
    save_file(state, file)
    return file


def attention(made: WanDiT, block: int = 0) -> nn.Linear:
    layer = made.trunk.blocks[block].self_attn.q
    assert isinstance(layer, nn.Linear)
    return layer


def pair(layer: str = "diffusion_model.blocks.0.self_attn.q", size: int = 32, rank: int = 2) -> State:
    generator = torch.Generator().manual_seed(len(layer))
    down, up = (torch.randn(shape, generator=generator) for shape in ((rank, size), (size, rank)))
    return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}


def close(a: torch.Tensor, b: torch.Tensor, limit: float = 1e-6) -> bool:
    return float((a - b).detach().norm() / b.detach().norm()) <= limit


@pytest.mark.parametrize("config", [SMALL, I2V, VACE], ids=["t2v", "i2v", "vace"])
def test_live_equals_merged_for_every_kind_on_every_tensor(config: DiTConfig, tmp_path: Path) -> None:
    lora = load_lora(written(every_kind(config), tmp_path))
    merged, live = model(config), model(config)
    untouched = velocity(live)
    ledger = apply(merged, [LoraSpec(lora, 0.3)]).ledger
    applied = apply(live, [LoraSpec(lora, 0.3)], mode="live")
    assert set(ledger.counts()) == set(applied.ledger.counts()) == {"applied"}
    assert len({entry.tensor for entry in ledger.entries}) == len(shapes(config))
    assert close(velocity(live), velocity(merged))
    assert not close(untouched, velocity(merged), 0.1)
    applied.remove()
    assert torch.equal(velocity(live), untouched)
    assert live.fingerprint() == model(config).fingerprint()


def test_live_leaves_linear_weights_alone(tmp_path: Path) -> None:
    live = model()
    apply(live, [written(every_kind(), tmp_path)], mode="live")
    for own, value in model().state_dict().items():
        linear = own.endswith(".weight") and isinstance(live.get_submodule(own.rpartition(".")[0]), nn.Linear)
        assert torch.equal(live.state_dict()[own], value) == linear


@pytest.mark.parametrize("mode", ["merge", "live"])
def test_several_loras_stack_and_their_strengths_change(mode: Any, tmp_path: Path) -> None:
    first, second = (written(state, tmp_path, name) for state, name in ((every_kind(), "a"), (pair(), "b")))
    made = model()
    applied = apply(made, [LoraSpec(first, 0.5), f"{second}:-2"], mode=mode, removable=True)
    assert applied.strengths == (0.5, -2.0)
    applied.set_strength(0.25)
    applied.set_strength(1.5, 1)
    expected = model()
    apply(expected, [LoraSpec(first, 0.25)])
    apply(expected, [LoraSpec(second, 1.5)])
    assert close(velocity(made), velocity(expected), 2e-6)
    for i in (0, 1):
        applied.set_strength(0.0, i)
    assert torch.equal(velocity(made), velocity(model()))
    with pytest.raises(ValueError, match="strength of a LoRA is nan"):
        applied.set_strength(float("nan"))
    applied.remove()
    assert made.fingerprint() == model().fingerprint()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_rounds_once_whatever_the_files_have(dtype: torch.dtype, tmp_path: Path) -> None:
    made = model(dtype=dtype)
    lora = load_lora(written(pair() | {"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(1.0)}, tmp_path))
    exact = attention(model(dtype=dtype)).weight.float()
    for strength in (0.7, 0.01):
        (delta,) = lora.deltas
        expected = (exact + strength * 0.5 * (delta.parts["up"] @ delta.parts["down"])).to(dtype)
        one = model(dtype=dtype)
        apply(one, [LoraSpec(lora, strength)])
        torch.testing.assert_close(attention(one).weight, expected, rtol=torch.finfo(dtype).eps, atol=0)
    apply(made, [LoraSpec(lora, 0.7), LoraSpec(lora, -0.7)])
    assert made.fingerprint() == model(dtype=dtype).fingerprint()


def test_live_in_bf16_stays_near_merged_in_fp32(tmp_path: Path) -> None:
    path = written(every_kind(dtype=torch.bfloat16), tmp_path)
    live, exact = model(dtype=torch.bfloat16), model(dtype=torch.bfloat16).float()
    apply(live, [LoraSpec(path, 0.3)], mode="live")
    apply(exact, [LoraSpec(path, 0.3)])
    assert close(velocity(live), velocity(exact), 0.05)


def test_an_fp32_island_stays_one_under_autocast(tmp_path: Path) -> None:
    path = written(pair("diffusion_model.time_embedding.2"), tmp_path)
    live, merged = model(), model()
    apply(live, [path], mode="live")
    apply(merged, [path])
    with torch.autocast("cpu", torch.bfloat16):
        times = [made.embed_time(torch.tensor([998.39]), (1, 1, 1))[0] for made in (live, merged)]
    assert times[0].dtype == torch.float32
    assert close(*times)


def test_a_merge_is_final_unless_asked(tmp_path: Path) -> None:
    applied = apply(model(), [written(pair(), tmp_path)])
    for action in (applied.remove, lambda: applied.set_strength(0.5)):
        with pytest.raises(ValueError, match="the weights were not kept; apply them with removable=True or mode='live'"):
            action()


def test_what_was_applied_later_comes_off_first(tmp_path: Path) -> None:
    path = written(pair(), tmp_path)
    made = model()
    first = apply(made, [path], removable=True)
    after_first = made.fingerprint()
    second = apply(made, [f"{path}:0.5"], removable=True)
    with pytest.raises(ValueError, match=r"cannot remove these LoRAs: 'trunk\.blocks\.0\.self_attn\.q\.weight' was changed since"):
        first.remove()
    second.remove()
    assert made.fingerprint() == after_first
    first.remove()
    assert made.fingerprint() == model().fingerprint()


def test_live_loras_come_off_in_any_order(tmp_path: Path) -> None:
    paths = [written(pair(layer), tmp_path, name) for name, layer in (("a", "blocks.0.self_attn.q"), ("b", "blocks.0.self_attn.q"))]
    made = model()
    first, second = (apply(made, [path], mode="live") for path in paths)
    first.remove()
    expected = model()
    apply(expected, [paths[1]])
    assert close(velocity(made), velocity(expected))
    second.remove()
    assert torch.equal(velocity(made), velocity(model()))


@pytest.mark.parametrize("wrapped", [True, False])
def test_compiled_blocks_notice_live_loras(wrapped: bool, tmp_path: Path) -> None:
    lora = load_lora(written(every_kind(), tmp_path))
    made, merged = model(), model()
    apply(merged, [LoraSpec(lora, 0.3)])
    for i, block in enumerate(made.trunk.blocks):
        if wrapped:
            made.trunk.blocks[i] = torch.compile(block, backend="eager", fullgraph=True)  # type: ignore[assignment]
        else:
            block.compile(backend="eager", fullgraph=True)
    assert close(velocity(made), velocity(model()))
    applied = apply(made, [LoraSpec(lora, 0.9)], mode="live")
    applied.set_strength(0.3)
    assert close(velocity(made), velocity(merged))
    applied.remove()
    assert close(velocity(made), velocity(model()))


def test_merging_into_a_model_leaves_its_file_alone(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    apply(WanDiT.from_pretrained(tmp_path / "model"), [written(every_kind(), tmp_path)])
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before
    assert WanDiT.from_pretrained(tmp_path / "model").fingerprint() == model().fingerprint()


class Foreign(nn.Module):
    """A backbone of another family, with a layer that has no weight of its own."""

    config = "anything"

    class Packed(nn.Module):
        in_features, out_features = 6, 4

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., :4] * 2

    def __init__(self) -> None:
        super().__init__()
        self.project = self.Packed()

    @classmethod
    def official_names(cls, config: Any) -> dict[str, str]:
        return {"project.weight": "proj_q.weight"}


def test_a_packed_layer_of_another_backbone_takes_live_loras_alone(tmp_path: Path) -> None:
    down, up = torch.randn(2, 6), torch.randn(4, 2)
    path = written({"lora_unet_proj_q.lora_down.weight": down, "lora_unet_proj_q.lora_up.weight": up}, tmp_path)
    made, x = Foreign(), torch.randn(3, 6)
    with pytest.raises(ValueError, match=r"'project\.weight' is packed: .* apply it with mode='live'"):
        apply(made, [path])
    applied = apply(made, [LoraSpec(path, 0.5)], mode="live")
    torch.testing.assert_close(made.project(x), 2 * x[:, :4] + 0.5 * x @ down.T @ up.T)
    applied.remove()
    assert torch.equal(made.project(x), 2 * x[:, :4])


def test_no_numbers_on_meta_and_none_in_fp8(tmp_path: Path) -> None:
    path = written(pair(), tmp_path)
    with torch.device("meta"):
        empty = WanDiT(SMALL)
    assert match(empty, load_lora(path)).ledger.counts() == {"applied": 2}
    with pytest.raises(ValueError, match="on the meta device"):
        apply(empty, [path])
    packed = model()
    attention(packed).weight = nn.Parameter(attention(packed).weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"is torch\.float8_e4m3fn: a LoRA cannot be merged into it without loss"):
        apply(packed, [path])


def test_a_lora_of_wan21_i2v_goes_on_a_wan22_i2v(tmp_path: Path) -> None:
    path = written(every_kind(I2V), tmp_path)
    made = model(SMALL.model_copy(update={"in_dim": 36}))
    ledger = apply(made, [path], on_unmatched="strict").ledger
    assert set(ledger.counts()) == {"applied", "skipped"}
    assert {entry.why for entry in ledger.of("skipped")} == {"this model has no image branch"}
    assert all("img" in entry.key for entry in ledger.of("skipped"))


def test_experts_get_their_own_loras(tmp_path: Path) -> None:
    both, high, low = (written(pair(), tmp_path, name) for name in ("both", "high", "low"))
    specs = [LoraSpec(both, 1.0), LoraSpec(high, 2.0, "high"), LoraSpec(low, 3.0, "low")]
    assert apply(model(), specs, expert="high").strengths == (1.0, 2.0)
    assert apply(model(), specs, expert="low").strengths == (1.0, 3.0)
    with pytest.raises(ValueError, match="this model is not said to be any: give expert='high' or 'low'"):
        apply(model(), specs)
    only_low = written(pair("transformer_2.blocks.0.attn1.to_q"), tmp_path, "only")
    assert apply(model(), [only_low]).ledger.counts() == {"applied": 2}
    with pytest.raises(ValueError, match="is of the expert of low noise, this model is that of high noise"):
        apply(model(), [only_low], expert="high")
    with pytest.raises(ValueError, match="'mid' is not one of high, low, None"):
        apply(model(), [both], expert="mid")  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rank=st.integers(1, 9),
    alpha=st.none() | st.floats(0.01, 64),
    strength=st.floats(-4, 4),
    kind=st.sampled_from(["lora", "loha", "lokr", "lokr whole", "lokr both", "loha core", "lokr core"]),
    data=st.data(),
)
def test_every_formula_is_the_direct_product(
    rank: int, alpha: float | None, strength: float, kind: str, data: st.DataObject, tmp_path: Path
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    key, conv = "diffusion_model.blocks.1.cross_attn.o", "core" in kind
    if conv:
        key = "diffusion_model.patch_embedding"
    parts, expected, width = factored(kind, rank)
    state = {f"{key}.{name}": value for name, value in parts.items()}
    if alpha is not None:
        state[f"{key}.alpha"] = torch.tensor(alpha)
    scale = 1.0 if alpha is None or width is None else float(torch.tensor(alpha)) / width
    merged, live = model(), model()
    path = written(state, tmp_path)
    before = merged.patch_embedding.weight.clone() if conv else merged.trunk.blocks[1].cross_attn.o.weight.clone()
    apply(merged, [LoraSpec(path, strength)])
    apply(live, [LoraSpec(path, strength)], mode="live")
    after = merged.patch_embedding.weight if conv else merged.trunk.blocks[1].cross_attn.o.weight
    change = strength * scale * expected.reshape(before.shape)
    # of the largest number: terms of a sum may cancel
    torch.testing.assert_close(after, before + change, rtol=1e-5, atol=max(1e-4, 1e-6 * float(change.abs().max())))
    assert close(velocity(live), velocity(merged), 1e-5)


def factored(kind: str, rank: int) -> tuple[State, torch.Tensor, int | None]:
    """Parts of a change of a 32 x 32 layer (or of the 32 x 16 x 1 x 2 x 2 patches), their product by loops, and the rank that scales."""
    randn = torch.randn
    if kind == "lora":
        a, b = randn(rank, 32), randn(32, rank)
        return {"lora_A.weight": a, "lora_B.weight": b}, sum(b[:, r, None] * a[r] for r in range(rank)), rank
    if kind == "loha":
        (a1, b1), (a2, b2) = ((randn(32, rank), randn(rank, 32)) for _ in range(2))
        return {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}, (a1 @ b1) * (a2 @ b2), rank
    if kind == "loha core":
        made, product = {}, torch.ones(32, 16, 1, 2, 2)
        for i in (1, 2):
            core, a, b = randn(rank, rank, 1, 2, 2), randn(rank, 32), randn(rank, 16)
            made |= {f"hada_t{i}": core, f"hada_w{i}_a": a, f"hada_w{i}_b": b}
            product = product * tucker(core, a, b)
        return made, product, rank
    if kind == "lokr core":
        w1, core, a, b = randn(4, 2), randn(rank, rank, 1, 2, 2), randn(rank, 8), randn(rank, 8)
        made = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
        return made, kronecker(w1, tucker(core, a, b)), rank
    w1, w2 = randn(4, 8), randn(8, 4)
    if kind == "lokr whole":
        return {"lokr_w1": w1, "lokr_w2": w2}, kronecker(w1, w2), None
    a, b = randn(8, rank), randn(rank, 4)
    if kind == "lokr":
        return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, kronecker(w1, a @ b), rank
    a1, b1 = randn(4, rank + 1), randn(rank + 1, 8)
    return {"lokr_w1_a": a1, "lokr_w1_b": b1, "lokr_w2": w2}, kronecker(a1 @ b1, w2), rank + 1


def tucker(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    mixed = torch.tensordot(a.T, core, dims=([1], [0]))
    return torch.tensordot(mixed, b, dims=([1], [0])).movedim(-1, 1)


def kronecker(w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    rows = [torch.cat([w1[i, j] * w2 for j in range(w1.shape[1])], dim=1) for i in range(w1.shape[0])]
    return torch.cat(rows, dim=0)


def test_a_lora_of_the_tiny_model_changes_its_video(tmp_path: Path) -> None:
    made = WanDiT.from_pretrained("pkg:wan_dit/weights/tiny")
    before = velocity(made)
    applied = apply(made, [written(pair("diffusion_model.blocks.5.self_attn.o", size=TINY.dim), tmp_path)], mode="live")
    assert not close(velocity(made), before, 1e-3)
    applied.remove()
    assert torch.equal(velocity(made), before)
