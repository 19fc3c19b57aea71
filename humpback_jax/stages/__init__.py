"""The stages of a round; each reads artifacts and writes one."""
