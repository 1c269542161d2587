"""Heatmaps: where the adapters look in an image."""
