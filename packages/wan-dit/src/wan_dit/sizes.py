"""Sizes of videos: which a picture suggests, and how far one may be from the grid of a model.

All sizes are (width, height) in pixels. The rules are those of the official code, so that a picture gives the same size there.
"""

from __future__ import annotations

import math

Size = tuple[int, int]


def area_size(picture: Size, area: int, multiple: Size, stride: Size = (8, 8)) -> Size:
    """The size of a picture's shape and about `area` pixels, rounded down to multiples (official Wan2.1 `image2video.py`).

    multiple: pixels a token covers along (width, height); stride: pixels a latent covers
    """
    aspect = picture[1] / picture[0]

    def fit(side: float, stride: int, multiple: int) -> int:
        patch = multiple // stride
        return max(1, int(side // stride // patch)) * multiple  # floors twice, as the official code does

    return fit(math.sqrt(area / aspect), stride[0], multiple[0]), fit(math.sqrt(area * aspect), stride[1], multiple[1])


def best_output_size(picture: Size, area: int, multiple: Size) -> Size:
    """The size nearest a picture's shape of at most `area` pixels (official Wan2.2 `utils.py`, for TI2V).

    One side is rounded down and the other made of what area is left; of the two ways, the one that keeps the shape better.
    """
    aspect = picture[0] / picture[1]
    width = math.sqrt(area * aspect)

    def floor(side: float, multiple: int) -> int:
        return max(multiple, int(side // multiple) * multiple)

    wide = floor(width, multiple[0])
    high = floor(area / width, multiple[1])
    by_width, by_height = (wide, floor(area / wide, multiple[1])), (floor(area / high, multiple[0]), high)
    return min((by_height, by_width), key=lambda size: _distortion(size, aspect))


def keeps_shape(picture: Size, size: Size, multiple: Size) -> bool:
    """Whether a picture stretched to `size` is off by one token a side at most, as it is at any size of `area_size`."""
    scales = [(side / own, (side + step) / own) for side, own, step in zip(size, picture, multiple, strict=True)]
    return max(low for low, _ in scales) <= min(high for _, high in scales)


def _distortion(size: Size, aspect: float) -> float:
    ratio = size[0] / size[1]
    return max(aspect / ratio, ratio / aspect)
