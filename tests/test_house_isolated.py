"""The wheels in environments of their own: each package alone, the four together, a third-party scheduler come and gone."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
from isolated_environment import CODEC, ENCODER, EXAMPLE, PACKAGES, ROOT, Environment, build_wheels, metadata
from packaging.requirements import Requirement
from safetensors import safe_open

pytestmark = pytest.mark.isolated
NEEDS = {"wan-vae": [], "wan-text": [], "wan-dit": [], "wan-train": ["wan-dit", "wan-vae"]}
MODULES = {name: name.replace("-", "_") for name in PACKAGES}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_wheels(tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> dict[str, Environment]:
    """One environment for each package, with what it requires and no other of the four."""
    return {name: Environment.create(tmp_path_factory.mktemp(name), wheels, name, *NEEDS[name]) for name in PACKAGES}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Environment:
    return Environment.create(tmp_path_factory.mktemp("together"), wheels, *PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_wheel_holds_the_package_and_no_tests(wheels: dict[str, Path], name: str) -> None:
    with zipfile.ZipFile(wheels[name]) as archive:
        files = archive.namelist()
    module = MODULES[name]
    assert {file.split("/")[0] for file in files} == {module, f"{module}-0.1.0.dist-info"}
    assert f"{module}/py.typed" in files
    assert any(file.endswith("licenses/LICENSE") for file in files)
    assert not [file for file in files if "/tests/" in file or "test_" in file]
    if name != "wan-train":
        assert {f"{module}/weights/tiny/config.json", f"{module}/weights/tiny/model.safetensors"} <= set(files)


@pytest.mark.parametrize("name", PACKAGES)
def test_metadata_asks_for_lower_bounds_and_no_torchvision(wheels: dict[str, Path], name: str) -> None:
    fields = metadata(wheels[name])
    required = [Requirement(text) for text in fields["Requires-Dist"]]
    assert fields["License-Expression"] == ["Apache-2.0"]
    assert fields["Requires-Python"] == [">=3.11"]
    assert not {requirement.name for requirement in required} & {"torchvision", "diffusers", "transformers"}
    hard = {requirement.name for requirement in required if requirement.marker is None}
    assert hard & set(PACKAGES) == set(NEEDS[name])


@pytest.mark.parametrize("name", PACKAGES)
def test_package_imports_alone_with_all_its_public_names(alone: dict[str, Environment], name: str) -> None:
    others = [MODULES[other] for other in PACKAGES if other not in (name, *NEEDS[name])]
    alone[name].run(
        "python", "-c",
        f"import {MODULES[name]} as package, importlib.util\n"
        "[getattr(package, public) for public in package.__all__]\n"
        f"assert [other for other in {others} if importlib.util.find_spec(other)] == []",
    )  # fmt: skip


@pytest.mark.parametrize(("name", "listing"), [("wan-vae", "list"), ("wan-text", "list"), ("wan-dit", "plugins"), ("wan-train", "list")])
def test_package_lists_its_parts_alone_as_command_and_as_module(alone: dict[str, Environment], name: str, listing: str) -> None:
    command = json.loads(alone[name].run(name, listing, "--json").stdout)
    assert command
    assert json.loads(alone[name].run("python", "-m", MODULES[name], listing, "--json").stdout) == command


def test_wan_vae_alone_is_a_codec_for_video_files(alone: dict[str, Environment], tmp_path: Path) -> None:
    source, latents, target = (str(tmp_path / name) for name in ("in.mp4", "latents.safetensors", "out.mp4"))
    write_clip(source, frames=9)
    alone["wan-vae"].run("wan-vae", "encode", source, latents)
    alone["wan-vae"].run("wan-vae", "decode", latents, target)
    with av.open(target) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9


def test_wan_text_alone_reads_prompts(alone: dict[str, Environment], tmp_path: Path) -> None:
    assert "circle" in alone["wan-text"].run("wan-text", "tokenize", "a red circle moves left").stdout
    alone["wan-text"].run("wan-text", "encode", "a red circle moves left", "--output", str(tmp_path / "contexts"))
    assert (tmp_path / "contexts" / "encoder.json").exists()


def test_wan_dit_alone_says_what_to_install(alone: dict[str, Environment]) -> None:
    failed = alone["wan-dit"].run("wan-dit", "generate", "a red circle moves left", code=2)
    assert "pip install wan-vae" in failed.stderr or "pip install wan-text" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list(alone["wan-dit"].folder.rglob("*.mp4"))


def test_all_four_make_a_video_from_a_prompt(together: Environment, tmp_path: Path) -> None:
    video = tmp_path / "video.mp4"
    together.run("wan-dit", "generate", "a red circle moves left", "--steps", "2", "--output", str(video))
    with av.open(str(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 17


def test_third_party_scheduler_comes_is_used_and_goes(together: Environment, tmp_path: Path) -> None:
    def schedulers() -> dict[str, str]:
        rows = json.loads(together.run("wan-dit", "plugins", "--json").stdout)
        return {row["name"]: row["distribution"] for row in rows if row["kind"] == "wan_schedulers"}

    assert "heun-example" not in schedulers()
    together.install(EXAMPLE)
    assert schedulers()["heun-example"] == EXAMPLE
    video = tmp_path / "heun.mp4"
    together.run("wan-dit", "generate", "a red circle moves left", "--scheduler", "heun-example", "--steps", "2", "--output", str(video))
    assert video.stat().st_size > 0
    together.uninstall(EXAMPLE)
    assert "heun-example" not in schedulers()
    failed = together.run(
        "wan-dit", "generate", "a red circle", "--scheduler", "heun-example", "--output", str(tmp_path / "none.mp4"), code=2
    )
    assert "no scheduler named 'heun-example'" in failed.stderr


def test_third_party_codec_comes_is_used_and_goes(alone: dict[str, Environment], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """With wan-vae and nothing else of this house."""
    vae = alone["wan-vae"]
    request.addfinalizer(lambda: vae.uninstall(CODEC) if "dct" in listed() else None)

    def listed() -> dict[str, str]:
        return {row["name"]: row["distribution"] for row in json.loads(vae.run("wan-vae", "list", "--json").stdout)}

    assert "dct" not in listed()
    vae.install(CODEC)
    assert listed()["dct"] == CODEC
    clip, latents, back = (str(tmp_path / name) for name in ("clip.mp4", "clip.safetensors", "back.mp4"))
    write_clip(clip, 10)
    vae.run("wan-vae", "encode", clip, latents, "--codec", "dct")
    (facts,) = json.loads(vae.run("wan-vae", "info", latents, "--json").stdout)
    assert facts["latent_space"] == "dct-1"
    vae.run("wan-vae", "decode", latents, back)
    with av.open(back) as container:
        assert sum(1 for _ in container.decode(video=0)) == 10
    rows = json.loads(vae.run("wan-vae", "eval", clip, "--codec", "dct", "--codec", "tiny", "--json").stdout)
    assert {row["codec"] for row in rows["results"]} == {"dct", "tiny"}
    vae.uninstall(CODEC)
    failed = vae.run("wan-vae", "decode", latents, str(tmp_path / "none.mp4"), code=2)
    assert "dct" in failed.stderr


def test_a_backbone_refuses_the_latents_of_a_third_party_codec(together: Environment, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: together.uninstall(CODEC))
    together.install(CODEC)
    failed = together.run("wan-dit", "generate", "a red circle moves left", "--vae", "dct", "--output", "none.mp4", code=2)
    assert "its latent_space is dct-1, the backbone needs tiny-2" in failed.stderr


@pytest.mark.parametrize(("steps", "least"), [(2, 0.0), pytest.param(1500, 0.9, marks=pytest.mark.slow)])
def test_third_party_text_encoder_is_learnt_by_the_projection_alone_and_swaps_in_by_name(
    together: Environment, tmp_path: Path, steps: int, least: float, request: pytest.FixtureRequest
) -> None:
    """Another width and space: the built-in backbone obeys it, with all but its context embedder as it was."""
    request.addfinalizer(lambda: together.uninstall(ENCODER))
    together.install(ENCODER)
    recipe, run = str(ROOT / "examples" / ENCODER / "recipe.toml"), tmp_path / "words"
    short = ["objective.settings.clips=16", "objective.settings.preview_prompts=2"] if steps < 1500 else []
    together.run("wan-train", "run", recipe, f"output={run}", f"steps={steps}", "preview_every=0", *short, timeout=3000)
    swapped = ["--text-encoder", "words", "--context-embedder", str(run / "export" / "context_embedder.safetensors")]
    video = tmp_path / "words.mp4"
    together.run("wan-dit", "generate", "a red circle moves left", *swapped, "--steps", "2", "--output", str(video))
    assert video.stat().st_size > 0
    with safe_open(swapped[-1], "pt") as file:
        assert file.metadata()["embedding_space"] == "words-1"
        assert file.get_tensor("context_embedder.0.weight").shape == (128, 64)
    if least:
        figures = json.loads(together.run("wan-train", "evaluate", *swapped, "--json", timeout=1200).stdout)
        print({row["prompts"]: row["all_right"] for row in figures})
        assert figures[0]["all_right"] >= least


def write_clip(path: str, frames: int, size: int = 64) -> None:
    """An mp4 of a grey ramp that moves."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for shift in range(frames):
            row = np.roll(np.linspace(0, 255, size, dtype=np.uint8), 4 * shift)
            picture = np.repeat(np.tile(row, (size, 1))[:, :, None], 3, axis=2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")))
        container.mux(stream.encode())
