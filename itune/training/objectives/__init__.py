"""What a training step minimises: a file for each objective, all of them an `Objective`."""
