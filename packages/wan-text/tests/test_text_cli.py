"""The command and the context folders it writes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from wan_text import TextEncoder, load_text_encoder
from wan_text.cache import read_index, write_contexts
from wan_text.cli import main


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def run(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def contexts(folder: Path) -> dict[str, Any]:
    return {digest: load_file(folder / f"{row['key']}.safetensors")["context"] for digest, row in read_index(folder).items()}


def test_encode_writes_what_the_encoder_returns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a blue star stays still\n\n  A red circle moves left \n", encoding="utf-8")
    folder = tmp_path / "deep" / "contexts"
    prompts = ["a red circle moves left", "", "a blue star stays still", "  A red circle moves left "]
    assert main(["encode", prompts[0], prompts[1], str(tmp_path / "prompts.txt"), "-o", str(folder), "--device", "cpu"]) == 0
    assert "4 encoded, 0 already there" in capsys.readouterr().out
    tiny = load_text_encoder("tiny")
    found = contexts(folder)
    assert list(found) == [sha256(prompt) for prompt in prompts]
    for prompt, expected in zip(prompts, tiny.encode(prompts), strict=True):
        torch.testing.assert_close(found[sha256(prompt)], expected, atol=2e-6, rtol=0)
    facts = json.loads((folder / "encoder.json").read_text())
    assert facts["fingerprint"] == tiny.fingerprint()
    assert (facts["embedding_space"], facts["embed_dim"], facts["max_tokens"], facts["dtype"]) == ("tiny-2", 96, 32, "float32")
    assert facts["cleaner"].startswith("lower/ftfy-")
    rows = read_index(folder)
    assert rows[sha256("")]["tokens"] == 1
    assert rows[sha256(prompts[0])]["key"] == rows[sha256(prompts[3])]["key"], "prompts with the same ids share a file"
    tensors = {f"{row['key']}.safetensors" for row in rows.values()}
    assert {path.name for path in folder.iterdir()} == {"encoder.json", "index.jsonl", ".index.lock", *tensors}


def test_prompts_already_there_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-o", str(tmp_path), "--device", "cpu"]
    assert main(["encode", "red", "blue", *arguments]) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert main(["encode", "blue", "green", *arguments]) == 0
    assert "1 encoded, 1 already there, text encoder 'tiny'" in capsys.readouterr().out
    assert before.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}.items()
    assert len(read_index(tmp_path)) == 3
    next(iter(before)).unlink()
    assert main(["encode", "red", "blue", *arguments]) == 0
    assert "1 encoded, 1 already there" in capsys.readouterr().out


def test_a_folder_holds_one_encoder(tmp_path: Path, encoder: TextEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    write_contexts(encoder, ["red"], tmp_path, name="mine")
    with torch.no_grad():
        encoder.umt5.norm.weight[0] += 1
    with pytest.raises(ValueError, match=r"holds contexts of the encoder 'mine': fingerprint"):
        write_contexts(encoder, ["blue"], tmp_path, name="mine")
    assert main(["encode", "blue", "-o", str(tmp_path)]) == 2
    assert "name the folder's encoder with --text-encoder" in capsys.readouterr().err
    assert main(["encode", "blue", "-o", str(tmp_path), "--text-encoder", "tiny", "--device", "cpu"]) == 2
    assert len(read_index(tmp_path)) == 1


def test_an_encoder_that_cannot_say_who_it_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'mine' has no fingerprint, cleaner, tokenize"):
        write_contexts(object(), ["red"], tmp_path / "new", name="mine")
    assert not (tmp_path / "new").exists()


def test_a_very_long_prompt_is_cut_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "red " * 10_000
    assert main(["encode", prompt, "-o", str(tmp_path), "--device", "cpu"]) == 0
    assert "has 10001 tokens, this encoder takes 32" in capsys.readouterr().err
    (row,) = read_index(tmp_path).values()
    assert row["tokens"] == 32
    assert row["truncated"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "missing.txt", "-o", "out"], "missing.txt"),
        (["encode", "empty.txt", "-o", "out"], "no prompt in empty.txt"),
        (["encode", "latin.txt", "-o", "out"], "'latin.txt' is not UTF-8 text"),
        (
            ["encode", "red", "-o", "out", "--text-encoder", "tinny"],
            "no text encoder named 'tinny' (installed: tiny, umt5-xxl; did you mean 'tiny'?)",
        ),
        (["encode", "red", "-o", "empty.txt"], "cannot write to 'empty.txt': 'empty.txt' is a file"),
        (["encode", "red", "-o", "empty.txt/out"], "is a file"),
        (["encode", "red", "-o", "out", "--device", "abacus"], "device 'abacus' cannot be used here"),
        (["encode", "red", "-o", "out", "--text-encoder", "broken"], "no .safetensors"),
        (["tokenize", "red", "--text-encoder", "nothing"], "no text encoder named 'nothing'"),
        (["encode", "red"], "wan-text: error: the following arguments are required: -o/--output (see wan-text encode --help)"),
        (["encode", "red", "-o", "out", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        ([], "wan-text: error: the following arguments are required: COMMAND"),
        (["info", "nothing"], "no text encoder named 'nothing'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "broken").mkdir()
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_damaged_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", "red", "-o", str(tmp_path), "--device", "cpu"]) == 0
    for name, text, message in (
        ("index.jsonl", "words\n", "is not readable"),
        ("index.jsonl", "[1]\n", "is not readable"),
        ("index.jsonl", '{"sha256": "ab"}\n{"tokens": 3}\n', "is not readable"),
        ("encoder.json", "{", "is not JSON"),
        ("encoder.json", "1", "holds a int, expected a JSON object"),
    ):
        kept = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text)
        assert main(["encode", "blue", "-o", str(tmp_path), "--device", "cpu"]) == 2, (name, text)
        assert f"{name}' {message}" in capsys.readouterr().err
        (tmp_path / name).write_text(kept)


def test_a_line_torn_by_a_crash_is_written_again(tmp_path: Path, encoder: TextEncoder) -> None:
    write_contexts(encoder, ["red", "blue"], tmp_path, name="mine")
    index = tmp_path / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-20])
    assert list(read_index(tmp_path)) == [sha256("red")]
    assert write_contexts(encoder, ["green", "blue"], tmp_path, name="mine").encoded == 2
    assert list(read_index(tmp_path)) == [sha256(prompt) for prompt in ("red", "green", "blue")]


MEETING = """
import sys, time
from pathlib import Path
from wan_text import load_text_encoder
from wan_text.cache import write_contexts

folder, own, other = Path(sys.argv[1]), *sys.argv[2:]
encoder = load_text_encoder("tiny")
encode = encoder.encode

def meet(prompts):
    if prompts != [""]:
        (folder / own).touch()
        while not (folder / other).exists():
            time.sleep(0.01)
    return encode(prompts)

encoder.encode = meet
write_contexts(encoder, [*(f"{own} {i}" for i in range(150)), "a star"], folder / "out", name="tiny")
"""


def test_two_processes_fill_one_folder(tmp_path: Path) -> None:
    """Both have read the index before either writes to it."""
    names = ["red", "blue"]
    commands = [[sys.executable, "-c", MEETING, str(tmp_path), *order] for order in (names, names[::-1])]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for process in processes:
            _, error = process.communicate(timeout=120)
            assert process.returncode == 0, error
    finally:
        for process in processes:
            process.kill()
    assert set(read_index(tmp_path / "out")) == {sha256("a star"), *(sha256(f"{name} {i}") for name in names for i in range(150))}


def test_another_type_is_told_from_another_encoder(tmp_path: Path) -> None:
    write_contexts(load_text_encoder("tiny"), ["red"], tmp_path, name="tiny")
    with pytest.raises(ValueError, match=r"encoder 'tiny': dtype 'float32' instead of 'bfloat16'; use that encoder in that type"):
        write_contexts(load_text_encoder("tiny", dtype=torch.bfloat16), ["blue"], tmp_path, name="tiny")


def test_tokenize_shows_ids_pieces_and_truncation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", "a red circle", "", "red " * 40, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["tokens"] for row in rows] == [4, 1, 41]
    assert [row["truncated"] for row in rows] == [False, False, True]
    assert rows[0]["pieces"] == ["▁a", "▁red", "▁circle", "</s>"]
    assert rows[1]["ids"] == [1]
    assert len(rows[2]["ids"]) == rows[2]["limit"] == 32
    assert main(["tokenize", "a red circle"]) == 0
    assert "▁a ▁red ▁circle </s>" in capsys.readouterr().out


def test_list_and_info(tmp_path: Path, encoder: TextEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["umt5-xxl"]["dim"] == 4096
    assert rows["tiny"]["status"] == "ok"
    assert main(["list"]) == 0
    assert main(["info", "umt5-xxl"]) == 0
    assert "hub:Wan-AI/Wan2.1-T2V-1.3B" in capsys.readouterr().out
    encoder.save_pretrained(tmp_path / "mine")
    assert main(["info", str(tmp_path / "mine"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["embedding_space"] == "test-1"
    write_contexts(encoder, ["red", "blue"], tmp_path / "contexts", name="mine")
    assert main(["info", str(tmp_path / "contexts"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)[0]
    assert (facts["kind"], facts["prompts"], facts["name"]) == ("contexts", 2, "mine")


def test_listing_and_importing_take_no_torch() -> None:
    code = "import sys, wan_text; from wan_text.cli import main; main(['list']); main(['info', 'tiny']); "
    code += "print([name for name in ('torch', 'pydantic', 'sentencepiece', 'ftfy', 'huggingface_hub') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
