"""growing-gradient: gradients are finite and far larger than any healthy run makes them.

What it does:
    Looks at the total norm as the optimizer is about to use it. It holds above 1e15; above 1e8 where that is also ten
    thousand times the norm of the first steps, or 1e12 times the gradient that came from the loss. A norm that came and
    went is left alone. The module it names is the first, going back from the loss, that multiplies its gradient ten
    times more than in the first steps or than its siblings do; else the one that multiplies it most.

Why it matters:
    Clipping hides it: a norm of 1e16 becomes 0.1, and what is left of the direction belongs to a few elements. Above
    1.8e19 the squares overflow float32; then the norm is infinite, clipping makes all gradients 0, and the optimizer's
    second moments become infinite.

Use instead:
    A smaller learning rate, orthogonal or smaller recurrent weights, a norm before the module named, a smaller weight
    of the loss.
"""

import math
import statistics

from nanhunt.findings import Location
from nanhunt.records.health import (
    Extent,
    Health,
    ModuleHealth,
    ModuleSample,
    ParameterHealth,
    ParameterSample,
    StepHealth,
)
from nanhunt.rules.nh104_growing_activation import NUM_FIRST, stands_out
from nanhunt.rules.registry import Judgement, Rule

_HUGE, _LARGE = 1e15, 1e8
_GROWTH, _AMPLIFICATION = 1e4, 1e12


def _judge(health: Health) -> Judgement | None:
    norms = [(seen.step, seen.gradient_norm) for seen in health.steps if seen.gradient_norm is not None]
    finite = [(step, norm) for step, norm in norms if math.isfinite(norm)]
    large = [(step, norm) for step, norm in finite if _is_large(health, finite, step, norm)]
    if not large or (len(large) < 2 and large[-1] != finite[-1]):
        return None
    step, norm = large[0]
    first = [value for earlier, value in finite[:NUM_FIRST] if earlier < step]
    tensor, gradient = _largest_gradient(health, step)
    module, gain = _amplifier(health, step)
    multiplied = (f"{module or 'the model'} multiplies the gradient going through it by {gain:.3g}",) if gain else ()
    before = (f"the norm of the first steps was {statistics.median(first):.3g}",) if first else ()
    return Judgement(
        f"the gradient norm is {norm:.3g}, and finite",
        evidence={
            "gradient_norm": norm,
            "largest_gradient": gradient,
            "largest_norm": max(value for _, value in large),
        },
        notes=(*before, *multiplied),
        help=("lower the learning rate, or the scale of the weights that multiply the gradient",),
        location=Location("backward", module=module if gain else tensor.rpartition(".")[0], tensor=tensor, step=step),
    )


def _is_large(health: Health, norms: list[tuple[int, float]], step: int, norm: float) -> bool:
    if norm > _HUGE:
        return True
    if norm <= _LARGE:
        return False
    first = [value for earlier, value in norms[:NUM_FIRST] if earlier < step]
    from_loss = _loss_gradient(health, step)
    has_grown = bool(first) and norm > _GROWTH * statistics.median(first)
    return has_grown or (from_loss > 0 and norm > _AMPLIFICATION * from_loss)


def _loss_gradient(health: Health, step: int) -> float:
    """The gradient at the output of the model, or of the last module, in the sample nearest to the step."""
    for module in reversed(health.modules):
        sizes = {sample.step: _size(sample.output_gradient) for sample in module.samples}
        known = [seen for seen, size in sizes.items() if size > 0]
        if known:
            return sizes[_nearest(step, known)]
    return 0.0


def _largest_gradient(health: Health, step: int) -> tuple[str, float]:
    """Name of the parameter with the largest gradient, in the sample nearest to the step."""
    near = _nearest(step, [sample.step for parameter in health.parameters for sample in parameter.samples])
    found = [(sample.abs_max, parameter.name) for parameter in health.parameters if (sample := parameter.at(near))]
    finite = [pair for pair in found if math.isfinite(pair[0])]
    value, name = max(finite, default=(0.0, ""))
    return name, value


def _amplifier(health: Health, step: int) -> tuple[str, float | None]:
    """The module that multiplies the gradient, and by how much; no number where none does."""
    steps = [sample.step for module in health.modules for sample in module.samples if sample.gradient_gain]
    near = _nearest(step, steps)
    names = [module.name for module in health.modules]
    gains = []
    for module in reversed(health.modules):
        sample = module.at(near)
        holds_others = any(name.startswith(f"{module.name}.") or (not module.name and name) for name in names)
        if sample is not None and sample.gradient_gain and not holds_others:
            gains.append((module, sample))
    if not gains:
        return "", None
    top = max(_size(sample.input_gradient) for _, sample in gains)
    for module, sample in gains:
        assert sample.gradient_gain is not None
        siblings = [other.at(near) for other in health.siblings(module)]
        history = [one.gradient_gain for one in module.samples[:NUM_FIRST] if one.step < near and one.gradient_gain]
        beside = [one.gradient_gain for one in siblings if one is not None and one.gradient_gain]
        if _size(sample.input_gradient) > 1e-3 * top and stands_out(sample.gradient_gain, history, beside):
            return module.name, sample.gradient_gain
    module, sample = max(gains, key=lambda pair: pair[1].gradient_gain or 0.0)
    is_amplifying = sample.gradient_gain is not None and sample.gradient_gain > 1e3
    return (module.name, sample.gradient_gain) if is_amplifying else ("", None)


def _nearest(step: int, steps: list[int]) -> int:
    return min(steps, key=lambda other: (abs(other - step), other < step), default=step)


def _size(extent: Extent | None) -> float:
    return extent.magnitude if extent is not None and extent.is_finite else 0.0


RULE = Rule("NH204", "growing-gradient", "growing-gradient", _judge, Health, "warning")


def _run(*norms: float) -> Health:
    samples = tuple(ParameterSample(step, norm / 2) for step, norm in enumerate(norms))
    steps = tuple(StepHealth(step, norm, 0.1) for step, norm in enumerate(norms))
    return Health(parameters=(ParameterHealth("rnn.weight", "float32", 9, samples),), steps=steps)


def _amplified(gain: float) -> Health:
    entered, left = Extent(-1e-3, 1e-3, "float32"), Extent(-gain, gain, "float32")
    module = ModuleHealth("rnn", "RNN", (ModuleSample(0, None, None, left, entered),))
    return Health(modules=(module,), steps=(StepHealth(0, gain),))


FLAGGED = (_run(8.8e16), _run(1.0, 1.2, 1e5, 1e9), _amplified(1e10))
CLEAN = (_run(1e10, 2e10), _run(1.0, 1e9, 1.0), _run(1.0, 100.0, 1.0), _run(1e9, 1e8, 1e7), _amplified(1e7))
