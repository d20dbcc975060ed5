"""What the processes of the sharding tests run; a module of its own, which a forked server can import."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from wan_vae.config import VAEConfig
from wan_vae.model import WanVAE
from wan_vae.sharding import RowShard, decode_sharded, encode_sharded
from wan_vae.testing import randomise


def make(config: VAEConfig) -> WanVAE:
    """The same weights in every process."""
    vae = WanVAE(config).eval()
    randomise(vae)
    vae.backend = "direct"
    return vae


def chunked(x: torch.Tensor, size: int) -> list[torch.Tensor]:
    """One frame, then `size` at a time."""
    return list(x.split([1, *[size] * ((x.shape[2] - 1) // size)], dim=2))


def join(rank: int, size: int, store: str) -> None:
    """Form the group; nobody waits longer than half a minute."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=30))


def work(rank: int, size: int, store: str, config: dict[str, Any], video: torch.Tensor, latents: torch.Tensor, out: Any) -> None:
    """Encode and decode, and put the results, or what went wrong, into the queue."""
    try:
        join(rank, size, store)
        vae = make(VAEConfig(**config))
        encoded = torch.cat(list(encode_sharded(vae, chunked(video, vae.spec.stride[0]))), dim=2)
        decoded = torch.cat(list(decode_sharded(vae, chunked(latents, 1))), dim=2)
        out.put((rank, encoded.numpy(), decoded.numpy()))
    except Exception as error:
        out.put((rank, type(error).__name__, str(error)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rows(rank: int, size: int, store: str, parts: list[int], above: int, below: int, out: Any) -> None:
    """Extend, gather and own on a picture whose rows are numbered from 1."""
    try:
        join(rank, size, store)
        picture = torch.arange(1.0, sum(parts) + 1).view(1, 1, 1, -1, 1)
        shard = RowShard(None, parts)
        own = shard.own(picture)
        out.put((rank, shard.extend(own, above, below).flatten().tolist(), torch.equal(shard.gather(own), picture)))
    except Exception as error:
        out.put((rank, type(error).__name__, str(error)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
