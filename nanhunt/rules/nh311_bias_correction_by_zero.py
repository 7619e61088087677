"""bias-correction-by-zero: an optimizer divided by 1 - beta ** step, which is exactly 0.

What it does:
    Works out ``1 - beta ** step`` from the betas of the group and the step count in the state of the first weight that
    the step spoilt. It holds where that is 0, and the operation divides.

Why it matters:
    It is 0 at step 0, for a count that is increased after its use or was loaded as -1, and where beta is 1 in the type
    it is held in: 0.999 is 1 in bfloat16. 0/0 is NaN in every weight.

Use instead:
    Count the step before the correction, and keep betas as Python numbers.

Known limits:
    An optimizer of your own is known only if it keeps ``betas`` in its groups and ``step`` in its state.
"""

from collections.abc import Iterator

from nanhunt.records.updates import SpoiltElement
from nanhunt.rules.optimizer_words import example, spoilt
from nanhunt.rules.registry import Case, Judgement, Rule

_DIVIDING = ("div", "_foreach_div", "addcdiv", "_foreach_addcdiv", "reciprocal", "_foreach_reciprocal")


def _judge(case: Case) -> Judgement | None:
    for element in spoilt(case):
        assert case.op is not None
        divides = case.op.op.removeprefix("aten::").rstrip("_") in _DIVIDING or "_fused_" in case.op.op
        found = next(_zero_corrections(element), None) if divides and element.was_given_finite else None
        if found is not None:
            name, beta, step = found
            return Judgement(
                f"{element.optimizer} divided by 1 - {beta:g} ** {step:g} = 0 in {element.parameter}",
                evidence={name: beta, "step": step, "num_nonfinite": element.num_nonfinite},
                help=("count the step before the correction, and keep the betas below 1 in the type they are held in",),
            )
    return None


def _zero_corrections(element: SpoiltElement) -> Iterator[tuple[str, float, float]]:
    step = element.state.get("step", element.settings.get("step"))
    if step is None or step < 0:
        return
    for name, beta in element.settings.items():
        if name.startswith("beta") and 0 <= beta <= 1 and 1 - beta**step == 0:
            yield name, beta, step


RULE = Rule("NH311", "bias-correction-by-zero", "bias-correction-by-zero", _judge, goes_before=("NH103",))

FLAGGED = (
    example("aten::div", state={"step": 0.0, "exp_avg_sq": 1e-5}),
    example("aten::_fused_adam_", state={"step": 0.0, "exp_avg_sq": 1e-5}),
    example("aten::div", state={"step": 4.0}, settings={"lr": 1e-3, "betas[1]": 1.0}),
)
CLEAN = (
    example("aten::div", state={"step": 1.0}),
    example("aten::sqrt", state={"step": 0.0}),
    example("aten::div", state={"exp_avg": 0.0}),
)
