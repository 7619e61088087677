"""Which module is running, followed with forward hooks."""

from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class ModulePath:
    """The dotted path of the innermost module whose forward is running.

    Hooks are registered for all modules of the process and removed on exit; modules outside ``root`` are shown by class
    name in angle brackets. A module reachable by two names has the first.
    """

    def __init__(self, root: nn.Module | None) -> None:
        self._names: dict[int, str] = {}
        if root is not None:
            self.name_modules(root)
        self._stack: list[tuple[str, bool]] = []
        self._handles: list[Any] = []

    def name_modules(self, root: nn.Module) -> None:
        """Shows the modules of ``root`` by their dotted paths from here on."""
        self._names = {id(module): name for name, module in root.named_modules()}

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

    def _enter_module(self, module: nn.Module, args: object) -> None:
        name = self._names.get(id(module), f"<{type(module).__name__}>")
        self._stack.append((name, torch._C._current_autograd_node() is not None))

    def _leave_module(self, module: nn.Module, args: object, output: object) -> None:
        if self._stack:
            self._stack.pop()

    @property
    def current(self) -> str:
        """Path of the innermost running module; '' for the root and outside."""
        return self._stack[-1][0] if self._stack else ""

    @property
    def in_backward(self) -> bool:
        """Whether that module's forward was begun by a backward pass, which recomputes it."""
        return bool(self._stack) and self._stack[-1][1]
