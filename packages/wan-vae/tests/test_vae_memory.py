"""Peak memory of a real encode and decode does not depend on the length of the film."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Film = Callable[..., Path]
CHILD = """
import sys
from pathlib import Path
from wan_vae import VideoCodec, load_vae

codec, (film, latents, back) = VideoCodec(load_vae("tiny")), sys.argv[1:]
info = codec.encode_file(film, latents, chunk=4)
codec.decode_file(latents, back, chunk=4)
status = Path("/proc/self/status").read_text()  # getrusage would count what the parent held
print(info.frames, status.partition("VmHWM:")[2].split()[0])
"""


def peak(film: Path) -> tuple[int, int]:
    """Frames coded, and the most kilobytes that a process held which encoded and decoded `film`."""
    paths = [str(film), str(film.with_suffix(".safetensors")), str(film.with_suffix(".mkv"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD, *paths], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    frames, kilobytes = done.stdout.split()
    return int(frames), int(kilobytes)


@pytest.mark.slow
def test_two_thousand_frames_take_the_memory_of_two_hundred(film: Film) -> None:
    (few, low), (many, high) = (peak(film(frames, 64, 48, name=f"{frames}.mp4", lossless=False)) for frames in (200, 2000))
    assert (few, many) == (200, 2000)
    assert high < 1.1 * low, f"{low} kB for 200 frames, {high} kB for 2,000"
