"""The built-in backbone keeps the contract, and backbones that break it in one way each are found out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_dit.contracts import Context
from wan_dit.model import WanDiT
from wan_dit.testing import BackboneContract


class TestBuiltIn(BackboneContract):
    plugin = "tiny"


class Broken(WanDiT):
    """The built-in backbone with one defect."""

    defect = ""
    calls = 0

    def encode_context(self, text: list[Tensor], conditioning: Any = None) -> Context:
        if self.defect == "mixes prompts":
            text = [text[0]] * len(text)
        if self.defect == "ignores text":
            text = [torch.ones_like(tokens) for tokens in text]
        if self.defect == "detaches text":
            text = [tokens.detach() for tokens in text]
        return super().encode_context(text, conditioning)

    def forward(self, latents: Tensor, timestep: Tensor, context: Context, conditioning: Any = None) -> Tensor:
        self.calls += 1
        if self.defect == "ignores time":
            timestep = torch.full_like(timestep, 500.0)
        if self.defect == "misreads times of frames" and timestep.ndim == 2:
            timestep = timestep * 0.9
        velocity = super().forward(latents, timestep, context, conditioning)
        if self.defect == "wrong shape":
            return velocity[:, :, :-1]
        if self.defect == "half precision":
            return velocity.half()
        if self.defect == "keeps state":
            return velocity * (1 + 1e-3 * self.calls)
        return velocity

    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        if self.defect == "saves other weights":
            other = WanDiT(self.config)
            other.init_weights()
            other.save_pretrained(folder)

    @property
    def spec(self) -> Any:
        return self.config.model_copy(update={"latent_channels": 4, "text_len": 8}).spec() if self.defect == "wrong spec" else super().spec


DEFECTS: dict[str, str] = {
    "wrong spec": "test_spec_describes_the_model",
    "wrong shape": "test_velocity_has_the_shape_of_the_latents_in_fp32",
    "half precision": "test_velocity_has_the_shape_of_the_latents_in_fp32",
    "mixes prompts": "test_a_batch_equals_its_samples",
    "misreads times of frames": "test_one_timestep_a_frame_equals_one_a_sample",
    "ignores text": "test_every_input_matters",
    "ignores time": "test_every_input_matters",
    "keeps state": "test_the_same_call_gives_the_same_bits",
    "detaches text": "test_gradients_reach_latents_and_text",
    "saves other weights": "test_a_saved_model_loads_to_the_same_bits",
}


@pytest.mark.parametrize(("defect", "method"), DEFECTS.items(), ids=list(DEFECTS))
def test_a_defect_is_found(defect: str, method: str, tmp_path: Path) -> None:
    kit = TestBuiltIn()
    broken = Broken.from_pretrained("pkg:wan_dit/weights/tiny")
    test: Callable[..., None] = getattr(kit, method)
    arguments = {"tmp_path": tmp_path} if method.startswith("test_a_saved") else {}
    test(broken, **arguments)
    broken.defect = defect
    arguments = {"tmp_path": tmp_path / "again"} if arguments else {}
    with pytest.raises((AssertionError, RuntimeError)):
        test(broken, **arguments)
