"""Held-out likelihood, meters and statistics."""
