"""Weights by Hub id, from a local server that answers as the Hub does: what is fetched, pinned, kept, and said when it is not there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from dit_layouts import model, official_sharded, state_in
from safetensors.torch import save_file

OLD, NEW = "1" * 40, "2" * 40
REPO = "org/Wan-A14B"
READ = """
import json, sys
from wan_dit.parts import revision
from wan_dit.plugins import find
try:
    spec = find("wan_backbones", sys.argv[1])
    print(json.dumps([spec.load().fingerprint(), revision(spec)]))
except OSError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class FakeHub(ThreadingHTTPServer):
    """One repository at several commits: commit -> folder; `main` is the newest one."""

    def __init__(self, commits: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.commits, self.fetched = commits, list[str]()
        self.cut = ""  # a file whose transfer breaks off half-way


class Answer(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        prefix, _, rest = path.partition(REPO)
        kind, *inner = rest.strip("/").split("/", 2)
        commit = {"main": NEW}.get(inner[0], inner[0]) if inner else NEW
        folder = self.server.commits.get(commit)
        if not rest or folder is None:
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound" if rest else "RepoNotFound"})
        elif prefix == "/api/models/" and kind == "tree":
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            rows = [
                {"type": "file", "oid": etag(file), "size": file.stat().st_size, "path": str(file.relative_to(folder))} for file in files
            ]
            self.send(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})
        elif prefix == "/api/models/":
            self.send(200, json.dumps({"id": REPO, "sha": commit, "siblings": []}).encode(), {"Content-Type": "application/json"})
        elif (file := folder / inner[1]).is_file():
            if self.command == "GET":
                self.server.fetched.append(inner[1])
            self.send(200, file.read_bytes(), {"ETag": f'"{etag(file)}"', "X-Repo-Commit": commit}, cut=inner[1] == self.server.cut)
        else:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})

    def send(self, status: int, body: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def log_message(self, *args: object) -> None:
        pass


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture(scope="module")
def commits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two experts; the low-noise one differs between the commits, and a VAE stands beside them."""
    found = {}
    for commit, seed in ((OLD, 1), (NEW, 2)):
        folder = tmp_path_factory.mktemp("repository")
        official_sharded(folder / "high_noise_model", model())
        official_sharded(folder / "low_noise_model", model(seed=seed))
        (folder / "Wan2.1_VAE.pth").write_bytes(b"large")
        found[commit] = folder
    return found


@pytest.fixture
def hub(commits: dict[str, Path]) -> Iterator[FakeHub]:
    with FakeHub(commits) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def read(hub: FakeHub, cache: Path, ref: str, *, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """Another process, since huggingface_hub reads its environment once."""
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, "-c", READ, ref], env=env, capture_output=True, text=True, timeout=120)


def loaded(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 0, result.stderr
    found: list[str] = json.loads(result.stdout)
    return found


def test_a_folder_at_a_pinned_commit_is_fetched_alone_and_then_read_offline(hub: FakeHub, tmp_path: Path) -> None:
    ref = f"hub:{REPO}@{OLD}/low_noise_model"
    assert loaded(read(hub, tmp_path, ref)) == [model(seed=1).fingerprint(), OLD]
    assert set(hub.fetched) == {
        *("low_noise_model/config.json", "low_noise_model/diffusion_pytorch_model.safetensors.index.json"),
        *(f"low_noise_model/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)),
    }
    assert len(hub.fetched) == 4
    hub.shutdown()
    assert loaded(read(hub, tmp_path, ref, offline=True)) == [model(seed=1).fingerprint(), OLD]


def test_no_revision_is_the_newest_commit(hub: FakeHub, tmp_path: Path) -> None:
    assert loaded(read(hub, tmp_path, f"hub:{REPO}/low_noise_model")) == [model(seed=2).fingerprint(), NEW]


@pytest.mark.parametrize(
    ("ref", "offline", "message"),
    [
        (f"hub:{REPO}/low_noise_model", True, "outgoing traffic has been disabled"),
        (f"hub:{REPO}@{'3' * 40}/low_noise_model", False, "cannot fetch 'org/Wan-A14B@3333"),
        ("hub:org/nothing", False, "cannot fetch 'org/nothing' from the Hub"),
        (f"hub:{REPO}/medium_noise_model", False, "no checkpoint at 'hub:org/Wan-A14B/medium_noise_model'"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(hub: FakeHub, tmp_path: Path, ref: str, offline: bool, message: str) -> None:
    result = read(hub, tmp_path, ref, offline=offline)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("FileNotFoundError: ")
    assert message in result.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_download_that_broke_off_is_told_and_taken_up_again(hub: FakeHub, tmp_path: Path) -> None:
    ref = f"hub:{REPO}@{OLD}/low_noise_model"
    hub.cut = "low_noise_model/diffusion_pytorch_model-00002-of-00002.safetensors"
    broken = read(hub, tmp_path, ref)
    assert broken.returncode == 1
    assert "FileNotFoundError: cannot fetch" in broken.stderr.strip().splitlines()[-1]
    offline = read(hub, tmp_path, ref, offline=True)
    assert offline.returncode == 1
    assert "FileNotFoundError" in offline.stderr.strip().splitlines()[-1]
    hub.cut = ""
    assert loaded(read(hub, tmp_path, ref))[1] == OLD


def test_a_single_file_is_fetched_by_its_name(hub: FakeHub, commits: dict[str, Path], tmp_path: Path) -> None:
    made = model(seed=3)
    save_file(state_in(made, "official"), commits[NEW] / "wan.safetensors")
    assert loaded(read(hub, tmp_path, f"hub:{REPO}/wan.safetensors")) == [made.fingerprint(), NEW]
    assert hub.fetched == ["wan.safetensors"]
