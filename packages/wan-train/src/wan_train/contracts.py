"""What a trainer asks of its parts, structurally."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Dataset(Protocol):
    """Captioned clips, each fixed by its index."""

    def __len__(self) -> int: ...

    def video(self, indices: Sequence[int]) -> Tensor:
        """Clips `[N, 3, T, H, W]` in [-1, 1]; those from index `len(self)` on are never trained on, but previewed."""

    def captions(self, index: int) -> list[str]:
        """The captions of a clip, paraphrases of each other."""

    def key(self) -> str:
        """What a cache of this data set depends on."""

    def evaluation_prompts(self, n: int) -> list[str]:
        """Prompts that previews are sampled from."""

    def evaluate(self, clips: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Validation figures of clips `[N, 3, T, H, W]` made from prompts."""


class Objective(Protocol):
    """What is trained and how its loss is computed; `target(settings, dataset, folder, device, pm)` builds one.

    Everything random comes from the generator it is handed, so a step is the same after a resume.
    """

    modules: dict[str, nn.Module]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser: `params`, and `muon=True` where Muon may train them (2-D weights)."""

    def prepare(self) -> None:
        """Once before training: fit and encode what is encoded once."""

    def loss(self, batch_size: int, generator: torch.Generator, progress: float) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch drawn with `generator`, and figures for the log; progress is the share of the run that is done."""

    def preview(self, modules: dict[str, nn.Module]) -> tuple[Tensor, dict[str, float]]:
        """Sample clips `[N, 3, T, H, W]` made with the given (averaged) modules, and validation figures."""

    def export(self, modules: dict[str, nn.Module], folder: str) -> None:
        """Write the trained parts as folders that `from_pretrained` reads."""


class TrainableVAE(Protocol):
    """A VAE that the VAE objective can train."""

    config: Any
    spec: Any

    def reinitialised(self, **architecture: Any) -> TrainableVAE:
        """One with fresh weights and this one's config, with the fields in `architecture` changed."""

    def reconstruct(self, video: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Differentiable and unclamped: the video, the mean and the log-variance."""

    def fit_normaliser(self, batches: Iterable[Tensor]) -> None:
        """Measure the mean and deviation of each latent channel and write them into the config."""
