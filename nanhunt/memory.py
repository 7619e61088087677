"""How the process allocator treats the large tensors of a training step."""

import ctypes
import sys

# Names and numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD_BYTES = 32 * 2**20
_NEVER_TRIM = -1


def keep_freed_memory() -> bool:
    """Lets glibc keep the memory a step has freed for the next one, and says whether it took the setting.

    By default it hands the activations back to the kernel after every backward pass and has them faulted in again, page
    by page, which costs about a twentieth of a full-size step. The setting holds for the whole process, so programs
    call this and libraries do not.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trimmed = mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)
    return bool(trimmed and mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES))
