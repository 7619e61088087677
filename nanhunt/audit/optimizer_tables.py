"""The tables above the findings of an optimizer's audit."""

import math
from collections import Counter

from nanhunt.audit.optimizer_schedule import Curve, shown
from nanhunt.findings import DataTable
from nanhunt.records.optimizer_audit import Decay, DryRun, OptimizerSetup

_DECAYS: dict[Decay, str] = {
    "none": "none",
    "direct": "multiplies a weight by 1 - rate x decay in each step",
    "through the gradient": "is added to the gradient, so what it does depends on that",
    "unknown": "acts in a way that is not known",
}


def decay_text(setup: OptimizerSetup) -> str:
    """How weight decay acts, in words."""
    ways = dict.fromkeys(group.decay for group in setup.groups)
    return ", ".join(_DECAYS[way] for way in ways if way != "none" or len(ways) == 1)


def groups_table(setup: OptimizerSetup) -> DataTable:
    """The numbers of the groups."""
    rows = tuple(
        (
            str(group.index),
            f"{group.lr:.4g}" if group.lr is not None else "its own",
            f"{group.weight_decay:g}",
            f"{group.settings['eps']:g}" if "eps" in group.settings else "",
            f"{group.num_parameters:,}",
            f"{group.num_elements:,}",
        )
        for group in setup.groups
    )
    return DataTable("parameter groups", ("group", "rate", "decay", "eps", "parameters", "weights"), rows)


def roles_table(setup: OptimizerSetup) -> list[DataTable]:
    """What each kind of parameter gets."""
    found: Counter[tuple[str, str, str]] = Counter()
    for parameter in setup.parameters:
        where = ", ".join(str(index) for index in parameter.groups) or "none"
        decay = f"{setup.decay_of(parameter):g}" if parameter.groups else ""
        found[parameter.role, where if parameter.requires_grad else f"{where} (frozen)", decay] += 1
    rows = tuple((role, where, decay, f"{number:,}") for (role, where, decay), number in sorted(found.items()))
    note = "other: a matrix in a module of no known type" if any(row[0] == "other" for row in rows) else ""
    return [DataTable("what the parameters are", ("role", "group", "decay", "parameters"), rows, note)] if rows else []


def run_table(run: DryRun | None) -> list[DataTable]:
    """What one step on copies left as it was."""
    if run is None or not run.updates:
        return []
    rows = tuple(
        (
            str(update.group),
            update.dtype,
            f"{update.lr:.4g}" if math.isfinite(update.lr) else "its own",
            f"{update.num_elements:,}",
            f"{update.num_unchanged / update.num_elements:.2%}" if update.num_elements else "",
        )
        for update in run.updates
    )
    columns = ("group", "type", "rate", "weights with a gradient", "left as they were")
    return [DataTable("one step on copies", columns, rows)]


def rates_table(curve: Curve, group: int) -> DataTable:
    """A dozen points of a group's curve."""
    points = curve.of(group)
    highest = curve.peak(group)
    rows = tuple(
        (f"{step:,}", f"{rate:.4g}", f"{rate / highest:.4g}" if highest > 0 else "") for step, rate in shown(points)
    )
    note = f"{curve.num_steps:,} steps ({curve.steps_from})"
    return DataTable("learning rate", ("update", "rate", "share of the peak"), rows, note)
