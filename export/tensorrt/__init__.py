"""TensorRT plans, built from typed ONNX graphs."""
