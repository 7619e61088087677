"""The caller's own model while a copy of it is run."""

import contextlib
from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.utils.hooks import RemovableHandle

from nanhunt.capture.put_back import put_back


class Keeper:
    """Puts the caller's model back if the loss runs that one, and not the copy it is given; a context manager.

    Its state is only copied when it is run, and its gradients are always set aside: a loss may use a parameter without
    a forward.

    Args:
        model: The caller's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._later = contextlib.ExitStack()
        self._handles: list[RemovableHandle] = []
        self._is_kept = False
        self._gradients = [(own, own.grad) for own in model.parameters()]

    def __enter__(self) -> Self:
        for own, _ in self._gradients:
            own.grad = None
        return self

    def watch(self, but: nn.Module) -> None:
        """From here on its modules are heard of, but those that a copy shares with it."""
        self.ignore()
        shared = set(but.modules())
        self._handles = [
            module.register_forward_pre_hook(self._keep) for module in self._model.modules() if module not in shared
        ]

    def ignore(self) -> None:
        """Takes the hooks away, which a copy would take along."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ignore()
        self._later.close()
        for own, gradient in self._gradients:
            own.grad = gradient

    def _keep(self, *args: Any) -> None:
        if not self._is_kept:
            self._is_kept = True
            self._later.enter_context(put_back(self._model))
