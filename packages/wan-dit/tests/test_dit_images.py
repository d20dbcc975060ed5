"""Pictures of every kind become the RGB that a person sees."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from wan_dit.images import fit, picture_files, read_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def pixels(source: Any) -> np.ndarray:
    image = read_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_a_picture_is_turned_as_its_exif_data_say(tmp_path: Path) -> None:
    stored = np.zeros((8, 24, 3), np.uint8)
    stored[:, :8] = RED
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn to the right
    Image.fromarray(stored).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "phone.png"), np.rot90(stored, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_parts_are_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 2), (*RED, 255))
    image.paste((0, 0, 0, 0), (2, 0, 4, 2))
    if mode == "P":
        image = image.quantize(4, method=Image.Quantize.FASTOCTREE)  # a palette with transparency
    elif mode != "RGBA":
        image = image.convert("LA" if mode == "LA" else "RGBA").convert(mode)
    found = pixels(image)
    assert (found[:, 2:] == 255).all()
    assert np.abs(found[:, :2].astype(int) - (RED if mode != "LA" else 3 * [76])).max() <= 1


def test_half_transparent_is_half_white() -> None:
    assert np.abs(pixels(Image.new("RGBA", (2, 2), (0, 0, 0, 128))).astype(int) - 127).max() <= 1


def test_a_colour_that_stands_for_transparent_is_white(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (9, 8, 7)).save(tmp_path / "a.png", transparency=(9, 8, 7))
    assert (pixels(tmp_path / "a.png") == 255).all()


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    levels = np.array([[0, 257, 32768, 65535, 128, 129]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert pixels(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 128, 255, 0, 1]
    Image.fromarray(levels.astype(np.int32)).save(tmp_path / "deep.tiff")
    assert pixels(tmp_path / "deep.tiff")[0, :, 0].tolist() == [0, 1, 128, 255, 0, 1]


def test_grey_palette_bilevel_and_cmyk(tmp_path: Path) -> None:
    assert pixels(Image.new("L", (2, 2), 77)).tolist() == np.full((2, 2, 3), 77).tolist()
    assert (pixels(Image.new("1", (2, 2), 1)) == 255).all()
    Image.new("RGB", (4, 4), RED).quantize(2).save(tmp_path / "a.gif")
    assert np.abs(pixels(tmp_path / "a.gif").astype(int) - RED).max() <= 4
    Image.new("RGB", (16, 16), (200, 40, 30)).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    assert np.abs(pixels(tmp_path / "print.jpg").astype(int) - (200, 40, 30)).max() <= 4


def test_a_tensor_is_a_picture_too() -> None:
    levels = torch.arange(48, dtype=torch.float32).view(3, 4, 4)
    for tensor in (levels, levels[None], levels[:, None], levels[None, :, None]):
        assert np.array_equal(pixels(tensor / 127.5 - 1), levels.permute(1, 2, 0).numpy())
    for wrong in (levels, levels[:2] / 255, levels[0], levels.byte(), torch.full((3, 2, 2), torch.nan), torch.zeros(2, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"an image (is a floating-point )?tensor.*\[-1, 1\], got"):
            read_image(wrong)


def test_what_is_no_picture_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "webp", "bmp", "tiff"):
        whole = tmp_path / f"whole.{suffix}"
        Image.fromarray(noise).save(whole)
        (tmp_path / f"cut.{suffix}").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray(np.full((2, 2), 70_000, np.int32)).save(tmp_path / "whole32.tiff")
    for name, expected in (
        ("none.png", "no image at '"),
        (".", "is a folder: give one image"),
        ("text.png", "is not an image that can be read: give a PNG"),
        ("empty.png", "is not an image that can be read"),
        *((f"cut.{suffix}", "is cut or damaged|not an image") for suffix in ("png", "jpg", "webp", "bmp", "tiff")),
        ("float.tiff", "floating-point numbers, whose range it does not tell"),
        ("whole32.tiff", "beyond 16 bits"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=expected) as error:
            read_image(tmp_path / name)
        assert "\n" not in str(error.value)
        assert str(tmp_path) in str(error.value)


def test_fit_keeps_the_proportions_and_the_middle() -> None:
    stripes = np.zeros((30, 90, 3), np.uint8)
    stripes[:, 30:60] = RED
    assert np.abs(np.asarray(fit(Image.fromarray(stripes), (15, 15))).astype(int) - RED).max() < 20
    assert fit(Image.fromarray(stripes), (90, 30)).tobytes() == stripes.tobytes()


def test_pictures_of_a_folder_come_in_natural_order(tmp_path: Path) -> None:
    for name in ("10.png", "2.PNG", "1.jpeg", ".hidden.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("")
    with pytest.warns(RuntimeWarning, match="holds 1 files that are no pictures"):
        assert [file.name for file in picture_files(tmp_path)] == ["1.jpeg", "2.PNG", "10.png"]
    (tmp_path / "none").mkdir()
    with pytest.raises(
        ValueError, match=re.escape(f"'{tmp_path / 'none'}' is a folder without frames: expected pictures such as 0001.png")
    ):
        picture_files(tmp_path / "none")
