"""A third-party VAE for tests: it moves pixels into channels and back, so that what a codec does around it can be seen exactly."""

from __future__ import annotations

import time

import torch
from einops import rearrange
from wan_vae import VAESpec

T, S = 4, 8


class ShuffleVAE:
    spec = VAESpec("shuffle", "shuffle_vae:ShuffleVAE", latent_space="shuffle-1", latent_channels=3 * T * S * S, stride=(T, S, S))

    def encode_stream(self, chunks):
        for index, chunk in enumerate(chunks):
            video = chunk if index else chunk.repeat(1, 1, T, 1, 1)
            yield rearrange(video, "b c (t p) (h q) (w r) -> b (c p q r) t h w", p=T, q=S, r=S)

    def decode_stream(self, chunks):
        for index, chunk in enumerate(chunks):
            video = rearrange(chunk.float(), "b (c p q r) t h w -> b c (t p) (h q) (w r)", p=T, q=S, r=S)
            yield video if index else video[:, :, T - 1 :]

    def encode(self, video):
        return torch.cat(list(self.encode_stream([video[:, :, :1], *video[:, :, 1:].split(T, dim=2)])), dim=2)

    def decode(self, latents, *, generator=None):
        return torch.cat(list(self.decode_stream(latents.split(1, dim=2))), dim=2)


class StoppingVAE(ShuffleVAE):
    """Calls `stop` before the third chunk is handed out."""

    def __init__(self, stop):
        self.stop = stop

    def encode_stream(self, chunks):
        yield from self._until_third(super().encode_stream(chunks))

    def decode_stream(self, chunks):
        yield from self._until_third(super().decode_stream(chunks))

    def _until_third(self, chunks):
        for index, chunk in enumerate(chunks):
            if index == 2:
                self.stop()
            yield chunk


class UncertainVAE(ShuffleVAE):
    """Gives a log-variance in its sessions: minus the square of its latents."""

    backend = "shuffled"

    def encode_session(self):
        return UncertainSession()


class UncertainSession:
    def __init__(self):
        self.started = False

    def push(self, video, *, moments=False):
        before = [video[:, :, :1]] if self.started else []
        self.started = True
        latents = list(ShuffleVAE().encode_stream([*before, video]))[-1]
        return (latents, -latents.square()) if moments else latents


def stuck_vae():
    """A VAE that says so and waits, for a process that is killed while it writes."""

    def stop():
        print("stuck", flush=True)
        time.sleep(60)

    return StoppingVAE(stop)


stuck_vae.spec = VAESpec("stuck", "shuffle_vae:stuck_vae", latent_space="shuffle-1", latent_channels=3 * T * S * S, stride=(T, S, S))
