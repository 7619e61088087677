"""Which module is running, followed with forward hooks."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

_MODULE_FILE = nn.Module.__call__.__code__.co_filename


class ModulePath:
    """The dotted path of the innermost module whose forward is running.

    Hooks are registered for all modules of the process and removed on exit; modules outside ``root`` are shown by class
    name in angle brackets. A module reachable by two names has the first.

    Attributes:
        current: Path of the innermost running module; '' for the root and outside.
        on_enter: Called with every module that is called while no other module runs, its positional and its
            keyword arguments.
        on_leave: Called with the same module and its output.
    """

    def __init__(self, root: nn.Module | None) -> None:
        self.current = ""
        self.on_enter: Callable[[nn.Module, Any, Any], None] | None = None
        self.on_leave: Callable[[nn.Module, Any], None] | None = None
        self._names: dict[int, str] = {}
        self._owners: dict[int, str] = {}
        if root is not None:
            self.name_modules(root)
        self._stack: list[str] = []
        self._handles: list[Any] = []

    def name_modules(self, root: nn.Module, prefix: str = "") -> None:
        """Shows the modules of ``root`` by their dotted paths from here on; names given before stay."""
        for name, module in root.named_modules():
            path = ".".join(part for part in (prefix, name) if part)
            if self._names.setdefault(id(module), path) == path:
                for own in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    self._owners.setdefault(id(own), path)

    def knows(self, module: nn.Module) -> bool:
        """Whether the module has a name."""
        return id(module) in self._names

    @property
    def is_outside(self) -> bool:
        """Whether no module is running."""
        return not self._stack

    def module_of(self, tensor: Tensor | None) -> str:
        """Path of the module that owns the parameter or buffer; '' if none is known to."""
        return self._owners.get(id(tensor), "")

    def __enter__(self) -> Self:
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._stack.clear()
        self.current = ""

    def _enter_module(self, module: nn.Module, args: object) -> None:
        if not self._stack and self.on_enter is not None and torch._C._current_autograd_node() is None:
            self.on_enter(module, args, _keyword_arguments(sys._getframe(1)))
        self._stack.append(self.current)
        name = self._names.get(id(module))
        self.current = name if name is not None else f"<{type(module).__name__}>"

    def _leave_module(self, module: nn.Module, args: object, output: object) -> None:
        if self._stack:
            self.current = self._stack.pop()
        if not self._stack and self.on_leave is not None and torch._C._current_autograd_node() is None:
            self.on_leave(module, output)


def _keyword_arguments(caller: FrameType) -> dict[str, Any]:
    """The keyword arguments of the module's call, which torch does not give to a hook for all modules.

    A hook of the module's own would be given them, but with such a hook the fused path of ``nn.TransformerEncoder`` is
    not taken: the program would change under observation.
    """
    found = caller.f_locals.get("kwargs") if caller.f_code.co_filename == _MODULE_FILE else None
    return found if isinstance(found, dict) else {}
