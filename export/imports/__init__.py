"""Read the published checkpoints of other projects."""
