"""Every plugin on docs/plugins.md is built as a wheel from the page's text, installed, and really used."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from documentation import ROOT, Block, blocks, run, shell_lines, write_film
from hatchling.builders.wheel import WheelBuilder
from wan_dit import load_backbone
from wan_dit.listing import KINDS, plugin_rows
from wan_dit.plugins import find
from wan_text import load_image_encoder, load_prompt_rewriter, load_text_encoder
from wan_train.plugins import plugin_manager
from wan_vae import load_vae
from wan_vae.video import read_frames, to_tensor

pytestmark = pytest.mark.xdist_group("plugin page")
PAGE = ROOT / "docs" / "plugins.md"
BLOCKS = blocks(PAGE)
OURS = {"wan-vae", "wan-text", "wan-dit", "wan-train"}
SHORT_RUN = ["steps=2", "batch_size=1"]


def section(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.section == kind]


def project(kind: str) -> dict:
    (text,) = [block.text for block in section(kind) if block.title.endswith("pyproject.toml")]
    return tomllib.loads(text)["project"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The projects of the page, as a reader would type them."""
    folder = tmp_path_factory.mktemp("sources")
    for block in BLOCKS:
        if "/" in block.title:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
            if path.name == "plugin.py":
                path.with_name("__init__.py").touch()
    return folder


@pytest.fixture(scope="module")
def site(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all of them are installed in, from wheels."""
    folder = tmp_path_factory.mktemp("site")
    for source in sorted(sources.iterdir()):
        for wheel in WheelBuilder(str(source)).build(directory=str(source / "dist"), versions=["standard"]):
            zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def here(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, with the plugins installed."""
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(site)):
            del sys.modules[name]


def follow(kind: str, *more: str) -> None:
    """Do what a section says: write its files, run its scripts and its commands, training with further arguments."""
    for block in section(kind):
        if "/" not in block.title and block.title:
            Path(block.title).write_text(block.text)
            if block.language == "python":
                exec(compile(block.text, block.title, "exec"), {"__name__": "__main__"})
        for words in shell_lines(block):
            assert run([*words, *(more if words[:2] == ["wan-train", "run"] else [])]) == 0, " ".join(words)


def manifest() -> dict:
    (path,) = Path("outputs").glob("*.json")
    assert path.with_suffix(".mp4").stat().st_size > 0
    return json.loads(path.read_text())


def test_page_has_a_plugin_and_a_table_row_for_every_kind() -> None:
    assert {block.section for block in BLOCKS if block.title.endswith("pyproject.toml")} == set(KINDS)
    for kind, owner in KINDS.items():
        assert [line for line in PAGE.read_text().splitlines() if f"| `{kind}` |" in line and f"| {owner} |" in line], kind


@pytest.mark.parametrize("kind", KINDS)
def test_plugin_has_one_entry_point_named_as_it_and_asks_for_packages_it_imports(kind: str) -> None:
    facts = project(kind)
    assert list(facts["entry-points"]["wan"]) == [facts["name"]]
    code = "\n".join(block.text for block in section(kind) if block.title.startswith(f"{facts['name']}/") and block.language == "python")
    needed = {name for name in OURS if f"from {name.replace('-', '_')}" in code} - {"wan-vae" if "wan-train" in str(facts) else ""}
    assert needed <= {requirement.split(">")[0].split("[")[0] for requirement in facts["dependencies"]}


@pytest.mark.parametrize("kind", KINDS)
def test_plugin_is_listed_and_its_target_imports(kind: str, here: Path) -> None:
    rows = [row for row in plugin_rows(plugin_manager(), check=True) if row["distribution"] == project(kind)["name"]]
    assert [(row["kind"], row["status"], row["version"]) for row in rows] == [(kind, "ok", "0.1")]


def test_listing_them_imports_no_torch(site: Path) -> None:
    code = "import sys; from wan_dit.listing import plugin_rows; from wan_train.plugins import plugin_manager\n"
    code += "assert len(plugin_rows(plugin_manager())) > 7; assert not {'torch', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(site)}, check=True)


def test_plugins_pass_their_conformance_kits(sources: Path, site: Path) -> None:
    kits = sorted(str(path) for path in sources.glob("*/tests/test_*.py"))
    assert len(kits) == 7
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTEST_ADDOPTS": ""}
    done = subprocess.run([*command, "--rootdir", str(sources), *kits], cwd=sources, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_listing_commands_of_the_page_find_no_fault(here: Path) -> None:
    follow("When something is wrong")


def test_vae_codes_a_film_and_decodes_a_generation(here: Path) -> None:
    film = write_film(here / "film.mp4", frames=6, size=(40, 56))
    follow("wan_vaes")
    before, after = (to_tensor(list(read_frames(path))) for path in (film, here / "back.mp4"))
    assert before.shape == after.shape == (1, 3, 6, 40, 56)
    assert (before - after).abs().mean() < 2 / 255, "the codec is lossless, its films are nearly so"
    record = manifest()
    assert record["parts"]["vae"]["dist"] == project("wan_vaes")["name"]
    assert record["parts"]["backbone"]["name"] == "shuffle-dit"


def test_text_encoder_says_the_same_in_german(here: Path) -> None:
    follow("wan_text_encoders")
    assert manifest()["parts"]["text_encoder"]["dist"] == project("wan_text_encoders")["name"]
    german, english = load_text_encoder("tiny-german"), load_text_encoder("tiny")
    for said, meant in (("Ein roter Kreis bewegt sich nach links", "a red circle moves left"), ("blauer stern", "blue star")):
        assert torch.equal(german.encode([said])[0], english.encode([meant])[0])
    assert german.cleaner != english.cleaner


def test_image_encoder_sees_colours(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    follow("wan_image_encoders")
    assert "colours-4" in capsys.readouterr().out
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 20, 30)
    assert torch.equal(load_image_encoder("colours").encode(red), torch.tensor([1.0, -1.0, -1.0]).expand(1, 16, 3))


def test_rewriter_moves_the_camera_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    follow("wan_prompt_rewriters")
    assert capsys.readouterr().out == "a cat walks, the camera pans slowly\n"
    (kept,) = load_prompt_rewriter("camera", move="it zooms in").rewrite(["a camera"])
    assert kept.text == "a camera"


def test_backbone_differs_from_the_built_in_one_at_another_size_only(here: Path) -> None:
    follow("wan_backbones")
    assert manifest()["parts"]["backbone"]["dist"] == project("wan_backbones")["name"]
    scaled, tiny = load_backbone("tiny-scaled"), load_backbone("tiny")
    text = [torch.randn(5, tiny.spec.text_dim, generator=torch.Generator().manual_seed(0))]
    for grid, same in (((5, 8, 8), True), ((5, 8, 12), False)):
        latents = torch.randn(1, tiny.spec.latent_channels, *grid, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            a, b = (model(latents, torch.tensor([500.0]), model.encode_context(text)) for model in (scaled, tiny))
        assert torch.allclose(a, b, atol=1e-5) == same


def test_scheduler_makes_a_video_and_is_of_second_order(here: Path) -> None:
    follow("wan_schedulers")
    assert manifest()["parts"]["scheduler"]["dist"] == project("wan_schedulers")["name"]
    assert manifest()["steps"] == 8
    scheduler = find("wan_schedulers", "adams").load()

    def error(steps: int) -> float:
        """On a flow that scales the sample by the deviation at each sigma: data drawn from N(0, 1/4)."""
        schedule = scheduler.schedule(steps, 1.0)
        state, sample = scheduler.start(schedule), torch.ones(1, dtype=torch.float64)
        for sigma in schedule.sigmas[:-1].double():
            sample = scheduler.step(state, sample * (sigma - (1 - sigma) / 4) / ((1 - sigma) ** 2 / 4 + sigma**2), sample)
        return abs(sample.item() - 0.5)

    assert math.log2(error(64) / error(128)) > 1.7


def test_attention_is_used(here: Path) -> None:
    follow("wan_attentions")
    assert manifest()["options"]["attention"] == "sliced"


def test_cache_skips_the_blocks_in_half_of_the_later_evaluations(here: Path) -> None:
    follow("wan_caches")
    assert manifest()["cache"]["branches"]["positive"] == {"evaluations": 12, "skipped": 3}


def test_model_brings_its_settings(here: Path) -> None:
    follow("wan_models")
    record = manifest()
    assert record["model"]["dist"] == project("wan_models")["name"]
    assert (record["size"], record["frames"], record["fps"], record["steps"]) == ([64, 96], 21, 12, 20)
    assert len(list(read_frames(next(Path("outputs").glob("*.mp4"))))) == 21


def test_objective_trains_the_decoder_and_leaves_the_encoder(here: Path) -> None:
    follow("wan_objectives", *SHORT_RUN)
    before, after = load_vae("tiny"), load_vae(str(here / "runs/decoder/export/vae"))
    video = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(before.encode(video), after.encode(video))
    assert not torch.equal(before.decode(before.encode(video)), after.decode(after.encode(video)))
    assert logged(here / "runs/decoder", "l1") > 0


def test_dataset_feeds_a_training(here: Path) -> None:
    for i, caption in enumerate(("a red circle moves left", "a blue star stays still")):
        (here / "clips").mkdir(exist_ok=True)
        write_film(here / f"clips/{i}.mp4", size=(80, 72)).with_suffix(".txt").write_text(f"{caption}\n{caption.upper()}\n")
    follow("wan_datasets", *SHORT_RUN)
    assert logged(here / "runs/films", "loss") > 0
    trained, tiny = load_backbone(str(here / "runs/films/export/backbone")), load_backbone("tiny")
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), tiny.parameters(), strict=True))


def logged(folder: Path, name: str) -> float:
    """The last value of a figure in a run's log, whose last step is the second."""
    rows = [row for line in (folder / "log.jsonl").read_text().splitlines() if name in (row := json.loads(line))]
    assert rows[-1]["step"] == 2
    assert math.isfinite(rows[-1][name])
    return rows[-1][name]
