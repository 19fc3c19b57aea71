"""Supervised fine-tuning: loss, packing, optimizer, step and loop."""
