"""Compare a bundle with the checkpoint that it came from."""
