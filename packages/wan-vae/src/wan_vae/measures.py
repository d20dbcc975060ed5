"""The measures of `wan-vae eval`: what each is called, how it is shown, and what it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .perceptual import WINDOW

NOT_COMPUTED = "not computed"
MEGABYTE = 1e6


@dataclass(frozen=True)
class Measure:
    """A measure: its key in JSON, heading, format, unit and meaning; `shown` says whether the table has it also where none was computed."""

    key: str
    label: str
    form: str
    unit: str
    meaning: str
    shown: bool = True


MEASURES = (
    Measure("compression_values", "values", "{:.1f}x", "", "pixel values of the clip over values of its latents, which include padding"),
    Measure("compression_bits", "bits", "{:.1f}x", "", "bits of 8-bit RGB over bits of the latents in the type they are stored in"),
    Measure("psnr", "PSNR", "{:.2f}", "dB", "peak signal-to-noise ratio, from one mean squared error over the clip; more is better"),
    Measure("psnr_frame", "PSNR frame", "{:.2f}", "dB", "the mean of every frame's own PSNR", False),
    Measure("psnr_luma_bt709", "PSNR Y 709", "{:.2f}", "dB", "PSNR of BT.709 luma over the clip", False),
    Measure("psnr_luma_bt601", "PSNR Y 601", "{:.2f}", "dB", "PSNR of BT.601 luma over the clip", False),
    Measure("ssim", "SSIM", "{:.4f}", "", "structural similarity, 7x7 uniform window, mean over frames and channels; 1 is best"),
    Measure("ssim_gaussian", "SSIM gauss", "{:.4f}", "", "structural similarity, 11x11 Gaussian window", False),
    Measure("ms_ssim", "MS-SSIM", "{:.4f}", "", "multi-scale structural similarity, 5 scales; needs 161x161 pixels; 1 is best"),
    Measure("first_frame", "first", "{:+.2f}", "dB", "PSNR of frame 0 less the median of the others; negative is a worse first frame"),
    Measure(
        "first_frame_colour",
        "colour",
        "{:+.2f}",
        "levels",
        "colour of frame 0 against the others: mean error less their median, of the channel that differs most",
    ),
    Measure(
        "seam",
        "seam",
        "{:+.2f}",
        "levels",
        "change of the error (means of 8x8 blocks) where a group of frames begins, less that inside groups; more is a visible seam",
    ),
    Measure("flicker", "flicker", "{:.2f}", "levels", "mean absolute change of a pixel's error from frame to frame; 0 is best"),
    Measure("flicker_static", "still", "{:.2f}", "levels", "flicker of the pixels that stand still in the original, within 1 level"),
    Measure(
        "tile_step",
        "tile step",
        "{:+.2f}",
        "levels",
        "step of the error across tile borders, less that between other neighbours (--tile)",
        False,
    ),
    Measure(
        "tile_error", "tile error", "{:+.2f}", "levels", "error of the pixels at tile borders, less that of the others (--tile)", False
    ),
    Measure("lpips", "LPIPS", "{:.4f}", "", "mean over frames of the distance that the network of --lpips-weights gives; 0 is best", False),
    Measure(
        "rfvd",
        "rFVD",
        "{:.2f}",
        "",
        f"Fréchet distance between features (--fvd-model) of windows of {WINDOW} frames, over all clips",
        False,
    ),
    Measure("encode_fps", "enc/s", "{:.1f}", "frames/s", "speed of the encoder in this one pass, reading not counted"),
    Measure("decode_fps", "dec/s", "{:.1f}", "frames/s", "speed of the decoder in this one pass"),
    Measure(
        "peak_memory",
        "memory",
        "{:.0f} MB",
        "MB",
        "peak of encoding and decoding above what the loaded codec takes; a lower bound where the system keeps old peaks",
    ),
)
PSNR = next(measure for measure in MEASURES if measure.key == "psnr")


def text(measure: Measure, value: Any) -> str:
    """A value as the table shows it."""
    if value is None:
        return NOT_COMPUTED
    shown = measure.form.format(value / MEGABYTE if measure.key == "peak_memory" else value)
    return shown[1:] if shown in ("+0.00", "-0.00") else shown
