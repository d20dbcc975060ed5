"""How a backbone is read and set up for a run: precision, LoRAs, attention, offload, processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from .guidance import guided_velocity
from .inputs import sha256_of
from .layers import Precision
from .lora import LoraSpec
from .manifest import InputFile, LoraRecord, Options, recorded_file

if TYPE_CHECKING:
    import pluggy
    from torch.distributed.device_mesh import DeviceMesh

    from .lora.reference import Expert
    from .tasks.task import Compat

Offload = Literal["none", "model", "blocks", "stream"]
Quantise = Literal["int8", "fp8"]


@dataclass(frozen=True, eq=False)
class BackboneSetup:
    """What is done to every backbone of a pipeline.

    precision: see `WanDiT`; None is the backbone's own
    loras: put on in this order; `on_unmatched` says what a key without a place means
    attention: a name from `wan_attentions`, None for torch's
    offload: `"model"` keeps one part in memory at a time beside the VAE, `"blocks"` two blocks of the backbone on the device,
    one running and one arriving, `"stream"` the same, read from the file
    quantise: linear layers of the blocks in int8 or fp8, None for none
    context_embedder: a file that makes the backbone read another text encoder
    compile: compile one block, which all others share
    mesh, fsdp: see `wan_dit.parallel`
    """

    precision: Precision | None = None
    loras: Sequence[LoraSpec] = ()
    on_unmatched: Literal["strict", "warn"] = "strict"
    attention: str | None = None
    offload: Offload = "none"
    quantise: Quantise | None = None
    context_embedder: str | os.PathLike[str] | None = None
    compile: bool = False
    mesh: DeviceMesh | None = None
    fsdp: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("precision", self.precision, (None, *get_args(Precision))),
            ("offload", self.offload, get_args(Offload)),
            ("quantise", self.quantise, (None, *get_args(Quantise))),
        ):
            if value not in known:
                raise ValueError(f"{name} '{value}' is not one of {', '.join(filter(None, known))}")
        if self.fsdp and self.mesh is None:
            raise ValueError("fsdp needs several processes: give a mesh too")
        if self.mesh is not None and (self.streamed or self.compile):
            raise ValueError("several processes cannot be combined with offload of blocks or compile; use fsdp, which splits the weights")

    @classmethod
    def from_record(cls, loras: Sequence[LoraRecord], options: Options) -> BackboneSetup:
        """The setup of a recorded run, on one process; ValueError where a file of it is gone or has changed."""
        specs = [LoraSpec(recorded_file("LoRA", lora), lora.strength, lora.expert) for lora in loras]
        embedder = None if options.context_embedder is None else recorded_file("context embedder", options.context_embedder)
        how = {name: getattr(options, name) for name in ("precision", "attention", "quantise")}
        return cls(loras=specs, context_embedder=embedder, offload=options.offload or "none", on_unmatched="warn", **how)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that shows and writes what is made."""
        return self.mesh is None or torch.distributed.get_rank() == 0

    @property
    def changes_backbone(self) -> bool:
        """Whether a backbone is other after `load` and `apply` than the one that was read."""
        plain = BackboneSetup()
        names = ("precision", "attention", "quantise", "context_embedder", "compile", "mesh")
        return self.streamed or bool(self.loras) or any(getattr(self, name) != getattr(plain, name) for name in names)

    @property
    def streamed(self) -> bool:
        """Whether not all of a backbone's weights are in memory at a time."""
        return self.offload in ("blocks", "stream")

    def load(self, spec: Any, *, dtype: torch.dtype | None, device: torch.device) -> Any:
        """A backbone by its spec, with its own weights."""
        if self.streamed or self.quantise:
            from .offload import load_offloaded

            mode = "none" if self.offload == "model" else self.offload
            return load_offloaded(spec, mode=mode, dtype=dtype, device=device, quantise=self.quantise)
        return spec.load(dtype=dtype, device="cpu" if self.fsdp else device)

    def apply(self, backbone: Any, expert: str | None, *, device: torch.device, pm: pluggy.PluginManager) -> Any:
        """Set up a backbone that was loaded; expert: `high` or `low`, None where there is one model alone."""
        if self.precision is not None:
            backbone.precision = self.precision
        if self.context_embedder is not None:
            from .context_embedder import with_context_embedder

            backbone = with_context_embedder(backbone, self.context_embedder)
        if self.loras:
            from .lora import apply

            live = self.streamed or self.quantise is not None
            apply(
                backbone, self.loras, mode="live" if live else "merge", on_unmatched=self.on_unmatched, expert=cast("Expert | None", expert)
            )
        if self.attention is not None:
            from .attentions import use_attention

            use_attention(backbone, self.attention, pm, device=device)
        if self.mesh is not None:
            from .parallel import parallelize

            backbone = parallelize(backbone, self.mesh, fsdp=self.fsdp)
            return backbone.to(device) if self.fsdp else backbone
        if self.compile:
            for block in (*backbone.trunk.blocks, *backbone.trunk.vace_blocks):
                block.compile()
        return backbone

    def text_facts(self) -> dict[str, Any] | None:
        """Fields of a backbone's spec that the context embedder changes."""
        if self.context_embedder is None:
            return None
        from .context_embedder import read_facts

        return read_facts(self.context_embedder)

    def guide(self) -> Callable[..., Tensor]:
        """What makes one guided velocity of two forwards."""
        if self.mesh is None:
            return guided_velocity
        from .parallel import guidance_over

        return guidance_over(self.mesh)

    def lora_records(self) -> tuple[LoraRecord, ...]:
        return tuple(LoraRecord(**_file(spec.lora), strength=spec.strength, expert=spec.expert) for spec in self.loras)

    def record(self, *, cache: str | None, compat: Compat) -> Options:
        """What the record of a run says of it."""
        embedder = None if self.context_embedder is None else InputFile(**_file(self.context_embedder))
        mesh = self.mesh
        sizes = {} if mesh is None else dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
        return Options(
            precision=self.precision, attention=self.attention, cache=cache, quantise=self.quantise, context_embedder=embedder,
            offload=None if self.offload == "none" else self.offload, compat=None if compat == "fixed" else compat, processes=sizes,
        )  # fmt: skip


def _file(source: Any) -> dict[str, Any]:
    """Path and sha256 of a file; of what is in memory, or on the Hub, its name."""
    if isinstance(source, str | os.PathLike) and Path(source).exists():
        return {"path": os.path.abspath(source), "sha256": sha256_of(source)}
    return {"path": str(source) if isinstance(source, str | os.PathLike) else None, "sha256": ""}
