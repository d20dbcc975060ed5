"""The decoder that takes out noise: what it is told, where its noise comes from, and how it begins as a plain one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from process_group import in_processes
from safetensors.torch import load_file, save_file
from sharded import work
from torch import Tensor
from wan_vae.checkpoint import infer_config, save_diffusers, save_official
from wan_vae.config import TINY, VAEConfig
from wan_vae.contents import shapes_of
from wan_vae.model import WanVAE
from wan_vae.names import official_names
from wan_vae.plan import make_plan
from wan_vae.setting import Setting
from wan_vae.stream import StreamState
from wan_vae.testing import VAEContract, difference, randomise
from wan_vae.tiling import TiledVAE
from wan_vae.timestep import FrameNoise, ScaleShift, TimestepEmbedding, conditioned

SMALL = VAEConfig(
    base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=(1, 2, 2), temporal_downsample=(True, False), num_res_blocks=1, latent_space="test"
)
STYLES = {"plain": SMALL, "residual": SMALL.model_copy(update={"residual": True, "patch_size": 2})}


def make(style: str = "plain", timed: bool = True, **changes: object) -> WanVAE:
    statistics = {"latents_mean": (0.3, -0.2, 0.0, 1.0), "latents_std": (2.0, 0.5, 1.0, 3.0)}
    vae = WanVAE(STYLES[style].model_copy(update={"timestep_conditioning": timed, **changes})).eval()
    randomise(vae)
    vae.config = vae.config.model_copy(update=statistics)
    return vae


def clip(vae: WanVAE, latents: int, batch: int = 1, cells: tuple[int, int] = (2, 1), seed: int = 0) -> Tensor:
    time, height, width = vae.spec.stride
    shape = (batch, 3, 1 + (latents - 1) * time, cells[0] * height, cells[1] * width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def drawn(vae: WanVAE, frames: int, batch: int = 1, cells: tuple[int, int] = (2, 3), seed: int = 0) -> Tensor:
    return torch.randn(batch, vae.config.z_dim, frames, *cells, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestConditioned(VAEContract):
    @pytest.fixture(scope="class")
    @classmethod
    def vae(cls) -> WanVAE:
        return make("residual")


class TestConditionedAndChunked(VAEContract):
    @pytest.fixture(scope="class")
    @classmethod
    def vae(cls) -> WanVAE:
        return make("plain", chunk=2)


@pytest.mark.parametrize("style", STYLES)
def test_a_plain_vae_becomes_one_that_decodes_the_same(style: str) -> None:
    plain = make(style, timed=False)
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    vae = conditioned(plain)
    assert vae.config == plain.config.model_copy(update={"timestep_conditioning": True})
    assert all(torch.equal(vae.state_dict()[key], value) for key, value in state.items())
    new = vae.state_dict().keys() - state.keys()
    kinds = {name: type(module) for name, module in vae.named_modules()}
    assert {kinds[key.rpartition(".")[0]] for key in new if "timestep" not in key} == {ScaleShift}
    assert new
    assert not any(vae.state_dict()[key].any() for key in new if "scale_shift" in key)
    z = drawn(plain, 4)
    for timestep in (0.0, 0.05, 0.2):
        told = StreamState(timestep=torch.tensor([timestep]))
        with torch.no_grad():
            assert difference(vae.decode_step(z, told), plain.decode_step(z, StreamState())) <= 1e-6
    noise = FrameNoise.of(seeded(3)).frames(z)
    assert difference(vae.decode(z, generator=seeded(3)), plain.decode(0.975 * z + 0.025 * noise)) <= 1e-5
    vae.config = vae.config.model_copy(update={"decode_noise_scale": 0.0})
    assert difference(vae.decode(z), plain.decode(z)) <= 1e-5
    with torch.no_grad():
        next(vae.decoder.parameters()).add_(1)
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in state.items()), "the plain one is left alone"
    with pytest.raises(ValueError, match="conditioned on a timestep already"):
        conditioned(vae)


def test_a_vae_with_other_tensors_is_refused() -> None:
    plain = make(timed=False)
    plain.decoder.middle.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"not the tensors of a plain VAE: decoder\.middle\.extra"):
        conditioned(plain)


def test_the_timestep_counts_once_the_tables_are_drawn() -> None:
    vae = conditioned(make(timed=False))
    z = drawn(vae, 3)

    def at(timestep: float) -> Tensor:
        with torch.no_grad():
            return vae.decode_step(z, StreamState(timestep=torch.tensor([timestep])))

    assert torch.equal(at(0.0), at(0.2))
    tables = [module for module in vae.modules() if isinstance(module, ScaleShift)]
    blocks = len([name for name, _ in vae.decoder.named_modules() if name.endswith("norm2")])
    assert len(tables) == 2 * blocks + 1, "one for each norm of the residual blocks, and that of the head"
    for table in tables:
        torch.nn.init.normal_(table.weight, std=0.05)
        assert difference(at(0.0), at(0.2)) > 1e-4
        torch.nn.init.zeros_(table.weight)
        assert torch.equal(at(0.0), at(0.2))


def test_each_video_of_a_batch_has_its_own_timestep() -> None:
    vae, timesteps = make(), torch.tensor([0.02, 0.15])
    z = drawn(vae, 3, batch=2)
    with torch.no_grad():
        together = vae.decode_step(z, StreamState(timestep=timesteps))
        for i in range(2):
            alone = vae.decode_step(z[i : i + 1], StreamState(timestep=timesteps[i : i + 1]))
            assert difference(together[i : i + 1], alone) <= 1e-5
        assert difference(together[1:], vae.decode_step(z[1:], StreamState(timestep=timesteps[:1]))) > 1e-4


def test_decode_mixes_the_share_and_tells_the_timestep_of_the_config() -> None:
    vae = make(decode_timestep=0.1, decode_noise_scale=0.07)
    z, noise = drawn(vae, 3), FrameNoise.of(None).frames(drawn(vae, 3))
    with torch.no_grad():
        given_ = vae.denormalise(0.93 * z + 0.07 * noise)
        expected = vae.decode_step(given_, StreamState(timestep=torch.tensor([0.1]))).clamp(-1, 1)
    assert difference(vae.decode(z), expected) <= 1e-5
    other = make(decode_timestep=0.2, decode_noise_scale=0.07)
    assert difference(other.decode(z), expected) > 1e-4
    assert len({vae.fingerprint(), other.fingerprint(), make(decode_timestep=0.1).fingerprint()}) == 3


def test_noise_is_the_generator_s_and_else_always_the_same() -> None:
    vae = make()
    z = drawn(vae, 3)
    assert torch.equal(vae.decode(z), vae.decode(z))
    assert torch.equal(vae.decode(z, generator=seeded(1)), vae.decode(z, generator=seeded(1)))
    assert difference(vae.decode(z, generator=seeded(1)), vae.decode(z, generator=seeded(2))) > 1e-4
    assert difference(vae.decode(z, generator=seeded(1)), vae.decode(z)) > 1e-4
    generator = seeded(1)
    assert not torch.equal(vae.decode(z, generator=generator), vae.decode(z, generator=generator)), "a generator moves on"
    state = torch.get_rng_state()
    vae.decode(z)
    assert torch.equal(torch.get_rng_state(), state)
    assert make(timed=False).decode(z, generator=(untouched := seeded(1))) is not None
    assert torch.equal(untouched.get_state(), seeded(1).get_state())


def test_noise_is_white_and_its_frames_differ() -> None:
    noise = FrameNoise(5).frames(torch.empty(1, 8, 40, 8, 8))
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    frames = noise[0].transpose(0, 1).flatten(1)
    others = torch.corrcoef(frames) - torch.eye(40)
    assert others.abs().max() < 0.25


@settings(max_examples=10, deadline=None)
@given(chunk=st.integers(0, 2), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_any_chunks_give_the_same_frames(chunk: int, sizes: list[int]) -> None:
    vae = make("plain", chunk=chunk).double()
    z = drawn(vae, sum(sizes), cells=(2, 1)).double()
    for seed in (None, 4):
        parts = vae.decode_stream(z.split(sizes, 2), generator=None if seed is None else seeded(seed))
        assert difference(torch.cat(list(parts), 2), vae.decode(z, generator=None if seed is None else seeded(seed))) <= 1e-9


def test_a_session_resumes_with_the_noise_it_would_have_drawn(tmp_path: Path) -> None:
    vae = make()
    z = drawn(vae, 4)
    first = vae.decode_session(generator=seeded(1))
    first.push(z[:, :, :2])
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    second = vae.decode_session()
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(second.push(z[:, :, 2:]), first.push(z[:, :, 2:]))
    saved = first.state_dict()
    with pytest.raises(ValueError, match="not a state of this model's decoder"):
        vae.decode_session().load_state_dict({key: value for key, value in saved.items() if key != "noise"})
    with pytest.raises(ValueError, match="not a state of this model's decoder"):
        make(timed=False).decode_session().load_state_dict(saved)


def test_tiles_and_processes_draw_the_noise_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    vae = make()
    z = drawn(vae, 3, cells=(7, 6))
    exact = TiledVAE(vae, (12, 8))
    assert difference(exact.decode(z), vae.decode(z)) <= 1e-5
    assert difference(exact.decode(z, generator=seeded(2)), vae.decode(z, generator=seeded(2))) <= 1e-5
    blended = TiledVAE(vae, (16, 16), mode="blend")
    assert torch.equal(blended.decode(z, generator=seeded(2)), blended.decode(z, generator=seeded(2)))
    assert not torch.equal(blended.decode(z, generator=seeded(2)), blended.decode(z, generator=seeded(3)))
    shared = WanVAE(STYLES["plain"].model_copy(update={"timestep_conditioning": True})).eval()
    randomise(shared)
    arguments = [(rank, 2, str(tmp_path / "store"), shared.config.model_dump(), clip(shared, 3, cells=(7, 6)), z) for rank in range(2)]
    for _, encoded, decoded in in_processes(work, arguments, ["torch", "torch.distributed"], 60):
        assert not isinstance(encoded, str), decoded
        assert difference(torch.from_numpy(decoded), shared.decode(z)) < 1e-5


def test_compiled_steps_compute_the_same() -> None:
    vae = make(dim_mult=(1, 2), temporal_downsample=(True,))
    torch.compiler.reset()
    z, session = drawn(vae, 3), vae.decode_session(compile={"backend": "eager"})
    made = torch.cat([session.push(part) for part in z.split(1, 2)], 2)
    assert difference(made, vae.decode(z)) <= 2e-5


def test_half_precision_stays_near() -> None:
    vae = make()
    z = drawn(vae, 3)
    whole = vae.decode(z)
    assert 0 < difference(vae.set_precision(decode=torch.bfloat16).decode(z).float(), whole) < 0.1


def test_training_draws_a_share_for_each_video_and_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = make(max_timestep=0.15).train()
    video, seen = clip(vae, 2, batch=40), []
    step = vae.decode_step

    def watch(latents: Tensor, state: StreamState) -> Tensor:
        seen.append((vae.normalise(latents), state.timestep))
        return step(latents, state)

    monkeypatch.setattr(vae, "decode_step", watch)
    with torch.no_grad():
        vae.reconstruct(video, [seeded(seed) for seed in range(40)])
        mean, logvar = vae.moments(video)
    (given_, timestep), posterior = seen.pop(), []
    assert tuple(timestep.shape) == (40,)
    assert 0 <= timestep.min() < 0.02
    assert 0.13 < timestep.max() < 0.15
    for i in range(40):
        noise = torch.randn(mean[i].shape, generator=seeded(i))
        posterior.append(vae.normalise((mean[i] + noise * torch.exp(0.5 * logvar[i].clamp(-30, 20)))[None]))
    rest = (given_ - (1 - timestep.view(-1, 1, 1, 1, 1)) * torch.cat(posterior)) / timestep.view(-1, 1, 1, 1, 1)
    assert abs(rest.mean()) < 0.05
    assert abs(rest.std() - 1) < 0.05, "what was mixed in has unit variance in normalised latents"
    one, other = (vae.reconstruct(video[:2], [seeded(0), seeded(seed)])[0].detach() for seed in (1, 2))
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


def test_in_eval_mode_reconstruct_is_encode_and_decode() -> None:
    vae = make()
    video = clip(vae, 3, batch=2)
    with torch.no_grad():
        output = vae.reconstruct(video)[0]
        assert difference(output.clamp(-1, 1), vae.decode(vae.encode(video))) <= 1e-5
        assert torch.equal(output, vae.reconstruct(video)[0])


@pytest.mark.parametrize("style", STYLES)
def test_gradients_reach_every_parameter(style: str) -> None:
    vae = make(style).train()
    output, mean, logvar = vae.reconstruct(clip(vae, 3), generator=seeded(0))
    (output.square().mean() + mean.square().mean() + logvar.exp().mean()).backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not (p.grad.abs().max() > 0)] == []


def test_the_tables_of_a_fresh_one_learn_first() -> None:
    vae = conditioned(make(timed=False)).train().requires_grad_()
    vae.reconstruct(clip(vae, 3), generator=seeded(0))[0].square().mean().backward()
    tables = [module.weight.grad for module in vae.modules() if isinstance(module, ScaleShift)]
    assert all(slope is not None and slope.abs().max() > 0 for slope in tables)


def test_training_takes_noise_out() -> None:
    """A few steps on one clip: what is told lowers the error where there is noise."""
    torch.manual_seed(0)
    vae = make("plain", z_dim=4).train()
    video, (groups, tables) = clip(vae, 2, cells=(2, 2)), (vae.parameter_groups(), [])
    tables = [parameter for name in ("decoder", "decoder_head") for parameter in groups[name]]
    optimiser = torch.optim.AdamW(tables, lr=3e-3)

    def loss(step: int) -> Tensor:
        return (vae.reconstruct(video, seeded(step))[0] - video).square().mean()

    with torch.no_grad():
        before = sum(loss(1000 + i).item() for i in range(4))
    for step in range(40):
        optimiser.zero_grad()
        loss(step).backward()
        optimiser.step()
    with torch.no_grad():
        assert sum(loss(1000 + i).item() for i in range(4)) < 0.8 * before


def test_groups_hold_what_is_new() -> None:
    vae = make()
    groups = {name: {id(parameter) for parameter in group} for name, group in vae.parameter_groups().items()}
    for name, module in vae.named_modules():
        if isinstance(module, ScaleShift | TimestepEmbedding):
            group = "decoder_head" if name == "decoder.head.scale_shift" else "decoder"
            assert {id(parameter) for parameter in module.parameters()} <= groups[group], name


def test_checkpoints_keep_it_and_other_layouts_refuse_it(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    vae = make("residual", decode_timestep=0.07, max_timestep=0.3)
    vae.save_pretrained(tmp_path / "vae")
    loaded = WanVAE.from_pretrained(tmp_path / "vae")
    assert loaded.config == vae.config
    assert torch.equal(loaded.decode(drawn(vae, 3)), vae.decode(drawn(vae, 3)))
    assert infer_config(shapes_of(load_file(tmp_path / "vae" / "model.safetensors"))).timestep_conditioning
    assert sorted(official_names(vae.config)) == sorted(vae.state_dict())
    for save, name in ((save_official, "vae.pth"), (save_diffusers, "folder")):
        with pytest.raises(ValueError, match="cannot run a VAE with timestep_conditioning = True, which Wan's has not"):
            save(vae, tmp_path / name)
    state = load_file(tmp_path / "vae" / "model.safetensors")
    plain = {key: value for key, value in state.items() if "scale_shift" not in key and "timestep" not in key}
    save_file(plain, tmp_path / "part.safetensors")
    (tmp_path / "config.json").write_text((tmp_path / "vae" / "config.json").read_text().replace('"model.safetensors"', '"other"'))
    with pytest.raises(ValueError, match=r"does not fit this model: missing .*decoder\..*scale_shift"):
        WanVAE.from_pretrained(tmp_path / "part.safetensors")
    code, _, error = run("convert", "vae", "out", "--to", "diffusers")
    assert code == 2
    assert "timestep_conditioning = True" in error


def test_a_checkpoint_is_conditioned_by_the_command(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert run("convert", "tiny", "noisy", "--to", "wan", "--timestep-conditioning")[0] == 0
    vae, tiny = WanVAE.from_pretrained(tmp_path / "noisy"), WanVAE.from_pretrained("pkg:wan_vae/weights/tiny")
    assert vae.config == tiny.config.model_copy(update={"timestep_conditioning": True})
    z = drawn(tiny, 2)
    noise = FrameNoise.of(None).frames(z)
    assert difference(vae.decode(z), tiny.decode(0.975 * z + 0.025 * noise)) <= 2e-3  # the new tensors are in fp16
    for arguments, message in (
        (("noisy", "again", "--to", "wan"), "already"),
        (("tiny", "out", "--to", "diffusers"), "use --to wan"),
        (("tiny", "out.pth", "--to", "official"), "use --to wan"),
    ):
        code, _, error = run("convert", *arguments, "--timestep-conditioning")
        assert code == 2
        assert message in error


def test_memory_is_planned_for() -> None:
    plain = Setting(TINY, "decoder", (64, 64), memory=1 << 34, backend="direct")
    timed = Setting(TINY.model_copy(update={"timestep_conditioning": True}), "decoder", (64, 64), memory=1 << 34, backend="direct")
    weights = make_plan(plain).parts.weights, make_plan(timed).parts.weights
    assert weights[0] < weights[1]
    assert make_plan(timed).fits
