"""Parts that do not fit are refused from their specs, before any weight is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
from wan_dit.compat import check, fitting
from wan_dit.plugins import BackboneSpec, PluginManager, VideoModelSpec, hookimpl


@dataclass(frozen=True)
class FakeSpec:
    """A spec of another package: no common base class, only the fields."""

    name: str
    target: str = "nowhere:X"
    latent_space: str = "a"
    latent_channels: int = 4
    stride: Any = (4, 8, 8)
    embedding_space: str = "t"
    embed_dim: int = 6
    max_tokens: int = 9

    def load(self, weights: Any = None, *, dtype: Any = None, device: Any = None) -> Any:
        raise AssertionError(f"weights of {self.name} were read")


BACKBONE = BackboneSpec("b", "nowhere:B", "a", 4, (4, 8, 8), "t", 6, 9)
VAE, TEXT = FakeSpec("v"), FakeSpec("t")


class Installed:
    @hookimpl
    def wan_vaes(self) -> list[Any]:
        return [VAE, FakeSpec("other", latent_space="z")]

    @hookimpl
    def wan_text_encoders(self) -> list[Any]:
        return [TEXT]

    @hookimpl
    def wan_backbones(self) -> list[Any]:
        return [BACKBONE]

    @hookimpl
    def wan_models(self) -> list[Any]:
        return [VideoModelSpec("m", "b", "other", "t", scheduler="s")]


@pytest.fixture
def pm() -> PluginManager:
    manager = PluginManager()
    manager.register(Installed(), name="installed")
    return manager


def test_parts_that_fit(pm: PluginManager) -> None:
    check(BACKBONE, VAE, TEXT, pm=pm)
    check(BACKBONE, replace(VAE, stride=[4, 8, 8]), replace(TEXT, max_tokens=2), pm=pm)


@pytest.mark.parametrize(
    ("vae", "text", "expected"),
    [
        # the tag comes first: equal channels are not equal latents
        ({"latent_space": "z", "latent_channels": 5}, {}, "vae 'v' does not fit backbone 'b': its latent_space is z, the backbone needs a"),
        ({"latent_channels": 5}, {}, "its latent_channels is 5, the backbone needs 4"),
        ({"stride": (4, 16, 16)}, {}, "its stride is (4, 16, 16), the backbone needs (4, 8, 8)"),
        ({}, {"embedding_space": "z", "embed_dim": 7}, "text encoder 't' does not fit backbone 'b': its embedding_space is z"),
        ({}, {"embed_dim": 7}, "its embed_dim is 7, the backbone needs 6"),
        ({}, {"max_tokens": 10}, "it makes up to 10 tokens, the backbone takes 9"),
    ],
)
def test_the_first_mismatch_is_named(pm: PluginManager, vae: dict[str, Any], text: dict[str, Any], expected: str) -> None:
    fitting_parts = "installed and fitting: " + ("v" if vae else "t")
    with pytest.raises(ValueError, match=f"{re.escape(expected)}.*; {fitting_parts}$"):
        check(BACKBONE, replace(VAE, **vae), replace(TEXT, **text), pm=pm)


@pytest.mark.parametrize("backbone_space", ["unknown", "wan2.1"])
def test_what_is_unknown_fits_nothing_not_even_another_unknown_one(pm: PluginManager, backbone_space: str) -> None:
    backbone = replace(BACKBONE, latent_space=backbone_space)
    with pytest.raises(
        ValueError, match=rf"its latent_space is unknown, the backbone's is {backbone_space}.*write one name as 'latent_space'"
    ):
        check(backbone, replace(VAE, latent_space="unknown"), TEXT, pm=pm)
    with pytest.raises(ValueError, match=r"its embedding_space is unknown.*write one name as 'embedding_space'"):
        check(replace(BACKBONE, embedding_space="unknown"), VAE, replace(TEXT, embedding_space="unknown"), pm=pm)


def test_parts_that_fit_are_listed_under_names_that_can_be_typed(pm: PluginManager) -> None:
    class Another:
        @hookimpl
        def wan_vaes(self) -> list[Any]:
            return [VAE]

    pm.register(Another(), name="another")
    assert fitting("wan_vaes", BACKBONE, pm) == ["another:v", "installed:v"]


def test_nothing_installed_fits(pm: PluginManager) -> None:
    backbone = replace(BACKBONE, latent_space="q")
    assert fitting("wan_vaes", backbone, pm) == []
    with pytest.raises(ValueError, match="no installed vae fits"):
        check(backbone, VAE, TEXT, pm=pm)


def test_a_part_without_a_spec_is_refused(pm: PluginManager) -> None:
    class Nameless:
        name = "mine"

    with pytest.raises(ValueError, match="it does not state its latent_space"):
        check(BACKBONE, Nameless(), TEXT, pm=pm)


def test_a_pipeline_checks_before_it_loads(pm: PluginManager) -> None:
    from wan_dit.pipeline import Pipeline

    class Solver:
        def schedule(self) -> None: ...
        def start(self) -> None: ...
        def step(self) -> None: ...

    with pytest.raises(ValueError, match="its latent_space is z"):
        Pipeline("m", scheduler=Solver(), pm=pm)
    assert Pipeline("m", vae="v", scheduler=Solver(), pm=pm).specs["vae"] is VAE
