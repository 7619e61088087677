"""The popular masks, applied one at a time: shown to hide the fault, or not even that.

``clamp`` and ``nan_to_num`` stand here because they are what is tested, not because anything of ours relies on them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nanhunt.capture.step import Change
from nanhunt.experiments.changes import Diagnosis
from nanhunt.experiments.substitute import Substitution, tensors_mapped
from nanhunt.records.ops import SourceLine

_SYMMETRIC = ("aten::_linalg_eigh", "aten::linalg_eig")
_SHIFTS = (1e-4, 1e-3)


def changes(diagnosis: Diagnosis) -> Iterator[Change]:
    """Those that apply to the offender, then those that apply to any step."""
    offender = diagnosis.offender
    if offender is not None and offender.source is not None:
        line, op = offender.source, diagnosis.forward_op
        if op in _SYMMETRIC:
            for shift in _SHIFTS:
                yield _diagonal_shift(line, op, shift)
        yield Change(
            "clamp-offender",
            f"outputs of {op.removeprefix('aten::').strip('_')} clamped to [-10, 10]",
            "mask",
            around=lambda: Substitution(line, op, outputs=tensors_mapped(lambda tensor: tensor.clamp(-10, 10))),
        )
    yield Change("clamp-outputs", "the model's outputs clamped to [-40, 40]", "mask", model=_clamp_outputs)
    yield Change(
        "sanitise-gradients",
        "nan_to_num on the gradients",
        "mask",
        gradients=_sanitise,
        note="the gradients are still wrong: what was non-finite is now 0",
    )


def _diagonal_shift(line: SourceLine, op: str, shift: float) -> Change:
    def shifted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        matrix, *rest = args
        return (matrix + shift * torch.eye(matrix.shape[-1]).to(matrix), *rest), kwargs

    return Change(
        f"diagonal-shift-{shift:g}",
        f"{shift:g} added to the diagonal before {op.removeprefix('aten::').strip('_')}",
        "mask",
        around=lambda: Substitution(line, op, inputs=shifted),
        note="it moves all eigenvalues alike: only their rounding changed",
    )


def _clamp_outputs(model: nn.Module) -> None:
    clamped: Callable[[Any], Any] = tensors_mapped(lambda tensor: tensor.clamp(-40, 40))

    def clamp(module: nn.Module, args: Any, output: Any) -> Any:
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
            raise LookupError(f"no tensor was found in the model's output, a {type(output).__name__}")
        return clamped(output)

    model.register_forward_hook(clamp)


def _sanitise(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            _replace_nonfinite(parameter.grad)


def _replace_nonfinite(gradient: Tensor) -> None:
    gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
