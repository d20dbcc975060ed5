"""GPUs by name, from their makers' data sheets: bf16 without sparsity, and what a collective reaches in practice where one is known."""

from __future__ import annotations

from dataclasses import dataclass

EFFICIENCY = 0.4  # of the peak, in products and attention alike: about 400 TFLOP/s on an H100; an assumption where nothing was measured


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of a machine.

    memory, host: bytes on it, and in the machine for each; peak: FLOP/s; hbm: bytes a second of its own memory
    inside, between, pcie: bytes a second to a neighbour in the machine, to another machine, to the host's memory
    """

    name: str
    memory: int
    peak: float
    hbm: float
    inside: float
    between: float = 50e9  # 400 Gbit/s
    pcie: float = 25e9
    host: int = 200_000_000_000
    per_machine: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 80_000_000_000, 989e12, 3.35e12, 400e9),
        Gpu("h200", 141_000_000_000, 989e12, 4.8e12, 400e9),
        Gpu("b200", 180_000_000_000, 2250e12, 8e12, 800e9, pcie=50e9),
        Gpu("a100-40gb", 40_000_000_000, 312e12, 1.55e12, 250e9, 25e9, 20e9),
        Gpu("a100", 80_000_000_000, 312e12, 2.0e12, 250e9, 25e9, 20e9),
        Gpu("l40s", 48_000_000_000, 362e12, 0.86e12, 25e9, 12.5e9),
        Gpu("rtx4090", 24_000_000_000, 165e12, 1.01e12, 20e9, 1.25e9, host=64_000_000_000, per_machine=1),
        Gpu("rtx5090", 32_000_000_000, 209e12, 1.79e12, 40e9, 1.25e9, 50e9, host=64_000_000_000, per_machine=1),
    )
}


def gpu_named(name: str) -> Gpu:
    """LookupError that lists those known."""
    if name.lower() not in GPUS:
        raise LookupError(f"no GPU named '{name}' (known: {', '.join(GPUS)}); give one of them, and --memory and --tflops for another")
    return GPUS[name.lower()]
