"""`python -m humpback_jax VERB` is the `humpback` program."""

import sys

from humpback_jax.cli import main

sys.exit(main())
