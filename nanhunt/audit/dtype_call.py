"""One operation while the dtype audit looks at it."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nanhunt.audit.dtype_looks import is_narrower
from nanhunt.audit.shadow import REDUCTIONS, is_half
from nanhunt.observe.op_info import OpTraits
from nanhunt.records.dtype_audit import Narrowing

MANY_TERMS = 4096
"""Terms of a float32 reduction from which on it runs again in float64."""


@dataclass
class Call:
    """One operation while it runs.

    Attributes:
        func: The operation.
        traits: What is known of it once and for all.
        args: Its positional arguments.
        kwargs: Its others.
        floats: The floating-point and complex tensors among them.
        first: The first of these as it was before, where it matters.
        shadowed: The arguments in float64, of one that writes to them.
    """

    func: Any
    traits: OpTraits
    args: Any
    kwargs: Any
    floats: list[Tensor]
    first: Tensor | None = None
    shadowed: tuple[Any, Any] | None = None


def is_worth_it(call: Call, known: list[Tensor]) -> bool:
    """Whether anything can be lost: in half, against a 0-dim tensor of a wider type, in a sum of many terms."""
    if not known:
        return False
    if any(is_half(tensor.dtype) for tensor in known):
        return True
    if call.traits.name in REDUCTIONS and any(tensor.numel() >= MANY_TERMS for tensor in call.floats):
        return True
    return any(not one.dim() and is_narrower(known[-1].dtype, one.dtype) for one in call.floats)


def num_terms(call: Call, result: Tensor) -> int:
    """Elements that go into one result of a reduction; 0 for what reduces nothing."""
    if call.traits.name not in REDUCTIONS or not call.floats:
        return 0
    largest = max(tensor.numel() for tensor in call.floats)
    dim = call.args[1] if len(call.args) > 1 else None
    if result.numel() == largest and isinstance(dim, int) and result.dim():
        # A softmax and a running sum have as many results as terms.
        return result.shape[dim]
    return max(largest // max(result.numel(), 1), 1)


def weight(found: Narrowing) -> tuple[float, ...]:
    """Larger for what loses more."""
    lost = found.lost if math.isfinite(found.lost) else 0.0
    return (found.num_overflow * (not found.is_mask), found.num_samples_lost, lost, found.spread_error)
