"""Finds the tensor of a model that each delta of a LoRA changes, and writes the ledger; changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..config import DiTConfig
from . import vocabulary
from .delta import Delta
from .ledger import Entry, Ledger, Status
from .read import Lora
from .reference import Expert
from .vocabulary import BLOCK, Vocabulary

AS_WIDE = (*(f"attn.{layer}.weight" for layer in "qkvo"), "ffn.0.weight", "modulation")  # tensors whose last axis is the model's width


@dataclass(frozen=True)
class Match:
    """Which tensor each delta changes, in the model's own names, and the account of all keys."""

    pairs: tuple[tuple[str, Delta], ...]
    ledger: Ledger


def match(model: nn.Module, lora: Lora, expert: Expert | None = None) -> Match:
    """Match a LoRA with a model that has a `config` and the classmethod `official_names(config)`; meta will do.

    expert: which model of Wan2.2 A14B this is; a file with keys for both needs to know
    """
    if expert is None and len(lora.experts) > 1:
        raise ValueError(f"'{lora.name}' holds a LoRA for each expert of Wan2.2 A14B: say which this model is, high or low")
    own, others = vocabulary.of_model(model), _branches(model)
    pairs: list[tuple[str, Delta]] = []
    entries = list(lora.rejected)
    seen: set[tuple[str, str]] = set()
    for delta in lora.deltas:
        tensor = own.tensor(delta) or ""
        status, why = _status(model, delta, tensor, others, expert)
        if status == "applied" and (tensor, delta.kind) in seen:
            status, why = "not understood", "a second change of one tensor, under another name"
        if status == "applied":
            seen.add((tensor, delta.kind))
            pairs.append((tensor, delta))
        entries += [Entry(lora.name, key, status, tensor, why) for key in delta.keys]
    return Match(tuple(pairs), Ledger(tuple(entries)))


def check_some(model: nn.Module, lora: Lora, matched: Match, expert: Expert | None = None) -> None:
    """ValueError that says what the file looks like where none of its keys fits the model."""
    if matched.pairs:
        return
    if {entry.status for entry in matched.ledger.entries} == {"other expert"}:
        raise ValueError(f"'{lora.name}' is of the expert of {lora.experts[0]} noise, this model is that of {expert} noise")
    raise ValueError(
        f"'{lora.name}' is a LoRA of another architecture: it looks like {architecture(lora)}; "
        f"the model has {_architecture_of(model)}. {matched.ledger.summary()}"
    )


def architecture(lora: Lora) -> str:
    """What the names and shapes in a file say of the model it was made for."""
    names = vocabulary.of_config(vocabulary.any_wan(lora.deltas))
    known = [(own, delta) for delta in lora.deltas if (own := names.tensor(delta))]
    if not known:
        return f"no Wan at all (its layers are called {', '.join(dict.fromkeys(delta.module for delta in lora.deltas[:3]))})"
    blocks = {int(found[1]) for _, delta in known if (found := BLOCK.search(delta.module))}
    width = next((shape[-1] for own, delta in known if own.endswith(AS_WIDE) and len(shape := _shape_made(delta)) > 1), None)
    facts = [f"width {width}" if width else "", f"at least {max(blocks) + 1} blocks" if blocks else ""]
    return " and ".join(filter(None, facts)) or "a Wan whose width it does not tell"


def shape_of(model: nn.Module, tensor: str) -> tuple[int, ...] | None:
    """The shape of a tensor by its own name, as the layer has it when its weight is packed; None where there is no such."""
    owner, _, leaf = tensor.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    if leaf == "weight" and hasattr(module, "in_features"):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    found = getattr(module, leaf, None)
    return None if found is None else tuple(found.shape)


def _status(model: nn.Module, delta: Delta, tensor: str, others: Vocabulary | None, expert: Expert | None) -> tuple[Status, str]:
    if expert is not None and delta.expert not in (None, expert):
        return "other expert", f"of the expert of {delta.expert} noise"
    if not tensor:
        elsewhere = others and others.tensor(delta)
        return ("skipped", f"this model has no {vocabulary.branch(elsewhere)}") if elsewhere else ("no such module", "")
    shape = shape_of(model, tensor)
    if shape is None:
        return "no such module", ""
    misfit = delta.misfit(shape)
    return ("shape mismatch", misfit) if misfit else ("applied", "")


def _branches(model: nn.Module) -> Vocabulary | None:
    config = model.config
    return vocabulary.of_config(vocabulary.with_all_branches(config)) if isinstance(config, DiTConfig) else None


def _shape_made(delta: Delta) -> tuple[int, ...]:
    try:
        return tuple(delta.matrix("meta").shape)
    except (RuntimeError, IndexError):
        return ()


def _architecture_of(model: nn.Module) -> str:
    config = model.config
    if isinstance(config, DiTConfig):
        return f"width {config.dim} and {config.num_layers} blocks"
    return f"{len(list(model.parameters()))} tensors of {type(model).__name__}"


def merged_ledger(matches: Iterable[Match]) -> Ledger:
    """The entries of several files together."""
    return Ledger(tuple(entry for found in matches for entry in found.ledger.entries))
