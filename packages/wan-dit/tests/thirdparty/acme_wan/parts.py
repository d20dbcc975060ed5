import torch
from torch import nn

from .plugin import TEXT, VAE, WIDE


class AcmeVAE(nn.Module):
    """Three latent channels are the picture, enlarged; the top left pixel is white on black, so that it can be recognised."""

    spec = VAE

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def decode(self, latents, *, generator=None):
        time, height, width = self.spec.stride
        picture = latents[:, :3].repeat_interleave(time, 2)[:, :, time - 1 :]
        video = torch.tanh(self.gain * picture).repeat_interleave(height, 3).repeat_interleave(width, 4)
        video[..., :8, :8] = -1
        video[..., 0, 0] = 1
        return video


class AcmeText(nn.Module):
    """A token a word: a wave whose frequency depends on the letters."""

    spec = TEXT

    def encode(self, prompts):
        place = torch.arange(self.spec.embed_dim)
        return [torch.stack([torch.sin(place * (1 + sum(map(ord, word)) % 97)) for word in prompt.split() or [""]]) for prompt in prompts]


class AcmeWideText(AcmeText):
    """The same for another width."""

    spec = WIDE
