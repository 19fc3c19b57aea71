"""The whole loop on a random 2-layer model that reads bytes: a rehearsal, and the tests' subject.

What it shows: that every stage runs, resumes and reports. A random model learns nothing worth
having in eight steps, so no figure of it means anything.

Launch:   humpback run --config=configs/tiny.py --workdir=runs/tiny
Expected: about half a minute on two CPU cores, most of it compilation.
"""

from __future__ import annotations

from humpback_jax.config import apply_tiny, default_config


def get_config(argument: str = "") -> object:
    """The only argument, `tiny`, changes nothing here: this config already is."""
    from humpback_jax.config import arguments

    arguments(argument, ("tiny",), "configs/tiny.py")
    config = default_config()
    with config.unlocked():
        config.name = "rehearsal"
    apply_tiny(config)
    return config
