"""Merge a checkpoint into ONNX graphs, quantise, verify, and write a bundle."""
