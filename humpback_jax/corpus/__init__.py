"""From documents to self-contained segments."""
