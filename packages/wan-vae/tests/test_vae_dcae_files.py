"""Checkpoints of DC-AEs in the official and in diffusers' layout, there and back to the bit; and the commands on them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from dcae_pairs import CONFIGS, DEEP, SANA, made, pictures
from diffusers import AutoencoderDC
from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_vae import load_vae
from wan_vae.checkpoint import describe, save_diffusers, save_official
from wan_vae.codecs.dcae import DCAE
from wan_vae.codecs.dcae_config import PRESETS, DCAEConfig
from wan_vae.codecs.dcae_diffusers import to_tensors
from wan_vae.codecs.dcae_infer import infer_config
from wan_vae.contents import shapes_of
from wan_vae.latents import LatentFile
from wan_vae.model import WanVAE
from wan_vae.plugins import find_vae
from wan_vae.testing import difference
from wan_vae.video import Reader, probe

Run = Callable[..., tuple[int, str, str]]
SMALL = DEEP.model_copy(update={"head_dim": 32, "decoder_dims": (8, 16, 32, 32)})  # what shapes tell
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"


def same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Equal names, types and bits."""
    return state.keys() == expected.keys() and all(
        value.dtype == expected[name].dtype and torch.equal(value, expected[name]) for name, value in state.items()
    )


@pytest.fixture(scope="module")
def vae() -> DCAE:
    return made(SMALL)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_diffusers_there_and_back(name: str, tmp_path: Path) -> None:
    vae = made(CONFIGS[name])
    save_diffusers(vae, tmp_path / "a")
    theirs = AutoencoderDC.from_pretrained(tmp_path / "a")
    assert same(theirs.state_dict(), load_file(tmp_path / "a" / DIFFUSERS_FILE))
    theirs.save_pretrained(tmp_path / "b", max_shard_size="40KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    for folder in (tmp_path / "a", tmp_path / "b"):
        back = load_vae(str(folder))
        assert isinstance(back, DCAE)
        assert back.config == vae.config
        assert same(back.state_dict(), vae.state_dict())
    save_diffusers(back, tmp_path / "c")
    assert (tmp_path / "c" / DIFFUSERS_FILE).read_bytes() == (tmp_path / "a" / DIFFUSERS_FILE).read_bytes()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_official_file_there_and_back(name: str, suffix: str, tmp_path: Path) -> None:
    config = SMALL if name == "deep" else CONFIGS[name]
    vae, path = made(config), tmp_path / f"dcae{suffix}"
    save_official(vae, path)
    back = load_vae(str(path))
    # what shapes do not tell: the factor, and the width of a first stage without blocks
    told = config.model_copy(update={"scaling_factor": 1.0, "decoder_dims": back.config.decoder_dims})
    assert back.config == told
    assert same(back.state_dict(), vae.state_dict())
    assert describe(path) == back.spec
    save_official(back, tmp_path / "again.pth")
    assert same(torch.load(tmp_path / "again.pth", weights_only=True), vae.state_dict())


@pytest.mark.parametrize("config", [DEEP, SANA], ids=["deep", "sana"])
def test_the_names_are_those_that_diffusers_converts(config: DCAEConfig) -> None:
    vae = made(config)
    state = {name: value for name, value in vae.state_dict().items() if "aggreg.1." not in name}  # it knows one scale
    expected = {name: value for name, value in to_tensors(vae.state_dict(), config).items() if "multiscale.1." not in name}
    assert same(convert_autoencoder_dc_checkpoint_to_diffusers(dict(state)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_and_counts_stay_counts(vae: DCAE, dtype: torch.dtype, tmp_path: Path) -> None:
    half = made(SMALL).to(dtype)
    save_official(half, tmp_path / "half.safetensors")
    loaded = DCAE.from_pretrained(tmp_path / "half.safetensors", dtype=dtype)
    assert same(loaded.state_dict(), half.state_dict())
    counts = {name: value for name, value in loaded.state_dict().items() if name.endswith("num_batches_tracked")}
    assert {(value.dtype, int(value)) for value in counts.values()} == {(torch.int64, 70_001)}
    assert {value.dtype for value in load_vae(str(tmp_path / "half.safetensors")).parameters()} == {torch.float32}


def test_a_folder_of_ours_keeps_every_fact(tmp_path: Path) -> None:
    vae = made(DEEP.model_copy(update={"latent_space": "mine-1", "out_activation": "silu"}))
    vae.save_pretrained(tmp_path / "mine")
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["format"] == "wan-dcae/1"
    for source in (tmp_path / "mine", tmp_path / "mine" / "model.safetensors"):
        back = load_vae(str(source))
        assert (back.config, back.fingerprint()) == (vae.config, vae.fingerprint())
        assert same(back.state_dict(), vae.state_dict())
        assert describe(source) == vae.spec


def shapes(config: DCAEConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in DCAE(config).state_dict().items()}


@pytest.mark.parametrize("name", PRESETS)
def test_whose_latents_a_release_has(name: str, tmp_path: Path) -> None:
    config, found = PRESETS[name], shapes(PRESETS[name])
    cached = Path(f"models--mit-han-lab--{name}/snapshots/0123/model.safetensors")
    for path in (Path(f"{name}.safetensors"), Path(name) / "model.safetensors", tmp_path / cached):
        assert infer_config(found, path) == config
    sana = "sana" in name
    unnamed = infer_config(found, tmp_path / "model.safetensors")
    assert unnamed == (config if sana else config.model_copy(update={"scaling_factor": 1.0, "latent_space": "unknown"}))
    wrong = "dc-ae-f64c128-in-1.0" if "f32" in name else "dc-ae-f32c32-in-1.0"
    assert infer_config(found, Path(f"{wrong}.safetensors")).latent_space == "unknown"  # the shapes are not those of that name


def test_an_official_folder_says_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dc-ae-f64c128-mix-1.0", "dc-ae-lite-f32c32-sana-1.1"):
        (tmp_path / "config.json").write_text(json.dumps({"model_name": name}))
        spec = find_vae(str(tmp_path))
        config = PRESETS[name]
        assert (spec.target, spec.latent_space, spec.stride) == ("wan_vae.codecs.dcae:DCAE", config.latent_space, config.stride)
        assert spec.parameters == {"dc-ae-f64c128-mix-1.0": 676_896_140, "dc-ae-lite-f32c32-sana-1.1": 421_181_228}[name]
    vae = made(DEEP.model_copy(update={"latent_space": "small-1"}))
    monkeypatch.setitem(PRESETS, "dc-ae-small-1.0", vae.config)
    (tmp_path / "config.json").write_text('{"model_name": "dc-ae-small-1.0"}')
    save_file(vae.state_dict(), tmp_path / "model.safetensors")
    back = load_vae(str(tmp_path))
    assert (back.config, back.fingerprint()) == (vae.config, vae.fingerprint())
    (tmp_path / "config.json").write_text('{"model_name": "dc-ae-f8c4"}')  # not known by its name: the shapes tell
    small = made(SMALL)
    save_file(small.state_dict(), tmp_path / "model.safetensors")
    other = load_vae(str(tmp_path))
    assert (other.config.latent_space, other.config.scaling_factor) == ("unknown", 1.0)
    assert same(other.state_dict(), small.state_dict())


@pytest.mark.parametrize("name", ["dc-ae-f32c32-in-1.0-256px.pt", "dc-ae-f32c32-in-1.0-finetuned.safetensors", "my-dc-ae-f32c32-in-1.0.pt"])
def test_a_name_that_begins_or_ends_as_a_release_s_is_another(name: str) -> None:
    with torch.device("meta"):
        found = shapes_of(DCAE(PRESETS["dc-ae-f32c32-in-1.0"]).state_dict())
    config = infer_config(found, Path("/checkpoints") / name)
    assert (config.latent_space, config.scaling_factor) == ("unknown", 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoder_block_out_channels", None),
        ("encoder_block_out_channels", 5),
        ("encoder_block_types", None),
        ("encoder_qkv_multiscales", None),
        ("decoder_norm_types", 3),
    ],
)
def test_a_bad_field_of_a_folder_of_diffusers_is_named(field: str, value: Any, tmp_path: Path, vae: DCAE) -> None:
    save_diffusers(vae, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {field: value}))
    for read in (load_vae, find_vae):
        with pytest.raises(ValueError, match=f"the configuration of '.*' is not valid: {field} is {value}, expected a"):
            read(str(tmp_path))


@pytest.mark.parametrize("layout", ["diffusers", "pipeline"])
def test_a_repository_on_the_hub(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any repository by its id; of a pipeline, the VAE alone is fetched. Facts need no weights."""
    repo, fetched = tmp_path / "repo", tmp_path / "cache"
    mixed = made(DEEP)
    save_diffusers(mixed, repo / "vae" if layout == "pipeline" else repo)
    (repo / "transformer").mkdir()
    (repo / "transformer" / DIFFUSERS_FILE).write_bytes(b"many gigabytes")
    if layout == "pipeline":
        (repo / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')

    def snapshot_download(name: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        assert name == "mit-han-lab/dc-ae-f32c32-mix-1.0-diffusers"
        for file in repo.rglob("*.*"):
            inner = file.relative_to(repo)
            if any(fnmatch(inner.as_posix(), pattern) for pattern in allow_patterns or ["*"]):
                (fetched / inner).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, fetched / inner)
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    spec = find_vae("mit-han-lab/dc-ae-f32c32-mix-1.0-diffusers")
    assert (spec.target, spec.stride, spec.latent_channels) == ("wan_vae.codecs.dcae:DCAE", (1, 8, 8), 4)
    assert not list(fetched.rglob("*.safetensors"))
    assert same(spec.load().state_dict(), mixed.state_dict())
    assert [file.name for file in fetched.rglob("*.safetensors")] == [DIFFUSERS_FILE]


QKV = "encoder.stages.3.op_list.0.context_module.main.qkv.conv.weight"


def test_what_does_not_fit_is_named(vae: DCAE, tmp_path: Path) -> None:
    official, folder = tmp_path / "dcae.safetensors", tmp_path / "folder"
    changes: tuple[tuple[dict[str, Tensor | None], str], ...] = (
        ({QKV.replace("qkv", "proj"): None}, r"missing 1 \(encoder\.stages\.3\.op_list\.0\.context_module\.main\.proj\.conv\.weight\)"),
        ({"encoder.stages.1.op_list.0.main.conv2.conv.bias": torch.zeros(16)}, r"unexpected 1 \(encoder\.stages\.1.*bias\)"),
        ({QKV: torch.zeros(90, 32, 1, 1)}, r"qkv\.conv\.weight' is \(90, 32, 1, 1\), expected \(96, 32, 1, 1\)"),
        ({"encoder.project_out.main.op_list.0.conv.weight": None}, "missing or misshapen 'encoder.project_out.op_list.0.conv.weight'"),
        ({"decoder.project_in.main.conv.bias": torch.zeros(32, dtype=torch.float16)}, "mixes types"),
        ({"decoder.project_in.main.conv.bias": torch.full((32,), torch.nan)}, "holds NaN"),
        ({"decoder.stages.1.op_list.0.main.conv.conv.weight": torch.zeros(64, 16, 3, 3, dtype=torch.int8)}, "scaled or quantised"),
    )
    for change, message in changes:
        state = {key: value for key, value in {**vae.state_dict(), **change}.items() if value is not None}
        save_file(state, official)
        with pytest.raises(ValueError, match=message):
            DCAE.from_pretrained(official)
    save_diffusers(vae, folder)
    kept, attention = load_file(folder / DIFFUSERS_FILE), "encoder.down_blocks.3.0.attn"
    changes = (
        ({f"{attention}.to_k.weight": None}, rf"missing 1 \({attention}\.to_k\.weight\)"),
        ({f"{attention}.to_k.bias": torch.zeros(32)}, rf"unexpected 1 \({attention}\.to_k\.bias\)"),
        ({f"{attention}.to_k.weight": torch.zeros(24, 32)}, r"to_k\.weight' is \(24, 32\), expected \(32, 32\)"),
        ({f"{attention}.to_out.weight": torch.zeros(32, 32, 1, 1)}, r"to_out\.weight' is \(32, 32, 1, 1\), expected \(32, 32\)"),
    )
    for change, message in changes:
        save_file({key: value for key, value in {**kept, **change}.items() if value is not None}, folder / DIFFUSERS_FILE)
        with pytest.raises(ValueError, match=message):
            load_vae(str(folder))


def test_weights_for_another_class(vae: DCAE, tmp_path: Path) -> None:
    deep, wan, part = (tmp_path / f"{name}.safetensors" for name in ("deep", "wan", "part"))
    save_official(vae, deep)
    save_official(WanVAE(), wan)
    with pytest.raises(ValueError, match=r"not a Wan VAE: it holds a DC-AE; load it with wan_vae\.load_vae"):
        WanVAE.from_pretrained(deep)
    with pytest.raises(ValueError, match="not a DC-AE: it holds a Wan VAE"):
        DCAE.from_pretrained(wan)
    save_file({key: value for key, value in vae.state_dict().items() if key.startswith("decoder.")}, part)
    for read in (DCAE.from_pretrained, describe):
        with pytest.raises(ValueError, match="holds the decoder of a DC-AE alone"):
            read(part)
    save_file(vae.to_diffusers()[1], deep)
    with pytest.raises(ValueError, match=r"in diffusers' names without its config\.json: give the folder of AutoencoderDC"):
        DCAE.from_pretrained(deep)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which the command replaces for its process


@pytest.mark.usefixtures("quiet")
def test_convert_keeps_every_bit(vae: DCAE, run: Run, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "a")
    lines = ("a b --to diffusers", "b c --to wan", "c d.safetensors --to comfy", "d.safetensors e.pth --to official", "e.pth f --to wan")
    lost = {"d.safetensors": "scaling_factor"}
    for line in lines:
        code, out, err = run("convert", *line.split())
        made_by = line.split()[1]
        assert code == 0, err
        assert f"{len(vae.state_dict())} tensors" in out
        assert (f"'{made_by}' does not say {lost.get(made_by)}" in err) == (made_by in lost)
    assert same(load_file("b/diffusion_pytorch_model.safetensors"), vae.to_diffusers()[1])
    for file in ("c/model.safetensors", "d.safetensors", "f/model.safetensors"):
        assert same(load_file(file), vae.state_dict())
    assert load_vae("c").config == vae.config
    assert AutoencoderDC.from_pretrained("b").config.scaling_factor == 0.37
    assert run("convert", "b", "g", "--to", "diffusers", "--dtype", "fp16")[0] == 0
    types = {(value.dtype, name.endswith("num_batches_tracked")) for name, value in load_file(f"g/{DIFFUSERS_FILE}").items()}
    assert types == {(torch.float16, False), (torch.int64, True)}
    assert int(next(value for name, value in load_file(f"g/{DIFFUSERS_FILE}").items() if "tracked" in name)) == 70_001


@pytest.mark.usefixtures("quiet")
def test_list_and_info(vae: DCAE, run: Run, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = json.loads(run("list", "--json")[1])
    found = {row["name"]: row for row in rows if row["name"].startswith("dc-ae")}
    assert {name: (row["parameters"], row["stride"], row["latent_space"]) for name, row in found.items()} == {
        "dc-ae-f32c32-in-1.0": (323_356_460, "1x32x32", "dc-ae-f32c32-in"),
        "dc-ae-f64c128-in-1.0": (676_896_140, "1x64x64", "dc-ae-f64c128-in"),
        "dc-ae-f128c512-in-1.0": (1_120_682_252, "1x128x128", "dc-ae-f128c512-in"),
        "dc-ae-f32c32-sana-1.0": (312_250_275, "1x32x32", "dc-ae-f32c32-sana"),
        "dc-ae-f32c32-sana-1.1": (312_250_275, "1x32x32", "dc-ae-f32c32-sana"),
    }
    save_diffusers(vae, tmp_path / "deep")
    (facts,) = json.loads(run("info", "deep", "--json")[1])
    parameters = sum(parameter.numel() for parameter in vae.parameters())
    expected = {"kind": "checkpoint", "distribution": "wan-vae", "channels": 4, "stride": "1x8x8", "parameters": parameters}
    assert facts == facts | expected | {"latent_space": "unknown", "state": "on disk"}


@pytest.mark.usefixtures("quiet")
def test_a_film_to_latents_and_back(run: Run, real_clips: Path, tmp_path: Path) -> None:
    vae, clip = made(DEEP.model_copy(update={"latent_space": "small-1"})), real_clips / "carphone_pristine.mp4"
    vae.save_pretrained(tmp_path / "deep")
    part = ("--frames", "3", "--crop", "50x30+60+40", "--chunk", "2")
    code, _, err = run("encode", str(clip), "film.safetensors", "--codec", "deep", *part)
    assert code == 0, err
    file = LatentFile.open(tmp_path / "film.safetensors")
    assert (list(file.shape), file.info.latent_space, file.info.frames) == ([3, 4, 4, 7], "small-1", 3)
    assert (file.info.padding.frames, file.info.padding.bottom, file.info.padding.right) == (0, 2, 6)
    frames = [torch.from_numpy(frame.pixels) for frame in Reader(clip, limit=3, crop=file.info.crop)]
    video = torch.stack(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    padded = torch.nn.functional.pad(video, (0, 6, 0, 2, 0, 0), mode="replicate")
    stored = load_file(tmp_path / "film.safetensors")["latents"]
    assert difference(stored.transpose(0, 1)[None], vae.encode(padded)) <= 1e-5
    code, _, err = run("decode", "film.safetensors", "back.mp4", "--codec", "deep", "--lossless")
    assert code == 0, err
    back = probe(tmp_path / "back.mp4")
    assert (back.frames, back.width, back.height) == (3, 50, 30)
    shown = torch.stack([torch.from_numpy(frame.pixels) for frame in Reader(tmp_path / "back.mp4")]).permute(3, 0, 1, 2)[None]
    expected = (vae.decode(vae.encode(padded))[..., :30, :50] + 1) * 127.5
    assert (shown.float() - expected).abs().max() <= 1
    assert run("encode", str(clip), "b.safetensors", "--codec", "deep", "--logvar")[0] == 2
    assert run("encode", str(clip), "c.safetensors", "--codec", "deep", "--frames", "1", "--tile", "64x64")[0] == 0
    save_diffusers(made(SANA), tmp_path / "other")
    code, _, err = run("decode", "film.safetensors", "no.mp4", "--codec", "other")
    assert (code, "small-1" in err) == (2, True)


def test_tiles_blend_to_a_picture_of_the_same_size(vae: DCAE) -> None:
    from wan_vae.tiling import TiledVAE

    video = pictures(vae, (8, 8))
    whole = TiledVAE(vae, (64, 64), "blend")  # one tile, which is the whole
    assert difference(whole.encode(video), vae.encode(video)) <= 1e-5
    tiled = TiledVAE(vae, (32, 32), "blend")
    latents = tiled.encode(video)
    assert latents.shape == vae.encode(video).shape
    assert tiled.decode(latents).shape == video.shape
    with pytest.raises(ValueError, match="cannot be tiled exactly"):
        TiledVAE(vae, (32, 32))
