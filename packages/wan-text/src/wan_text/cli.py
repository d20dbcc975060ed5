"""The command `wan-text`: encode, tokenize, list, info, convert, cache, rewrite. Help and listing import no torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from ._shared.cli import Parser, add_common, run, show
from ._shared.discover import discover, resolve
from .cache_commands import add_cache
from .convert_command import add_convert
from .plugins import UMT5_TARGET, ImageEncoderSpec, TextEncoderSpec, find_image_encoder, find_text_encoder, load_spec, plugin_manager
from .rewrite_command import add_rewrite

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEFAULT = "tiny"
KINDS = {"wan_text_encoders": "text encoder", "wan_image_encoders": "image encoder", "wan_prompt_rewriters": "prompt rewriter"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (0, 2 for bad input, 1 for anything unexpected, 130 on Ctrl-C)."""
    return run(lambda args: args.command(args), _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="wan-text",
        description="Prompts to context tokens.",
        epilog="example: wan-text encode 'a red circle moves left' '' -o contexts",
    )
    parser.add_argument("--version", action="version", version=f"wan-text {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    encode = _command(commands, "encode", _encode, "prompts to a folder of context files", "wan-text encode prompts.txt -o contexts")
    _add_prompts(encode)
    encode.add_argument("-o", "--output", required=True, metavar="DIR", help="the folder; prompts that are in it already are skipped")
    encode.add_argument("--dtype", choices=DTYPES, help="type to compute and store (default: fp32; on a GPU the checkpoint's own)")
    encode.add_argument("--quantise", choices=("int8",), help="keep weights in 8 bits: a quarter of fp32, 2 to 3 %% off")
    encode.add_argument("--stream", action="store_true", help="leave the weights in their file: umT5-XXL in under 1 GB of memory")
    encode.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")

    text = "the tokens of prompts, and what would be cut off"
    tokenize = _command(commands, "tokenize", _tokenize, text, "wan-text tokenize 'a red circle' --json", listing=True)
    _add_prompts(tokenize)

    _command(commands, "list", _list, "the installed encoders and prompt rewriters", "wan-text list --json", listing=True)

    text = "facts of an encoder or a context folder"
    info = _command(commands, "info", _info, text, "wan-text info umt5-xxl", listing=True)
    info.add_argument("name", help="a context folder, or name, file, folder, Hub id or module:attr of a text encoder")

    add_convert(commands, _command, DTYPES)
    add_cache(commands, _command, _prompts)
    add_rewrite(commands, _command, _prompts)
    return parser


def _command(commands: Any, name: str, run_it: Any, text: str, example: str, *, listing: bool = False) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text.capitalize()}.", epilog=f"example: {example}"
    )
    parser.set_defaults(command=run_it)
    add_common(parser, listing=listing)
    return parser


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="prompts ('' is the empty one), or .txt files with one a line")
    parser.add_argument("--text-encoder", metavar="NAME", help="name, file, folder, Hub id or module:attr (default: the built-in tiny)")


def _encode(args: argparse.Namespace) -> None:
    prompts, folder = _prompts(args.prompts), _output(args.output)

    from tqdm import tqdm

    from .cache import read_facts, write_contexts

    spec = _recorded(read_facts(folder)) if not args.text_encoder else find_text_encoder(args.text_encoder)
    encoder = _load(spec, args)
    with tqdm(total=len(set(prompts)), unit=" prompts", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        done = write_contexts(encoder, prompts, folder, name=spec.name, progress=bar.update)
    print(f"{folder}: {done.encoded} encoded, {done.present} already there, text encoder '{spec.name}'")


def _tokenize(args: argparse.Namespace) -> None:
    spec = find_text_encoder(args.text_encoder or DEFAULT)
    if spec.target == UMT5_TARGET and spec.weights:
        from .checkpoint import load_tokenizer

        tokenizer: Any = load_tokenizer(spec.weights)
    else:
        tokenizer = spec.load()
    prompts = _prompts(args.prompts)
    rows = []
    for prompt, tokens in zip(prompts, tokenizer.tokenize(prompts), strict=True):
        pieces = tokenizer.pieces(tokens.ids) if hasattr(tokenizer, "pieces") else []
        facts = {"tokens": tokens.count, "limit": spec.max_tokens, "truncated": tokens.truncated}
        rows.append({"prompt": prompt, **facts, "ids": list(tokens.ids), "pieces": pieces})
    if args.json:
        return show(rows, as_json=True)
    table = [{**row, "prompt": _short(row["prompt"]), "pieces": " ".join(row["pieces"])} for row in rows]
    show([{key: value for key, value in row.items() if key != "ids"} for row in table], as_json=False)


def _list(args: argparse.Namespace) -> None:
    rows, pm = [], plugin_manager()
    for kind, label in KINDS.items():
        for offer in discover(kind, pm):
            facts = {"name": offer.name, "kind": label, "distribution": offer.dist, "version": offer.version}
            rows.append(facts | _columns(offer.spec) | {"status": str(offer.error or "ok")})
    for dist, error in pm.broken.items():
        blank = dict.fromkeys(rows[0] if rows else (), "")
        rows.append({**blank, "distribution": dist, "version": pm.versions.get(dist, ""), "status": f"{type(error).__name__}: {error}"})
    show(rows, as_json=args.json, empty="nothing is installed")


def _columns(spec: Any) -> dict[str, Any]:
    """What is listed of a spec of any kind; empty where it has none, or could not be had."""
    blank = dict.fromkeys(("space", "dim", "tokens", "weights"), "")
    if not isinstance(spec, TextEncoderSpec | ImageEncoderSpec):
        return blank | {"summary": getattr(spec, "summary", "")}
    facts: tuple[str, int, int]
    if isinstance(spec, TextEncoderSpec):
        facts = (spec.embedding_space, spec.embed_dim, spec.max_tokens)
    else:
        facts = (spec.image_space, spec.image_dim, spec.tokens)
    return dict(zip(("space", "dim", "tokens"), facts, strict=True)) | {"weights": spec.weights or "none", "summary": spec.summary}


def _info(args: argparse.Namespace) -> None:
    if (Path(args.name) / "encoder.json").is_file():
        from .cache import read_facts, read_index

        folder = Path(args.name)
        facts = {"kind": "contexts", **(read_facts(folder) or {}), "prompts": len(read_index(folder))}
    else:
        facts = _facts(args.name)
    show([facts] if args.json else [{"field": key, "value": value} for key, value in facts.items()], as_json=args.json)


def _facts(ref: str) -> dict[str, Any]:
    """All of a spec but where its code is; of an image encoder where the name is one's."""
    spec: Any
    if any(offer.name == ref for offer in discover("wan_image_encoders", plugin_manager())):
        spec, kind = find_image_encoder(ref), "image encoder"
    else:
        spec, kind = find_text_encoder(ref), "text encoder"
    hidden = ("target", "format", "describe")
    return {"kind": kind} | {key: value for key, value in vars(spec).items() if key not in hidden} | {"weights": spec.weights or "none"}


def _prompts(given: Sequence[str]) -> list[str]:
    """The prompts themselves, and the non-empty lines of .txt files."""
    prompts: list[str] = []
    for text in given:
        if not text.lower().endswith(".txt"):
            prompts.append(text)
            continue
        try:
            prompts += [line for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"'{text}' is not UTF-8 text: {error}") from error
    if not prompts:
        raise ValueError(f"no prompt in {', '.join(given)}: expected one a line")
    return prompts


def _output(text: str) -> Path:
    """The output folder, found to be writable before an encoder is loaded, or fetched; nothing is created yet."""
    folder = Path(text)
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"cannot write to '{text}': '{existing}' is a file")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"cannot write to '{text}': no permission for '{existing}'")
    return folder


def _recorded(facts: dict[str, Any] | None) -> TextEncoderSpec:
    """The encoder that a context folder was begun with, or the default one for a new folder."""
    if facts is None:
        return find_text_encoder(DEFAULT)
    try:
        spec: TextEncoderSpec = resolve("wan_text_encoders", str(facts.get("name")), plugin_manager(), typed=False)
        return spec
    except LookupError as error:
        raise LookupError(f"{error}; name the folder's encoder with --text-encoder") from error


def _load(spec: TextEncoderSpec, args: argparse.Namespace) -> Any:
    import torch

    from ._shared.weights import best_device, usable_device

    device, dtype = usable_device(args.device or best_device()), getattr(torch, DTYPES[args.dtype]) if args.dtype else None
    return load_spec(spec, dtype=dtype, device=device, quantise=args.quantise, stream=args.stream)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
