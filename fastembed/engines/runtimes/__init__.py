"""What computes a model: PyTorch, or ONNX Runtime and TensorRT from an exported folder."""
