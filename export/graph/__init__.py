"""Build ONNX graphs: the vision tower and the decoder."""
