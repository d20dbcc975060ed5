"""Film to latent file and back: every frame and pixel, constant memory, checked metadata, nothing half-written."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shuffle_vae import ShuffleVAE, StoppingVAE
from signing import save_signed
from wan_vae import VideoCodec, WanVAE, load_vae
from wan_vae._shared.spec import UNKNOWN
from wan_vae.config import TINY
from wan_vae.latents import LatentFile, LatentInfo, Padding, is_latent_file, write_latents
from wan_vae.metrics import psnr
from wan_vae.video import probe, read_frames, to_frames, to_tensor

Film = Callable[..., Path]
THIRD_PARTY = Path(__file__).parent / "third_party"


@pytest.fixture(scope="module")
def tiny() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE().eval()


def frames_of(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(path)))


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize(("frames", "width", "height"), [(1, 16, 16), (2, 17, 16), (5, 16, 8), (8, 30, 23), (23, 24, 9)])
def test_every_frame_and_pixel_comes_back(film: Film, tmp_path: Path, frames: int, width: int, height: int, chunk: int) -> None:
    source, latents, back = film(frames, width, height), tmp_path / "film.safetensors", tmp_path / "back.mp4"
    codec = VideoCodec(ShuffleVAE())
    info = codec.encode_file(source, latents, chunk=chunk)
    assert info.padding == Padding(-(frames - 1) % 4, -width % 8, -height % 8)
    assert LatentFile.open(latents).shape == (1 + -(-(frames - 1) // 4), 768, -(-height // 8), -(-width // 8))
    assert codec.decode_file(latents, back, chunk=chunk, lossless=True) == info
    assert np.array_equal(frames_of(back), frames_of(source))
    assert probe(back).fps == probe(source).fps == 24
    assert {file.name for file in tmp_path.iterdir()} == {"film.mp4", "film.safetensors", "back.mp4"}


def test_real_film_through_the_wan_architecture(real_clips: Path, tiny: WanVAE, tmp_path: Path) -> None:
    codec, latents, back = VideoCodec(tiny), tmp_path / "phone.safetensors", tmp_path / "back.mp4"
    info = codec.encode_file(real_clips / "carphone_pristine.mp4", latents, limit=3)
    assert (info.frames, info.width, info.height, info.fps) == (3, 176, 144, Fraction(30000, 1001))
    codec.decode_file(latents, back, lossless=True, chunk=2)
    in_memory, padding = codec.encode(to_tensor(read_frames(real_clips / "carphone_pristine.mp4", limit=3)))
    assert padding == info.padding == Padding(frames=2)
    assert torch.allclose(load_file(latents)["latents"].transpose(0, 1)[None], in_memory, atol=1e-5)
    expected = to_frames(codec.decode(in_memory, padding)).astype(int)
    assert np.abs(frames_of(back) - expected).max() <= 1


def test_in_memory_pads_and_trims_any_batch() -> None:
    codec, video = VideoCodec(ShuffleVAE()), torch.rand(2, 3, 7, 21, 30) * 2 - 1
    latents, padding = codec.encode(video)
    assert (latents.shape, padding) == ((2, 768, 3, 3, 4), Padding(2, 2, 3))
    assert torch.equal(codec.decode(latents, padding), video)
    assert codec.decode(latents).shape == (2, 3, 9, 24, 32)
    with pytest.raises(ValueError, match=r"expected a video \[B, 3, T, H, W\], got \[3, 7, 21, 30\]"):
        codec.encode(video[0])
    with pytest.raises(ValueError, match=r"expected latents \[B, 768, .* of 'shuffle'"):
        codec.decode(latents[:, :5])


def test_latent_file_is_plain_safetensors_that_says_what_it_holds(film: Film, tmp_path: Path) -> None:
    path = tmp_path / "film.safetensors"
    written = VideoCodec(ShuffleVAE(), name="my-codec").encode_file(film(6, 20, 12), path, dtype=torch.bfloat16)
    tensors = load_file(path)
    assert list(tensors) == ["latents"]
    assert (tensors["latents"].shape, tensors["latents"].dtype) == ((3, 768, 2, 3), torch.bfloat16)
    file = LatentFile.open(path)
    assert file.info == written
    assert file.dtype == "BF16"
    assert [chunk.shape[2] for chunk in file.chunks(5)] == [1, 2]
    assert torch.equal(torch.cat(list(file.chunks()), dim=2)[0].transpose(0, 1), tensors["latents"])
    assert written.to_metadata() == {
        "format": "wan-vae-latents/2",
        "codec": "my-codec",
        "weights": "",
        "weights_dtype": "",
        "backend": "",
        "latent_space": "shuffle-1",
        "normalised": "true",
        "fps": "24/1",
        "time_base": "1/12288",
        "frames": "6",
        "width": "20",
        "height": "12",
        "pad_frames": "3",
        "pad_right": "4",
        "pad_bottom": "4",
        "rotation": "0",
        "color_range": "full",
        "bit_depth": "8",
        "pixel_aspect": "1/1",
        "primaries": "2",
        "transfer": "2",
        "crop": "0,0,0,0",
        "gaps": "",
    }
    assert LatentInfo.from_metadata(written.to_metadata()) == written


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_latents_are_stored_in_the_type_asked_for(film: Film, tmp_path: Path, dtype: torch.dtype) -> None:
    VideoCodec(ShuffleVAE()).encode_file(film(), tmp_path / "film.safetensors", dtype=dtype)
    assert load_file(tmp_path / "film.safetensors")["latents"].dtype == dtype
    with pytest.raises(ValueError, match=r"float32, float16 or bfloat16, not torch\.int8"):
        VideoCodec(ShuffleVAE()).encode_file(film(), tmp_path / "other.safetensors", dtype=torch.int8)


def test_latents_of_another_space_are_refused_and_other_weights_warned_of(film: Film, tiny: WanVAE, tmp_path: Path) -> None:
    latents, back = tmp_path / "film.safetensors", tmp_path / "back.mp4"
    VideoCodec(ShuffleVAE()).encode_file(film(), latents)
    with pytest.raises(ValueError, match=r"space 'shuffle-1' \(codec 'shuffle'\), but 'mine' decodes 'tiny-2'"):
        VideoCodec(tiny, name="mine").decode_file(latents, back)
    assert not back.exists()
    VideoCodec(tiny).encode_file(film(), latents)
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match="was encoded with other weights"):
        VideoCodec(WanVAE().eval()).decode_file(latents, back)


def test_weights_are_compared_in_one_type_only(film: Film, tmp_path: Path) -> None:
    latents, back = tmp_path / "film.safetensors", tmp_path / "back.mp4"
    assert VideoCodec(load_vae("tiny")).encode_file(film(), latents).weights_dtype == "float32"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VideoCodec(load_vae("tiny", dtype=torch.bfloat16)).decode_file(latents, back)
        VideoCodec(load_vae("tiny")).decode_file(latents, back)


def test_the_codec_is_recorded_by_its_registered_name(film: Film, tmp_path: Path) -> None:
    assert VideoCodec(load_vae("tiny")).encode_file(film(), tmp_path / "film.safetensors").codec == "tiny"


def test_latents_of_an_unknown_space_are_decoded_by_the_vae_that_made_them_alone(film: Film, tmp_path: Path) -> None:
    latents, back = tmp_path / "film.safetensors", tmp_path / "back.mp4"
    maker, other = (WanVAE(TINY.model_copy(update={"latent_space": UNKNOWN})).eval() for _ in range(2))
    VideoCodec(maker).encode_file(film(), latents)
    assert VideoCodec(maker).decode_file(latents, back).frames == 7
    for wrong, hint in ((other, r"now float32\)$"), (maker.to(torch.bfloat16), r"load it in float32 \(--dtype\)$")):
        with pytest.raises(ValueError, match=f"latents of an unknown space, which only the VAE that made them decodes, .*{hint}"):
            VideoCodec(wrong).decode_file(latents, tmp_path / "other.mp4")
    assert not (tmp_path / "other.mp4").exists()


def test_the_built_in_vae_keeps_a_moving_square() -> None:
    film = np.zeros((9, 64, 64, 3), np.uint8)
    for t, frame in enumerate(film):
        frame[20:44, 10 + 2 * t : 34 + 2 * t] = (225, 25, 30)
    codec, video = VideoCodec(load_vae("tiny")), to_tensor(film)
    assert psnr(codec.decode(*codec.encode(video)), video) > 25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": "9"}, "contradicts itself: latents .* decode to 9 frames of 48x32, its metadata say 11 of 48x32"),
        ({"pad_right": "3"}, "its metadata say 9 of 51x32"),
        ({"frames": "-3"}, "incomplete or wrong.*frames is '-3'"),
        ({"fps": "24/0"}, "incomplete or wrong"),
        ({"width": "wide"}, "incomplete or wrong.*wide"),
        ({"height": None}, "incomplete or wrong.*height"),
        ({"normalised": "false"}, "not normalised"),
        ({"format": "wan-vae-latents/9"}, "format is 'wan-vae-latents/9', expected 'wan-vae-latents/2'"),
    ],
)
def test_metadata_that_lie(film: Film, tmp_path: Path, change: dict[str, str | None], message: str) -> None:
    path, back = tmp_path / "film.safetensors", tmp_path / "back.mp4"
    metadata = VideoCodec(ShuffleVAE()).encode_file(film(), path).to_metadata()
    changed = {key: value for key, value in {**metadata, **change}.items() if value is not None}
    save_signed(load_file(path), path, changed)
    assert is_latent_file(path)
    with pytest.raises(ValueError, match=rf"film\.safetensors' .*{message}"):
        VideoCodec(ShuffleVAE()).decode_file(path, back)
    assert not back.exists()


@pytest.mark.parametrize("kind", ["empty", "text", "cut short", "other tensors", "wrong rank", "integers", "folder"])
def test_what_is_no_latent_file(film: Film, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.safetensors"
    metadata = VideoCodec(ShuffleVAE()).encode_file(film(), path).to_metadata()
    if kind in ("empty", "text", "cut short"):
        path.write_bytes({"empty": b"", "text": b"words " * 200, "cut short": path.read_bytes()[:9000]}[kind])
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        shape = (3, 8, 4) if kind == "wrong rank" else (3, 768, 4, 6)
        dtype = torch.int32 if kind == "integers" else torch.float32
        save_file({"weights" if kind == "other tensors" else "latents": torch.zeros(shape, dtype=dtype)}, path, metadata)
    with pytest.raises(ValueError, match=r"bad\.safetensors' is not a latent file: "):
        LatentFile.open(path)
    with pytest.raises(FileNotFoundError, match="no latent file at"):
        LatentFile.open(tmp_path / "none.safetensors")


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_failure_midway_leaves_nothing(film: Film, tmp_path: Path, error: BaseException) -> None:
    def stop() -> None:
        raise error

    source, latents = film(20), tmp_path / "film.safetensors"
    with pytest.raises(type(error)):
        VideoCodec(StoppingVAE(stop)).encode_file(source, latents)
    assert [file.name for file in tmp_path.iterdir()] == ["film.mp4"]
    VideoCodec(ShuffleVAE()).encode_file(source, latents)
    with pytest.raises(type(error)):
        VideoCodec(StoppingVAE(stop)).decode_file(latents, tmp_path / "back.mp4")
    assert {file.name for file in tmp_path.iterdir()} == {"film.mp4", "film.safetensors"}


def test_codec_that_gives_too_few_frames_is_an_error(film: Film, tmp_path: Path) -> None:
    class Short(ShuffleVAE):
        def decode_stream(self, chunks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
            yield next(super().decode_stream(chunks))

    VideoCodec(ShuffleVAE()).encode_file(film(9), tmp_path / "film.safetensors")
    with pytest.raises(ValueError, match=r"decoded 1 frames of .* which holds 9"):
        VideoCodec(Short()).decode_file(tmp_path / "film.safetensors", tmp_path / "back.mp4")
    assert not (tmp_path / "back.mp4").exists()


def test_progress_counts_frames(film: Film, tmp_path: Path) -> None:
    codec, calls = VideoCodec(ShuffleVAE()), []
    codec.encode_file(film(10), tmp_path / "film.safetensors", progress=lambda *call: calls.append(call))
    assert calls == [(1, 10), (5, 10), (9, 10), (10, 10)]
    calls.clear()
    codec.decode_file(tmp_path / "film.safetensors", tmp_path / "back.mp4", chunk=2, progress=lambda *call: calls.append(call))
    assert calls == [(1, 10), (9, 10), (10, 10)]
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        codec.encode_file(tmp_path / "film.mp4", tmp_path / "other.safetensors", chunk=0)


def test_no_latents_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no latents to write"):
        write_latents(tmp_path / "film.safetensors", [], lambda: pytest.fail("asked for the facts of nothing"))
    assert not list(tmp_path.iterdir())


MEMORY = """
import sys
from pathlib import Path
from shuffle_vae import ShuffleVAE
from wan_vae import VideoCodec

codec, folder = VideoCodec(ShuffleVAE()), Path(sys.argv[1])
for name in ("short", "long"):
    codec.encode_file(folder / f"{name}.mp4", folder / "film.safetensors")
    codec.decode_file(folder / "film.safetensors", folder / "back.mp4")
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_peak_memory_does_not_grow_with_length(film: Film, tmp_path: Path) -> None:
    for name, frames in (("short.mp4", 80), ("long.mp4", 280)):  # x264 itself looks some 60 frames ahead
        film(frames, 96, 96, name=name, lossless=False)
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=True)
    short, long = (int(kilobytes) * 1024 for kilobytes in done.stdout.split())
    assert long - short < (280 - 80) * 96 * 96 * 3 * 4 / 2, "half of the further frames, as float32, is held"


def test_tensors_alive_do_not_grow_with_length(film: Film, tiny: WanVAE, tmp_path: Path) -> None:
    alive: dict[int, int] = {}

    def progress(done: int, total: int | None) -> None:
        if done in (9, 33):
            alive[done] = sum(item.nbytes for item in gc.get_objects() if type(item) is torch.Tensor)

    codec = VideoCodec(tiny)
    codec.encode_file(film(34, 32, 32), tmp_path / "film.safetensors", progress=progress)
    assert alive[9] == alive[33]
    codec.decode_file(tmp_path / "film.safetensors", tmp_path / "back.mp4", progress=progress)
    assert alive[9] == alive[33]


def child_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(THIRD_PARTY)}


@pytest.mark.parametrize(("command", "end"), [("encode", signal.SIGKILL), ("decode", signal.SIGINT)])
def test_killed_process_leaves_no_file_under_the_final_name(film: Film, tmp_path: Path, command: str, end: signal.Signals) -> None:
    source, folder = film(60), tmp_path / "work"
    folder.mkdir()
    if command == "decode":
        source = tmp_path / "film.safetensors"
        VideoCodec(ShuffleVAE()).encode_file(tmp_path / "film.mp4", source)
    final = folder / ("film.safetensors" if command == "encode" else "film.mp4")
    line = [sys.executable, "-m", "wan_vae", command, str(source), str(final), "--codec", "shuffle_vae:stuck_vae"]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (a shell may have started these tests deaf to it)
    with subprocess.Popen(line, env=child_environment(), stdout=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "stuck\n"
            assert len(list(folder.iterdir())) == 1  # the scratch file
            process.send_signal(end)
            process.wait(30)
        finally:
            process.kill()
    assert process.returncode == (-signal.SIGKILL if end == signal.SIGKILL else 130)
    assert not final.exists()
    assert end == signal.SIGKILL or not list(folder.iterdir())


def test_a_codec_of_two_types_says_both(film: Callable[..., Path], tmp_path: Path) -> None:
    """As on a GPU: encode in fp32, decode in bf16; its weights cannot be told from those of a file made in fp32."""
    vae = load_vae("tiny")
    VideoCodec(vae).encode_file(film(5, 16, 16), tmp_path / "film.safetensors")
    assert LatentFile.open(tmp_path / "film.safetensors").info.backend == "direct"
    mixed = VideoCodec(vae.set_precision(decode=torch.bfloat16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixed.decode_file(tmp_path / "film.safetensors", tmp_path / "back.mp4")
    mixed.encode_file(tmp_path / "back.mp4", tmp_path / "again.safetensors")
    assert LatentFile.open(tmp_path / "again.safetensors").info.weights_dtype == "bfloat16+float32"
