"""vanished-constant: a constant has no effect in the type it is used in.

What it does:
    Looks at plain numbers and 0-dim tensors that are added, that bound a clamp, or that fill a tensor. It holds where
    an addend that is not 0 rounds to 0 and no element changed; where a half tensor is unchanged in every element by an
    addend of a thousandth or more; where the lower bound of a clamp rounds to 0 or the upper one to 1; and where
    a tensor is filled with zeros instead.

Why it matters:
    The guard is not there. 1e-8 is 0 in float16, so x + 1e-8 under a root or a division is x. 1 - 1e-6 is 1 in
    float16 and bfloat16, so log(1 - p) is -inf after p.clamp(1e-6, 1 - 1e-6); in float32 the same holds for 1 - 1e-8.

Use instead:
    Compute the guarded operation in float32, or a constant that the type has: torch.finfo(x.dtype).tiny, and log1p or
    logsigmoid instead of a clamp.

Known limits:
    An eps that its type has, but that is lost beside larger elements, is no fault: it is there for zeros.
"""

from nanhunt.findings import Severity
from nanhunt.numerics import count
from nanhunt.records.dtype_audit import DtypeAudit, OpPlace, VanishedConstant
from nanhunt.rules.dtype_places import by_line, in_modules, location
from nanhunt.rules.registry import Judgement, Rule


def _judge(audit: DtypeAudit) -> tuple[Judgement, ...] | None:
    groups = by_line(audit.constants)
    kinds = ([one for one in group if one.kind == kind] for group in groups for kind in dict.fromkeys(_kinds(group)))
    return tuple(_judgement(group) for group in kinds) or None


def _kinds(group: list[VanishedConstant]) -> list[str]:
    return [one.kind for one in group]


def _judgement(group: list[VanishedConstant]) -> Judgement:
    one = group[0]
    severity: Severity | None = "error" if any(other.num_beyond for other in group) else None
    evidence: dict[str, object] = {"constant": one.value, "rounded": one.rounded, "num_elements": one.num_elements}
    if one.kind.endswith("bound"):
        evidence["num_beyond_the_bound"] = sum(other.num_beyond for other in group)
    return Judgement(
        _message(one),
        evidence=evidence,
        notes=in_modules(group),
        help=("compute this in float32, or choose a constant that the type has",),
        location=location(one.place),
        severity=severity,
    )


def _message(one: VanishedConstant) -> str:
    if one.kind == "addend" and one.rounded == 0.0:
        return f"{one.value:.9g} is 0 in {one.dtype}: adding it changed none of {count(one.num_elements, 'element')}"
    if one.kind == "addend":
        return f"adding {one.value:.9g} in {one.dtype} changed none of {count(one.num_elements, 'element')}"
    if one.kind == "filling":
        return f"{count(one.num_elements, 'element')} filled with {one.value:.9g} hold 0 in {one.dtype}"
    return f"the {one.kind} {one.value:.9g} of a clamp is {one.rounded:g} in {one.dtype}"


RULE = Rule("NH416", "vanished-constant", "vanished-constant", _judge, judges=DtypeAudit, severity="warning")

_PLACE = OpPlace("aten::add", module="norm")

FLAGGED = (
    DtypeAudit(constants=(VanishedConstant(_PLACE, "float16", "addend", 1e-8, 0.0, 64),)),
    DtypeAudit(constants=(VanishedConstant(_PLACE, "bfloat16", "addend", 1.0, 1.0, 1),)),
    DtypeAudit(constants=(VanishedConstant(_PLACE, "bfloat16", "upper bound", 1 - 1e-6, 1.0, 64, 2),)),
    DtypeAudit(constants=(VanishedConstant(_PLACE, "float16", "filling", 1e-9, 0.0, 64),)),
)
CLEAN = (DtypeAudit(),)
