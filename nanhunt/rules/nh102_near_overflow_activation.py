"""near-overflow-activation: what a module gives out comes close to the largest number of its type.

What it does:
    Compares the largest output of each module with the limit of its element type. It holds where the last three
    samples all lie above a quarter of 65504 in float16, or above 1e30 in float32 and bfloat16.

Why it matters:
    Everything is finite, but a factor of four is less than what one unusual batch brings, or the square in the next
    norm.

Use instead:
    Run this module in bfloat16 or float32, or scale down what it is given.

Known limits:
    Outputs that are large on the negative side alone are taken for a mask, and those that are the same in every sample
    for constants; both are left alone. Operations between modules are not seen.
"""

from nanhunt.findings import Location
from nanhunt.numerics import LIMITS
from nanhunt.records.health import Extent, Health, ModuleHealth, ModuleSample
from nanhunt.rules.registry import Judgement, Rule

_NEAR = {"float16": LIMITS["float16"].max / 4, "bfloat16": 1e30, "float32": 1e30, "float64": 1e300}
_SUSTAINED = 3


def _judge(health: Health) -> Judgement | None:
    found = [(first, module) for module in health.modules for first in _near_samples(module)[:1]]
    if not found:
        return None
    first, module = min(found, key=lambda pair: pair[0].step)
    last = _near_samples(module)[-1].output
    assert last is not None
    return Judgement(
        f"the output of {module.name or 'the model'} reaches {last.unmasked:.3g};"
        f" {last.dtype} ends at {LIMITS[last.dtype].max:.3g}",
        evidence={"largest": last.unmasked, "limit": LIMITS[last.dtype].max, "class": module.kind},
        notes=(f"so do {len(found) - 1:,} other modules",) if len(found) > 1 else (),
        help=("run it in a type with a larger range, or scale its input down",),
        location=Location("forward", module=module.name, step=first.step),
    )


def _near_samples(module: ModuleHealth) -> list[ModuleSample]:
    """The samples near the limit, where the last ones all are."""
    finite = [sample for sample in module.samples if sample.output is not None and sample.output.is_finite]
    near = [sample for sample in finite if _is_near(sample.output)]
    values = {sample.output.unmasked for sample in near if sample.output is not None}
    is_sustained = len(near) >= _SUSTAINED and finite[-_SUSTAINED:] == near[-_SUSTAINED:]
    return near if is_sustained and len(values) > 1 else []


def _is_near(output: Extent | None) -> bool:
    return output is not None and output.unmasked > _NEAR.get(output.dtype, float("inf"))


RULE = Rule("NH102", "near-overflow-activation", "near-overflow-activation", _judge, Health, "warning")


def _run(*outputs: float, low: float = -1.0, dtype: str = "float16") -> Health:
    samples = (ModuleSample(step, output=Extent(low, high, dtype)) for step, high in enumerate(outputs))
    return Health(modules=(ModuleHealth("block.scores", "Linear", tuple(samples)),))


FLAGGED = (_run(9e3, 2e4, 3e4, 4e4), _run(1e31, 2e31, 3e31, dtype="bfloat16"))
CLEAN = (
    _run(9e3, 2e4, 3e4, 9e3),
    _run(2e4, 2e4, 2e4),
    _run(2.0, 3.0, 4.0, low=-65504.0),
    _run(1e29, 2e29, 3e29, dtype="float32"),
    _run(2e4, 3e4, 4e4, dtype="float32"),
)
