"""The report: a PNG that others read, labels that can be read, a page that needs nothing else and trusts no name."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from wan_vae.evaluation import Measured
from wan_vae.glyphs import DOTS, write
from wan_vae.measures import MEASURES
from wan_vae.report import Report
from wan_vae.sheet import CLIPS, GAP, GUTTER, contact_sheet, png
from wan_vae.thumbnails import PICTURES, WIDTH, Samples

EVIL = '<script src="x">&.mp4'


class Page(HTMLParser):
    """Tags in order, the text of cells, and every attribute that could fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.titles: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]

        self.titles += [value for name, value in attrs if name == "alt"]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def samples(frames: int = 9, size: tuple[int, int] = (20, 30), error: float = 0.05) -> Samples:
    found = Samples()
    video = torch.linspace(-0.5, 0.5, frames).view(1, 1, -1, 1, 1).expand(1, 3, -1, *size)
    for piece in video.split([1, frames - 1] if frames > 1 else 1, dim=2):
        found.add(piece, piece + error)
    return found


def measured(clip: str = "a/clip.mp4", codec: str = "tiny", features: int = 0, **values: float | None) -> Measured:
    every = {measure.key: None for measure in MEASURES if measure.key != "rfvd"}
    own = {**every, "frames": 9, "width": 30, "height": 20, "psnr": 30.0, "peak_memory": 2_500_000, **values}
    sets = tuple([torch.arange(2.0) * (i + side) for i in range(features)] for side in (1, 3))
    return Measured(clip, codec, own, samples(), sets)


def test_png_is_read_back_exactly() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    image = Image.open(io.BytesIO(png(picture)))
    assert (image.mode, image.size) == ("RGB", (53, 37))
    assert np.array_equal(np.asarray(image), picture)


def test_glyphs_are_all_different_and_fit() -> None:
    pictures = {letter: write(letter, 1) for letter in DOTS}
    assert {picture.shape for picture in pictures.values()} == {(7, 6)}
    assert len({picture.tobytes() for picture in pictures.values()}) == len(DOTS)
    assert all(picture.any() for letter, picture in pictures.items() if letter != " ")
    assert np.array_equal(write("aé", 1), write("A?", 1))
    assert write("", 3).shape == (21, 0)


@pytest.mark.parametrize(("frames", "expected"), [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (9, [0, 2, 6, 8]), (1000, None)])
def test_pictures_are_the_first_the_last_and_some_between(frames: int, expected: list[int] | None) -> None:
    indices = [sample.index for sample in samples(frames).pictures()]
    assert expected is None or indices == expected
    assert (indices[0], indices[-1], len(indices)) == (0, frames - 1, min(frames, PICTURES))
    assert np.diff(indices).max(initial=0) < max(2, frames / 2)


@pytest.mark.parametrize(
    ("size", "shape"), [((20, 30), (160, 240)), ((100, 480), (50, 240)), ((100, 200), (100, 200)), ((900, 10), (320, 4))]
)
def test_pictures_are_of_a_size_to_be_seen(size: tuple[int, int], shape: tuple[int, int]) -> None:
    sample = samples(1, size).pictures()[0]
    assert sample.original.shape == sample.reconstruction.shape == (*shape, 3)
    assert sample.original.shape[1] <= WIDTH
    assert np.unique(sample.difference).tolist() == [round(8 * 0.05 * 127.5)]


def test_sheet_shows_original_reconstruction_and_difference() -> None:
    one = measured()
    first = one.samples.pictures()[0]
    sheet = contact_sheet({"clip.mp4": [one, measured(codec="other")]})
    left = sheet[:, GAP + GUTTER : GAP + GUTTER + first.original.shape[1]]
    for picture, times in ((first.original, 1), (first.reconstruction, 2), (first.difference, 2)):
        rows = np.flatnonzero((left == picture[0, 0]).all(axis=(1, 2)))
        assert len(rows) == times * picture.shape[0]
    assert (sheet[:, :GUTTER].max(axis=2) > 200).any(), "rows are labelled"


def test_sheet_of_many_clips_says_how_many_it_leaves_out() -> None:
    clips = {f"{i}.mp4": [measured(f"{i}.mp4")] for i in range(CLIPS + 3)}
    full, more = contact_sheet(dict(list(clips.items())[:CLIPS])), contact_sheet(clips)
    assert full.shape[0] < more.shape[0] < full.shape[0] + 40
    assert len(Page(Report([one for found in clips.values() for one in found], {}).to_html()).links) == CLIPS + 3


def test_table_and_means() -> None:
    report = Report(
        [
            measured(psnr=30.0, seam=-0.001, first_frame=1.5),
            measured("b/other.mp4", psnr=34.0, lpips=0.5),
            measured(codec="exact", psnr=math.inf),
        ],
        {},
    )
    rows = report.rows()
    assert [(row["clip"], row["codec"], row["PSNR"]) for row in rows] == [
        ("clip.mp4", "tiny", "30.00"),
        ("other.mp4", "tiny", "34.00"),
        ("mean of 2", "tiny", "32.00"),
        ("clip.mp4", "exact", "inf"),
        ("mean of 1", "exact", "inf"),
    ]
    assert [row["LPIPS"] for row in rows[:3]] == ["not computed", "0.5000", "0.5000"]
    assert [rows[0][label] for label in ("memory", "seam", "first")] == ["2 MB", "0.00", "+1.50"]
    assert "rFVD" not in rows[0]
    assert len({tuple(row) for row in rows}) == 1


def test_clips_of_one_name_keep_their_paths() -> None:
    rows = Report([measured("a/clip.mp4"), measured("b/clip.mp4")], {}).rows()
    assert [row["clip"] for row in rows] == ["a/clip.mp4", "b/clip.mp4", "mean of 2"]


def test_rfvd_is_over_all_clips_of_a_codec() -> None:
    report = Report([measured(features=2), measured("b.mp4", features=1)], {"fvd_model": "fvd.pt"})
    (mean,) = report.means()
    assert mean["rfvd_windows"] == 3
    assert mean["rfvd"] > 0
    assert [bool(row["rFVD"]) for row in report.rows()] == [False, False, True]
    alone = Report([measured(features=1)], {"fvd_model": "fvd.pt"})
    assert alone.missing()[-1] == "rFVD: not computed, it needs 2 windows of 16 frames and the clips have 1"


def test_json_is_strict_and_says_what_is_missing() -> None:
    text = Report([measured(psnr=math.inf, first_frame=-math.inf)], {"dtype": "fp32"}).to_json()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (row,) = record["results"]
    assert (row["psnr"], row["first_frame"], row["ssim"], row["frames"]) == ("inf", "-inf", "not computed", 9)
    assert record["units"]["seam"] == "levels"
    assert set(record["units"]) <= set(record["means"][0])


def test_page_needs_no_other_file_and_escapes_names() -> None:
    page = Report([measured(EVIL, codec=EVIL)], {"lpips_weights": EVIL}).to_html()
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert parsed.words.count(EVIL) == 3, "clip and codec of a row, codec of the means"
    assert f"Pictures of {EVIL}" in parsed.titles
    assert {link[:22] for link in parsed.links} == {"data:image/png;base64,"}
    assert not re.search(r"url\(|@import|https?:", page)
    image = Image.open(io.BytesIO(base64.b64decode(parsed.links[0][22:])))
    assert image.size[0] > GUTTER
    assert parsed.tags.count("tr") == 3
    assert "prefers-color-scheme:dark" in page


def test_page_explains_every_measure_it_shows() -> None:
    page = Report([measured(tile_step=1.0)], {}).to_html()
    for measure in MEASURES:
        shown = f"<th>{measure.label}</th>" in page
        assert (measure.meaning.replace("'", "&#x27;") in page) == shown, measure.key
    assert "<th>tile step</th>" in page
    assert "LPIPS: not computed" in page
