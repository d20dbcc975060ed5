"""Recipes and overrides: what is read, and what is said where it is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field
from wan_train.config import TrainConfig, read_settings
from wan_train.objectives.flow import FlowSettings
from wan_train.objectives.vae import VAESettings

RECIPES = sorted(file.name.removesuffix(".toml") for file in (files("wan_train") / "recipes").iterdir() if file.name.endswith(".toml"))
SETTINGS: dict[str, type[BaseModel]] = {"vae": VAESettings, "rectified-flow": FlowSettings}


def test_the_built_in_parts_have_their_recipes() -> None:
    assert {"tiny-vae", "tiny-t2v"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_the_package_parse_down_to_the_objectives_settings(name: str) -> None:
    config = TrainConfig.from_toml(name)
    assert config.name == name
    assert config.output == Path("runs") / name
    read_settings(SETTINGS[config.objective.name], config.objective.settings, name)


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("steps=7", lambda c: c.steps, 7),
        ("optimiser.lr=1e-3", lambda c: c.optimiser.lr, 1e-3),
        ("optimiser.betas=[0.8, 0.95]", lambda c: c.optimiser.betas, (0.8, 0.95)),
        ("optimiser.name=adamw", lambda c: c.optimiser.name, "adamw"),
        ("precision='bf16'", lambda c: c.precision, "bf16"),
        ("output=some/where", lambda c: c.output, Path("some/where")),
        ("objective.settings.new=true", lambda c: c.objective.settings["new"], True),
        ("objective.settings.deep.er={a = 1}", lambda c: c.objective.settings["deep"], {"er": {"a": 1}}),
        ("objective.settings.phrase=a = b", lambda c: c.objective.settings["phrase"], "a = b"),
        ("data.settings.split=", lambda c: c.data.settings["split"], ""),
    ],
)
def test_an_override_is_toml_or_a_bare_word(vae_toml: Path, override: str, read: Callable[[TrainConfig], object], expected: object) -> None:
    assert read(TrainConfig.from_toml(vae_toml, [override])) == expected


def test_overrides_leave_the_rest_and_the_last_one_counts(vae_toml: Path) -> None:
    plain, changed = TrainConfig.from_toml(vae_toml), TrainConfig.from_toml(vae_toml, ["steps=1", "optimiser.lr=0.5", "steps=9"])
    assert changed.steps == 9
    assert changed.optimiser.model_copy(update={"lr": plain.optimiser.lr}) == plain.optimiser
    assert changed.objective == plain.objective


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", r"vae\.toml': steps: .*greater than 0 \(got 0\)"),
        ("steps=many", r"steps: .*integer.* \(got 'many'\)"),
        ("optimiser.lr=-1", r"optimiser\.lr: .*greater than 0 \(got -1\)"),
        ("optimiser.name=sgd", r"optimiser\.name: .*'adamw', 'adamw8bit' or 'muon' \(got 'sgd'\)"),
        ("optimizer.lr=1", r"optimizer: Extra inputs are not permitted"),
        ("ema=1", r"ema: .*less than 1 \(got 1\)"),
        ("steps", r"'steps' must read dotted\.key=value"),
        ("=3", r"'=3' must read dotted\.key=value"),
        ("steps.more=3", r"'steps' is a value, not a section"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_in_one_line(vae_toml: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        TrainConfig.from_toml(vae_toml, [override])
    assert "\n" not in str(caught.value)


def test_every_wrong_field_is_named_and_a_missing_one_too(tmp_path: Path) -> None:
    recipe = tmp_path / "bad.toml"
    recipe.write_text("name = 'x'\nsteps = -1\nobjective = {name = 'vae'}\ndata = {name = 'shapes'}\noutput = 'x'\n")
    with pytest.raises(ValueError, match=r"steps: .*\(got -1\); batch_size: Field required$"):
        TrainConfig.from_toml(recipe)


def test_what_is_not_toml_says_so(tmp_path: Path) -> None:
    recipe = tmp_path / "bad.toml"
    recipe.write_text("steps = = 3")
    with pytest.raises(ValueError, match=r"bad\.toml' is not TOML: .*line 1"):
        TrainConfig.from_toml(recipe)


@pytest.mark.parametrize("name", ["tiny-vea", "folder/recipe.toml"])
def test_an_unknown_recipe_lists_the_known_ones(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"no recipe '{name}'.*tiny-t2v, tiny-t2v-polish, tiny-t2v-refine, tiny-vae"):
        TrainConfig.from_toml(name)


def test_a_folder_does_not_hide_a_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-vae").mkdir()
    assert TrainConfig.from_toml("tiny-vae").objective.name == "vae"


def test_the_schema_lists_every_field(vae_toml: Path) -> None:
    schema = TrainConfig.model_json_schema()
    assert set(schema["properties"]) == set(TrainConfig.model_fields)
    assert schema["additionalProperties"] is False
    assert json.loads(json.dumps(schema)) == schema
    dumped = TrainConfig.from_toml(vae_toml).model_dump(mode="json")
    assert TrainConfig.model_validate(json.loads(json.dumps(dumped))) == TrainConfig.from_toml(vae_toml)


def test_settings_are_read_in_one_line() -> None:
    class Two(BaseModel):
        model_config = ConfigDict(extra="forbid")
        a: int = Field(gt=0)
        b: str

    assert read_settings(Two, {"a": 1, "b": "x"}, "here") == Two(a=1, b="x")
    with pytest.raises(ValueError, match=r"^'here': a: .*\(got 0\); b: Field required; c: .*\(got 5\)$"):
        read_settings(Two, {"a": 0, "c": 5}, "here")
