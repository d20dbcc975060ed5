"""Encode or decode once and print the peak of resident memory in bytes: `python bench/peak.py encode|decode winograd|direct|diffusers`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from references import reference_latents, reference_video
from wan_vae.checkpoint import diffusers_config
from wan_vae.config import WAN21


def main(what: str, who: str) -> None:
    torch.set_num_threads(1)
    video, latents = torch.zeros(1, 3, 9, 96, 160), torch.zeros(1, 16, 3, 12, 20)
    video[:, :, ::2], latents[:, :, ::2] = 0.5, 0.5
    with torch.no_grad():
        if who == "diffusers":
            from diffusers import AutoencoderKLWan

            theirs = AutoencoderKLWan.from_config(diffusers_config(WAN21)).eval()
            reference_latents(theirs, video) if what == "encode" else reference_video(theirs, latents)
        else:
            from wan_vae import WanVAE

            ours = WanVAE(WAN21).eval()
            ours.backend = who
            ours.encode(video) if what == "encode" else ours.decode(latents)
    # not ru_maxrss, which a new process inherits from the one that started it
    print(next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")))


if __name__ == "__main__":
    main(*sys.argv[1:])
