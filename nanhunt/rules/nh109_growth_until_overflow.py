"""growth-until-overflow: what overflowed had been growing from step to step.

What it does:
    Holds where an operation overflowed and the outputs of its module, or of the model for an operation outside of
    modules, had grown a thousandfold in the steps before, and did not shrink in the last of them.

Why it matters:
    The operation that overflowed is only the first that could not hold the numbers; they were wrong long before.

Use instead:
    A smaller learning rate or a warm-up, a norm, or clipped gradients: look at the first step of the growth.

Known limits:
    The magnitudes of sampled steps are compared; growth within one step is not seen.
"""

from dataclasses import replace

from nanhunt.numerics import count
from nanhunt.records.health import Extent, Health, ModuleHealth, ModuleSample
from nanhunt.rules.nh108_overflow import FLAGGED as OVERFLOWS
from nanhunt.rules.offender import describe_overflow, factors, numbers, overflow_of
from nanhunt.rules.registry import Case, Judgement, Rule

GROWTH = 1e3
"""How many times its first output a module's last one must be."""
_NUM_LAST = 3


def _judge(case: Case) -> Judgement | None:
    found, grown = overflow_of(case), _growth(case)
    if found is None or grown is None:
        return None
    module, first, last = grown
    assert first.output is not None
    assert last.output is not None
    growth = f"the output of {module.name or 'the model'} grew from {first.output.magnitude:.3g}"
    return Judgement(
        f"{describe_overflow(case, found)}; {growth} to {last.output.magnitude:.3g}"
        f" in {count(last.step - first.step, 'step')}",
        evidence=numbers(
            case,
            limit=found.limit,
            first_step=first.step,
            first_magnitude=first.output.magnitude,
            last_step=last.step,
            last_magnitude=last.output.magnitude,
        ),
        notes=factors(case),
        help=("lower the learning rate, or clip the gradients, before the first step of the growth",),
    )


def _growth(case: Case) -> tuple[ModuleHealth, ModuleSample, ModuleSample] | None:
    """The module that grew, its first sample and its last one before the fault."""
    if case.health is None or case.op is None:
        return None
    for module in case.health.modules:
        if module.name != case.op.module:
            continue
        seen = [one for one in module.samples if one.step < case.step and one.output and one.output.is_finite]
        sizes = [one.output.magnitude for one in seen if one.output is not None]
        last = sizes[-_NUM_LAST:]
        if len(sizes) >= _NUM_LAST and last == sorted(last) and 0 < GROWTH * sizes[0] < sizes[-1]:
            return module, seen[0], seen[-1]
    return None


RULE = Rule("NH109", "growth-until-overflow", "growth-until-overflow", _judge, goes_before=("NH108", "NH404"))


def _after(*outputs: float, name: str = "head") -> Case:
    samples = (ModuleSample(step, output=Extent(-value, value, "float32")) for step, value in enumerate(outputs))
    health = Health(modules=(ModuleHealth(name, "Linear", tuple(samples)),))
    return replace(OVERFLOWS[0], step=len(outputs), health=health)


FLAGGED = (_after(1.0, 1e5, 1e12, 1e20), _after(1.0, 1e2, 1e4))
CLEAN = (_after(1.0, 1.1, 1.2, 1.3), _after(1.0, 1e4, 1.0), _after(1.0, 1e5, 1e9, name="other"), OVERFLOWS[0])
