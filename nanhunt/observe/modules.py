"""The module tracer: one sum per module output and gradient, read only when a step has gone non-finite.

Forward hooks and tensor hooks alone: full backward hooks would refuse in-place modules and cost a graph node each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nanhunt.observe.finite import can_hold_nonfinite, sums, unreadable_kind
from nanhunt.records.modules import ModuleFault

MAX_LOOKS = 100_000
"""Sums kept per step; a loop that never steps must not fill the memory."""


@dataclass(frozen=True)
class _Look:
    """One tensor seen: of which module, as what, and its sum, still on its device."""

    module: str
    total: Tensor


class ModuleTracer:
    """Follows every module's output and its gradients with hooks, for long runs."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[Any] = []
        self.begin_step()

    def __enter__(self) -> Self:
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._on_inputs(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._on_outputs(name)))
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin_step(self) -> None:
        """Forgets what the last step showed."""
        self._outputs: list[_Look] = []
        self._input_gradients: list[_Look] = []
        self._output_gradients: list[_Look] = []

    def fault(self) -> ModuleFault | None:
        """Where the step first went non-finite; None if every module output and gradient is finite."""
        bad = _nonfinite(self._outputs)
        if bad:
            return ModuleFault("forward", (bad[0],), len(self._outputs), len(bad))
        entered = _nonfinite(self._input_gradients)
        if not entered:
            return None
        left = set(_nonfinite(self._output_gradients))
        # A module is to blame where the gradient that came to its output was finite and the one it passed on is not.
        blamed = [name for name in dict.fromkeys(entered) if name not in left]
        deepest = [name for name in blamed if not any(_is_inside(other, name) for other in blamed)]
        return ModuleFault(
            "backward", tuple(deepest or blamed or entered[:1]), len(self._input_gradients), len(entered)
        )

    def _on_inputs(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            for tensor in _readable((args, kwargs)):
                if tensor.requires_grad:
                    tensor.register_hook(_adder(self._input_gradients, name))

        return look

    def _on_outputs(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in _readable(output):
                _add(self._outputs, name, tensor)
                if tensor.requires_grad:
                    tensor.register_hook(_adder(self._output_gradients, name))

        return look


def _readable(values: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if can_hold_nonfinite(leaf) and unreadable_kind(leaf) is None]


def _adder(looks: list[_Look], name: str) -> Callable[[Tensor], None]:
    def add(gradient: Tensor) -> None:
        _add(looks, name, gradient)

    return add


def _add(looks: list[_Look], name: str, tensor: Tensor) -> None:
    if len(looks) < MAX_LOOKS and tensor.numel():
        with torch.no_grad():
            values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
            half = values.dtype in (torch.float16, torch.bfloat16)
            looks.append(_Look(name, values.sum(dtype=torch.float32) if half else values.sum()))


def _nonfinite(looks: list[_Look]) -> list[str]:
    """Names of the modules whose tensor was non-finite, in the order seen."""
    totals = sums([look.total for look in looks])
    if totals is None:
        return []
    return [look.module for look, good in zip(looks, torch.isfinite(totals).tolist(), strict=True) if not good]


def _is_inside(name: str, container: str) -> bool:
    return name != container and (container == "" or name.startswith(f"{container}."))
