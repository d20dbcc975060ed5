"""A batch of damaged files, read in this process: `python fuzzing.py latents|video SEED CASES FOLDER` prints what came of them."""

from __future__ import annotations

import json
import random
import resource
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

MEMORY = 12 << 30  # bytes of address space


def damage(data: bytes, chance: random.Random) -> bytes:
    """The bytes with one of the accidents that files have, most often in the headers at both ends."""
    mutable = bytearray(data)
    anywhere, head, tail = (
        (lambda: chance.randrange(len(data))),
        (lambda: chance.randrange(min(1800, len(data)))),
        (lambda: -1 - chance.randrange(400)),
    )
    place = chance.choice([anywhere, head, tail])
    kind = chance.choice(["flip", "flip", "flip", "bytes", "cut", "zeros", "insert", "remove", "append", "swap", "number"])
    at = place() % len(data)
    if kind == "flip":
        for _ in range(chance.choice([1, 1, 2, 8])):
            mutable[place() % len(data)] ^= 1 << chance.randrange(8)
    elif kind == "bytes":
        for _ in range(chance.choice([1, 4, 32])):
            mutable[place() % len(data)] = chance.randrange(256)
    elif kind == "cut":
        del mutable[at:]
    elif kind == "zeros":
        mutable[at : at + 64] = bytes(len(mutable[at : at + 64]))
    elif kind == "insert":
        mutable[at:at] = chance.randbytes(chance.randrange(1, 40))
    elif kind == "remove":
        del mutable[at : at + chance.randrange(1, 40)]
    elif kind == "append":
        mutable += chance.randbytes(chance.randrange(1, 100))
    elif kind == "swap":
        half = len(data) // 2
        mutable[at % half : at % half + 50], mutable[half : half + 50] = mutable[half : half + 50], mutable[at % half : at % half + 50]
    else:
        mutable[at : at + 4] = chance.choice([0xFFFFFFFF, 0x7FFFFFFF, 0, 1, 65536]).to_bytes(4, chance.choice(["big", "little"]))
    return bytes(mutable)


def read_latents(path: Path) -> Any:
    import torch
    from wan_vae.latents import LatentFile

    file = LatentFile.open(path)
    file.verify()
    chunks = [torch.cat(list(file.chunks(2, name=name)), dim=2) for name in ("latents", "logvar")]
    return file.info, file.timestamps(), [chunk.numpy().tobytes() for chunk in chunks]


def try_latents(path: Path, whole: Any, chance: random.Random) -> str:
    try:
        got = read_latents(path)
    except ValueError:
        return "refused"
    return "whole" if got == whole else "WRONG"


def read_video(path: Path, on_error: str) -> tuple[int, int | None, int]:
    """Frames read, frames declared, gaps."""
    from wan_vae.video import read

    reader = read(path, on_error=on_error)
    count, last = 0, None
    for pixels, pts in reader:
        assert pixels.shape == (reader.info.height, reader.info.width, 3), f"{pixels.shape} of {reader.info}"
        assert last is None or pts > last, f"{pts} after {last}"
        count, last = count + 1, pts
    return count, reader.info.frames, len(reader.gaps)


def try_video(path: Path, whole: Any, chance: random.Random) -> str:
    on_error = chance.choice(["error", "stop", "fill"])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            count, declared, gaps = read_video(path, on_error)
        except ValueError:
            return "refused"
    if heard:
        return "recorded" if gaps else "warned"
    if gaps:
        return "WRONG: a gap without a warning"
    if path.suffix == ".ts" and count < whole[0]:  # a transport stream declares no length: less of it is a shorter film
        return "shorter"
    return "whole" if count in (whole[0], declared) else f"WRONG: {count} frames, declared {declared}"


def main(kind: str, seed: int, cases: int, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    chance, outcomes = random.Random(seed), Counter[str]()
    sources = [path for path in sorted(folder.glob("film.*")) if (path.suffix == ".safetensors") == (kind == "latents")]
    wholes = {path: read_latents(path) if kind == "latents" else read_video(path, "error") for path in sources}
    for case in range(cases):
        source = chance.choice(sources)
        damaged = folder / f"damaged-{kind}-{seed}{source.suffix}"
        damaged.write_bytes(damage(source.read_bytes(), chance))
        outcome = (try_latents if kind == "latents" else try_video)(damaged, wholes[source], chance)
        if outcome.startswith("WRONG"):
            damaged.rename(folder / f"wrong-{kind}-{seed}-{case}{source.suffix}")
        outcomes[f"{source.name} {outcome}" if outcome.startswith("WRONG") else outcome] += 1
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
