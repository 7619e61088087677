"""half-precision-reduction-overflow: a sum, mean or norm of finite float16 numbers went beyond 65504.

What it does:
    Holds where a sum, mean, variance or norm gave infinity in float16, and every float16 number it was given is finite.

Why it matters:
    A thousand numbers of 70 are enough. A mean of numbers that are all below 65504 is below 65504, and is still
    infinite where the sum is formed first and rounded to float16 in between.

Use instead:
    ``x.float().sum()``, or ``x.sum(dtype=torch.float32)``, and a cast after the result has been divided. Under autocast
    these operations run in float32 unless they are given ``.half()`` tensors in a region where it is off.
"""

from nanhunt.numerics import LIMITS
from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule

_SUMS = ("sum", "nansum", "mean", "nanmean", "cumsum", "var", "var_mean", "std", "std_mean")
_NORMS = ("norm", "linalg_vector_norm")
_LIMIT = LIMITS["float16"].max


def _judge(case: Case) -> Judgement | None:
    name = case.op.op.removeprefix("aten::") if case.op is not None else ""
    given = case.operand("self")
    if case.op is None or name not in _SUMS + _NORMS or not case.op.outputs or given is None or given.facts is None:
        return None
    facts, result = given.facts, case.op.outputs[0]
    is_half = facts.dtype == result.dtype == "float16"
    if not is_half or not facts.is_finite or result.num_nan or not result.num_nonfinite:
        return None
    is_mean = "mean" in name and "var" not in name and "std" not in name
    note = f"no mean of numbers up to {facts.abs_max:g} is beyond {_LIMIT:g}: the sum was rounded to float16 before the"
    return Judgement(
        f"{case.op.op} of {facts.num_elements:,} finite numbers up to {facts.abs_max:g} overflowed float16, which ends"
        f" at {_LIMIT:g}",
        evidence={"num_elements": facts.num_elements, "abs_max": facts.abs_max, "limit": _LIMIT},
        notes=(f"{note} division",) if is_mean else (),
        help=("reduce in float32: give the operation dtype=torch.float32, and cast the result",),
    )


RULE = Rule("NH402", "half-precision-reduction-overflow", "half-precision-reduction-overflow", _judge)


def _reduced(op: str, *, given: str = "float16", made: str = "float16", abs_max: float = 80.0) -> Case:
    record = OpRecord(7, op, "birth", "forward", "loss", None, outputs=(ValueFacts((), made, num_posinf=1),))
    operand = Operand("self", ValueFacts((1000,), given, abs_max=abs_max))
    return Case(record, OffenderEvidence(1, ((),), (float("inf"),), (operand,)))


FLAGGED = (_reduced("aten::sum"), _reduced("aten::mean"), _reduced("aten::linalg_vector_norm", abs_max=3e4))
CLEAN = (
    _reduced("aten::sum", given="float32", made="float32", abs_max=1e38),
    _reduced("aten::sum", given="float32"),
    _reduced("aten::mul"),
)
