"""What a store believes, keeps and refuses; one process."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from wan_train.store import Store, restore, training_state
from wan_train.store.failpoints import failpoint
from wan_train.store.manifest import folder_name
from wan_train.store.rng import restore_rng, rng_states
from wan_train.store.shards import Reader, read_whole, shapes
from wan_train.store.tree import fill, flatten

Damage = Callable[[Path], None]


def state(step: int) -> dict[str, Any]:
    return {"weight": torch.full((64, 64), float(step)), "values": {"step": step}}


def saved(folder: Path, *steps: int) -> Path:
    with Store(folder, keep=10) as store:
        for step in steps:
            store.save(step, state(step))
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_another_step(path: Path) -> None:
    path.write_text((path.parent.parent / folder_name(1) / path.name).read_text())


def changed(path: Path) -> None:
    path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 2'))


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        ("__0_0.distcp", flip, r"__0_0\.distcp' is damaged: its sha256 is"),
        (".metadata", flip, r"\.metadata' is damaged: its sha256 is"),
        ("values.json", flip, r"values\.json' is damaged"),
        ("__0_0.distcp", lambda path: os.truncate(path, 100), r"__0_0\.distcp' has 100 bytes, expected [\d,]+"),
        ("__0_0.distcp", Path.unlink, r"__0_0\.distcp' is missing"),
        ("rng-00000.json", Path.unlink, r"rng-00000\.json' is missing"),
        ("manifest.json", Path.unlink, r"step-00000002' has no manifest\.json: it was not finished"),
        ("manifest.json", of_another_step, r"manifest\.json' is of step 1, not of this folder"),
        ("manifest.json", changed, r"manifest\.json' is damaged: its checksum is"),
        ("manifest.json", lambda path: path.write_text("{"), r"manifest\.json' is not JSON"),
        ("manifest.json", lambda path: path.write_text("{}"), r"manifest\.json': step: Field required"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(tmp_path: Path, file: str, damage: Damage, told: str) -> None:
    saved(tmp_path, 1, 2)
    damage(tmp_path / folder_name(2) / file)
    into = state(0)
    with Store(tmp_path) as store:
        with pytest.warns(UserWarning, match=told):
            assert store.latest() == 1
        store.load(1, into)
        with pytest.raises(ValueError, match=told):
            store.load(2, into)
    assert into["values"] == {"step": 1}
    assert bool((into["weight"] == 1).all())


def test_no_checkpoint_is_none_and_one_that_is_being_written_is_not_looked_at(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / folder_name(1)).rename(tmp_path / "step-00000001.tmp-0123abcd")
    with (
        pytest.warns(UserWarning, match=r"step-00000001\.tmp-0123abcd' was not finished by a run that ended: deleted"),
        Store(tmp_path) as store,
    ):
        assert store.latest() is None
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_leftovers_of_a_live_run_stay(tmp_path: Path) -> None:
    with Store(tmp_path):
        (left := tmp_path / "step-00000001.tmp-0123abcd").mkdir()
        with pytest.raises(ValueError, match="is written to by another run"):
            Store(tmp_path)
        assert left.exists()


@pytest.mark.parametrize(
    ("keep", "every", "left"), [(2, None, [5, 6]), (1, None, [6]), (1, 2, [2, 4, 6]), (3, 5, [4, 5, 6]), (9, None, [1, 2, 3, 4, 5, 6])]
)
def test_retention(tmp_path: Path, keep: int, every: int | None, left: list[int]) -> None:
    with Store(tmp_path, keep, every) as store:
        for step in range(1, 7):
            store.save(step, state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", *map(folder_name, left)]


def test_retention_neither_counts_nor_deletes_what_is_damaged(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4)
    for step in (3, 4):
        (tmp_path / folder_name(step) / "manifest.json").unlink()
    with Store(tmp_path, keep=1) as store:
        store.prune()
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", *map(folder_name, (2, 3, 4))]
        with pytest.warns(UserWarning, match="it was not finished"):
            assert store.latest() == 2
        store.save(4, state(4), wait=True)
        assert store.latest() == 4, "a damaged one gives way to one that is whole"


def test_a_rollback_goes_past_the_newest(tmp_path: Path) -> None:
    with Store(saved(tmp_path, 10, 20, 30)) as store:
        assert (store.latest(), store.latest(before=30), store.latest(before=20), store.latest(before=10)) == (30, 20, 10, None)
        into = state(0)
        store.load(20, into)
        assert into["values"]["step"] == 20
        store.save(30, state(31), wait=True)  # the course that was rolled back is replaced
        store.load(30, into)
        assert into["values"]["step"] == 31


@pytest.mark.parametrize(
    ("into", "told"),
    [
        ({"weight": torch.zeros(64, 63)}, r"holds 'weight' as \[64, 64\], the run has \[64, 63\]"),
        ({"weights": torch.zeros(64, 64)}, r"has no 'weights': it is of other parts"),
        ({"values": {"epoch": 0}}, r"has no value 'values/epoch'"),
    ],
)
def test_a_checkpoint_of_other_settings_is_told(tmp_path: Path, into: dict[str, Any], told: str) -> None:
    with Store(saved(tmp_path, 1)) as store, pytest.raises(ValueError, match=told):
        store.load(1, into)


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, 1j, b"bytes", torch.float32, [object()]], ids=["object", "set", "complex", "bytes", "dtype", "list of one"]
)
def test_what_is_neither_tensor_nor_plain_is_refused_before_anything_is_written(tmp_path: Path, value: Any) -> None:
    with Store(tmp_path) as store, pytest.raises(ValueError, match="at 'inner/odd': give tensors, numbers, strings"):
        store.save(1, {"inner": {"odd": value}})
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=4)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first draw makes tables of characters
@given(st.dictionaries(KEYS, st.recursive(PLAIN | st.lists(PLAIN), lambda inner: st.dictionaries(KEYS, inner), max_leaves=8)))
def test_plain_values_come_back_exactly(values: dict[str, Any]) -> None:
    def blank(value: Any) -> Any:
        return {key: blank(inner) for key, inner in value.items()} if isinstance(value, dict) else None

    into = blank(values)
    fill(into, json.loads(json.dumps(flatten(values)[1])))
    assert into == values


def test_lists_with_tensors_are_gone_into_and_keys_that_collide_are_told() -> None:
    tensors, values = flatten({"groups": [{"lr": 0.1, "betas": (0.9, 0.99), "step": torch.ones(())}, {"lr": 0.2}], "list": [1, [2]]})
    assert list(tensors) == ["groups/0/step"]
    assert values == {"groups/0/lr": 0.1, "groups/0/betas": (0.9, 0.99), "groups/1/lr": 0.2, "list": [1, [2]]}
    into: dict[str, Any] = {"groups": [{"betas": (0.0, 0.0)}]}
    fill(into, {"groups/0/betas": [0.9, 0.99]})
    assert into == {"groups": [{"betas": (0.9, 0.99)}]}
    with pytest.raises(ValueError, match="'a/b' twice"):
        flatten({"a": {"b": 1}, "a/b": 2})


def test_two_optimisers_views_and_modules_without_gradients_are_resumed_by_name(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[dict[str, nn.Module], list[Any], list[Any]]:
        torch.manual_seed(seed)
        modules: dict[str, nn.Module] = {"conv": nn.Conv2d(2, 3, 2), "unused": nn.Linear(2, 2)}
        weight = modules["conv"].weight
        matrix = weight.detach().view(3, -1)
        rest = [modules["conv"].bias, *modules["unused"].parameters()]
        return modules, [torch.optim.Muon([matrix], 0.1), torch.optim.AdamW(rest, 0.1)], [(weight, matrix)]

    def step(modules: dict[str, nn.Module], optimisers: list[Any], views: list[Any]) -> None:
        modules["conv"](torch.ones(1, 2, 4, 4)).square().sum().backward()
        views[0][1].grad = views[0][0].grad.flatten(1)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        modules.get("conv").zero_grad()

    run, again, untouched = made(0), made(1), made(0)
    with Store(tmp_path) as store:
        first = training_state(run[0], run[1], views=run[2])  # gives the optimisers their states, and changes no step that follows
        assert all(not bool(value.any()) for each in first["optimisers"] for inner in each["state"].values() for value in inner.values())
        for each in (run, untouched):
            step(*each)
        for one, other in zip(run[0]["conv"].parameters(), untouched[0]["conv"].parameters(), strict=True):
            assert torch.equal(one, other), "asking for the state changed the step"
        store.save(1, training_state(run[0], run[1], views=run[2], values={"rate": 0.5}), wait=True)
        store.load(1, into := training_state(again[0], again[1], views=again[2], values={"rate": 0.0}))
        assert restore(into, again[1]) == {"rate": 0.5}
        assert "optimisers/0/state/conv.weight/momentum_buffer" in shapes(tmp_path / folder_name(1))
    for each in (run, again):
        step(*each)
    for name in run[0]:
        for one, other in zip(run[0][name].parameters(), again[0][name].parameters(), strict=True):
            assert torch.equal(one, other)


def test_an_optimiser_over_what_no_module_has_is_told() -> None:
    with pytest.raises(ValueError, match=r"holds a tensor \[4\] that is of none of the modules"):
        training_state({"linear": nn.Linear(2, 2)}, [torch.optim.AdamW([nn.Parameter(torch.zeros(4))])])


def test_random_generators_go_on(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draws() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn()

    with Store(tmp_path) as store:
        store.save(1, {}, wait=True)
        expected = draws()
        assert store.restore_rng(1)
        assert draws() == expected
    states = json.loads(json.dumps(rng_states()))
    expected = draws()
    restore_rng(states)
    assert draws() == expected


def test_metadata_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"holds (posix|nt)\.mkdir, which is none of DCP's"):
        Reader(tmp_path).read_metadata()
    assert not (tmp_path / "ran").exists()


def test_whole_tensors_of_any_type_are_read_by_prefix(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool)
    given_state = {"a": {str(kind): torch.ones(3, dtype=kind) for kind in kinds}, "b": torch.zeros(2)}
    with Store(tmp_path) as store:
        store.save(7, given_state, wait=True)
    read = read_whole(tmp_path / folder_name(7), "a/")
    assert {key: value.dtype for key, value in read.items()} == {str(kind): kind for kind in kinds}
    assert all(bool(value.all()) for value in read.values())


def test_failpoints_do_nothing_unless_asked_for_and_their_names_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WAN_TRAIN_FAILPOINT", raising=False)
    failpoint("shard")
    for wrong in ("nowhere", "shard:often"):
        monkeypatch.setenv("WAN_TRAIN_FAILPOINT", wrong)
        with pytest.raises(ValueError, match="give one of staged, shard,"):
            failpoint("shard")


@pytest.mark.parametrize("settings", [{"keep": 0}, {"keep_every": 0}])
def test_settings_that_would_delete_all_are_refused(tmp_path: Path, settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Store(tmp_path, **settings)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Store(tmp_path / "file" / "run")
