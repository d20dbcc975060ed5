"""The command `wan-text rewrite`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._shared.cli import show
from ._shared.files import replacing

OPTIONS = ("template", "base_url", "model", "key_env", "timeout", "retries", "instructions")


def add_rewrite(commands: Any, command: Any, prompts: Any) -> None:
    """Add it to the parser; `command` makes one, `prompts` reads prompts that are given as text or in .txt files."""
    text, example = "short prompts to longer ones, one a line", "wan-text rewrite 'a cat' --rewriter template -o prompts.txt"
    parser = command(commands, "rewrite", _rewrite, text, example, listing=True)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="prompts, or .txt files with one a line")
    parser.add_argument("--rewriter", default="template", metavar="NAME", help="template, openai, or another installed one (%(default)s)")
    parser.add_argument("--task", choices=("t2v", "i2v"), default="t2v", help="what the prompts are for (%(default)s)")
    parser.add_argument("--template", metavar="TEXT", help="template: a text, or a .txt file, with {prompt} in it")
    parser.add_argument("--base-url", metavar="URL", help="openai: such as http://localhost:8000/v1")
    parser.add_argument("--model", metavar="NAME", help="openai: the model's name at that server")
    parser.add_argument("--key-env", metavar="NAME", help="openai: environment variable with the key (OPENAI_API_KEY)")
    parser.add_argument("--timeout", type=float, metavar="S", help="openai: seconds an answer may take (60)")
    parser.add_argument("--retries", type=int, metavar="N", help="openai: further attempts where none comes (3)")
    parser.add_argument("--instructions", metavar="TEXT", help="openai: a system prompt, or a .txt file with one")
    parser.add_argument("-o", "--output", metavar="FILE", help="write them to a .txt file, as wan-text encode takes it (default: print)")
    parser.set_defaults(read_prompts=prompts)


def _rewrite(args: argparse.Namespace) -> None:
    from .plugins import load_prompt_rewriter

    options = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    options |= {name: _text(options[name]) for name in ("template", "instructions") if name in options}
    rows = load_prompt_rewriter(args.rewriter, **options).rewrite(args.read_prompts(args.prompts), task=args.task)
    lines = "".join(" ".join(row.text.split()) + "\n" for row in rows)
    if args.output:
        with replacing(args.output) as scratch:
            scratch.write_text(lines, encoding="utf-8")
    if args.json:
        show([vars(row) for row in rows], as_json=True)
    elif not args.output:
        print(lines, end="")


def _text(given: str) -> str:
    return Path(given).read_text(encoding="utf-8").strip() if given.endswith(".txt") else given
