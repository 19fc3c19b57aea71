"""`humpback bench`: our speed and that of other systems, on the same work, one process each."""
