"""What malloc does in processes that compute on a CPU: environment variables that it reads when they start.

And how it is told from other failures that memory was not enough.
"""

import ctypes
import os
import re

# By default a thread's large blocks go back to the system at every step, and come again page by page: a sixth of a
# training step's time, a fortieth of an engine's.
KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
KEEP_MEMORY["THP_MEM_ALLOC_ENABLE"] = "1"  # torch asks for huge pages
# Under ZeRO-3 they have to go back: gloo's threads would keep what they gathered.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
# Torch's own words on GPU and CPU, Python's, and Ray's when its monitor ends a worker.
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|running low on memory|MemoryError")


def give_back() -> None:
    """Returns to the system what malloc was told to keep (`KEEP_MEMORY`): on a CPU, roles share one machine."""
    if "MALLOC_TRIM_THRESHOLD_" in os.environ:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
