"""Shapes of a stage: multiples of the grid, of about one area, and the nearest for each clip; budgets of micro-batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wan_train.data.buckets import Bucket, Buckets, Budget, Info, cost, tokens

GRIDS = st.sampled_from([(4, 16, 16), (4, 32, 32), (4, 8, 16)])


@pytest.mark.parametrize(
    ("bucket", "grid", "count"),
    [
        (Bucket(1, 256, 256), (4, 16, 16), 256),
        (Bucket(81, 192, 336), (4, 16, 16), 5_292),
        (Bucket(81, 480, 832), (4, 16, 16), 32_760),
        (Bucket(81, 720, 1280), (4, 16, 16), 75_600),
        (Bucket(121, 704, 1280), (4, 32, 32), 27_280),
    ],
)
def test_tokens_are_those_of_the_published_models(bucket: Bucket, grid: tuple[int, int, int], count: int) -> None:
    assert tokens(bucket, grid) == count


def test_the_cost_is_proportional_to_the_operations_of_a_block() -> None:
    dim, ffn = 5120, 13824  # 14B: 12 s h^2 + 4 s h f + 4 s^2 h

    def operations(s: int) -> float:
        return 12 * s * dim**2 + 4 * s * dim * ffn + 4 * s * s * dim

    image, video = Bucket(1, 256, 256), Bucket(81, 720, 1280)
    ratio = cost(video, knee=3 * dim + ffn) / cost(image, knee=3 * dim + ffn)
    assert ratio == pytest.approx(operations(75_600) / operations(256))


@given(GRIDS, st.integers(1, 12), st.integers(1, 12), st.floats(1, 4))
def test_shapes_are_of_the_grid_within_the_area_and_the_ratio(grid: tuple[int, int, int], rows: int, columns: int, ratio: float) -> None:
    size = (rows * grid[1], columns * grid[2])
    made = Buckets(video=size, grid=grid, frames=(5,), ratio=ratio)
    assert size in made.video
    for height, width in made.video:
        assert height % grid[1] == width % grid[2] == 0
        assert height * width <= size[0] * size[1]
        assert max(height, width) <= ratio * min(height, width) or (height, width) == size
        others = {shape for shape in made.video if shape != (height, width)} - {size}
        assert not any(h >= height and w >= width for h, w in others) or (height, width) == size  # none lies within another


@given(st.integers(1, 200), st.integers(16, 4000), st.integers(16, 4000))
def test_a_clip_goes_to_the_longest_bucket_it_fills_and_the_nearest_proportions(frames: int, height: int, width: int) -> None:
    made = Buckets(video=(480, 832), image=(256, 256), frames=(17, 81, 1))
    bucket = made.of(Info(frames, height, width, 16))
    assert bucket.frames == max(count for count in (1, 17, 81) if count <= frames)
    shapes = made.image if frames == 1 else made.video
    off = abs(math.log(bucket.width / bucket.height * height / width))
    assert off == pytest.approx(min(abs(math.log(w / h * height / width)) for h, w in shapes))


def test_buckets_of_the_480_pixel_stage() -> None:
    made = Buckets(video=(480, 832), frames=(81,))
    assert made.of(Info(81, 1080, 1920, 24)) == (81, 480, 832)
    assert made.of(Info(200, 1920, 1080, 24)) == (81, 832, 480)
    assert made.of(Info(81, 512, 512, 24)) == (81, 624, 640)  # 632 pixels square are no multiple of 16
    assert made.of(Info(1, 480, 832, 0)) == (1, 480, 832)
    assert 20 < len(made.video) < 40


def test_a_clip_too_short_for_every_bucket_is_refused_and_a_picture_is_not() -> None:
    made = Buckets(frames=(33, 81))
    with pytest.raises(ValueError, match="32 frames, the shortest bucket 33"):
        made.of(Info(32, 64, 64, 16))
    assert made.of(Info(1, 64, 64, 0)).frames == 1


def test_a_micro_batch_holds_what_both_budgets_allow() -> None:
    image, short, long = Bucket(1, 256, 256), Bucket(17, 256, 256), Bucket(81, 256, 256)  # 256, 1,280 and 5,376 tokens
    assert [Budget(5_376)(bucket) for bucket in (image, short, long)] == [21, 4, 1]
    budget = Budget(16_384, squared=30_000_000)
    assert [budget(bucket) for bucket in (image, short, long)] == [64, 12, 1]  # tokens bind, tokens bind, squares bind


@given(st.integers(1, 10**6), st.integers(0, 10**12), st.sampled_from([1, 5, 17, 81]), st.integers(1, 40), st.integers(1, 40))
def test_one_more_sample_would_be_over_the_budget(limit: int, squared: int, frames: int, rows: int, columns: int) -> None:
    bucket = Bucket(frames, 16 * rows, 16 * columns)
    count = tokens(bucket)
    if count > limit or (squared and count**2 > squared):
        with pytest.raises(ValueError, match="more than the budget of"):
            Budget(limit, squared)(bucket)
        return
    held = Budget(limit, squared)(bucket)
    assert held * count <= limit
    assert not squared or held * count**2 <= squared
    assert (held + 1) * count > limit or (squared and (held + 1) * count**2 > squared)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"video": (480, 850)}, "multiples of 16 and 16"),
        ({"video": (480,)}, "multiples of 16 and 16"),
        ({"image": (0, 16)}, "multiples of 16 and 16"),
        ({"frames": (80,)}, "1 \\+ 4k, such as 5 or 81"),
        ({"frames": ()}, "1 \\+ 4k"),
        ({"ratio": 0.5}, "1 or more, got 0.5"),
        ({"video": (480, 848), "grid": (4, 32, 32)}, "multiples of 32 and 32"),
    ],
)
def test_shapes_off_the_grid_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Buckets(**options)
