"""`wan-vae convert`: every layout to every other at no difference; diffusers reads the result; nothing is lost in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_vae.checkpoint import save_diffusers, save_official
from wan_vae.codecs.taehv import TAEHV
from wan_vae.codecs.taehv_config import TAEHVConfig
from wan_vae.config import VAEConfig
from wan_vae.model import WanVAE
from wan_vae.names import diffusers_names, official_names
from wan_vae.testing import difference, randomise

CONFIGS = {
    "2.1": VAEConfig(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=(1, 2, 4, 4), temporal_downsample=(False, True, True), latent_space="unknown"
    ),
    "2.2": VAEConfig(
        base_dim=4, decoder_base_dim=8, z_dim=6, dim_mult=(1, 2, 4, 4), temporal_downsample=(False, True, True),
        residual=True, patch_size=2, latent_space="unknown",
    ),
}  # fmt: skip
SMALL_TAEHV = TAEHVConfig(z_dim=3, encoder_dim=4, decoder_dims=(8, 6, 4, 4), latent_space="unknown")
Convert = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def convert(run: Callable[..., tuple[int, str, str]]) -> Convert:
    """`convert("SOURCE OUT --to wan")` in `tmp_path` gives exit code, stdout and stderr."""
    return lambda line: run("convert", *line.split())


@pytest.fixture(params=CONFIGS)
def vae(request: pytest.FixtureRequest) -> WanVAE:
    vae = WanVAE(CONFIGS[request.param]).eval()
    randomise(vae)
    return vae


@pytest.fixture
def vae21(tmp_path: Path) -> WanVAE:
    """Of 2.1, and saved as `a.pth`."""
    vae = WanVAE(CONFIGS["2.1"]).eval()
    randomise(vae)
    save_official(vae, tmp_path / "a.pth")
    return vae


def same(state: dict[str, Tensor], vae: WanVAE, names: dict[str, str]) -> bool:
    expected = {names[key]: value for key, value in vae.state_dict().items()}
    return set(state) == set(expected) and all(
        value.dtype == expected[key].dtype and torch.equal(value, expected[key]) for key, value in state.items()
    )


def test_round_trips_keep_every_bit(vae: WanVAE, convert: Convert) -> None:
    official, diffusers = official_names(vae.config), diffusers_names(vae.config)
    save_official(vae, "a.pth")
    for line in (
        "a.pth b --to diffusers",
        "b c --to wan",
        "c d.safetensors --to comfy",
        "d.safetensors e.pth --to official",
        "e.pth f --to wan",
        "f g --to diffusers",
        "g h.safetensors --to official",
    ):
        code, out, err = convert(line)
        assert (code, err) == (0, ""), line
        assert f"{len(official)} tensors" in out
    for name in ("b", "g"):
        assert same(load_file(f"{name}/diffusion_pytorch_model.safetensors"), vae, diffusers)
    for name in ("c/model.safetensors", "d.safetensors", "f/model.safetensors", "h.safetensors"):
        assert same(load_file(name), vae, official)
    assert same(torch.load("e.pth", weights_only=True), vae, official)
    for name in ("b", "c", "h.safetensors"):
        back = WanVAE.from_pretrained(name)
        assert (back.config, back.fingerprint()) == (vae.config, vae.fingerprint())


@torch.no_grad()
def test_diffusers_reads_the_result_and_gives_the_same(vae: WanVAE, convert: Convert) -> None:
    save_official(vae, "a.pth")
    assert convert("a.pth b --to diffusers")[0] == 0
    theirs = AutoencoderKLWan.from_pretrained("b")
    video = torch.rand(1, 3, 5, *vae.spec.stride[1:]) * 2 - 1
    assert difference(vae.encode(video), theirs.encode(video).latent_dist.mean) <= 1e-5
    latents = torch.randn(1, vae.config.z_dim, 2, 1, 1)
    assert difference(vae.decode(latents), theirs.decode(latents).sample) <= 1e-5
    theirs.save_pretrained("theirs", max_shard_size="100KB")
    assert len(list(Path("theirs").glob("*.safetensors"))) > 1
    assert convert("theirs c.pth --to official")[0] == 0
    assert same(torch.load("c.pth", weights_only=True), vae, official_names(vae.config))


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_is_kept_and_changed_on_request(vae21: WanVAE, convert: Convert, name: str, dtype: torch.dtype) -> None:
    assert convert(f"a.pth b.safetensors --to comfy --dtype {name}")[0] == 0
    assert convert("b.safetensors c --to diffusers")[0] == 0
    for file in ("b.safetensors", "c/diffusion_pytorch_model.safetensors"):
        assert {value.dtype for value in load_file(file).values()} == {dtype}
    expected = vae21.state_dict()["decoder.head.conv.weight"].to(dtype)
    assert torch.equal(load_file("b.safetensors")["decoder.head.2.weight"], expected)


def test_weights_beyond_fp16_are_refused(vae21: WanVAE, convert: Convert) -> None:
    state = {official_names(vae21.config)[key]: value for key, value in vae21.state_dict().items()}
    save_file(state | {"conv1.bias": state["conv1.bias"] + 1e5}, "large.safetensors")
    code, _, err = convert("large.safetensors b.safetensors --to comfy --dtype fp16")
    assert code == 2
    assert "'quant_conv.bias' holds 1e+05; use bf16" in err
    assert not Path("b.safetensors").exists()


@pytest.mark.parametrize("line", ["a.pth b.pth --to official", "a.pth b --to diffusers", "a.pth b --to wan"])
def test_nothing_is_overwritten_unasked(vae21: WanVAE, convert: Convert, line: str) -> None:
    assert convert(line)[0] == 0
    before = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    other = WanVAE(vae21.config)
    save_official(other, "a.pth")
    code, _, err = convert(line)
    assert code == 2
    assert "exists; name another output or pass --overwrite" in err
    assert {file: file.read_bytes() for file in before if file != Path("a.pth")} == {f: v for f, v in before.items() if f != Path("a.pth")}
    assert convert(f"{line} --overwrite")[0] == 0
    assert WanVAE.from_pretrained(line.split()[1]).fingerprint() == other.fingerprint()


def test_an_empty_folder_is_written_to(vae21: WanVAE, convert: Convert) -> None:
    Path("b").mkdir()
    assert convert("a.pth b --to wan")[0] == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nothing.pth b --to wan", "nothing.pth"),
        ("a.pth b --to onnx", "invalid choice: 'onnx'"),
        ("a.pth b", "required: --to"),
        ("a.pth b.bin --to official", "give a name that ends in .pth or .safetensors"),
        ("a.pth b.pth --to comfy", "give a name that ends in .safetensors"),
        ("a.pth b.safetensors --to diffusers", "--to diffusers makes a folder"),
        ("a.pth a.pth --to official --overwrite", "'a.pth' is the input"),
        ("a.pth no/b --to wan", "there is no folder"),
        ("a.pth full --to diffusers --overwrite", "it holds other weights ('model.safetensors')"),
        ("a.pth full --to official", "give a name that ends in"),
        ("shuffle_vae:ShuffleVAE b --to wan", "'shuffle_vae:ShuffleVAE' cannot be converted"),
        ("wan_vae.model:WanVAE b --to wan", "names no weights to convert"),
        ("words.safetensors b --to wan", "is not a readable checkpoint"),
        ("t.safetensors b --to diffusers", "AutoencoderKLWan cannot hold a TAEHV"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(vae21: WanVAE, convert: Convert, line: str, message: str) -> None:
    vae21.save_pretrained("full")
    Path("words.safetensors").write_text("words")
    save_official(TAEHV(SMALL_TAEHV), "t.safetensors")
    before = sorted(Path().rglob("*"))
    code, out, err = convert(line)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert sorted(Path().rglob("*")) == before


def test_a_folder_written_anew_has_no_left_overs_that_are_read(vae21: WanVAE, convert: Convert) -> None:
    assert convert("a.pth b --to diffusers")[0] == 0
    Path("b/diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"x": "old.safetensors"}}')
    code, _, err = convert("a.pth b --to diffusers --overwrite")
    assert (code, "holds other weights" in err) == (2, True)


def test_what_a_layout_has_no_room_for_is_told(vae21: WanVAE, convert: Convert, tmp_path: Path) -> None:
    vae21.config = vae21.config.model_copy(update={"latents_mean": (0.5,) * 4, "latents_std": (2.0,) * 4, "latent_space": "mine-1"})
    vae21.save_pretrained("ours")
    _, _, err = convert("ours b.pth --to official")
    assert err.startswith(
        "wan-vae: warning: 'b.pth' does not say latent_space, latents_mean, latents_std, which its layout has no room for"
    )
    assert "does not say latent_space, which" in convert("ours c --to diffusers")[2]
    assert convert("ours d --to wan")[2] == ""
    assert WanVAE.from_pretrained("c").config == vae21.config.model_copy(update={"latent_space": "unknown"})


def test_other_classes_of_ours_are_converted_too(convert: Convert) -> None:
    vae = TAEHV(SMALL_TAEHV).eval()
    save_official(vae, "t.pth")
    assert convert("t.pth b --to wan")[0] == 0
    assert convert("b c.safetensors --to comfy")[0] == 0
    assert all(torch.equal(value, vae.state_dict()[key]) for key, value in load_file("c.safetensors").items())
    assert TAEHV.from_pretrained("b").config == SMALL_TAEHV


def test_an_export_of_the_built_in_vae(convert: Convert) -> None:
    assert convert("tiny b --to diffusers")[0] == 0
    assert AutoencoderKLWan.from_pretrained("b").config.patch_size == 2
    with pytest.raises(ValueError, match="holds other weights"):
        save_diffusers(WanVAE.from_pretrained("b"), _with_others("c"))


def _with_others(name: str) -> Path:
    Path(name).mkdir()
    save_file({"x": torch.zeros(1)}, f"{name}/model.safetensors")
    return Path(name)
