"""From a launcher to a mesh, and what is refused before any process waits for another."""

from __future__ import annotations

import pytest
import torch
from wan_dit.config import T2V_1_3B, TINY
from wan_dit.model import Trunk
from wan_dit.parallel import CfgParallel, init_parallel, parallelize, sequence_parallel


class Group:
    """A process group, as far as its size goes."""

    def __init__(self, size: int) -> None:
        self.size = lambda: size


def test_without_a_launcher_the_way_to_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(ValueError, match=r"RANK, WORLD_SIZE.* not set: .*torchrun --nproc-per-node"),
        init_parallel(ulysses=2, device="cpu"),
    ):
        pass


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"ulysses": 2}, r"4 processes, but ulysses 2 x ring 1 needs 2"),
        ({"ulysses": 2, "ring": 2, "cfg_parallel": True}, r"ulysses 2 x ring 2 x 2 for guidance needs 8"),
        ({"ulysses": 0}, r"at least 1, got ulysses 0"),
    ],
)
def test_degrees_that_do_not_multiply_to_the_processes_are_refused(
    degrees: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), init_parallel(**degrees, device="cpu"):
        pass


def test_heads_that_do_not_divide_are_refused_before_anything_is_changed() -> None:
    with torch.device("meta"):
        trunk = Trunk(T2V_1_3B.model_copy(update={"num_layers": 1}))
    attend = trunk.blocks[0].self_attn.attend
    with pytest.raises(ValueError, match=r"12 attention heads do not divide by a Ulysses degree of 8: use 2, 3, 4, 6, 12, and a ring"):
        sequence_parallel(trunk, ulysses=Group(8))
    assert trunk.blocks[0].self_attn.attend is attend
    assert not trunk._forward_pre_hooks


def test_one_process_stays_as_it_is() -> None:
    trunk = Trunk(TINY)
    attend = trunk.blocks[0].self_attn.attend
    sequence_parallel(trunk, ulysses=Group(1), ring=Group(1))
    sequence_parallel(trunk)
    assert trunk.blocks[0].self_attn.attend is attend
    assert not trunk._forward_pre_hooks


def test_guidance_takes_two_processes() -> None:
    with pytest.raises(ValueError, match="group of 2 processes, got one of 4"):
        CfgParallel(Group(4))


def test_a_backbone_without_a_trunk_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no `trunk` of blocks"):
        parallelize(torch.nn.Linear(2, 2), mesh=None)
