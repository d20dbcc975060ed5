"""Prompt rewriting: short prompts to the longer ones that Wan was trained on, before they are encoded. Text in, text out; imports no torch.

A rewriter has `rewrite(prompts, *, task) -> list[Rewritten]`, and keeps a prompt, with a warning, where it cannot do better.
"""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Literal, Protocol
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

Task = Literal["t2v", "i2v"]
PLACE = "{prompt}"
CINEMATIC = f"{PLACE}. Cinematic shot, natural light, fine detail, steady camera, smooth and plausible motion."
INSTRUCTIONS = {
    ("en", "t2v"): (
        "Rewrite the user's text as one prompt for a text-to-video model, in English, 80 to 100 words, one paragraph. Keep every subject, "
        "number, name, colour, action and quoted text of it, and its style. Add what a viewer would see: appearance, setting, light, "
        "framing, and how subject and camera move. Describe, do not tell a story or comment. Answer with the prompt alone."
    ),
    ("en", "i2v"): (
        "The user's text says how a given picture is to move. Rewrite it as one prompt for an image-to-video model, in English, at most "
        "80 words: what moves, how, and what the camera does. Do not describe what stands still in the picture, and add no new subjects. "
        "Answer with the prompt alone."
    ),
    ("zh", "t2v"): (
        "把用户的文字改写成一段用于文生视频模型的中文提示词,80到100字。保留其中的主体、数量、名称、颜色、动作、引号中的文字和风格,"
        "补充观众会看到的细节:外观、环境、光线、构图,以及主体和镜头的运动。只作描述,不讲故事,不加评论。只输出提示词。"
    ),
    ("zh", "i2v"): (
        "用户的文字说明一张给定的图片应如何运动。把它改写成一段用于图生视频模型的中文提示词,不超过80字:什么在动、怎样动、镜头如何运动。"
        "不要描述静止的内容,不要添加新的主体。只输出提示词。"
    ),
}
HAN = re.compile("[\u3400-\u9fff]")
REFUSAL = re.compile(
    r"\s*(i['\u2019]?m sorry|i am sorry|sorry[,.]|i can(no|['\u2019])t|i am unable|抱歉|对不起|很抱歉|我无法)", re.IGNORECASE
)
LONGEST = 4000  # characters of an answer that may still be a prompt; 512 tokens are about half of that
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
PATIENCE = 60.0  # the longest wait, in seconds, that a server can ask for


@dataclass(frozen=True)
class Rewritten:
    """A prompt after rewriting. kept: why it is the original; empty where it was rewritten."""

    text: str
    original: str
    kept: str = ""


class PromptRewriter(Protocol):
    """What a plugin of the kind `wan_prompt_rewriters` makes."""

    def rewrite(self, prompts: Iterable[str], *, task: Task = "t2v") -> list[Rewritten]:
        """One result a prompt, in their order."""


class TemplateRewriter:
    """Puts every prompt into a template.

    template: a text with `{prompt}` in it
    Example: `TemplateRewriter("{prompt}, oil painting").rewrite(["a cat"])[0].text` is `"a cat, oil painting"`.
    """

    def __init__(self, template: str = CINEMATIC) -> None:
        if PLACE not in template:
            raise ValueError(f"the template '{template[:60]}' has no {PLACE}, the place of the prompt")
        self.template = template

    def rewrite(self, prompts: Iterable[str], *, task: Task = "t2v") -> list[Rewritten]:
        """The template around each prompt; an empty one stays empty."""
        return [_keep(prompt, "it is empty") if not prompt.strip() else self._expanded(prompt) for prompt in prompts]

    def _expanded(self, prompt: str) -> Rewritten:
        text = prompt.strip()
        inner = text.rstrip(".") if f"{PLACE}." in self.template else text
        return Rewritten(self.template.replace(PLACE, inner), prompt)


class ChatRewriter:
    """Asks a language model behind any OpenAI-compatible endpoint (`POST {base_url}/chat/completions`).

    base_url: such as `http://localhost:8000/v1`
    key_env: name of the environment variable that holds the key, where one is needed; it is sent to this address alone
    timeout: seconds an answer may take; retries: further attempts where the server is busy, fails or does not answer
    instructions: the system prompt; by default one of ours, by the prompt's language and the task
    Where no answer comes, or one that is no prompt (a refusal, nothing, too long), the original is kept with a warning.
    ValueError for an address that is none, and where the server refuses the key or knows no such model.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_env: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 3,
        instructions: str | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"'{base_url}' is no address of a server, expected one such as http://localhost:8000/v1")
        if timeout <= 0 or retries < 0:
            raise ValueError(f"expected a timeout above 0 and retries of at least 0, got {timeout:g} and {retries}")
        self.url, self.model, self.key_env = f"{base_url.rstrip('/')}/chat/completions", model, key_env
        self.timeout, self.retries, self.instructions, self.sleep = timeout, retries, instructions, sleep

    def rewrite(self, prompts: Iterable[str], *, task: Task = "t2v") -> list[Rewritten]:
        """One request a prompt, one after the other; an empty prompt stays empty."""
        return [_keep(prompt, "it is empty") if not prompt.strip() else self._rewritten(prompt, task) for prompt in prompts]

    def _rewritten(self, prompt: str, task: Task) -> Rewritten:
        language = "zh" if HAN.search(prompt) else "en"
        system = self.instructions or INSTRUCTIONS[language, task]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        answer, problem = self._ask({"model": self.model, "messages": messages})
        text, problem = _prompt_in(answer) if answer is not None else ("", problem)
        return Rewritten(text, prompt) if not problem else _keep(prompt, problem)

    def _ask(self, body: dict[str, Any]) -> tuple[Any, str]:
        """The answer, or None and what went wrong at the last attempt."""
        problem = ""
        for attempt in range(1 + self.retries):
            wait = 2.0**attempt
            try:
                return self._post(body), ""
            except HTTPError as error:
                if error.code not in RETRIED:
                    reason = f"{self.url} answers {error.code} {error.reason}: {_excerpt(error)}"
                    raise ValueError(f"{reason}; check the model's name and the key in {self.key_env}") from None
                problem, wait = f"the server answers {error.code} {error.reason}", _asked_wait(error, wait)
            except TimeoutError:
                problem = f"no answer within {self.timeout:g} s"
            except (OSError, HTTPException) as error:
                problem = f"no connection: {getattr(error, 'reason', None) or error or type(error).__name__}"
            except ValueError:
                problem = "the answer is not JSON"
            if attempt < self.retries:
                self.sleep(min(wait, PATIENCE))
        return None, f"{problem}, after {1 + self.retries} attempts"

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_env):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(self.url, json.dumps(body).encode(), headers, method="POST")
        try:
            with build_opener(_NoRedirect).open(request, timeout=self.timeout) as answer:
                return json.loads(answer.read())
        except OSError as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise TimeoutError from error
            raise


class _NoRedirect(HTTPRedirectHandler):
    """A key goes to no other address than the one that was given."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _prompt_in(answer: Any) -> tuple[str, str]:
    """The prompt in an answer, or an empty text and why there is none."""
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        text = message.get("content")
    except (LookupError, TypeError, AttributeError):
        return "", "the answer holds no message"
    if message.get("refusal") or choice.get("finish_reason") == "content_filter" or (isinstance(text, str) and REFUSAL.match(text)):
        return "", "the model refuses"
    if choice.get("finish_reason") == "length":
        return "", "the answer was cut off"
    text = " ".join(text.split()) if isinstance(text, str) else ""
    text = text[1:-1].strip() if len(text) > 1 and text[0] + text[-1] in ('""', "''", "\u201c\u201d") else text
    if not text:
        return "", "the answer is empty"
    return (text, "") if len(text) <= LONGEST else ("", f"the answer has {len(text)} characters, more than a prompt of {LONGEST}")


def _keep(prompt: str, why: str) -> Rewritten:
    if prompt.strip():
        warnings.warn(f"prompt '{prompt if len(prompt) <= 40 else f'{prompt[:40]}...'}' was not rewritten: {why}", stacklevel=4)
    return Rewritten(prompt, prompt, why)


def _asked_wait(error: HTTPError, otherwise: float) -> float:
    asked = error.headers.get("Retry-After", "")
    return float(asked) if re.fullmatch(r"\d+(\.\d+)?", asked) else otherwise


def _excerpt(error: HTTPError) -> str:
    return " ".join(error.read(400).decode("utf-8", "replace").split())[:200] or "no reason given"
