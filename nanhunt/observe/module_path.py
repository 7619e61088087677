"""Which module is running, followed through a stand-in for ``nn.Module.__call__``.

Hooks would change the program: with any hook on a module ``nn.TransformerEncoder`` leaves its fused path, with hooks
for all modules a compiled module warns and calls them twice, and neither kind is called when a forward ends in Ctrl-C.
"""

import threading
import weakref
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn

from nanhunt.observe.compiled import code_of
from nanhunt.observe.patches import StandIn
from nanhunt.observe.source import KINDS, LIBRARY, USERS, Place, kind_of, user_place


class ModulePath:
    """The dotted path of the innermost module whose forward is running.

    Modules outside ``root`` are shown by class name in angle brackets. A module reachable by two names has the first.

    Attributes:
        current: Path of the innermost running module; '' for the root and outside.
        is_outside: Whether no module is running.
        called_from: The user's place that called the running module, once somebody has worked it out.
        on_enter: Called with every module that is called while no other module runs, its positional and its keyword
            arguments.
        on_leave: Called with the same module and its output.
        on_output: Called with every module, its positional and keyword arguments and its output.
    """

    def __init__(self, root: nn.Module | None) -> None:
        self.current = ""
        self.is_outside = True
        self.called_from: Place | None = None
        self.on_enter: Callable[[nn.Module, Any, Any], None] | None = None
        self.on_leave: Callable[[nn.Module, Any], None] | None = None
        self.on_output: Callable[[nn.Module, Any, Any, Any], None] | None = None
        self._names: dict[int, str] = {}
        self._owners: dict[int, str] = {}
        self._known: dict[int, weakref.ref[Any]] = {}
        self._boundary: CodeType | None = None
        if root is not None:
            self.name_modules(root)

    def name_modules(self, root: nn.Module, prefix: str = "") -> None:
        """Shows the modules of ``root`` by their dotted paths from here on; names given before stay."""
        for name, module in root.named_modules():
            path = ".".join(part for part in (prefix, name) if part)
            self._remember(self._names, module, path)
            for own in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                self._remember(self._owners, own, self._names[id(module)])

    def _remember(self, paths: dict[int, str], thing: Any, path: str) -> None:
        """Keeps the first path of a module or tensor until it is gone, for its identity may come again."""
        key = id(thing)
        if key not in paths:
            known = self._known

            def forget(reference: Any) -> None:
                paths.pop(key, None)
                known.pop(key, None)

            paths[key] = path
            known[key] = weakref.ref(thing, forget)

    def knows(self, module: nn.Module) -> bool:
        """Whether the module has a name."""
        return id(module) in self._names

    def is_part(self, module: nn.Module) -> bool:
        """Whether it belongs to the model itself, whose modules are shown without angle brackets."""
        return not self._names.get(id(module), "<").startswith("<")

    def module_of(self, tensor: Tensor | None) -> str:
        """Path of the module that owns the parameter or buffer; '' if none is known to."""
        return self._owners.get(id(tensor), "")

    def __enter__(self) -> Self:
        place = self._place = StandIn(nn.Module, "__call__")
        names, thread = self._names, threading.get_ident()

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread or not place.is_on:
                # Modes do not reach into other threads, so nothing of theirs is seen.
                return place.inner(module, *args, **kwargs)
            before, was_outside, called_from = self.current, self.is_outside, self.called_from
            if was_outside and self.on_enter is not None and torch._C._current_autograd_node() is None:
                self.on_enter(module, args, kwargs)
            name = names.get(id(module))
            self.current = name if name is not None else f"<{type(module).__name__}>"
            self.is_outside = False
            self.called_from = None
            try:
                output = place.inner(module, *args, **kwargs)
            finally:
                self.current, self.is_outside, self.called_from = before, was_outside, called_from
            if self.on_output is not None:
                with torch._C.DisableTorchFunction():
                    self.on_output(module, args, kwargs, output)
            if was_outside and self.on_leave is not None and torch._C._current_autograd_node() is None:
                self.on_leave(module, output)
            return output

        place.put(call)
        self._boundary = code_of(call)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._place.leave()
        self.current, self.is_outside, self.called_from = "", True, None

    def place(self, frame: FrameType | None) -> Place:
        """The user's place at or above the frame; what lies above the running module is worked out once per call."""
        library: FrameType | None = None
        boundary, kinds = self._boundary, KINDS
        while frame is not None:
            code = frame.f_code
            if code is boundary:
                break
            kind = kinds.get(code)
            if kind is None:
                kind = kind_of(code)
            if kind == USERS:
                if library is None:
                    return Place(frame.f_code, frame.f_lasti)
                return Place(library.f_code, library.f_lasti, frame.f_code, frame.f_lasti)
            if kind == LIBRARY and library is None:
                library = frame
            frame = frame.f_back
        if self.called_from is None:
            self.called_from = user_place(frame)
        outer = self.called_from
        if library is None:
            return outer
        if outer.users is not None:
            return Place(library.f_code, library.f_lasti, outer.users, outer.users_position)
        if outer.code is not None and kind_of(outer.code) == USERS:
            return Place(library.f_code, library.f_lasti, outer.code, outer.position)
        return Place(library.f_code, library.f_lasti)
