"""The stream of samples: each once an epoch, the same for any number of processes, in micro-batches within the budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wan_train.data.buckets import Bucket, Budget, Info, cost
from wan_train.data.mix import Group, Mix, shares
from wan_train.data.permutation import Permutation
from wan_train.data.sampler import Micro, Position, Sampler, share

IMAGE, SHORT, LONG = Bucket(1, 64, 64), Bucket(5, 64, 64), Bucket(17, 64, 96)
SHAPES = (IMAGE, SHORT, LONG)


def bucket_of(sample: int) -> Bucket:
    return SHAPES[sample * 7 % 11 % 3]


def sampler(count: int = 100, weight: float = 1.0, **options: Any) -> Sampler:
    options = {"batch_size": 8, **options}
    if options.get("micro_batches"):
        del options["batch_size"]
    return Sampler([Group("a", np.arange(count), weight)], bucket_of, Budget(tokens=128), **options)


def walk(made: Sampler, steps: int) -> tuple[list[list[Micro]], list[Position]]:
    position = Position()
    found, positions = list[list[Micro]](), [position]
    for _ in range(steps):
        micros, position = made.step(position)
        found.append(micros)
        positions.append(position)
    return found, positions


def samples(micros: Sequence[Micro]) -> list[int]:
    return [sample for micro in micros for sample in micro.samples]


def stream(made: Sampler, epochs: int) -> list[list[int]]:
    """The samples of whole epochs, one list an epoch."""
    position, taken = Position(), list[int]()
    while len(taken) < epochs * len(made):
        micros, position = made.step(position)
        taken += samples(micros)
    return [taken[i * len(made) : (i + 1) * len(made)] for i in range(epochs)]


@given(st.integers(0, 3000), st.integers(0, 2**40), st.integers(0, 9))
def test_a_permutation_has_every_number_once(count: int, seed: int, epoch: int) -> None:
    shuffled = Permutation(count, seed, epoch, 0, "x")[np.arange(count)]
    assert np.array_equal(np.sort(shuffled), np.arange(count))


def test_permutations_are_uniform_and_differ_by_every_field() -> None:
    seen = Counter(tuple(Permutation(4, 0, epoch, 0, "x")[np.arange(4)].tolist()) for epoch in range(4800))
    assert len(seen) == 24
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 60  # chi squared of 23 degrees of freedom: p < 5e-5
    made = [
        Permutation(1000, *key)[np.arange(1000)] for key in ((0, 0, 0, "x"), (1, 0, 0, "x"), (0, 1, 0, "x"), (0, 0, 1, "x"), (0, 0, 0, "y"))
    ]
    same = [float((a == b).mean()) for i, a in enumerate(made) for b in made[:i]]
    assert max(same) < 0.01
    assert abs(np.corrcoef(made[0], np.arange(1000))[0, 1]) < 0.15


def test_a_permutation_is_golden_and_needs_no_list_of_billions() -> None:
    assert Permutation(10, 0, 0, 0, "x")[np.arange(10)].tolist() == [0, 2, 3, 7, 6, 9, 1, 8, 5, 4]
    assert int(Permutation(10**12, 7, 1, 2, "pass")[10**11]) == 890607716555
    with pytest.raises(IndexError, match="0 to 9"):
        Permutation(10, 0, 0, 0, "x")[10]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 400),
    st.integers(1, 40),
    st.integers(0, 2**30),
    st.sampled_from([1, 7, 64, 8192]),
    st.sampled_from(["samples", "micros"]),
)
def test_every_sample_comes_exactly_once_an_epoch(count: int, size: int, seed: int, window: int, kind: str) -> None:
    options = {"batch_size": size} if kind == "samples" else {"micro_batches": size}
    made = sampler(count, seed=seed, window=window, **options)
    epochs = stream(made, 3)
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 20:
        assert epochs[0] != epochs[1] != epochs[2]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 30), st.integers(0, 99), st.integers(0, 299))
def test_micro_batches_are_of_one_shape_and_within_the_budget(count: int, size: int, seed: int, index: int) -> None:
    budget = Budget(tokens=128)
    for micro in sampler(count, batch_size=size, seed=seed).step(Position(0, index % count))[0]:
        assert {bucket_of(sample) for sample in micro.samples} == {micro.bucket}
        assert 1 <= len(micro.samples) <= budget(micro.bucket)


@settings(deadline=None, max_examples=40)
@given(st.integers(30, 300), st.integers(1, 30), st.integers(0, 20))
def test_a_step_is_a_function_of_its_position_alone(count: int, size: int, steps: int) -> None:
    found, positions = walk(sampler(count, batch_size=size, window=50), steps)
    again = sampler(count, batch_size=size, window=50)
    for at in reversed(range(steps)):
        assert again.step(positions[at]) == (found[at], positions[at + 1])
    assert all(len(samples(micros)) == size for micros in found)
    assert all(a < b for a, b in pairwise(positions))


def test_another_step_size_takes_up_where_the_first_one_stopped() -> None:
    one, other = sampler(200, batch_size=8), sampler(200, batch_size=5)
    first, positions = walk(one, 10)
    position, rest = positions[-1], list[int]()
    while len(rest) < 120:
        micros, position = other.step(position)
        rest += samples(micros)
    assert sorted([s for micros in first for s in samples(micros)] + rest) == list(range(200))


def test_resuming_on_4_then_2_then_3_ranks_leaves_the_global_stream_as_it_is() -> None:
    made = sampler(500, batch_size=24)
    alone = [sorted(samples(micros)) for micros in walk(made, 20)[0]]
    position, together = Position(), list[list[int]]()
    for ranks, steps in ((4, 7), (2, 5), (3, 8)):
        made = sampler(500, batch_size=24)  # a new process, which has the position alone
        for _ in range(steps):
            micros, position = made.step(position)
            together.append(sorted(sample for rank in range(ranks) for sample in samples(share(micros, rank, ranks))))
    assert together == alone
    assert len({sample for step in together for sample in step}) == 480  # of one epoch: none twice


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(SHAPES), st.integers(1, 12)), min_size=1, max_size=12),
    st.integers(1, 9),
)
def test_shares_have_every_sample_once_and_are_balanced(sizes: list[tuple[Bucket, int]], ranks: int) -> None:
    micros, start = [], 0
    for bucket, size in sizes:
        micros.append(Micro(bucket, tuple(range(start, start + size))))
        start += size
    given_ = [share(micros, rank, ranks) for rank in range(ranks)]
    assert sorted(sample for part in given_ for sample in samples(part)) == list(range(start))
    if start >= ranks:
        assert all(given_)
    loads = [sum(cost(micro.bucket) * len(micro.samples) for micro in part) for part in given_]
    largest = max(cost(micro.bucket) * len(micro.samples) for part in given_ for micro in part)
    assert max(loads) - min(loads) <= largest + 1e-9  # the bound of giving each to the one that has least


def test_a_share_outside_the_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 4 of 4"):
        share([], 4, 4)


def test_weights_take_samples_as_often_as_they_say_and_halves_in_turn() -> None:
    groups = [Group("a", np.arange(60), 0.5), Group("b", np.arange(60, 80), 2.0), Group("c", np.arange(80, 90), 0.0)]
    made = Sampler(groups, bucket_of, Budget(tokens=128), batch_size=7)
    assert len(made) == 30 + 40
    first, second = (Counter(epoch) for epoch in stream(made, 2))
    assert set(first.values()) == {1, 2}
    assert {s for s, n in first.items() if n == 2} == set(range(60, 80))
    assert {s for s in first if s < 60} | {s for s in second if s < 60} == set(range(60))
    assert not any(s >= 80 for s in first + second)


def test_a_repeated_sample_is_not_twice_in_a_step() -> None:
    made = Sampler([Group("a", np.arange(12), 5.0)], lambda sample: IMAGE, Budget(tokens=16), batch_size=4)
    for micros in walk(made, 15)[0]:
        assert len(set(samples(micros))) == 4


def test_stages_and_seeds_have_orders_of_their_own() -> None:
    orders = [samples(made.step(Position())[0]) for made in (sampler(), sampler(seed=1), sampler(stage="480px"), sampler())]
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_full_micro_batches_in_a_large_window() -> None:
    made, budget = sampler(20_000, micro_batches=50), Budget(tokens=128)
    micros = [micro for step in walk(made, 20)[0] for micro in step]
    assert sum(len(micro.samples) / budget(micro.bucket) for micro in micros) / len(micros) > 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size or micro_batches"),
        ({"batch_size": -1}, "batch_size or micro_batches"),
        ({"window": 0}, "window"),
        ({"weight": 0.0}, "no sample to draw"),
        ({"weight": -1.0}, "0 or more"),
        ({"weight": float("nan")}, "0 or more"),
    ],
)
def test_settings_that_draw_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(**options)


def test_a_position_outside_the_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="an epoch has 100 samples"):
        sampler().step(Position(0, 100))


class Rows:
    """A data set of pictures (odd samples) and films."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def info(self, index: int) -> Info:
        return Info(1 if index % 2 else 81, 64, 64, 16)

    def captions(self, index: int) -> list[str]:
        return [f"{self.count}: {index}"]

    def key(self) -> str:
        return f"rows {self.count}"


def test_a_mix_is_its_data_sets_in_turn() -> None:
    mix = Mix({"web": Rows(10), "films": Rows(6)})
    assert len(mix) == 16
    assert [mix.captions(i)[0] for i in (0, 9, 10, 15)] == ["10: 0", "10: 9", "6: 0", "6: 5"]
    assert mix.identity(10) == "rows 6 0"  # whatever the mix
    assert [mix.captions(i)[0] for i in (16, 17, 18)] == ["10: 10", "6: 6", "10: 11"], "those that are never trained on, in turn"
    with pytest.raises(IndexError, match="16"):
        mix.captions(-1)


def test_weights_of_a_mix_multiply_by_source_and_kind() -> None:
    mix = Mix({"web": Rows(10), "films": Rows(6)})
    groups = mix.groups({"image": 0.5, "films": 2, "films/video": 3})
    assert {group.name: (group.weight, group.samples.tolist()) for group in groups} == {
        "web/image": (0.5, [1, 3, 5, 7, 9]),
        "web/video": (1.0, [0, 2, 4, 6, 8]),
        "films/image": (1.0, [11, 13, 15]),
        "films/video": (6.0, [10, 12, 14]),
    }
    with pytest.raises(ValueError, match=r"weights of film,.*films/video"):
        mix.groups({"film": 2})


def test_wanted_shares_become_the_shares_that_are_drawn() -> None:
    groups = shares(
        Mix({"web": Rows(200), "films": Rows(100)}).groups(), {"web/image": 4, "web/video": 1, "films/image": 0, "films/video": 5}
    )
    made = Sampler(groups, lambda sample: IMAGE, Budget(tokens=128), batch_size=10)
    drawn = Counter((sample >= 200, sample % 2) for sample in stream(made, 1)[0])
    assert drawn == {(False, 1): 120, (False, 0): 30, (True, 0): 150}
    with pytest.raises(ValueError, match="shares are of web/image"):
        shares(groups, {"web/image": 1})
