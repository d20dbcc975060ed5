"""What the leaf packages share: the same files in wan-vae (the source), wan-text and wan-dit, copied by `nox -s shared`."""
