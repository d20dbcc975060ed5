"""Files that a video becomes: true pixels, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from wan_dit.media import contact_sheet, to_frames, write_video


def solid(*colours: tuple[int, int, int], size: tuple[int, int] = (64, 48)) -> torch.Tensor:
    """A video `[1, 3, T, H, W]` with one plain colour a frame."""
    frames = torch.tensor(colours, dtype=torch.float32) / 127.5 - 1
    return frames.T[None, :, :, None, None].expand(1, 3, len(colours), size[1], size[0]).clone()


def read(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_frames_are_rounded_to_nearest_and_clamped() -> None:
    levels = torch.arange(256) / 127.5 - 1
    video = torch.stack([levels, levels + 0.003, levels * 2]).view(1, 3, 1, 1, 256)
    frames = to_frames(video)
    assert frames.shape == (1, 1, 256, 3)
    assert frames.dtype == np.uint8
    assert (frames[0, 0, :, 0] == np.arange(256)).all()
    assert (frames[0, 0, :, 1] == np.arange(256)).all()
    assert frames[0, 0, 0, 2] == 0 and frames[0, 0, 255, 2] == 255  # noqa: PT018
    with pytest.raises(ValueError, match="a batch of 2"):
        to_frames(torch.zeros(2, 3, 1, 8, 8))


def test_an_mp4_has_the_true_size_rate_and_colours(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 160, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]
    path = write_video(solid(*colours), tmp_path / "deep" / "a.mp4", fps=8)
    frames = read(path)
    assert frames.shape == (5, 48, 64, 3)
    assert np.abs(frames.astype(int).mean((1, 2)) - np.array(colours)).max() <= 4
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)
        assert stream.codec_context.colorspace == 1
    assert [file.name for file in path.parent.iterdir()] == ["a.mp4"]


def test_a_single_pixel_survives(tmp_path: Path) -> None:
    video = solid((0, 0, 0), (0, 0, 0))
    video[..., 0, 0] = 1
    frames = read(write_video(video, tmp_path / "a.mp4", fps=16))
    assert frames[:, 0, 0].min() > 200
    assert frames[:, 0, 2:].max() < 40


def test_odd_sizes_are_written_too(tmp_path: Path) -> None:
    colours = [(250, 10, 10), (10, 10, 250)]
    frames = read(write_video(solid(*colours, size=(33, 17)), tmp_path / "a.mp4", fps=8))
    assert frames.shape == (2, 17, 33, 3)
    assert np.abs(frames.astype(int).mean((1, 2)) - np.array(colours)).max() <= 4


def test_a_contact_sheet_shows_every_frame_large_enough_to_see(tmp_path: Path) -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    with Image.open(contact_sheet(solid(*colours), tmp_path / "a.png", columns=3)) as sheet:
        pixels = np.asarray(sheet)
    tile = (48 * 3, 64 * 3)  # 64 pixels are enlarged three times, to at least 160
    assert pixels.shape == (2 * tile[0] + 12, 3 * tile[1] + 16, 3)
    for i, colour in enumerate(colours):
        y, x = 4 + i // 3 * (tile[0] + 4), 4 + i % 3 * (tile[1] + 4)
        assert (pixels[y : y + tile[0], x : x + tile[1]] == colour).all()


def test_a_contact_sheet_of_a_long_large_video_stays_small(tmp_path: Path) -> None:
    video = solid(*[(i * 3, 0, 0) for i in range(81)], size=(480, 32))
    with Image.open(contact_sheet(video, tmp_path / "a.png")) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape[1] <= 6 * 324 + 4
    assert (pixels[4, 4, 0], pixels[-5, -5, 0]) == (0, 240), "from the first frame to the last"
