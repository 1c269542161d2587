"""Train a captioner: configuration, batches, the loop, and the folder of a run."""
