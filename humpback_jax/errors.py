"""The one exception that users meet: a readable message that says what to do next."""

from __future__ import annotations


class HumpbackError(Exception):
    """A problem the user can fix. The command line prints the message alone, without a traceback.

    The message names the place (file, row, field, config key), the problem and the remedy.
    """


class Preempted(Exception):
    """The machine asked this process to end (SIGTERM); what it was doing is saved."""
