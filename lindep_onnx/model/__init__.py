"""ONNX as values: the graph, its weights, its shapes, its cost, and edits of it."""
