"""Prompt rewriting: the template, and a real server that answers, is busy, fails, refuses, is slow, or is not there."""

from __future__ import annotations

import json
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from wan_text import load_prompt_rewriter
from wan_text.cli import main
from wan_text.rewrite import CINEMATIC, ChatRewriter, Rewritten, TemplateRewriter

Answer = Callable[[BaseHTTPRequestHandler], None]


def reply(body: Any, status: int = 200, **headers: str) -> Answer:
    def send(request: BaseHTTPRequestHandler) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    return send


def says(text: Any, finish: str = "stop", **message: Any) -> Answer:
    return reply({"choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}]})


def slow(request: BaseHTTPRequestHandler) -> None:
    time.sleep(1)


def hang_up(request: BaseHTTPRequestHandler) -> None:
    request.connection.shutdown(socket.SHUT_RDWR)


class Server:
    """An endpoint that gives these answers in turn, the last one for ever, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.asked: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
                answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
                answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.http.shutdown()
    made.http.server_close()
    thread.join()


def rewriter(server: Server, **options: Any) -> tuple[ChatRewriter, list[float]]:
    """One that notes how long it would wait instead of waiting."""
    waits: list[float] = []
    return ChatRewriter(server.url, "some-model", sleep=waits.append, **options), waits


@pytest.mark.filterwarnings("error")
def test_a_prompt_is_rewritten(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.answers = [says('  "A ginger cat walks\n over été 🐱."  ')]
    made = rewriter(server)[0].rewrite(["a cat", "", "一只猫"], task="t2v")
    assert made[0] == Rewritten("A ginger cat walks over été 🐱.", "a cat")
    assert made[1] == Rewritten("", "", "it is empty")
    english, chinese = server.asked
    assert (english["path"], english["key"], english["model"]) == ("/v1/chat/completions", "Bearer secret", "some-model")
    assert english["messages"][1] == {"role": "user", "content": "a cat"}
    assert "in English" in english["messages"][0]["content"]
    assert "中文" in chinese["messages"][0]["content"]


def test_instructions_of_ones_own_and_another_task(server: Server) -> None:
    server.answers = [says("moves")]
    rewriter(server, key_env="NO_SUCH_KEY")[0].rewrite(["a cat"], task="i2v")
    rewriter(server, instructions="Be brief.")[0].rewrite(["a cat"])
    assert "picture" in server.asked[0]["messages"][0]["content"]
    assert server.asked[0]["key"] is None
    assert server.asked[1]["messages"][0]["content"] == "Be brief."


@pytest.mark.parametrize(
    ("answers", "waits"),
    [
        ([reply({}, 429, Retry_After="7"), says("better")], [7]),
        ([reply({}, 429, Retry_After="9999"), says("better")], [60]),
        ([reply({}, 503), reply({}, 500), says("better")], [1, 2]),
        ([hang_up, says("better")], [1]),
        ([reply(b"<html>"), says("better")], [1]),
    ],
)
def test_a_busy_or_failing_server_is_asked_again(server: Server, answers: list[Answer], waits: list[float]) -> None:
    server.answers = list(answers)
    asker, waited = rewriter(server)
    assert asker.rewrite(["a cat"]) == [Rewritten("better", "a cat")]
    assert waited == waits


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (reply({}, 500), "the server answers 500 Internal Server Error, after 3 attempts"),
        (reply({}, 429), "the server answers 429 Too Many Requests, after 3 attempts"),
        (slow, r"no answer within 0\.2 s, after 3 attempts"),
        (hang_up, "no connection: .*, after 3 attempts"),
        (reply(b"{"), "the answer is not JSON, after 3 attempts"),
        (reply([]), "the answer holds no message"),
        (reply({"choices": []}), "the answer holds no message"),
        (reply({"choices": [{"message": None}]}), "the answer holds no message"),
        (says("I'm sorry, but I can't help with that."), "the model refuses"),
        (says("抱歉,我不能"), "the model refuses"),
        (says(None, refusal="no"), "the model refuses"),
        (says("half a", finish="length"), "the answer was cut off"),
        (says("x", finish="content_filter"), "the model refuses"),
        (says("  "), "the answer is empty"),
        (says(None), "the answer is empty"),
        (says(["a"]), "the answer is empty"),
        (says("word " * 2000), "the answer has 9999 characters, more than a prompt of 4000"),
    ],
)
def test_without_a_prompt_in_the_answer_the_original_is_kept_and_said_so(server: Server, answer: Answer, why: str) -> None:
    server.answers = [answer]
    with pytest.warns(UserWarning, match=f"prompt 'a cat' was not rewritten: {why}"):
        (made,) = rewriter(server, retries=2, timeout=0.2)[0].rewrite(["a cat"])
    assert (made.text, made.original) == ("a cat", "a cat")
    assert made.kept


def test_no_server_at_all() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.warns(UserWarning, match="not rewritten: no connection: .*refused"):
            assert ChatRewriter(url, "m", retries=0).rewrite(["a cat"])[0].text == "a cat"


@pytest.mark.parametrize("status", [400, 401, 404, 307])
def test_a_wrong_key_or_model_is_an_error_and_a_key_goes_nowhere_else(server: Server, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.answers = [reply({"error": "no such model"}, status, Location=f"{server.url}/elsewhere")]
    with pytest.raises(ValueError, match=rf"answers {status} .*no such model.*the key in OPENAI_API_KEY") as error:
        rewriter(server)[0].rewrite(["a cat"])
    assert "secret" not in str(error.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "is no address of a server"),
        ({"base_url": "ftp://host/v1"}, "is no address of a server"),
        ({"base_url": "file:///etc/passwd"}, "is no address of a server"),
        ({"base_url": "http://host", "timeout": 0}, "expected a timeout above 0"),
        ({"base_url": "http://host", "retries": -1}, "retries of at least 0, got 60 and -1"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_prompt_rewriter("openai", model="m", **options)


def test_templates() -> None:
    assert TemplateRewriter("{prompt}, oil painting").rewrite(["a {cat}", " "]) == [
        Rewritten("a {cat}, oil painting", "a {cat}"),
        Rewritten(" ", " ", "it is empty"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_prompt_rewriter().rewrite(["a cat."])[0].text == CINEMATIC.replace("{prompt}", "a cat")
    with pytest.raises(ValueError, match=r"has no \{prompt\}"):
        TemplateRewriter("oil painting")
    with pytest.raises(ValueError, match=r"prompt rewriter 'template' cannot be made with model"):
        load_prompt_rewriter("template", model="m")
    with pytest.raises(LookupError, match="openai"):
        load_prompt_rewriter("opnai")


def test_the_command(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a dog\na fox\n")
    (tmp_path / "t.txt").write_text("photo of {prompt}\n")
    assert main(["rewrite", "a cat", str(tmp_path / "p.txt"), "--template", str(tmp_path / "t.txt")]) == 0
    assert capsys.readouterr().out == "photo of a cat\nphoto of a dog\nphoto of a fox\n"
    assert main(["rewrite", "a cat", "--template", "{prompt}, oil", "-o", str(tmp_path / "out.txt")]) == 0
    assert (capsys.readouterr().out, (tmp_path / "out.txt").read_text()) == ("", "a cat, oil\n")
    server.answers = [says("two\nlines"), says("I cannot do that")]
    asked = ["--rewriter", "openai", "--base-url", server.url, "--model", "m"]
    assert main(["rewrite", "a cat", "a dog", *asked, "--json"]) == 0
    out, err = capsys.readouterr()
    assert [row["text"] for row in json.loads(out)] == ["two lines", "a dog"]
    assert err == "wan-text: warning: prompt 'a dog' was not rewritten: the model refuses\n"
    assert main(["rewrite", "a cat", "--rewriter", "openai"]) == 2
    assert "prompt rewriter 'openai' cannot be made with no options" in capsys.readouterr().err
