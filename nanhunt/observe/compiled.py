"""Keeping our own code out of what ``torch.compile`` compiles."""

import contextlib
from types import CodeType
from typing import Any


def code_of(function: Any) -> CodeType:
    """The code of a Python function."""
    return function.__code__


def keep_uncompiled(code: CodeType, *, callees: bool = True) -> None:
    """Runs the code as written, also where it is called from a compiled region.

    It does what ``torch._disable_dynamo`` does, without a wrapper around every call; where this version of torch has
    no such switch, the code may be compiled, which changes its speed only.

    Args:
        code: What is not to be compiled.
        callees: Whether that goes for all it calls as well.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

        below = _FrameAction.SKIP if callees else _FrameAction.DEFAULT
        set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, below))


def keep_out(*functions: Any) -> None:
    """Keeps our own functions, and all they call, out of a compiled function that calls them."""
    for function in functions:
        # torch._disable_dynamo sets the same mark, and would import the compiler for it.
        function._torchdynamo_disable = True
        keep_uncompiled(function.__code__)
