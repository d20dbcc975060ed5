"""Linear layers of a backbone's blocks computed in float8, applied to modules from outside: torchao's float8 training.

The forward and both gradients take operands of 8 bits, which are made for each product and kept by none: input and weight in e4m3, the
gradient in e5m2, each with one scale for all of its numbers. So a scale is of the samples and tokens that a process computes at a time.
Weights stay parameters in fp32, the same ones under the same names, and all other layers are those of bf16 autocast.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import nn

MULTIPLE = 16  # that both sizes of a weight have to be of for `torch._scaled_mm`
CAPABILITY = (8, 9)  # of the first NVIDIA GPUs with float8 products (Ada); Hopper is 9.0
OTHERWISE = "use precision = 'bf16'"


def check_float8(device: str) -> None:
    """ValueError where torchao is not installed, or the device has no float8 products; a CPU emulates them in fp32."""
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"precision = 'fp8' on device '{device}': float8 is computed on CUDA, and emulated on a CPU: {OTHERWISE}")
    if kind == "cuda" and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        needed, given = (".".join(map(str, each)) for each in (CAPABILITY, found))
        raise ValueError(f"precision = 'fp8' needs a GPU of compute capability {needed} or above, '{device}' has {given}: {OTHERWISE}")
    if find_spec("torchao") is None:
        raise ValueError("precision = 'fp8' is torchao's, which is not installed: pip install wan-train[torchao]")


def compute_in_float8(modules: Mapping[str, nn.Module], *, emulate: bool) -> None:
    """Convert the linear layers in the blocks of every module that has a trunk, VACE blocks among them; before blocks are wrapped or split.

    A layer that does more than `nn.Linear`, as those of the fp32 islands, and one of another size than multiples of 16 stay as they are.
    emulate: compute in fp32 on operands rounded to 8 bits
    ValueError where no module has a trunk, or no layer fits.
    """
    trunks = {name: trunk for name, module in modules.items() if isinstance(trunk := getattr(module, "trunk", None), nn.Module)}
    if not trunks:
        raise ValueError(f"precision = 'fp8' is of the blocks of a backbone, and this run trains {', '.join(modules)} alone: {OTHERWISE}")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # the gradient of a weight is a product over all tokens, whose number need be no multiple of 16: 81 frames of 480p have 32760
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    for name, trunk in trunks.items():
        if not any(_fits(layer, path) for path, layer in trunk.named_modules()):
            raise ValueError(
                f"precision = 'fp8': no linear layer in the blocks of '{name}' has multiples of {MULTIPLE} for sizes: {OTHERWISE}"
            )
        convert_to_float8_training(trunk, config=config, module_filter_fn=_fits)


def _fits(layer: nn.Module, path: str) -> bool:
    in_block = path.startswith(("blocks.", "vace_blocks."))
    return in_block and type(layer) is nn.Linear and layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
