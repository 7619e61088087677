"""The learning rate over the planned steps: what the schedule really gives, from a copy of it."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedules

from nanhunt.audit.optimizer_copies import NoCopy, copy_of, unnoticed
from nanhunt.audit.optimizer_roles import rate_of
from nanhunt.errors import first_line
from nanhunt.numerics import LIMITS, ulp

STANDARD_STEPS = 10_000
"""Steps that are looked at where nobody says how many are planned."""

UNPLANNED = "no number of steps is planned"

_LONGEST = 2**21
_MOST_STEPPED = 20_000
_DENSE = 200
_ROUND = (0, 1, 2, 10, 100, 300, 1000, 10_000, 100_000, 1_000_000)
_SPARSE = 500

Rates = list[float]


class Curve(NamedTuple):
    """The rates of all groups at sampled steps.

    Attributes:
        kind: Class of the schedule.
        steps: The sampled steps, rising, from the first one that is known.
        rates: The rates of all groups at each.
        num_steps: Planned steps.
        steps_from: Where that number comes from.
        remark: What was not looked at; empty if nothing.
        start: The first step that it knows; above 0 for a schedule under way that cannot be asked for earlier ones.
    """

    kind: str
    steps: tuple[int, ...]
    rates: tuple[Rates, ...]
    num_steps: int
    steps_from: str
    remark: str = ""
    start: int = 0

    def peak(self, group: int) -> float:
        """The highest rate of a group."""
        return max(rates[group] for rates in self.rates)

    def of(self, group: int) -> list[tuple[int, float]]:
        """Step and rate of one group."""
        return [(step, rates[group]) for step, rates in zip(self.steps, self.rates, strict=True)]

    def spans(self) -> list[tuple[int, int]]:
        """Each sampled step with how many steps it stands for."""
        ends = [*self.steps[1:], self.num_steps]
        return [(start, end - start) for start, end in zip(self.steps, ends, strict=True)]

    def kept_share(self, group: int, decay: float) -> float:
        """The product of ``1 - rate x decay`` over all planned steps; infinite where it grows beyond all bounds."""
        logarithm, sign = 0.0, 1.0
        points = self.of(group)
        for (_, length), (_, rate), following in zip(self.spans(), points, [*points[1:], points[-1]], strict=True):
            # The steps between two samples are taken at the mean of both.
            mean = rate if length == 1 else (rate + following[1]) / 2
            left = 1 - mean * decay
            if left == 0:
                return 0.0
            logarithm += length * math.log(abs(left))
            sign *= math.copysign(1.0, left) if length % 2 else 1.0
        return sign * math.exp(logarithm) if logarithm < 700 else math.inf


def constant(optimizer: Optimizer, num_steps: int | None) -> Curve:
    """The rates as they stand, for as long as is planned."""
    rates = [rate_of(group) for group in optimizer.param_groups]
    number = num_steps or STANDARD_STEPS
    return Curve("", (0, max(number - 1, 1)), (rates, rates), number, "planned" if num_steps else "if the rate stays")


def curve_of(scheduler: Any, optimizer: Optimizer, num_steps: int | None) -> Curve:
    """The curve of a schedule, from its step 0 on where it can be asked for that.

    Raises:
        NoCopy: If it cannot be copied or asked.
    """
    kind = type(scheduler).__name__
    if isinstance(scheduler, torch_schedules.ReduceLROnPlateau):
        raise NoCopy(f"{kind} follows a metric, which is only known while training")
    inner = getattr(scheduler, "scheduler", scheduler)
    scheduler = inner if isinstance(inner, torch_schedules.LRScheduler) else scheduler
    try:
        with unnoticed():
            try:
                curve = _asked(scheduler, optimizer, num_steps, kind)
            except Exception:  # noqa: BLE001 - a formula may know no step beyond its end; taking the steps shows where
                curve = None
            curve = curve if curve is not None else _stepped(scheduler, optimizer, num_steps, kind)
            return _for_all_groups(curve, optimizer)
    # A schedule calls functions of the user.
    except Exception as error:
        raise NoCopy(f"{kind} cannot be asked on a copy: {type(error).__name__}: {first_line(error)}") from error


def _asked(scheduler: Any, optimizer: Optimizer, num_steps: int | None, kind: str) -> Curve | None:
    """The curve of a schedule that has a formula; None if it has none."""
    formula = _closed_form(scheduler, optimizer)
    if formula is None:
        return None
    # The first update runs at what the groups say, whatever the formula does.
    is_fresh = getattr(scheduler, "last_epoch", 0) == 0
    rates_at = _starting_at([rate_of(group) for group in optimizer.param_groups], formula) if is_fresh else formula
    number, source = (num_steps, "planned") if num_steps else _length(scheduler, rates_at)
    steps = _chosen(number, rates_at)
    return Curve(kind, steps, tuple(rates_at(step) for step in steps), number, source)


def _starting_at(now: Rates, formula: Callable[[int], Rates]) -> Callable[[int], Rates]:
    def rates_at(step: int) -> Rates:
        return formula(step) if step else now

    return rates_at


def _for_all_groups(curve: Curve, optimizer: Optimizer) -> Curve:
    """The curve with the rates of groups that the schedule does not know, as they stand."""
    more = [rate_of(group) for group in optimizer.param_groups]
    return curve._replace(rates=tuple([*rates, *more[len(rates) :]][: len(more)] for rates in curve.rates))


def num_scheduled(scheduler: Any) -> int | None:
    """How many groups a schedule has rates for; None where it does not say."""
    inner = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(inner, torch_schedules.LRScheduler):
        return None
    parts = getattr(inner, "_schedulers", None)
    bases = getattr(parts[0] if isinstance(parts, list | tuple) and parts else inner, "base_lrs", None)
    return len(bases) if isinstance(bases, list | tuple) else None


def why_it_cannot_step(scheduler: Any, optimizer: Optimizer) -> str:
    """What a step of a copy of the schedule raises; empty if nothing."""
    try:
        with unnoticed():
            _copied(getattr(scheduler, "scheduler", scheduler), optimizer).step()
    except Exception as error:  # noqa: BLE001 - whatever it raises is the answer
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def _first_step(scheduler: Any, optimizer: Optimizer) -> int:
    """How many steps a schedule has behind it; those of the optimizer where it keeps no count."""
    for one in (scheduler, *(getattr(scheduler, "_schedulers", None) or ())):
        taken = getattr(one, "last_epoch", None)
        if isinstance(taken, int):
            return max(taken, 0)
    counts = [held.get("step", 0) for held in optimizer.state.values() if isinstance(held, dict)]
    return max((int(one) for one in counts), default=0)


def _copied(scheduler: Any, optimizer: Optimizer) -> Any:
    clone = copy_of(optimizer, {}, with_state=False)
    # Its own step warns where no optimizer step came before, and looks for this mark.
    memo = {id(optimizer): clone, id(getattr(scheduler, "optimizer", optimizer)): clone}
    return copy.deepcopy(scheduler, memo)


def _closed_form(scheduler: Any, optimizer: Optimizer) -> Callable[[int], Rates] | None:
    """What gives the rates at any step without taking those before it; None for a schedule that has no such thing."""
    if isinstance(scheduler, torch_schedules.LambdaLR):
        functions, bases = copy.deepcopy(scheduler.lr_lambdas), [float(base) for base in scheduler.base_lrs]

        def rates_of_functions(step: int) -> Rates:
            return [base * float(function(step)) for base, function in zip(bases, functions, strict=True)]

        return rates_of_functions
    is_formula = hasattr(scheduler, "_get_closed_form_lr")
    if not is_formula and type(scheduler) is not torch_schedules.OneCycleLR:
        return None
    clone = _copied(scheduler, optimizer)

    def rates_at(step: int) -> Rates:
        clone.last_epoch = step
        found: Sequence[float | Tensor] = clone._get_closed_form_lr() if is_formula else clone.get_lr()
        return [float(rate) for rate in found]

    return rates_at


def _length(scheduler: Any, rates_at: Callable[[int], Rates]) -> tuple[int, str]:
    """How long a schedule is, told from the schedule itself."""
    for name in ("total_steps", "T_max"):
        value = getattr(scheduler, name, None)
        if type(value) is int and value > 0:
            return value, f"the schedule's {name}"
    if not any(rates_at(_LONGEST)) and not any(rates_at(2 * _LONGEST)):
        # The last power of two at which the rate is not 0 lies before the end, the next one behind it.
        low = max((2**power for power in range(22) if any(rates_at(2**power))), default=0)
        if not low and not any(rates_at(0)):
            return STANDARD_STEPS, UNPLANNED
        high = max(2 * low, 1)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if not any(rates_at(middle)) else (middle + 1, high)
        return max(low, 1), "where the schedule reaches 0"
    return STANDARD_STEPS, UNPLANNED


def _chosen(number: int, rates_at: Callable[[int], Rates]) -> tuple[int, ...]:
    """Steps to look at: all of a few, else the first ones, some on both scales, and those around the peak."""
    if number <= _MOST_STEPPED:
        return tuple(range(number))
    ratio = (number / _DENSE) ** (1 / _SPARSE)
    steps = {*range(_DENSE), number - 1, *(step for step in _ROUND if step < number)}
    steps |= {min(number - 1, int(_DENSE * ratio**power)) for power in range(_SPARSE)}
    steps |= {number * part // _SPARSE for part in range(_SPARSE)}
    for _ in range(4):
        ordered = sorted(steps)
        best = max(range(len(ordered)), key=lambda place: max(rates_at(ordered[place])))
        low, high = ordered[max(best - 1, 0)], ordered[min(best + 1, len(ordered) - 1)]
        steps |= {low + (high - low) * part // 50 for part in range(51)}
    return tuple(sorted(steps))


def _stepped(scheduler: Any, optimizer: Optimizer, num_steps: int | None, kind: str) -> Curve:
    """The curve of a schedule that must be stepped; it begins where the schedule stands."""
    length = getattr(scheduler, "total_steps", None)
    planned = num_steps or (length if type(length) is int and length > 0 else None)
    number = planned or _first_step(scheduler, optimizer) + STANDARD_STEPS
    source = "planned" if num_steps else "the schedule's total_steps" if length else UNPLANNED
    clone = _copied(scheduler, optimizer)
    groups = clone.optimizer.param_groups
    seen = [[rate_of(group) for group in groups]]
    start = _first_step(scheduler, optimizer)
    source = f"{source}, from step {start:,} on" if start else source
    left = number - start
    remark = f"only the first {_MOST_STEPPED:,} of {left:,} steps were looked at" if left > _MOST_STEPPED else ""
    for taken in range(1, min(left, _MOST_STEPPED)):
        try:
            clone.step()
        except Exception as error:
            if taken == 1:
                raise
            remark = f"it raises at its step {start + taken:,} of {number:,}: {first_line(error)}"
            break
        seen.append([rate_of(group) for group in groups])
    end = start + len(seen)
    return Curve(kind, tuple(range(start, end)), tuple(seen), end, source, remark, start)


def drives(scheduler: Any, optimizer: Optimizer) -> bool:
    """Whether the schedule changes this optimizer's groups; wrappers of either share them."""
    driven = getattr(scheduler, "optimizer", None)
    groups = getattr(driven, "param_groups", optimizer.param_groups)
    return any(one is other for one in groups for other in optimizer.param_groups)


def main_groups(curve: Curve) -> list[int]:
    """One group for each shape of the curve, the one with the highest rate first; none whose rate is never above 0."""
    chosen: dict[tuple[float, ...], int] = {}
    for group in sorted(range(len(curve.rates[0])), key=curve.peak, reverse=True):
        highest = curve.peak(group)
        if highest > 0:
            chosen.setdefault(tuple(round(rates[group] / highest, 6) for rates in curve.rates), group)
    return list(chosen.values())


def peak_step(points: Sequence[tuple[int, float]]) -> int:
    """The first step at the highest rate."""
    highest = max(rate for _, rate in points)
    return next(step for step, rate in points if rate >= highest * (1 - 1e-9))


def thinned(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """At most a thousand points, with the first ones, the peak and the last ones among them."""
    highest = peak_step(points)
    peak = next(point for point in points if point[0] == highest)
    return tuple(sorted({*points[:50], *points[:: len(points) // 800 + 1], peak, *points[-2:]}))


def shown(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """A dozen points for a table: the first ones, powers of ten, the peak and the last one."""
    wanted = {*_ROUND, peak_step(points), points[-1][0]}
    return tuple(point for point in points if point[0] in wanted)


def num_idle(curve: Curve, group: int, weight: float, dtype: str) -> int:
    """Steps whose rate is less than half the spacing of numbers at a weight, where updates are of unit size."""
    if dtype not in LIMITS or not weight > 0:
        return 0
    least = ulp(weight, dtype) / 2
    return sum(length for (_, length), (_, rate) in zip(curve.spans(), curve.of(group), strict=True) if rate < least)


def typical_weight(parameters: Sequence[Tensor]) -> tuple[float, str]:
    """Median of the absolute values of weights other than 0, and the type of most of them."""
    by_type: dict[str, list[Tensor]] = {}
    for parameter in parameters:
        by_type.setdefault(str(parameter.dtype).removeprefix("torch."), []).append(parameter)
    if not by_type:
        return 0.0, "float32"
    dtype, chosen = max(by_type.items(), key=lambda item: sum(one.numel() for one in item[1]))
    parts = []
    for one in [one for one in chosen if not one.is_meta][:64]:
        flat = one.detach().flatten()
        parts.append(flat[:: max(1, flat.numel() // 4096)].float().abs().cpu())
    if not parts:
        return 0.0, dtype
    values = torch.cat(parts)
    values = values[(values > 0) & values.isfinite()]
    return (float(values.median()) if values.numel() else 0.0), dtype
