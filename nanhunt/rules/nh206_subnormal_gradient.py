"""subnormal-gradient: gradients are so small that their numbers lose digits.

What it does:
    Counts gradient elements below the smallest normal number of their type, 1.2e-38 in float32 and bfloat16. A
    parameter counts where a tenth of its elements that are not zero are subnormal in each of the last samples, and none
    is of an ordinary size. The rule holds where this is a quarter of the parameters, and the gradient that came from
    the loss was at least a million times larger.

Why it matters:
    Subnormal numbers keep fewer digits the smaller they are, and end in zero. A CPU handles them 20 to 60 times slower:
    a step of two seconds can take two minutes. The weights do not learn from such a gradient; Adam divides it by its
    eps.

Use instead:
    Larger initial weights: the gain of a layer with ReLU is the root of 2, not 0.01. Norms or residual connections
    where the network is deep.
"""

from nanhunt.findings import Location
from nanhunt.numerics import LIMITS, count
from nanhunt.records.health import Extent, Health, ModuleHealth, ModuleSample, ParameterHealth, ParameterSample
from nanhunt.rules.registry import Judgement, Rule

_SHARE, _SHARE_OF_PARAMETERS = 0.1, 0.25
_ATTENUATION = 1e6
_SUSTAINED = 3


def _judge(health: Health) -> Judgement | None:
    affected = [parameter for parameter in health.parameters if _is_subnormal(parameter)]
    if not affected or len(affected) < _SHARE_OF_PARAMETERS * len(health.parameters):
        return None
    step = min(sample.step for parameter in affected for sample in parameter.samples if _has_many(parameter, sample))
    largest = max(seen.abs_max for parameter in affected for seen in parameter.samples if seen.step == step)
    if health.largest("output_gradient", step) < _ATTENUATION * largest:
        # Where hardly anything comes from the loss, it is the loss that has nothing left to teach.
        return None
    places = {module.name: place for place, module in enumerate(health.modules)}
    nearest = max(affected, key=lambda parameter: places.get(parameter.module, -1))
    sample = next(sample for sample in nearest.samples if _has_many(nearest, sample))
    return Judgement(
        f"gradients of {count(len(affected), 'parameter')} of {len(health.parameters):,} are subnormal",
        evidence={
            "subnormal_share": sample.subnormal_share,
            "largest": sample.abs_max,
            "smallest_normal": LIMITS[nearest.dtype].tiny,
            "num_parameters": len(affected),
        },
        notes=("a CPU is 20 to 60 times slower on subnormal numbers",),
        help=("raise the scale of the initial weights, or put norms between the layers",),
        location=Location("backward", module=nearest.module, tensor=nearest.name, step=step),
    )


def _is_subnormal(parameter: ParameterHealth) -> bool:
    """Whether it was, in each of the last samples that were counted."""
    counted = [sample for sample in parameter.samples if sample.subnormal_share is not None]
    return bool(counted) and all(_has_many(parameter, sample) for sample in counted[-_SUSTAINED:])


def _has_many(parameter: ParameterHealth, sample: ParameterSample) -> bool:
    if sample.subnormal_share is None or sample.zero_share is None or parameter.dtype not in LIMITS:
        return False
    nonzero = 1.0 - sample.zero_share
    # Single tiny elements beside ordinary ones are what a softmax gives.
    is_small = sample.abs_max < 1e8 * LIMITS[parameter.dtype].tiny
    return is_small and nonzero > 0 and sample.subnormal_share >= _SHARE * nonzero


RULE = Rule("NH206", "subnormal-gradient", "subnormal-gradient", _judge, Health, "warning")


def _run(share: float, *, abs_max: float = 1e-37, came: float = 1e-3, recovers: bool = False) -> Health:
    samples = [ParameterSample(step, abs_max, 0.0, share) for step in range(4)]
    samples += [ParameterSample(4, 1e-3, 0.0, 0.0)] * recovers
    head = ModuleSample(0, output_gradient=Extent(-came, came, "float32"))
    return Health(
        modules=(ModuleHealth("first", "Linear", ()), ModuleHealth("head", "Linear", (head,))),
        parameters=(ParameterHealth("first.weight", "float32", 64, tuple(samples)),),
    )


FLAGGED = (_run(0.6),)
CLEAN = (_run(0.05), _run(0.6, abs_max=1e-3, came=1e9), _run(0.6, came=1e-33), _run(0.6, recovers=True))
