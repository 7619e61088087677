"""Looks of our own, which neither the tracer nor a mode of the user's may see."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Suspends every mode, those of the user's as well: none sees the operations inside."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        yield


def unseen() -> AbstractContextManager[None]:
    """Suspends every mode and nothing else: a tensor of a subclass still does inside what its class says."""
    # Most loops run under no mode at all, and this is entered several times a step.
    return _without_modes() if torch._C._len_torch_dispatch_stack() else torch._C.DisableTorchFunction()


@contextlib.contextmanager
def _without_modes() -> Iterator[None]:
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield
