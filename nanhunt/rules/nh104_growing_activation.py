"""growing-activation: activations grew beyond what any healthy run reaches, and one module stands out.

What it does:
    Looks for outputs a thousand million times larger than 1 and than what went into the model. Of the modules in
    program order it names the first whose gain, the largest output over the largest input, is ten times that of its
    first samples or that of its siblings: modules of the same class and relative name in a numbered container. Where
    all siblings amplify alike, it names the first whose output is that large.

Why it matters:
    The values are still finite; the next steps, or the square in a loss, will not be.

Use instead:
    A smaller learning rate or a warm-up where the gain grew with the steps; a norm, or a smaller initial scale of the
    residual branches, where it was there from the start.

Known limits:
    Outputs that are large on the negative side alone are taken for a mask. A large output that came and went is not
    reported.
"""

import statistics

from nanhunt.findings import Location
from nanhunt.records.health import Extent, Health, ModuleHealth, ModuleSample
from nanhunt.rules.registry import Judgement, Rule

HUGE = 1e9
DEPARTURE = 10.0
"""How many times its usual gain a module must have to stand out."""
NUM_FIRST = 8
"""Samples that make up a module's own history."""


def _judge(health: Health) -> Judgement | None:
    steps = sorted({sample.step for module in health.modules for sample in module.samples})
    for step in steps:
        scale = _input_scale(health, step)
        huge = [module for module in health.modules if _output(module, step) > HUGE * scale]
        if any(_is_huge_at_the_end(module, scale) for module in huge):
            # Where one module drives the growth, the ones behind it are large as well.
            large = [module for module in health.modules if _output(module, step) > 1e-3 * HUGE * scale]
            blamed = next((module for module in large if _departs(health, module, step)), None)
            blamed = blamed or next((module for module in huge if _is_in_amplifying_row(health, module, step)), None)
            if blamed is not None:
                return _describe(health, blamed, step)
    return None


def _describe(health: Health, module: ModuleHealth, step: int) -> Judgement:
    sample = module.at(step)
    assert sample is not None
    history, siblings = _history(module, step), _sibling_gains(health, module, step)
    usual = []
    if history:
        usual.append(f"its own first gain: {statistics.median(history):.3g}")
    if siblings:
        usual.append(f"median gain of its {len(siblings):,} siblings: {statistics.median(siblings):.3g}")
    return Judgement(
        f"the output of {module.name or 'the model'} reaches {_output(module, step):.3g},"
        f" {sample.gain or 0:.3g} times its input",
        evidence={"output": _output(module, step), "gain": sample.gain, "class": module.kind},
        notes=tuple(usual),
        help=("lower the learning rate or the scale of this module, or put a norm before it",),
        location=Location("forward", module=module.name, step=step),
    )


def _input_scale(health: Health, step: int) -> float:
    """How large the model's input is, at least 1."""
    roots = [module for module in health.modules if not module.name] or list(health.modules[:1])
    given = [sample.input for module in roots if (sample := module.at(step)) is not None]
    return max([1.0, *(extent.magnitude for extent in given if extent is not None and extent.is_finite)])


def _output(module: ModuleHealth, step: int) -> float:
    sample = module.at(step)
    output = sample.output if sample is not None else None
    return output.unmasked if output is not None and output.is_finite else 0.0


def _is_huge_at_the_end(module: ModuleHealth, scale: float) -> bool:
    finite = [sample.output.unmasked for sample in module.samples if sample.output and sample.output.is_finite]
    return bool(finite) and finite[-1] > HUGE * scale


def _history(module: ModuleHealth, step: int) -> list[float]:
    gains = [sample.gain for sample in module.samples[:NUM_FIRST] if sample.step < step]
    return [gain for gain in gains if gain is not None]


def _sibling_gains(health: Health, module: ModuleHealth, step: int) -> list[float]:
    samples = [sibling.at(step) for sibling in health.siblings(module)]
    return [sample.gain for sample in samples if sample is not None and sample.gain is not None]


def _departs(health: Health, module: ModuleHealth, step: int) -> bool:
    sample = module.at(step)
    if sample is None or sample.gain is None:
        return False
    siblings = _sibling_gains(health, module, step)
    return stands_out(sample.gain, _history(module, step), siblings)


def stands_out(gain: float, history: list[float], siblings: list[float]) -> bool:
    """Whether a gain is far above the module's own first ones or those of at least two siblings."""
    above_own = bool(history) and gain > DEPARTURE * statistics.median(history)
    return above_own or (len(siblings) >= 2 and gain > DEPARTURE * statistics.median(siblings))


def _is_in_amplifying_row(health: Health, module: ModuleHealth, step: int) -> bool:
    sample = module.at(step)
    siblings = _sibling_gains(health, module, step)
    return sample is not None and len(siblings) >= 2 and statistics.median([sample.gain or 0.0, *siblings]) > 1.5


RULE = Rule("NH104", "growing-activation", "growing-activation", _judge, Health, "warning")


def _extent(value: float) -> Extent:
    return Extent(-value, value, "float32")


def _row(step: int, *gains: float) -> list[ModuleHealth]:
    """Blocks one behind the other, the first of which is given 1."""
    modules, value = [], 1.0
    for number, gain in enumerate(gains):
        sample = ModuleSample(step, _extent(value), _extent(value * gain))
        modules.append(ModuleHealth(f"blocks.{number}", "Block", (sample,)))
        value *= gain
    return modules


def _run(*outputs: float) -> Health:
    samples = (ModuleSample(step, _extent(1.0), _extent(value)) for step, value in enumerate(outputs))
    return Health(modules=(ModuleHealth("net", "Linear", tuple(samples)),))


FLAGGED = (
    _run(1.0, 2.0, 1e5, 1e10),
    Health(modules=tuple(_row(0, 2, 2, 1e10, 2))),
    Health(modules=tuple(_row(0, *[10] * 12))),
)
CLEAN = (
    _run(1.0, 1e10, 1.0),
    _run(1e10, 1.1e10, 1.2e10),
    _run(1.0, 1e5, 1e7),
    Health(modules=tuple(_row(0, *[2] * 12))),
)
