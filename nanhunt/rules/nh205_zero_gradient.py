"""zero-gradient: a gradient comes from the loss, and most parameters receive exactly zero.

What it does:
    Looks at the last four samples of the gradients. It holds where, in each of them, everything before a certain module
    had a gradient of exactly zero, these are more than half of the parameters, and a gradient other than zero came
    from the loss.

Why it matters:
    These weights do not learn. Exact zeros come from saturated or clamped values, from products of small numbers below
    the smallest of the type, or from clipping by a norm that overflowed.

Use instead:
    Look at the module named: it received a gradient and passed none on.

Known limits:
    Parameters without a gradient are not counted, nor zeros scattered over a network (experts that were not chosen,
    adapters that start at zero, parts whose loss has weight 0). A layer whose output is zero throughout, as of a dead
    ReLU, is left alone.
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.health import Extent, Health, ModuleHealth, ModuleSample, ParameterHealth, ParameterSample
from nanhunt.rules.registry import Judgement, Rule

_SUSTAINED = 4


def _judge(health: Health) -> Judgement | None:
    steps = sorted({sample.step for parameter in health.parameters for sample in parameter.samples})
    steps = [step for step in steps if health.largest("output_gradient", step) > 0]
    if len(steps) < _SUSTAINED:
        return None
    zero = _zero_before_a_cut(health, steps[-_SUSTAINED:])
    if 2 * len(zero) <= len(health.parameters) or _has_dead_output(health, steps[-1]):
        return None
    cut = _where_it_ends(health, zero, steps[-1])
    if cut is None:
        return None
    first = next(step for at, step in enumerate(steps) if _are_zero(zero, steps[at:]))
    came = health.largest("output_gradient", first)
    return Judgement(
        f"{len(zero):,} of {count(len(health.parameters), 'parameter')} have a gradient of exactly zero",
        evidence={"num_zero": len(zero), "num_parameters": len(health.parameters), "largest_output_gradient": came},
        notes=(f"gradients of up to {came:.3g} reach modules nearer to the loss",),
        help=("look for saturated or clamped values, underflow or clipping by an infinite norm",),
        location=Location("backward", module=cut, tensor=zero[-1].name, step=first),
    )


def _zero_before_a_cut(health: Health, steps: list[int]) -> list[ParameterHealth]:
    """The parameters without gradient before the first one, in program order, that had any."""
    places = {module.name: place for place, module in enumerate(health.modules)}
    known = [parameter for parameter in health.parameters if parameter.module in places]
    ordered = sorted(known, key=lambda parameter: places[parameter.module])
    zero = [parameter for parameter in ordered if _are_zero([parameter], steps)]
    alive = min((places[parameter.module] for parameter in ordered if parameter not in zero), default=len(places))
    return [parameter for parameter in zero if places[parameter.module] <= alive]


def _are_zero(parameters: list[ParameterHealth], steps: list[int]) -> bool:
    samples = [parameter.at(step) for parameter in parameters for step in steps]
    return all(sample is not None and sample.abs_max == 0 for sample in samples)


def _has_dead_output(health: Health, step: int) -> bool:
    outputs = [sample.output for module in health.modules if (sample := module.at(step)) is not None]
    return any(output is not None and output.is_finite and output.magnitude == 0 for output in outputs)


def _where_it_ends(health: Health, zero: list[ParameterHealth], step: int) -> str | None:
    """The first module, in program order, that a gradient still reached; None if nothing before it asks for one."""
    for module in health.modules:
        sample = module.at(step)
        if sample is not None and (_is_alive(sample.output_gradient) or _is_alive(sample.input_gradient)):
            owns_zero = any(parameter.module == module.name for parameter in zero)
            return module.name if owns_zero or sample.input_gradient is not None else None
    return None


def _is_alive(gradient: Extent | None) -> bool:
    return gradient is not None and gradient.is_finite and gradient.magnitude > 0


RULE = Rule("NH205", "zero-gradient", "zero-gradient", _judge, Health, "warning")


def _run(first: float, *, output: float = 1.0, passed_on: float | None = 0.0, num_steps: int = 5) -> Health:
    """Two parameters before a module and one in it, whose gradient is always 1."""

    def extent(value: float) -> Extent:
        return Extent(-value, value, "float32")

    def module(name: str, came: float, left: float | None) -> ModuleHealth:
        samples = (
            ModuleSample(step, None, extent(output), None if left is None else extent(left), extent(came))
            for step in range(num_steps)
        )
        return ModuleHealth(name, "Linear", tuple(samples))

    def parameter(name: str, value: float) -> ParameterHealth:
        return ParameterHealth(name, "float32", 4, tuple(ParameterSample(step, value) for step in range(num_steps)))

    return Health(
        modules=(module("first", first, None), module("gate", 1.0, passed_on), module("head", 1.0, 1.0)),
        parameters=(parameter("first.weight", first), parameter("first.bias", first), parameter("head.weight", 1.0)),
    )


FLAGGED = (_run(0.0),)
CLEAN = (_run(1e-9), _run(0.0, output=0.0), _run(0.0, passed_on=None), _run(0.0, num_steps=3))
