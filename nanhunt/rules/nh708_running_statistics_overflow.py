"""running-statistics-overflow: one finite batch made the running statistics of a norm infinite or NaN.

What it does:
    Holds where a batch norm in training was given finite values whose squares are beyond the type, and a buffer of its
    own became non-finite in it.

Why it matters:
    The output of that very call may be finite, and so are loss, gradients and weights, in this step and in all that
    follow. Evaluation uses the buffer, and gives NaN ever after. Numbers above 1.8e19 are enough, for their squares
    overflow float32.

Use instead:
    Find the sample; ``reset_running_stats()`` and some healthy batches mend the norm.
"""

from nanhunt.numerics import LIMITS
from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, Sink, Trace, ValueFacts
from nanhunt.rules.nh101_non_finite_activation import describe
from nanhunt.rules.registry import Case, Judgement, Rule

_NORMS = ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit", "batch_norm")


def _judge(case: Case) -> Judgement | None:
    op, given = case.op, case.operand("input")
    if op is None or op.op.removeprefix("aten::") not in _NORMS or given is None or given.facts is None:
        return None
    sink = next((sink for sink in case.trace.sinks if sink.kind == "buffer" and op.index in sink.births), None)
    if sink is None or not given.facts.is_finite or not _may_overflow(given.facts):
        return None
    is_hidden = all(other.kind == "buffer" for other in case.trace.sinks if op.index in other.births)
    return Judgement(
        f"{sink.name} became non-finite ({describe(sink.facts)}) over a finite batch with values up to"
        f" {given.facts.abs_max:.3g}",
        evidence={
            "buffer": sink.name,
            "input_abs_max": given.facts.abs_max,
            "num_nonfinite": sink.facts.num_nonfinite,
        },
        notes=("what reached loss and gradients is finite; evaluation reads the buffer",) if is_hidden else (),
        help=("find the sample with these values, and reset_running_stats() of the norm",),
    )


def _may_overflow(facts: ValueFacts) -> bool:
    """Whether the squares of the distances from the mean can come to more than the type holds."""
    spread = 2 * (facts.abs_max or 0.0)
    return facts.dtype in LIMITS and spread * spread * facts.num_elements > LIMITS[facts.dtype].max


RULE = Rule(
    "NH708",
    "running-statistics-overflow",
    "running-statistics-overflow",
    _judge,
    goes_before=("NH108", "NH118", "NH404"),
)


def _norm(kind: str = "buffer", num_nan: int = 0, abs_max: float = 1e30) -> Case:
    facts = ValueFacts((4,), "float32", num_posinf=1)
    record = OpRecord(7, "aten::native_batch_norm", "birth", "forward", "norm", None, outputs=(facts,))
    sink = Sink(kind, "norm.running_var", facts, (7,))  # type: ignore[arg-type]
    operand = Operand("input", ValueFacts((8, 4), "float32", num_nan=num_nan, abs_max=abs_max))
    return Case(record, OffenderEvidence(1, ((0,),), (float("inf"),), (operand,)), Trace(9, (record,), sinks=(sink,)))


FLAGGED = (_norm(),)
CLEAN = (_norm("output"), _norm(num_nan=1), _norm(abs_max=0.41))
