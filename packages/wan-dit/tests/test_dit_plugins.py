"""Packages find each other through plugins: identity, names, failures, laziness, and who may import whom."""

from __future__ import annotations

import ast
import filecmp
import importlib
import json
import os
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from wan_dit.listing import KINDS
from wan_dit.pipeline import Pipeline
from wan_dit.plugin import wan_models
from wan_dit.plugins import PART_KINDS, Hooks, PluginManager, SchedulerSpec, discover, find, hookimpl, plugin_manager

PACKAGES = Path(__file__).parents[2]
NAMES = {"wan-vae": "wan_vae", "wan-text": "wan_text", "wan-dit": "wan_dit", "wan-train": "wan_train"}
# who may import whom
ARROWS: dict[str, set[str]] = {"wan_vae": set(), "wan_text": set(), "wan_dit": set(), "wan_train": {"wan_dit", "wan_vae"}}

Install = Callable[..., None]

SCHEDULER = """
from wan_dit import SchedulerSpec, hookimpl

@hookimpl
def wan_schedulers():
    return [SchedulerSpec("{}", "wan_dit.schedulers.euler:Euler")]
"""
BROKEN = "import not_there"
RAISING = SCHEDULER + "\n@hookimpl\ndef wan_vaes():\n    raise RuntimeError('boom')\n"


def schedulers(pm: PluginManager) -> list[tuple[str, str]]:
    return [(offer.name, offer.dist) for offer in discover("wan_schedulers", pm) if offer.dist != "wan-dit"]


def test_the_distribution_is_the_identity_not_the_entry_point(install: Install) -> None:
    install("wan-foo", SCHEDULER.format("foo"), entry="same", version="1.5")
    install("wan-bar", SCHEDULER.format("bar"), entry="same")
    pm = plugin_manager()
    assert schedulers(pm) == [("bar", "wan-bar"), ("foo", "wan-foo")]
    assert pm.versions["wan-foo"] == "1.5"


def test_names_of_distributions_are_normalised(install: Install) -> None:
    install("Wan_Foo.Bar".replace(".", "_"), SCHEDULER.format("foo"))
    assert schedulers(plugin_manager()) == [("foo", "wan-foo-bar")]


def test_a_broken_plugin_hides_only_itself(install: Install) -> None:
    install("wan-broken", BROKEN)
    install("wan-foo", SCHEDULER.format("foo"))
    with pytest.warns(RuntimeWarning, match=r"plugin 'wan-broken' failed \(ModuleNotFoundError: No module named 'not_there'\)") as seen:
        pm = plugin_manager()
    assert len(seen) == 1
    assert schedulers(pm) == [("foo", "wan-foo")]
    assert find("wan_schedulers", "foo", pm).name == "foo", "its error is not raised for another part"
    for ref in ("wan-broken", "wan-broken:x"):
        with pytest.raises(LookupError, match="plugin 'wan-broken' failed") as error:
            find("wan_schedulers", ref, pm)
        assert isinstance(error.value.__cause__, ModuleNotFoundError)
    with pytest.raises(LookupError, match=r"no scheduler named 'nope'.*plugin 'wan-broken' failed"):
        find("wan_schedulers", "nope", pm)


def test_a_hook_that_raises_hides_only_itself_and_is_warned_of_once(install: Install) -> None:
    install("wan-foo", RAISING.format("foo"))
    pm = plugin_manager()
    with pytest.warns(RuntimeWarning, match=r"plugin 'wan-foo' failed \(RuntimeError: boom\)"):
        names = {offer.name for offer in discover("wan_vaes", pm) if offer.spec}
    assert "tiny" in names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find("wan_vaes", "tiny", pm).name == "tiny"
    assert find("wan_schedulers", "foo", pm).name == "foo"
    with pytest.raises(LookupError, match="boom"):
        find("wan_vaes", "wan-foo:codec", pm)


def test_a_hook_that_returns_something_else_is_reported(install: Install) -> None:
    install("wan-foo", "from wan_dit import hookimpl\n\n@hookimpl\ndef wan_schedulers():\n    return ['euler']\n")
    pm = plugin_manager()
    with pytest.warns(RuntimeWarning, match="wan_schedulers returned 'euler', which has no name, target, load"):
        assert schedulers(pm) == [("", "wan-foo")]


def test_plugins_can_be_disabled(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("wan-foo", SCHEDULER.format("foo"))
    install("wan-bar", SCHEDULER.format("bar"))
    for value, expected in (("", ["bar", "foo"]), ("Wan_Foo", ["bar"]), ("wan-foo, wan-bar", []), ("*", [])):
        monkeypatch.setenv("WAN_DISABLE_PLUGINS", value)
        assert [name for name, _ in schedulers(plugin_manager())] == expected
    assert {offer.dist for offer in discover("wan_vaes", plugin_manager())} == {"wan-vae"}, "* keeps the first party"
    monkeypatch.setenv("WAN_DISABLE_PLUGINS", "wan-vae")
    assert discover("wan_vaes", plugin_manager()) == []


def test_a_name_offered_twice_needs_its_distribution(install: Install) -> None:
    install("wan-foo", SCHEDULER.format("euler"))
    pm = plugin_manager()
    with pytest.raises(LookupError, match="'euler' is offered twice: say 'wan-dit:euler' or 'wan-foo:euler', or set WAN_DISABLE_PLUGINS"):
        find("wan_schedulers", "euler", pm)
    assert find("wan_schedulers", "wan-foo:euler", pm).summary == ""
    assert find("wan_schedulers", "wan-dit:euler", pm).summary != ""
    assert find("wan_schedulers", "unipc", pm).name == "unipc", "others are not affected"


def test_import_strings_count_only_where_a_person_typed_them(acme: Path) -> None:
    pm = plugin_manager()
    assert type(find("wan_schedulers", "wan_dit.schedulers.euler:Euler", pm).load()).__name__ == "Euler"
    spec = find("wan_vaes", "acme_wan.parts:AcmeVAE", pm)
    assert (spec.name, spec.latent_space) == ("acme", "tiny-2"), "a class brings its spec, whichever package the spec is from"
    for ref in ("wan_dit.schedulers.euler:Euler", "os:system"):
        with pytest.raises(LookupError, match="is an import string; those are taken only from the command line"):
            find("wan_schedulers", ref, pm, typed=False)
    for ref in ("not_there:X", "wan_dit.schedulers.euler:Nope"):
        with pytest.raises(LookupError, match="cannot import scheduler"):
            find("wan_schedulers", ref, pm)


def test_a_name_is_a_name_whatever_stands_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pm = plugin_manager()
    (tmp_path / "tiny").symlink_to(PACKAGES / "wan-dit/src/wan_dit/weights/tiny")
    monkeypatch.chdir(tmp_path)
    assert find("wan_backbones", "tiny", pm).weights == "pkg:wan_dit/weights/tiny"
    assert find("wan_backbones", "./tiny", pm).weights == "./tiny"
    with pytest.raises(LookupError):
        find("wan_backbones", "./tiny", pm, typed=False)


def test_a_hub_id_is_read_from_the_hub_and_only_where_it_is_typed() -> None:
    for ref in ("org/repo", "hub:org/repo@main"):
        with pytest.raises(OSError, match="cannot fetch 'org/repo"):
            find("wan_backbones", ref)
        with pytest.raises(LookupError):
            find("wan_backbones", ref, typed=False)


@pytest.mark.parametrize("name", ["tiny", "unipc", "wan2.1", "umt5-xxl", "wan2.1-t2v-1.3b"])
def test_built_in_models_stay_whole_whatever_else_is_called_like_their_parts(install: Install, name: str) -> None:
    source = """
import wan_dit.plugin, wan_text.plugin, wan_vae.plugin
from dataclasses import replace
from wan_dit import hookimpl

def named(specs):
    return [replace(specs[0], name="{name}")]

@hookimpl
def wan_vaes(): return named(wan_vae.plugin.wan_vaes())
@hookimpl
def wan_text_encoders(): return named(wan_text.plugin.wan_text_encoders())
@hookimpl
def wan_backbones(): return named(wan_dit.plugin.wan_backbones())
@hookimpl
def wan_schedulers(): return named(wan_dit.plugin.wan_schedulers())
@hookimpl
def wan_models(): return named(wan_dit.plugin.wan_models())
"""
    install("wan-twin", source.replace("{name}", name))
    pm = plugin_manager()
    models = [offer.spec for offer in discover("wan_models", pm) if offer.dist == "wan-dit"]
    assert len(models) == len(wan_models())
    for model in models:
        for part, kind in PART_KINDS.items():
            dist, _, expected = getattr(model, part).partition(":")
            assert find(kind, getattr(model, part), pm, typed=False).name == expected
            assert dist in NAMES
    assert Pipeline(pm=pm).model in models


PACKAGED = [
    (offer.kind, offer.spec) for kind in PART_KINDS.values() for offer in discover(kind, plugin_manager())
    if offer.spec and (getattr(offer.spec, "weights", None) or "").startswith("pkg:")
]  # fmt: skip


@pytest.mark.parametrize(("kind", "spec"), PACKAGED, ids=[f"{kind}-{spec.name}" for kind, spec in PACKAGED])
def test_what_is_registered_is_what_the_weights_say(kind: str, spec: Any) -> None:
    assert replace(spec.at(spec.weights), name=spec.name, summary=spec.summary) == spec


def test_every_part_of_the_built_in_model_is_packaged() -> None:
    assert [(kind, spec.name) for kind, spec in PACKAGED] == [(kind, "tiny") for kind in PART_KINDS.values() if kind != "wan_schedulers"]


def test_a_model_says_which_package_its_part_needs_even_where_others_offer_some(acme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_DISABLE_PLUGINS", "wan-text")
    pm = plugin_manager()
    pm.unregister(name="wan-vae")
    for part, package in (("vae", "try: pip install wan-vae"), ("text_encoder", "wan-text is disabled by WAN_DISABLE_PLUGINS")):
        given = {"vae": "acme", "text_encoder": "acme"} | {part: None}
        with pytest.raises(LookupError, match=rf"no {part.replace('_', ' ')} named '.*:tiny' \(installed: .*acme.*{package}"):
            Pipeline(pm=pm, **given)


def test_an_unknown_name_is_answered_with_the_closest_and_what_to_install() -> None:
    with pytest.raises(
        LookupError, match=r"no vae named 'wan2.3' \(installed: .*, taew2_1, taew2_2, tiny, wan2.1, wan2.2; did you mean 'wan2.2'\?\)"
    ):
        find("wan_vaes", "wan2.3")
    for kind, package in (("wan_vaes", "wan-vae"), ("wan_text_encoders", "wan-text")):
        with pytest.raises(LookupError, match=rf"\(installed: none\); try: pip install {package}"):
            find(kind, "tiny", PluginManager())


def test_every_lookup_takes_its_own_manager() -> None:
    class Plugin:
        @hookimpl
        def wan_schedulers(self) -> list[SchedulerSpec]:
            return [SchedulerSpec("mine", "nowhere:X")]

    pm = PluginManager()
    pm.register(Plugin(), name="mine")
    assert [offer.name for offer in discover("wan_schedulers", pm)] == ["mine"]
    assert find("wan_schedulers", "mine", pm).target == "nowhere:X"
    with pytest.raises(LookupError, match="no scheduler named 'mine'"):
        find("wan_schedulers", "mine")


def test_a_hook_with_arguments_that_its_kind_does_not_have_is_refused(install: Install) -> None:
    install("wan-foo", "from wan_dit import hookimpl\n\n@hookimpl\ndef wan_schedulers(steps):\n    return []\n")
    with pytest.warns(RuntimeWarning, match="plugin 'wan-foo' failed .*steps"):
        plugin_manager()


def test_listing_and_package_roots_import_nothing_heavy(acme: Path) -> None:
    code = """
import json, sys
import wan_vae, wan_text, wan_dit, wan_train
from wan_dit.cli import main
main(["plugins", "--json"]), main(["models", "--json"]), main(["info", "tiny", "--json"])
heavy = "torch pydantic huggingface_hub numpy safetensors transformers av PIL tqdm".split()
print(json.dumps([name for name in heavy if name in sys.modules]), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(acme)}, capture_output=True, text=True, check=True
    )
    assert "acme_wan.parts:AcmeVAE" in done.stdout
    assert json.loads(done.stderr) == []


def test_every_kind_belongs_to_one_package_and_is_implemented() -> None:
    owned = {}
    for dist, module in NAMES.items():
        hooks = importlib.import_module(f"{module}.plugins").Hooks
        owned.update({name: dist for name in vars(hooks) if name.startswith("wan_")})
    assert owned == KINDS
    pm = plugin_manager()
    assert all(any(offer.spec for offer in discover(kind, pm)) for kind in KINDS)
    assert {name for name in vars(Hooks) if name.startswith("wan_")} == {kind for kind, owner in KINDS.items() if owner == "wan-dit"}


def test_one_entry_point_a_package_and_none_for_pytest() -> None:
    ours = [entry for entry in entry_points(group="wan") if entry.dist and entry.dist.name in NAMES]
    assert sorted(entry.name for entry in ours) == sorted(NAMES)
    assert not [entry for entry in entry_points(group="pytest11") if entry.dist and entry.dist.name in NAMES]


def test_conformance_kits_are_plain_classes() -> None:
    kits = {
        "wan_vae": ["VAEContract"],
        "wan_text": ["TextEncoderContract"],
        "wan_dit": ["SchedulerContract", "StepListContract", "BackboneContract", "CacheContract", "AttentionContract"],
    }
    for module, names in kits.items():
        for name in names:
            kit = getattr(importlib.import_module(f"{module}.testing"), name)
            assert {base.__module__.removesuffix("_speed") for base in kit.__mro__ if base is not object} == {f"{module}.testing"}
            assert any(method.startswith("test_") for method in vars(kit))


def test_package_roots_stay_small() -> None:
    for module in NAMES.values():
        root = importlib.import_module(module)
        assert len(root.__all__) <= 12
        assert set(root.__all__) <= set(dir(root))
        for name in root.__all__:
            assert getattr(root, name) is not None


def test_shared_code_is_the_same_everywhere() -> None:
    source = PACKAGES / "wan-vae/src/wan_vae/_shared"
    files = sorted(file.name for file in source.glob("*.py"))
    assert "discover.py" in files
    for copy in (PACKAGES / "wan-text/src/wan_text/_shared", PACKAGES / "wan-dit/src/wan_dit/_shared"):
        assert sorted(file.name for file in copy.glob("*.py")) == files
        assert filecmp.cmpfiles(source, copy, files, shallow=False)[0] == files
    assert not (PACKAGES / "wan-train/src/wan_train/_shared").exists()


@pytest.mark.parametrize(("dist", "module"), NAMES.items())
def test_packages_import_only_whom_they_may(dist: str, module: str) -> None:
    imported = {name for file in (PACKAGES / dist / "src").rglob("*.py") for name in imports(file)}
    assert imported & set(ARROWS) - {module} <= ARROWS[module]
    project = tomllib.loads((PACKAGES / dist / "pyproject.toml").read_text())["project"]
    required = {NAMES[name] for name in NAMES for line in project["dependencies"] if line.startswith(name)}
    assert required <= ARROWS[module]


def imports(file: Path) -> set[str]:
    """Top-level packages that a file imports, also by `import_module("...")`."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("import_module", "__import__"):
            names |= {str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)}
    return {name.partition(".")[0] for name in names}


def test_the_import_reader_sees_every_way_to_import(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("import wan_vae.x\nfrom wan_text import y\nfrom . import z\ndef f():\n    import_module('wan_train.a')\n")
    assert imports(file) == {"wan_vae", "wan_text", "wan_train"}


def test_the_built_in_vocabulary_is_that_of_its_training_captions() -> None:
    from wan_train.data.captions import WORDS

    model = find("wan_models", "tiny")
    assert {group: set(words) for group, words in model.extra["words"].items()} == {group: set(words) for group, words in WORDS.items()}
