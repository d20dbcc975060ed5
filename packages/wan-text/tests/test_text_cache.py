"""Context folders under damage, several writers and kill -9: what is damaged is refused, found and mended."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from wan_text import TextEncoder, load_text_encoder
from wan_text.cache import read_facts, read_index, write_contexts
from wan_text.cache_check import entries, leftovers, prune, verify
from wan_text.cli import main

PROMPTS = ["a red circle moves left", "", "a blue star stays still", "a green square", "été 🐱", "a red circle moves left, then up"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WRITER = """
import sys
from pathlib import Path
import wan_text.cache
from wan_text import load_text_encoder

wan_text.cache._CHUNK = 2
prompts = [f"a red circle number {i}" for i in range(int(sys.argv[2]), int(sys.argv[3]))]
encoder = load_text_encoder("tiny")
print("ready", flush=True)
wan_text.cache.write_contexts(encoder, prompts, Path(sys.argv[1]), name="tiny")
"""


@pytest.fixture(scope="module")
def tiny() -> TextEncoder:
    encoder: TextEncoder = load_text_encoder("tiny")
    return encoder


@pytest.fixture(scope="module")
def whole(tiny: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "contexts"
    write_contexts(tiny, PROMPTS, folder, name="tiny")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "contexts")
    return tmp_path / "contexts"


def changed(content: bytes, rng: random.Random, *ways: str) -> tuple[str, bytes]:
    """Content damaged in one way, and which."""
    data, way, at = bytearray(content), rng.choice(ways), rng.randrange(len(content))
    if way == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del data[at:]
    elif way == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    else:
        data += rng.randbytes(rng.randint(1, 32))
    return f"{way} at {at}", bytes(data)


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file of a context folder; says how."""
    tensors = sorted(folder.glob("*.safetensors"))
    file = rng.choice([*tensors, folder / "encoder.json", folder / "index.jsonl"])
    if rng.random() < 0.1:
        file.unlink()
        return f"{file.name}: gone"
    if file in tensors and rng.random() < 0.2:
        shutil.copy(rng.choice([other for other in tensors if other != file]), file)
        return f"{file.name}: another's"
    content = file.read_bytes()
    how, data = changed(content, rng, "flip", "flip", "flip", "cut", "zero", "append")
    if data == content:
        return damage(folder, rng)
    file.write_bytes(data)
    return f"{file.name}: {how}"


def costs_prompts(folder: Path) -> bool:
    """An index that stops early, or a line without its end, is what a crash leaves: those prompts are not there, and no lie."""
    return len(read_index(folder)) < len(PROMPTS)


def believed(folder: Path, expected: dict[str, torch.Tensor]) -> Iterator[str]:
    """Prompts whose context is handed out and is not what it was."""
    from wan_dit.context_files import ContextFiles

    try:
        files = ContextFiles(folder)
    except (ValueError, OSError):
        return
    for prompt, context in expected.items():
        try:
            found = files.encode([prompt])[0]
        except (ValueError, LookupError):
            continue
        if found.shape != context.shape or not torch.equal(found, context):
            yield prompt


@pytest.mark.parametrize("cases", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_damage_is_found_and_never_believed(tiny: TextEncoder, whole: Path, tmp_path: Path, cases: int) -> None:
    rng = random.Random(cases)
    expected = dict(zip(PROMPTS, tiny.encode(PROMPTS), strict=True))
    for case in range(cases):
        folder = tmp_path / str(case)
        shutil.copytree(whole, folder)
        how = damage(folder, rng)
        assert not list(believed(folder, expected)), how
        if how == "encoder.json: gone":
            with pytest.raises(FileNotFoundError):
                verify(folder)
        else:
            assert verify(folder) or costs_prompts(folder), how
        if how.startswith("encoder.json"):
            with pytest.raises((ValueError, FileNotFoundError)):
                prune(folder)
        else:
            prune(folder)
            assert verify(folder) == [], how
            write_contexts(tiny, PROMPTS, folder, name="tiny")
            assert verify(folder) == []
            assert len(read_index(folder)) == len(PROMPTS)
        shutil.rmtree(folder)


@pytest.mark.parametrize("cases", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_damaged_weights_of_our_format_are_refused(encoder: TextEncoder, tmp_path: Path, cases: int) -> None:
    encoder.save_pretrained(tmp_path / "mine")
    file, rng = tmp_path / "mine" / "model.safetensors", random.Random(cases)
    content, expected = file.read_bytes(), encoder.encode(["a red circle"])[0]
    refused = 0
    for _ in range(cases):
        how, data = changed(content, rng, "flip", "flip", "cut", "zero", "append")
        if data == content:
            continue
        file.write_bytes(data)
        try:
            loaded = TextEncoder.from_pretrained(tmp_path / "mine")
        except ValueError:
            refused += 1
            continue
        # what remains are changes that no tensor sees, such as in the metadata of the header
        assert torch.equal(loaded.encode(["a red circle"])[0], expected), how
        assert loaded.fingerprint() == encoder.fingerprint(), how
    assert refused > 0.9 * cases


def test_several_writers_share_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "contexts"
    command = [sys.executable, "-c", WRITER, str(folder)]
    spans = [("0", "24"), ("12", "36"), ("0", "36")]
    writers = [subprocess.Popen([*command, *span], env=ENVIRONMENT, stdout=subprocess.DEVNULL) for span in spans]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    assert verify(folder) == []
    assert len(read_index(folder)) == 36
    assert not list(leftovers(folder))


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_what_a_killed_writer_leaves_is_whole_and_goes_on(tiny: TextEncoder, tmp_path: Path, kills: int) -> None:
    folder, rng = tmp_path / "contexts", random.Random(kills)
    for _ in range(kills):
        command = [sys.executable, "-c", WRITER, str(folder), "0", "400"]
        with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE) as writer:
            assert writer.stdout
            writer.stdout.readline()
            time.sleep(0.05 + 0.3 * rng.random())
            writer.send_signal(signal.SIGKILL)
        if (folder / "encoder.json").exists():
            assert verify(folder) == []
    prompts = [f"a red circle number {i}" for i in range(400)]
    done = write_contexts(tiny, prompts, folder, name="tiny")
    assert done.encoded + done.present == 400
    assert verify(folder) == []
    prune(folder, grace=0)
    assert verify(folder) == []
    assert not list(leftovers(folder))
    assert len(read_index(folder)) == 400


def test_ls_verify_and_prune(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "ls", str(folder), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["tokens"] for row in rows][:2] == [6, 1]
    assert main(["cache", "verify", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: whole; 0 files left over\n"
    victim = folder / rows[0]["file"]
    victim.write_bytes(victim.read_bytes()[:-1])
    (folder / rows[2]["file"]).unlink()
    (folder / ".abc.12345678.safetensors").write_bytes(b"half")
    assert main(["cache", "verify", str(folder)]) == 2
    out = capsys.readouterr().out
    assert "its content is not what was written" in out
    assert "a red circle moves left" in out
    assert "cannot be read: No such file or directory" in out
    assert out.endswith("2 damaged or missing; 1 files left over\n")
    assert main(["cache", "prune", str(folder), "--dry-run"]) == 0
    assert "would remove 2 prompts and 1 files" in capsys.readouterr().out
    assert victim.exists()
    assert main(["cache", "prune", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["files"] == [victim.name]
    assert (folder / ".abc.12345678.safetensors").exists(), "a writer may be at work on it"
    assert prune(folder, grace=0).files == (".abc.12345678.safetensors",)
    (folder.parent / "keep.txt").write_text("a green square\n")
    assert main(["cache", "prune", str(folder), "--keep", str(folder.parent / "keep.txt"), ""]) == 0
    assert "removed 2 prompts and 2 files" in capsys.readouterr().out
    assert [row["prompt"] for row in entries(folder)] == ["", "a green square"]
    assert main(["cache", "ls", str(folder.parent)]) == 2
    assert "no context folder at" in capsys.readouterr().err


def test_a_damaged_line_is_told_with_how_to_mend_it(folder: Path, tiny: TextEncoder) -> None:
    index = folder / "index.jsonl"
    index.write_text(index.read_text().replace("a green square", "a green circle"))
    with pytest.raises(ValueError, match=r"line 4: .*damaged: its checksum .*mend it with: wan-text cache prune"):
        write_contexts(tiny, PROMPTS, folder, name="tiny")
    assert prune(folder).lines == 1
    assert write_contexts(tiny, PROMPTS, folder, name="tiny").encoded == 1


USES: list[Callable[[Path], Any]] = [read_facts, entries, prune]


@pytest.mark.parametrize("use", USES)
def test_a_damaged_description_is_refused(folder: Path, use: Callable[[Path], Any]) -> None:
    facts = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps({**facts, "max_tokens": 33}))
    with pytest.raises(ValueError, match=r"encoder.json' is damaged.*remove the folder and encode again"):
        use(folder)
    assert [problem.place for problem in verify(folder)] == ["encoder.json"]


def test_numbers_that_are_none_are_not_stored(tiny: TextEncoder, tmp_path: Path) -> None:
    broken = tiny.reinitialised()
    with torch.no_grad():
        broken.umt5.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="makes NaN or infinite numbers of 'a red circle': use another type, such as fp32"):
        write_contexts(broken, ["a red circle"], tmp_path / "contexts", name="broken")
    assert not list((tmp_path / "contexts").glob("*.safetensors"))


def test_a_context_that_was_exchanged_is_found(folder: Path) -> None:
    first, second = (folder / row["file"] for row in entries(folder)[:2])
    save_file({"context": torch.zeros(6, 96)}, first)
    second.write_bytes(first.read_bytes())
    assert len(verify(folder)) == 2


def test_half_a_character_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", "red \ud83d", "-o", str(tmp_path / "contexts")]) == 2
    expected = "wan-text: error: prompt 'red \\ud83d' holds half a character at 4 (a lone surrogate): it is no UTF-8 text\n"
    assert capsys.readouterr().err == expected
