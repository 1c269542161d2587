"""What the adapters look at: heatmaps."""
