"""clip-norm-overflow: the norm of finite gradients is infinite, and clipping by it makes all of them 0.

What it does:
    Holds where a norm between the backward pass and the optimizer step is infinite although everything it was given is
    finite.

Why it matters:
    A norm squares: float32 gradients above 1.8e19 have an infinite one, in float16 a few hundred are enough.
    ``max_norm / inf`` is 0: every gradient of the step becomes 0, nothing is raised, and the step is lost. Where the
    factor is not a quotient, 0 times infinity is NaN.

Use instead:
    ``clip_grad_norm_(..., error_if_nonfinite=True)`` raises, and the norm is named here. Gradients of that size are a
    fault of their own: look for what made them. Under a loss scale, ``scaler.unscale_(optimizer)`` goes before
    clipping.

Known limits:
    Where all gradients become 0 and the loop goes on, nothing is non-finite any more, and nothing is reported.
"""

from nanhunt.numerics import LIMITS
from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule

_NORMS = ("linalg_vector_norm", "_foreach_norm", "norm", "frobenius_norm")


def _judge(case: Case) -> Judgement | None:
    op = case.op
    if op is None or op.op.removeprefix("aten::") not in _NORMS or not op.outputs:
        return None
    if not (op.between == "before the step" or op.phase in ("clip", "optimizer")):
        return None
    facts = op.outputs[0]
    if facts.num_nan or not facts.num_posinf:
        return None
    given = case.operand("self")
    largest = given.facts.abs_max if given is not None and given.facts is not None else None
    limit = LIMITS[facts.dtype].max if facts.dtype in LIMITS else None
    beyond = f", beyond {limit:.3g} in {facts.dtype}" if limit is not None else ""
    return Judgement(
        f"the norm of finite gradients is infinite{beyond}"
        f"{f'; the largest of them is {largest:.3g}' if largest is not None else ''}",
        evidence={"gradient_max": largest, "limit": limit, "dtype": facts.dtype},
        notes=("clipping by an infinite norm multiplies every gradient by 0",),
        help=(
            "find what made so large a gradient",
            "under a loss scale call scaler.unscale_(optimizer) before clipping",
        ),
    )


RULE = Rule("NH315", "clip-norm-overflow", "clip-norm-overflow", _judge, goes_before=("NH108", "NH404", "NH402"))


def _norm(op: str = "aten::linalg_vector_norm", *, between: str = "before the step", num_nan: int = 0) -> Case:
    facts = ValueFacts((), "float32", num_nan=num_nan, num_posinf=1 - num_nan)
    record = OpRecord(7, op, "birth", "forward", "", None, outputs=(facts,), between=between)  # type: ignore[arg-type]
    given = Operand("self", ValueFacts((4, 4), "float32", abs_max=3e19))
    return Case(record, OffenderEvidence(1, ((),), (float("inf"),), (given,)))


FLAGGED = (_norm(), _norm("aten::_foreach_norm"))
CLEAN = (_norm(between=""), _norm(num_nan=1), _norm("aten::native_layer_norm"))
