"""VAEs other than Wan's own, one file each."""
