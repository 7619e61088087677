"""half-linalg-input: a matrix in half, or rounded to half just before, goes into a decomposition or a solver.

What it does:
    Holds where torch refuses a half matrix, or where a matrix was rounded to half, lost digits there, and was cast up
    again for the decomposition. Views and copies in between are followed.

Why it matters:
    eigh, svd, solve, inv and their like have no kernels for half: they raise. A cast just before them ends the error
    and not the loss: the digits were gone when the matrix was in half. Eigenvalues are then wrong by up to the size of
    that rounding, and eigenvectors by that over the gap between the eigenvalues. Under CPU autocast the cast is made
    silently.

Use instead:
    Compute the matrix itself in float32: with torch.autocast(device, enabled=False), from inputs cast with .float().

Known limits:
    Arithmetic between the cast and the decomposition is not followed.
"""

from collections.abc import Iterator

from nanhunt.records.dtype_audit import DtypeAudit, LinalgInput, OpPlace
from nanhunt.rules.dtype_places import by_line, in_modules, location
from nanhunt.rules.registry import Judgement, Rule


def _judge(audit: DtypeAudit) -> tuple[Judgement, ...] | None:
    groups = by_line(one for one in audit.linalg if one.error or one.relative_change)
    return tuple(_judgements(groups)) or None


def _judgements(groups: list[list[LinalgInput]]) -> Iterator[Judgement]:
    for group in groups:
        worst = max(group, key=lambda one: (bool(one.error), one.relative_change or 0.0))
        where = location(worst.place)
        if worst.error:
            yield Judgement(
                f"{worst.place.op} was given a {worst.dtype} matrix and refused it",
                evidence={"dtype": worst.dtype, "error": worst.error},
                help=("compute the matrix in float32; a cast just before keeps the rounding of half",),
                location=where,
                severity="error",
            )
            continue
        yield Judgement(
            f"the matrix for {worst.place.op} was rounded to {worst.dtype} before: {worst.relative_change:.2g} of it"
            " is lost",
            evidence={"dtype": worst.dtype, "relative_change": worst.relative_change},
            notes=("eigenvectors change by that over the relative gap between eigenvalues", *in_modules(group)),
            help=("compute the matrix in float32, with autocast switched off and its inputs cast up",),
            location=where,
        )


RULE = Rule("NH412", "half-linalg-input", "half-linalg-input", _judge, judges=DtypeAudit, severity="warning")

_EIGH = OpPlace("aten::_linalg_eigh", module="pe")

FLAGGED = (
    DtypeAudit(linalg=(LinalgInput(_EIGH, "bfloat16", 1.6e-3),)),
    DtypeAudit(linalg=(LinalgInput(_EIGH, "float16", None, "linalg_eigh_cpu not implemented for 'Half'"),)),
)
CLEAN = (
    DtypeAudit(linalg=(LinalgInput(_EIGH, "bfloat16", 0.0), LinalgInput(_EIGH, "float16"))),
    DtypeAudit(),
)
"""An adjacency of zeros and ones loses nothing in half."""
