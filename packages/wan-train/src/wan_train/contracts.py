"""What a trainer asks of its parts, structurally."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .data.buckets import Bucket, Info


class Dataset(Protocol):
    """Captioned clips, each fixed by its index."""

    def __len__(self) -> int: ...

    def video(self, indices: Sequence[int]) -> Tensor:
        """Clips `[N, 3, T, H, W]` in [-1, 1]; those from index `len(self)` on are never trained on, but previewed."""

    def info(self, index: int) -> Info:
        """Frames, size and rate of a clip, for recipes with stages."""

    def clip(self, index: int, bucket: Bucket) -> Tensor:
        """A clip `[3, T, H, W]` in the shape of a bucket, for recipes with stages; in its own shape it is that of `video`."""

    def captions(self, index: int) -> list[str]:
        """The captions of a clip, paraphrases of each other."""

    def key(self) -> str:
        """What a cache of this data set depends on."""

    def evaluation_prompts(self, n: int) -> list[str]:
        """Prompts that previews are sampled from."""

    def evaluate(self, clips: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Validation figures of clips `[N, 3, T, H, W]` made from prompts."""


Draw = Callable[[int, str], "torch.Generator"]  # (sample, stream) -> the random numbers of this step


class Objective(Protocol):
    """What is trained and how its loss is computed; `target(settings, dataset, folder, device, pm)` builds one.

    modules: what is trained, by name; samples: how many samples there are to train on; previews: how many clips a preview makes
    An attribute `frozen`, if there is one, has modules by name that stay as they are, and are split over processes as those are.
    A method `enter(progress, before, averages)`, if there is one, is called before every step with the share of the run that is done,
    that at the step before (negative at the first) and the averaged weights, by module and name. It freezes what does not learn in this
    step (`requires_grad`), may change weights where a phase begins, in the averages too, and says whether another loss begins.
    A method `gather()`, if there is one, is called after the gradients of every step, and makes alike what processes know, beside
    gradients, of batches of their own.
    """

    modules: dict[str, nn.Module]
    samples: int
    previews: int

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser: `params`; `muon=True` where Muon may train them (2-D weights); `scale`, a share of AdamW's rate."""

    def prepare(self) -> None:
        """Once before training: fit and encode what is encoded once."""

    def batch_size(self, given: int, progress: float) -> int:
        """How many samples a step takes; `given` is what the recipe says."""

    def batch(self, samples: Sequence[int], draw: Draw, progress: float, *bucket: Bucket, shift: float | None = None) -> Any:
        """All that the loss of some samples needs, without gradients: clips, noise, prompts; a plain or data class of tensors on the CPU.

        Everything random comes from `draw`, so that it is the same in every parallel layout and after a resume; progress is the
        share of the run that is done. `bucket` and `shift` are of a recipe's stage, given where it has them; an objective without
        stages or noise levels need not take them.
        """

    def losses(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each sample, `[B]`, and figures of each for the log, `[B]` without gradients; the step takes the mean."""

    def preview(self, modules: dict[str, nn.Module], indices: Sequence[int]) -> Tensor:
        """Sample clips `[N, 3, T, H, W]`, one for each of the indices, which count from 0 to `previews`, with the given (averaged) modules.

        The processes share the indices, and each is asked for its own. So what is random in a clip is keyed by its index alone, and
        no process waits for another in here; one that raises ends the run on all.
        """

    def measure(self, clips: Tensor) -> tuple[Tensor, dict[str, float]]:
        """What to show of the clips of all indices, in order, as clips `[M, 3, T, H, W]`, and validation figures; on the first process."""

    def export(self, modules: dict[str, nn.Module], folder: str) -> None:
        """Write the trained parts, modules in the host's memory, as folders that `from_pretrained` reads."""


class TrainableVAE(Protocol):
    """A VAE that the VAE objective can train."""

    config: Any
    spec: Any

    def reinitialised(self, **architecture: Any) -> TrainableVAE:
        """One with fresh weights and this one's config, with the fields in `architecture` changed."""

    def reconstruct(
        self, video: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Differentiable and unclamped: the video, the mean and the log-variance, None without a posterior.

        A generator is for all or one for each video.
        """

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters by the parts that phases freeze and train: encoder, encoder_head, decoder_input, decoder, decoder_head.

        The first convolution of `encoder` is the one that takes pixels.
        """

    def fit_normaliser(self, batches: Iterable[Tensor]) -> None:
        """Measure the mean and deviation of each latent channel and write them into the config."""
