"""Gradients of ONNX graphs as ONNX graphs."""
