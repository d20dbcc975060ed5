"""One picture over several real processes gives what one process gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import in_processes
from sharded import chunked, make, rows, work
from wan_vae.config import TINY, VAEConfig
from wan_vae.testing import difference

SMALL21 = VAEConfig(
    base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=(1, 2, 2), temporal_downsample=(False, True), num_res_blocks=1, latent_space="small"
)
CONFIGS = {"wan2.1": SMALL21, "wan2.2": TINY.model_copy(update={"base_dim": 8, "decoder_base_dim": 8})}
SECONDS = 60


def run(task: Callable[..., None], size: int, tmp_path: Path, *given: Any) -> list[tuple[Any, ...]]:
    """What `size` processes answered, by rank."""
    arguments = [(rank, size, str(tmp_path / "store"), *given) for rank in range(size)]
    return in_processes(task, arguments, ["torch", "torch.distributed"], SECONDS)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(("name", "size"), [("wan2.1", 2), ("wan2.2", 3)])
def test_several_processes_equal_one(name: str, size: int, tmp_path: Path) -> None:
    vae = make(CONFIGS[name])
    time, height, width = vae.spec.stride
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, 1 + 5 * time, 5 * height, 2 * width, generator=generator) * 2 - 1
    video[:, :, 1 + time :, : 4 * height - 1] = 0.5  # all but the last process see a still picture
    latents = torch.randn(1, vae.config.z_dim, 6, 5, 2, generator=generator)
    latents[:, :, 1:, :4] = 0
    encoded, decoded = vae.encode(video), vae.decode(latents)
    answers = run(work, size, tmp_path, vae.config.model_dump(), video, latents)
    assert len(answers) == size
    for rank, latents_of_rank, video_of_rank in answers:
        assert not isinstance(latents_of_rank, str), f"rank {rank}: {latents_of_rank} {video_of_rank}"
        assert difference(torch.from_numpy(latents_of_rank), encoded) < 1e-5
        assert difference(torch.from_numpy(video_of_rank), decoded) < 1e-5
    assert len(chunked(video, time)) == 6


def test_rows_come_from_the_neighbours_and_zeros_from_outside(tmp_path: Path) -> None:
    answers = run(rows, 3, tmp_path, [2, 1, 3], 1, 1)
    assert [answer[1] for answer in answers] == [[0, 1, 2, 3], [2, 3, 4], [3, 4, 5, 6, 0]]
    assert all(answer[2] for answer in answers)


def test_rows_below_alone(tmp_path: Path) -> None:
    answers = run(rows, 2, tmp_path, [2, 1], 0, 1)
    assert [answer[1] for answer in answers] == [[1, 2, 3], [3, 0]]


def test_parts_shorter_than_what_a_neighbour_wants_are_refused_by_all(tmp_path: Path) -> None:
    answers = run(rows, 2, tmp_path, [3, 1], 2, 2)
    assert [answer[1] for answer in answers] == ["ValueError"] * 2
    assert all("fewer processes" in answer[2] for answer in answers)


def test_more_processes_than_rows_are_refused(tmp_path: Path) -> None:
    answers = run(rows, 2, tmp_path, [1, 0], 1, 1)
    assert [answer[1] for answer in answers] == ["ValueError"] * 2
