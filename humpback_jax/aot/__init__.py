"""Programs compiled ahead of time for TPU slices that need not be there, and what they need."""
