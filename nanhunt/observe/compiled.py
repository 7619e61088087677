"""Keeping our own code out of what ``torch.compile`` compiles."""

import contextlib
from types import CodeType
from typing import Any


def code_of(function: Any) -> CodeType:
    """The code of a Python function."""
    return function.__code__


def keep_uncompiled(code: CodeType) -> None:
    """Runs the code, and all it calls, as written, also where it is called from a compiled region.

    It does what ``torch._disable_dynamo`` does, without a wrapper around every call; where this version of torch has
    no such switch, the code may be compiled, which changes its speed only.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

        set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
