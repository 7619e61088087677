"""What a ``GradScaler`` does: the steps it skips because of its own scale are no fault, those no scale can help are."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from nanhunt.observe.exact import ExactTracer
from nanhunt.observe.health import HealthProbe
from nanhunt.observe.patches import Patches
from nanhunt.records.ops import OpRecord, Sink

COLLAPSED_SCALE = 1e-4
"""A loss scale below which half precision gains nothing from it."""


class ScalingFollower:
    """Follows every ``GradScaler`` of the loop.

    Args:
        tracer: Told what harm is certain.
        pending: The sinks of the running step that are not certain yet; taken over when the step is skipped.
        meet: Called with the optimizer that is to step.
        skipped: Called with the optimizer whose step was skipped.
        health: Told of the scale after every step.
    """

    def __init__(
        self,
        tracer: ExactTracer,
        pending: list[Sink],
        meet: Callable[[Optimizer], None],
        skipped: Callable[[Optimizer], None],
        health: HealthProbe | None = None,
    ) -> None:
        self._tracer, self._ledger = tracer, tracer.ledger
        self._pending, self._meet, self._skipped = pending, meet, skipped
        self._health = health
        self._num_stepped = self._num_skips = 0

    def patch(self, patches: Patches) -> None:
        """Puts itself around the scaler's methods."""
        scaler = torch.amp.GradScaler
        patches.around(scaler, "scale", self._begin_scaling, self._end_scaling)
        patches.around(scaler, "step", self._before_step, self._after_step)
        patches.around(scaler, "update", None, self._after_update)

    def note_step(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped, or a fused one was told to leave its step out."""
        self._num_stepped += 1
        if is_passed_over(optimizer):
            return
        self._num_skips = 0
        self._ledger.held.clear()

    def finish(self) -> None:
        """The loop has ended: what no later step has made good counts, if no scale could."""
        if self._is_beyond_scaling():
            self._ledger.sinks += self._ledger.held

    def _begin_scaling(self, *args: Any, **kwargs: Any) -> None:
        self._ledger.is_scaling = self._ledger.is_scaled = True

    def _end_scaling(self, *args: Any, **kwargs: Any) -> None:
        self._ledger.is_scaling = False

    def _before_step(self, scaler: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        self._meet(optimizer)
        self._num_stepped = 0

    def _after_step(self, scaler: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        if self._num_stepped and not is_passed_over(optimizer):
            return
        self._num_skips += 1
        self._ledger.held += self._pending
        self._pending.clear()
        if self._num_skips > 1 and self._is_beyond_scaling():
            self._ledger.sinks += self._ledger.held
        if not self._num_stepped:
            self._skipped(optimizer)

    def _after_update(self, scaler: Any, *args: Any, **kwargs: Any) -> None:
        if scaler.is_enabled() and self._health is not None:
            self._health.note_scale(scaler.get_scale(), self._num_skips > 0)
        if scaler.is_enabled() and self._ledger.held and scaler.get_scale() < COLLAPSED_SCALE:
            self._ledger.sinks += self._ledger.held
            self._ledger.held.clear()

    def _is_beyond_scaling(self) -> bool:
        """Whether the last skipped step began with a value that no scale makes finite: NaN, or a division by zero."""
        births = set(self._ledger.held[-1].births) if self._ledger.held else set()
        if any(birth < 0 for birth in births):
            # What went in was non-finite already.
            return True
        first = min((record for record in self._ledger.records if record.index in births), key=_index, default=None)
        if first is None or first.index in self._ledger.scaling:
            return False
        if first.phase == "forward":
            # The scale comes after it.
            return True
        if first.outputs and first.outputs[0].num_nan and not first.ingredients:
            return True
        evidence = self._tracer.evidence.get(first.index)
        divisors = [operand for operand in evidence.operands if operand.name == "other"] if evidence else []
        return any(operand.at_offenders and not any(operand.at_offenders) for operand in divisors)


def is_passed_over(optimizer: Optimizer) -> bool:
    """Whether a ``GradScaler`` has told a fused optimizer to leave this step out."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _index(record: OpRecord) -> int:
    return record.index
