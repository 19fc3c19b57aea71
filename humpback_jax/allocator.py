"""How the C library hands out the memory of large arrays on the host."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

TUNABLES = "GLIBC_TUNABLES"


def use_huge_pages() -> None:
    """Starts this program again, in the same process, with huge pages for its heap.

    XLA's CPU backend takes gigabytes of scratch memory for a training step and gives them back
    after it. In pages of 4 KiB the kernel then needs a sixth of the time of a step for faults.
    glibc reads the setting only at the start of a program. Does nothing elsewhere than on Linux,
    or where the variable is set already.
    """
    if sys.platform != "linux" or TUNABLES in os.environ:
        return
    environment = {**os.environ, TUNABLES: "glibc.malloc.hugetlb=1"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def return_free_memory() -> None:
    """Gives the kernel back what glibc keeps of freed memory; does nothing elsewhere.

    The compilation of a training step leaves a gigabyte of free pieces behind, in heaps of threads
    that ask for no memory again.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
