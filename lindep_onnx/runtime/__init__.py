"""All that knows ONNX Runtime and devices."""
