"""The commands of `wan-vae`, a module each: `add` declares one, and what it runs imports torch only then."""
