"""The LLaMA decoder: configuration, layers, attention, adapters and cache."""
