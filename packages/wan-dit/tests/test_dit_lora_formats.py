"""LoRA files: every format reads to the same change, names are those of the tables, and what is written reads back to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from wan_dit import config as presets
from wan_dit.config import DiTConfig
from wan_dit.layouts import names
from wan_dit.lora import apply, export, load_lora, match
from wan_dit.lora import vocabulary as vocabularies
from wan_dit.model import WanDiT

SMALL = DiTConfig(dim=32, ffn_dim=40, freq_dim=16, text_dim=12, num_heads=2, num_layers=2)
EVERYTHING = vocabularies.with_all_branches(SMALL).model_copy(update={"image_dim": 20, "in_dim": 36, "camera_dim": 24, "ref_dim": 16})
RELEASED = {
    name: getattr(presets, name)
    for name in ("T2V_1_3B", "T2V_14B", "I2V_14B", "FLF2V_14B", "I2V_A14B", "TI2V_5B", "VACE_1_3B", "VACE_14B", "TINY")
}
VARIANTS = {
    **RELEASED,
    "fun-control": presets.I2V_14B.model_copy(update={"ref_dim": 16}),
    "fun-camera": presets.I2V_14B.model_copy(update={"camera_dim": 24}),
    "everything": EVERYTHING,
}
State = dict[str, torch.Tensor]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # official name of a layer: down, up
RANK, ALPHA = 4, 2.0


def model(config: DiTConfig = SMALL, dtype: torch.dtype = torch.float32) -> WanDiT:
    torch.manual_seed(0)
    made = WanDiT(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return made.to(dtype).eval()


def layers(config: DiTConfig = SMALL) -> dict[str, tuple[int, ...]]:
    """Official names of the layers that have a matrix, and its shape."""
    with torch.device("meta"):
        made = WanDiT(config)
    table = names(config, "official")
    return {
        table[own].removesuffix(".weight"): tuple(value.shape)
        for own, value in made.state_dict().items()
        if own.endswith(".weight") and value.ndim > 1
    }


def factors(config: DiTConfig = SMALL, rank: int = RANK, dtype: torch.dtype = torch.float32) -> Factors:
    torch.manual_seed(1)
    made = {}
    for name, (out, *ins) in layers(config).items():
        down, up = torch.randn(rank, *ins), torch.randn(out, rank, *[1] * (len(ins) - 1))
        made[name] = (down.to(dtype), up.to(dtype))
    return made


def peft(made: Factors, path: Path, alpha: float | None = ALPHA, config: DiTConfig = SMALL) -> None:
    official, diffusers = names(config, "official"), names(config, "diffusers")
    table = {official[own].removesuffix(".weight"): diffusers[own].removesuffix(".weight") for own in official}
    state = {f"transformer.{table[name]}.lora_A.weight": down for name, (down, _) in made.items()}
    state |= {f"transformer.{table[name]}.lora_B.weight": up for name, (_, up) in made.items()}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": alpha})} if alpha else None
    save_file(state, path, metadata)


def dotted(prefix: str, down: str, up: str, alpha: bool) -> Callable[[Factors, Path], None]:
    def write(made: Factors, path: Path) -> None:
        state = {f"{prefix}{name}.{down}": value for name, (value, _) in made.items()}
        # where a format has no alpha, trainers multiply it into a factor
        state |= {f"{prefix}{name}.{up}": value if alpha else value * (ALPHA / RANK) for name, (_, value) in made.items()}
        save_file(state | ({f"{prefix}{name}.alpha": torch.tensor(ALPHA) for name in made} if alpha else {}), path)

    return write


def kohya(made: Factors, path: Path) -> None:
    dotted("lora_unet_", "lora_down.weight", "lora_up.weight", True)({name.replace(".", "_"): value for name, value in made.items()}, path)


def kohya_in_diffusers_names(made: Factors, path: Path) -> None:
    official, diffusers = names(SMALL, "official"), names(SMALL, "diffusers")
    table = {official[own].removesuffix(".weight"): diffusers[own].removesuffix(".weight").replace(".", "_") for own in official}
    dotted("lora_transformer_", "lora_down.weight", "lora_up.weight", True)({table[name]: value for name, value in made.items()}, path)


def differences(made: Factors, path: Path) -> None:
    deltas = {name: up.flatten(1) @ down.flatten(1) * (ALPHA / RANK) for name, (down, up) in made.items()}
    save_file({f"diffusion_model.{name}.diff": deltas[name].reshape(layers()[name]) for name in made}, path)


def pickled(made: Factors, path: Path) -> None:
    kohya(made, path)
    torch.save(load_file(path), path.with_suffix(".pt"))
    path.unlink()


WRITERS = {
    "peft": (peft, "peft"),
    "comfy": (dotted("diffusion_model.", "lora_down.weight", "lora_up.weight", True), "comfy"),
    "diffusion-pipe": (dotted("diffusion_model.", "lora_A.weight", "lora_B.weight", False), "comfy"),
    "diffsynth": (dotted("", "lora_A.default.weight", "lora_B.default.weight", False), "plain"),
    "kohya": (kohya, "kohya"),
    "kohya, diffusers' names": (kohya_in_diffusers_names, "kohya"),
    "differences": (differences, "comfy"),
    "pickle": (pickled, "kohya"),
}


def by_hand(made: Factors, before: WanDiT, strength: float = 1.0) -> State:
    table = {theirs: own for own, theirs in names(before.config, "official").items()}
    state = {key: value.clone() for key, value in before.state_dict().items()}
    for name, (down, up) in made.items():
        weight = state[table[f"{name}.weight"]]
        weight += strength * (ALPHA / RANK) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return state


@pytest.mark.parametrize(("write", "format"), WRITERS.values(), ids=WRITERS)
def test_the_same_delta_in_every_format_merges_to_the_same_weights(write: Any, format: str, tmp_path: Path) -> None:
    made, merged = factors(), model()
    write(made, tmp_path / "a.safetensors")
    lora = load_lora(next(tmp_path.glob("a.*")))
    assert lora.format == format
    applied = apply(merged, [lora])
    assert set(applied.ledger.counts()) == {"applied"}
    expected = by_hand(made, model())
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)
    changed = [key for key, value in model().state_dict().items() if not torch.equal(value, merged.state_dict()[key])]
    assert len(changed) == len(made)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_flat_names_are_told_apart_on_every_variant(config: DiTConfig) -> None:
    vocabulary = vocabularies.of_config(config)
    for layout in vocabularies.LAYOUTS:
        table = names(config, layout)
        assert [vocabulary.flat[theirs.replace(".", "_")] for theirs in table.values()] == list(table)
        assert [vocabulary.dotted[theirs] for theirs in table.values()] == list(table)


def test_every_layer_of_a_model_with_all_parts_has_a_place(tmp_path: Path) -> None:
    made, big = factors(EVERYTHING), model(EVERYTHING)
    kohya(made, tmp_path / "a.safetensors")
    peft(made, tmp_path / "b.safetensors", config=EVERYTHING)
    for name in "ab":
        found = match(big, load_lora(tmp_path / f"{name}.safetensors"))
        assert set(found.ledger.counts()) == {"applied"}
        assert len(found.pairs) == len(made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", ["peft", "comfy", "kohya"])
@pytest.mark.parametrize("source", ["peft", "comfy", "diffsynth", "kohya"])
def test_what_is_written_reads_back_to_the_bit(source: str, target: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    WRITERS[source][0](factors(dtype=dtype), tmp_path / "a.safetensors")
    first = load_lora(tmp_path / "a.safetensors")
    export(first, target, tmp_path / "b.safetensors")
    again = load_lora(tmp_path / "b.safetensors")
    pairs = [dict(match(model(), lora).pairs) for lora in (first, again)]
    assert again.format == target
    assert pairs[0].keys() == pairs[1].keys()
    for name, delta in pairs[0].items():
        assert delta.scale == pairs[1][name].scale
        for part, value in delta.parts.items():
            assert value.dtype == dtype
            assert torch.equal(value, pairs[1][name].parts[part])


def test_converting_there_and_back_gives_the_file(tmp_path: Path) -> None:
    kohya(factors(), tmp_path / "a.safetensors")
    for i, (target, ends) in enumerate((("peft", "bc"), ("comfy", "cd"), ("kohya", "de"))):
        export(load_lora(tmp_path / f"{'abcde'[i]}.safetensors"), target, tmp_path / f"{ends[0]}.safetensors")  # type: ignore[arg-type]
    first, last = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "d.safetensors")
    assert first.keys() == last.keys()
    assert all(torch.equal(value, last[key]) for key, value in first.items())


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranks=st.lists(st.integers(1, 9), min_size=2, max_size=4), alphas=st.lists(st.floats(0.125, 64, width=32), min_size=4, max_size=4))
def test_ranks_and_alphas_of_each_layer_survive_peft(ranks: list[int], alphas: list[float], tmp_path: Path) -> None:
    state = {}
    for i, (rank, alpha) in enumerate(zip(ranks, alphas, strict=False)):
        layer = f"lora_unet_blocks_{i // 2}_{('self_attn_q', 'cross_attn_o')[i % 2]}"
        state |= {f"{layer}.lora_down.weight": torch.randn(rank, 32), f"{layer}.lora_up.weight": torch.randn(32, rank)}
        state[f"{layer}.alpha"] = torch.tensor(alpha)
    save_file(state, tmp_path / "a.safetensors")
    export(load_lora(tmp_path / "a.safetensors"), "peft", tmp_path / "b.safetensors")
    found = [load_lora(tmp_path / f"{name}.safetensors").deltas for name in "ab"]
    table = vocabularies.of_config(SMALL)
    scales = [{table.tensor(delta): delta.scale for delta in deltas} for deltas in found]
    assert sorted(scales[0].values()) == sorted(alpha / rank for rank, alpha in zip(ranks, alphas, strict=False))
    assert scales[0] == scales[1]


@pytest.mark.parametrize(
    ("target", "read"), [("comfy", _convert_non_diffusers_wan_lora_to_diffusers), ("kohya", _convert_musubi_wan_lora_to_diffusers)]
)
def test_diffusers_reads_what_is_written_as_the_same_delta(target: Any, read: Any, tmp_path: Path) -> None:
    made = {name: pair for name, pair in factors().items() if name.startswith("blocks.")}  # diffusers refuses others
    peft(made, tmp_path / "a.safetensors")
    export(load_lora(tmp_path / "a.safetensors"), target, tmp_path / "b.safetensors")
    theirs = read(load_file(tmp_path / "b.safetensors"))
    ours = match(model(), load_lora(tmp_path / "b.safetensors")).pairs
    table = names(SMALL, "diffusers")
    assert len(theirs) == 2 * len(ours)
    for own, delta in ours:
        layer = f"transformer.{table[own].removesuffix('.weight')}"
        expected = theirs[f"{layer}.lora_B.weight"] @ theirs[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(delta.scale * delta.matrix(), expected, rtol=1e-5, atol=1e-5)


def test_peft_files_carry_what_diffusers_makes_a_config_of(tmp_path: Path) -> None:
    made = factors()
    kohya(made, tmp_path / "a.safetensors")
    export(load_lora(tmp_path / "a.safetensors"), "peft", tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        found = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (found["transformer.r"], found["transformer.lora_alpha"]) == (RANK, ALPHA)
    assert (found["transformer.rank_pattern"], found["transformer.alpha_pattern"]) == ({}, {})
    assert len(found["transformer.target_modules"]) == len(made)


SETTINGS = (
    ({"lora_alpha": 8}, None, 8 / RANK),
    ({"transformer.lora_alpha": 8}, None, 8 / RANK),
    ({"lora_alpha": 8, "use_rslora": True}, None, 8 / RANK**0.5),
    ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 3}}, None, 3 / RANK),
    ({"lora_alpha": 8, "alpha_pattern": {"^blocks.0.attn1.to_q": 3}}, None, 3 / RANK),
    ({"lora_alpha": 8, "alpha_pattern": {"to_k": 3}}, None, 8 / RANK),
    ({"lora_alpha": 8}, 2.0, 2 / RANK),
    ({}, None, 1.0),
)


@pytest.mark.parametrize("beside", [False, True], ids=["header", "adapter_config.json"])
@pytest.mark.parametrize(("fields", "alpha", "expected"), SETTINGS)
def test_alpha_is_the_files_own_then_that_of_the_settings(
    fields: dict[str, Any], alpha: float | None, expected: float, beside: bool, tmp_path: Path
) -> None:
    layer = "transformer.blocks.0.attn1.to_q"
    state = {f"{layer}.lora_A.weight": torch.randn(RANK, 32), f"{layer}.lora_B.weight": torch.randn(32, RANK)}
    if alpha is not None:
        state[f"{layer}.alpha"] = torch.tensor([alpha])
    save_file(state, tmp_path / "a.safetensors", None if beside else {"lora_adapter_metadata": json.dumps(fields)})
    if beside:
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    (delta,) = load_lora(tmp_path).deltas
    assert delta.scale == pytest.approx(expected)


def experts(tmp_path: Path) -> Path:
    state = {}
    for prefix, value in (("transformer", 1.0), ("transformer_2", 2.0)):
        layer = f"{prefix}.blocks.0.attn1.to_q"
        state |= {f"{layer}.lora_A.weight": torch.full((1, 32), value), f"{layer}.lora_B.weight": torch.ones(32, 1)}
    save_file(state, tmp_path / "both.safetensors", {"lora_adapter_metadata": json.dumps({"transformer_2.lora_alpha": 3})})
    return tmp_path / "both.safetensors"


def test_a_file_for_two_experts_is_told_apart(tmp_path: Path) -> None:
    path = experts(tmp_path)
    assert load_lora(path).experts == ("high", "low")
    with pytest.raises(ValueError, match=r"a LoRA for each expert of Wan2\.2 A14B: say which"):
        apply(model(), [path])
    for expert, change in (("high", 1.0), ("low", 6.0)):
        changed = model()
        applied = apply(changed, [path], expert=expert)  # type: ignore[arg-type]
        assert applied.ledger.counts() == {"applied": 2, "other expert": 2}
        difference = changed.trunk.blocks[0].self_attn.q.weight - model().trunk.blocks[0].self_attn.q.weight
        torch.testing.assert_close(difference, torch.full((32, 32), change), rtol=1e-5, atol=1e-5)


def test_two_experts_stay_two_in_peft_and_are_parted_in_other_formats(tmp_path: Path) -> None:
    both = load_lora(experts(tmp_path))
    export(both, "peft", tmp_path / "again.safetensors")
    again = load_lora(tmp_path / "again.safetensors")
    assert [(delta.module, delta.expert, delta.scale) for delta in again.deltas] == [(d.module, d.expert, d.scale) for d in both.deltas]
    with pytest.raises(ValueError, match="a LoRA for each expert, a file of kohya one"):
        export(both, "kohya", tmp_path / "one.safetensors")
    assert not (tmp_path / "one.safetensors").exists()
    export(both, "kohya", tmp_path / "low.safetensors", expert="low")
    assert float(load_file(tmp_path / "low.safetensors")["lora_unet_blocks_0_self_attn_q.alpha"]) == 3


def test_what_a_format_has_no_name_for_is_refused(tmp_path: Path) -> None:
    save_file({"diffusion_model.blocks.0.norm3.diff": torch.ones(32)}, tmp_path / "norm.safetensors")
    save_file(
        {"blocks.0.odd.lora_A.weight": torch.ones(1, 2), "blocks.0.odd.lora_B.weight": torch.ones(2, 1)}, tmp_path / "odd.safetensors"
    )
    save_file({"diffusion_model.blocks.0.norm3.diff": torch.ones(32), "surprise": torch.ones(1)}, tmp_path / "extra.safetensors")
    out = tmp_path / "out.safetensors"
    for name, target, message in (
        ("norm", "peft", r"PEFT has no name for 1 changes .*norm3\.diff\): use comfy or kohya"),
        ("odd", "comfy", r"no Wan has layers of these names: .*odd\.lora_A\.weight"),
        ("extra", "comfy", r"cannot convert 'extra.*not understood 1 \(surprise"),
        ("norm", "gguf", r"'gguf' is not known, expected one of peft, comfy, kohya"),
    ):
        with pytest.raises(ValueError, match=message):
            export(load_lora(tmp_path / f"{name}.safetensors"), target, out)  # type: ignore[arg-type]
    assert not out.exists()
