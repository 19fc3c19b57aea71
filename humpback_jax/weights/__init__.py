"""Weights in and out: Hugging Face safetensors, GGUF, models by name, content hashes."""
