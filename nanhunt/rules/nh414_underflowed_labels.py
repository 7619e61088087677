"""underflowed-labels: values of the batch are zero or subnormal in half, and were not before.

What it does:
    Looks at tensors of the batch as they are cast to half in the step: it holds where underflow takes more than a
    hundredth of a sample, by norm. Of tensors that are in half already it looks at the subnormal ones: it holds where
    they are more than a tenth of what is not zero.

Why it matters:
    float16 has no number between 0 and 6e-8, and few digits below 6e-5. A soft label of 1e-8 is 0, a signal in volts
    instead of microvolts is nothing at all. The step is finite and learns something else.

Use instead:
    Labels in float32, and inputs scaled to about 1 before they are cast.

Known limits:
    Where a tensor comes in half, its zeros may have been anything: they are not judged. Nor is a small label beside a
    large one of the same sample.
"""

from collections.abc import Iterator

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.dtype_audit import HALF, BatchTensor, DtypeAudit, Narrowing, OpPlace
from nanhunt.rules.dtype_places import location
from nanhunt.rules.registry import Judgement, Rule

_SHARE = 0.1


def _judge(audit: DtypeAudit) -> tuple[Judgement, ...] | None:
    return (*_cast(audit.narrowings), *_given(audit.batch)) or None


def _cast(narrowings: tuple[Narrowing, ...]) -> Iterator[Judgement]:
    for one in narrowings:
        if one.tensor and one.target in HALF and one.num_samples_lost:
            yield Judgement(
                f"{one.num_to_zero:,} of {count(one.num_nonzero, 'value')} of {one.tensor} became 0 in {one.target}",
                evidence={
                    "num_to_zero": one.num_to_zero,
                    "num_nonzero": one.num_nonzero,
                    "num_samples": one.num_samples,
                    "num_samples_changed": one.num_samples_lost,
                    "largest": one.largest,
                },
                notes=(f"{one.num_samples_lost:,} of {count(one.num_samples, 'sample')} lost more than a hundredth",),
                help=("keep labels in float32; scale inputs before the cast",),
                location=location(one.place, one.tensor),
            )


def _given(batch: tuple[BatchTensor, ...]) -> Iterator[Judgement]:
    for one in batch:
        if one.num_subnormal > _SHARE * one.num_nonzero:
            yield Judgement(
                f"{one.num_subnormal:,} of {count(one.num_nonzero, 'value')} of {one.name} other than 0 are subnormal"
                f" in {one.dtype}",
                evidence={
                    "num_subnormal": one.num_subnormal,
                    "num_nonzero": one.num_nonzero,
                    "num_zero": one.num_elements - one.num_nonzero,
                    "smallest": one.smallest,
                },
                notes=("what was smaller still is 0 already, and cannot be told from a 0 that was meant",),
                help=("store them in float32, or scaled",),
                location=Location("data", tensor=one.name),
            )


RULE = Rule("NH414", "underflowed-labels", "underflowed-labels", _judge, judges=DtypeAudit, severity="warning")


def _labels(**facts: object) -> DtypeAudit:
    place = OpPlace("aten::_to_copy", module="head")
    values = {"tensor": "batch.labels", "num_elements": 8, "num_nonzero": 8, "num_samples": 4, **facts}
    return DtypeAudit(narrowings=(Narrowing(place, "float32", "float16", **values),))  # type: ignore[arg-type]


FLAGGED = (
    _labels(num_to_zero=2, num_samples_lost=1, largest=0.9),
    DtypeAudit(batch=(BatchTensor("batch.labels", "float16", 8, 4, 1, 5.96e-8),)),
)
CLEAN = (
    _labels(num_to_zero=2, largest=0.9),
    _labels(num_to_zero=2, num_samples_lost=1, tensor=""),
    DtypeAudit(batch=(BatchTensor("batch.labels", "float16", 8, 1, 0, 1.0),)),
)
