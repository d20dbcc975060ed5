"""Whole models on disk: official release folders, diffusers pipeline folders and ComfyUI `models/` trees, told apart and opened.

Which model it is, and so its task and default settings, comes from the backbone's shapes; where those fit several models
(Wan2.1 I2V at 480p and 720p; T2V-14B and one expert of Wan2.2) from the names of folders and files. Nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._shared.files import read_json
from ._shared.weights import PICKLES
from .checkpoint import config_of, weights_folder
from .config import DiTConfig
from .plugins import VideoModelSpec, find
from .recognition import choose, fits, installed
from .schedulers.diffusers import config_differences

if TYPE_CHECKING:
    import pluggy

EXPERT_WORD = re.compile(r"(?<![a-z])(high|low)(?=[_-]?noise|[^a-z]|$)", re.IGNORECASE)
WEIGHTS = (".safetensors", ".gguf", *PICKLES)
EXPERTS = ("high_noise_model", "low_noise_model")  # folders of an official release
COMFY = {  # part -> folders of a ComfyUI tree, newer name first
    "backbone": ("diffusion_models", "unet"),
    "vae": ("vae",),
    "text_encoder": ("text_encoders", "clip"),
    "image_encoder": ("clip_vision",),
}
KINDS = {"vae": "wan_vaes", "text_encoder": "wan_text_encoders", "image_encoder": "wan_image_encoders"}


@dataclass(frozen=True)
class FoundModel:
    """A model found at a path.

    model: its task and default settings, those of an installed model
    parts: `backbone`, `low_noise_backbone`, `vae`, `text_encoder`, `image_encoder` -> file or folder; those that were found
    notes: what was found where, and what was not, a line each
    """

    model: VideoModelSpec
    parts: dict[str, str]
    notes: list[str]


@dataclass
class _Tree:
    """The files of a model before it is known which one it is."""

    root: Path
    kind: str
    parts: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    candidates: dict[str, list[Path]] = field(default_factory=dict)  # of a ComfyUI tree, which may hold many
    boundary: float | None = None
    scheduler: dict[str, Any] | None = None  # scheduler_config.json


def open_model(path: Path, preset: str | None, pm: pluggy.PluginManager, *, given: Collection[str] = ()) -> FoundModel:
    """What a folder, or the backbone's file in a ComfyUI tree, holds; reads configurations and headers alone.

    preset: the installed model whose task and settings it is used with; None tells it by shapes and names
    given: parts that are not looked for, since the caller has others
    Raises ValueError where there is no model, half of one, or several that fit: it lists them and says how to choose.
    """
    tree = _tree(path.resolve(), preset, pm)
    backbone = tree.parts["backbone"]
    config = config_of(weights_folder(backbone), None)
    low = tree.parts.get("low_noise_backbone")
    if low and (other := config_of(weights_folder(low), None)) != config:
        raise ValueError(f"'{backbone}' and '{low}' are experts of different models: {_difference(config, other)}")
    # the names of the folder, of its repository in the Hub's cache, and of the file
    names = [
        tree.root.name,
        *(name for name in tree.root.parts if name.startswith("models--")),
        *([backbone.stem] if backbone.is_file() else []),
    ]
    model = choose(backbone, config, paired=low is not None, names=names, preset=preset, pm=pm)
    for part in [part for part in tree.candidates if part not in given and _wants(model, part)]:
        tree.parts |= _one_of(part, model, tree, pm)
    parts = {part: str(found) for part, found in tree.parts.items() if part not in given and _wants(model, part)}
    notes = [f"model: {tree.kind}, used with the settings of {model.name}", *(f"{part}: {where}" for part, where in parts.items())]
    missing = [part for part in ("vae", "text_encoder", "image_encoder") if _wants(model, part) and part not in (*parts, *given)]
    notes += [f"{part}: none in '{tree.root}', the model's own is used ({getattr(model, part)})" for part in missing]
    if tree.scheduler:
        name = model.scheduler.rpartition(":")[2]
        notes += [f"scheduler: {line}" for line in config_differences(tree.scheduler, scheduler=name, shift=model.shift)]
    if tree.boundary is not None and model.low_noise_backbone and tree.boundary != model.boundary:
        notes.append(f"boundary: {tree.boundary:g} of model_index.json is used, the model's official one is {model.boundary:g}")
        model = replace(model, boundary=tree.boundary)
    return FoundModel(model, parts, [*notes, *tree.notes])


def _wants(model: VideoModelSpec, part: str) -> bool:
    return part not in ("image_encoder", "low_noise_backbone") or getattr(model, part) is not None


def _difference(config: DiTConfig, other: DiTConfig) -> str:
    names = [name for name in DiTConfig.model_fields if getattr(config, name) != getattr(other, name)]
    return ", ".join(f"{name} {getattr(config, name)} and {getattr(other, name)}" for name in names)


def _tree(path: Path, preset: str | None, pm: pluggy.PluginManager) -> _Tree:
    """Which kind of folder it is, and the files of its parts."""
    if not path.exists():
        raise FileNotFoundError(f"no model at '{path}'")
    if path.is_file():
        above = next((folder for folder in path.parents if folder.name in COMFY["backbone"]), None)
        return _comfy(above.parent, path, preset, pm) if above else _Tree(path.parent, "one file", {"backbone": path})
    if (path / "model_index.json").is_file():
        return _diffusers(path)
    for root in (path, path / "models"):
        if any((root / name).is_dir() for name in COMFY["backbone"]):
            return _comfy(root, None, preset, pm)
    if any((path / name).is_dir() for name in EXPERTS):
        if missing := [name for name in EXPERTS if not (path / name).is_dir()]:
            raise ValueError(f"'{path}' holds one expert of two: '{missing[0]}' is missing; fetch it, both are used in every run")
        return _official(path, {"backbone": path / EXPERTS[0], "low_noise_backbone": path / EXPERTS[1]})
    if (path / "config.json").is_file() or any(path.glob("*.safetensors")):
        return _official(path, {"backbone": path})
    raise ValueError(
        f"'{path}' is no model: expected an official release (config.json or {EXPERTS[0]}/), a diffusers pipeline (model_index.json) "
        f"or a ComfyUI tree ({COMFY['backbone'][0]}/)"
    )


def _official(path: Path, parts: dict[str, Path]) -> _Tree:
    tree = _Tree(path, "an official release", parts)
    if vae := next(iter(sorted(path.glob("Wan2.*_VAE.*"))), None):
        tree.parts["vae"] = vae
    if any(path.glob("models_t5_*")):
        tree.parts["text_encoder"] = path  # wan-text finds the weights and their tokenizer in it
        if not any(path.glob("google/*/spiece.model")):
            tree.notes.append(f"text_encoder: its tokenizer 'google/umt5-xxl/spiece.model' is missing in '{path}'")
    if clip := next(iter(sorted(path.glob("models_clip_*"))), None):
        tree.parts["image_encoder"] = clip
    return tree


def _diffusers(path: Path) -> _Tree:
    index = read_json(path / "model_index.json")
    tree = _Tree(path, f"a diffusers pipeline ({index.get('_class_name', 'of no class')})", boundary=index.get("boundary_ratio"))
    folders = {
        "backbone": "transformer",
        "low_noise_backbone": "transformer_2",
        "vae": "vae",
        "text_encoder": "text_encoder",
        "image_encoder": "image_encoder",
    }
    for part, name in folders.items():
        listed = name in index and index[name] not in (None, [None, None])
        if (path / name).is_dir():
            tree.parts[part] = path / name
        elif part.endswith("backbone") and (listed or part == "backbone"):
            raise ValueError(f"'{path}' is incomplete: its '{name}' folder is missing; fetch it again")
        elif listed:
            tree.notes.append(f"{part}: model_index.json lists '{name}', which is missing")
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        tree.scheduler = read_json(scheduler)
    return tree


def _comfy(root: Path, backbone: Path | None, preset: str | None, pm: pluggy.PluginManager) -> _Tree:
    """The backbone that was named, or the only one; a pair of experts is told by `high_noise` and `low_noise` in their names."""
    tree = _Tree(root, "a ComfyUI tree", candidates={part: _files(root, COMFY[part]) for part in KINDS})
    files = _files(root, COMFY["backbone"])
    if backbone is None:
        configs = {file: config for file in files if (config := _config(file))}
        if preset is not None:
            configs = {file: config for file, config in configs.items() if fits(find("wan_models", preset, pm), config, pm)}
        files = list(configs)
    else:
        files = [file for file in files if file == backbone or (_pair(file, root) == _pair(backbone, root))]
    groups: dict[str, list[Path]] = {}
    for file in sorted(files, key=lambda file: _expert(file, root)):  # high before low
        groups.setdefault(_pair(file, root), []).append(file)
    choices = list(groups.values())
    if not choices:
        raise ValueError(f"no Wan backbone{f' that fits {preset}' if preset else ''} in '{root / COMFY['backbone'][0]}'")
    if len(choices) > 1:
        listed = ", ".join(f"'{choice[0].relative_to(root)}'" for choice in choices)
        raise ValueError(f"'{root}' holds several models: give one of these files in its place: {listed}")
    if preset is None and len(choices[0]) == 1 and (word := _expert(choices[0][0], root)):
        other = "low" if word == "high" else "high"
        raise ValueError(
            f"'{choices[0][0]}' is one expert of two, the {other}-noise one is missing in '{root}': both are used in every run"
        )
    tree.parts = dict(zip(("backbone", "low_noise_backbone"), choices[0], strict=False))
    return tree


def _files(root: Path, folders: Iterable[str]) -> list[Path]:
    return sorted(file for name in folders for file in (root / name).rglob("*") if file.suffix in WEIGHTS and file.is_file())


def _config(file: Path) -> DiTConfig | None:
    """The configuration of a backbone, None for what is none."""
    try:
        return config_of(file, None)
    except (ValueError, OSError):
        return None


def _expert(file: Path, root: Path) -> str:
    """`high` or `low` where the name of a file says so, else nothing."""
    found = EXPERT_WORD.search(file.relative_to(root).as_posix())
    return found[0].lower() if found else ""


def _pair(file: Path, root: Path) -> str:
    """The name without `high` and `low`: the files of two experts differ in that alone."""
    return EXPERT_WORD.sub("*", file.relative_to(root).as_posix())


def _one_of(part: str, model: VideoModelSpec, tree: _Tree, pm: pluggy.PluginManager) -> dict[str, Path]:
    """The file of a ComfyUI tree that holds a part which fits the model, where there is exactly one."""
    files, fitting = tree.candidates[part], []
    own = installed(KINDS[part], getattr(model, part), pm)
    for file in files:
        try:
            spec = find(KINDS[part], str(file), pm)
        except (ValueError, LookupError, OSError) as error:
            tree.notes.append(f"{part}: '{file.relative_to(tree.root)}' is left out: {error}")
            continue
        same = ("target", *(name for name in ("latent_space", "embedding_space", "image_space") if hasattr(own, name)))
        if own is None or all(getattr(spec, name) == getattr(own, name) for name in same):
            fitting.append(file)
    if len(fitting) > 1:
        listed = ", ".join(f"'{file.relative_to(tree.root)}'" for file in fitting)
        raise ValueError(f"'{tree.root}' holds several for {part.replace('_', ' ')}: say which with --{part.replace('_', '-')}: {listed}")
    return {part: fitting[0]} if fitting else {}
