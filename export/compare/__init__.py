"""Export a checkpoint in several precisions and measure them."""
