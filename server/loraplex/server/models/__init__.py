"""Base models: one configurable decoder, its families, loading and quantization."""
