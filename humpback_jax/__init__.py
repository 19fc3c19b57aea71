"""Self-alignment with instruction backtranslation (Li et al., 2023) in JAX."""

__version__ = "0.1.0"
