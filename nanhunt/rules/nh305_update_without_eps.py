"""update-without-eps: an adaptive optimizer whose eps is 0 divided by the root of a second moment that is 0.

What it does:
    Looks at the first weight that the step spoilt: its second moment is exactly 0, and so is ``eps`` of its group.

Why it matters:
    A weight that has never had a gradient (a word that did not occur, an input that is always 0, a unit that is off)
    has a second moment of 0: its update is 0/0. ``eps`` is all that keeps it finite.

Use instead:
    The default ``eps``.
"""

from nanhunt.rules.optimizer_words import divides_by_zero, example, spoilt
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    for element in spoilt(case):
        denominator = element.denominator
        if element.was_given_finite and element.settings.get("eps") == 0 and divides_by_zero(element):
            assert denominator is not None
            return Judgement(
                f"{element.optimizer} divided by 0 in {element.parameter}: eps is 0, and {denominator[0]} is 0 at"
                f" {list(element.index)}",
                evidence={
                    "eps": 0.0,
                    "gradient": element.gradient,
                    "first_position": list(element.index),
                    "num_nonfinite": element.num_nonfinite,
                },
                help=("give the optimizer its default eps",),
            )
    return None


RULE = Rule("NH305", "update-without-eps", "update-without-eps", _judge, goes_before=("NH103",))

_SETTINGS = {"lr": 0.1, "eps": 0.0}
FLAGGED = (
    example(optimizer="Adagrad", gradient=0.0, state={"sum": 0.0}, settings=_SETTINGS),
    example("aten::div_", optimizer="Adadelta", gradient=0.0, state={"square_avg": 0.0}, settings=_SETTINGS),
)
CLEAN = (
    example(optimizer="Adagrad", gradient=0.0, state={"sum": 1e-12}, settings=_SETTINGS),
    example(optimizer="SGD", state={}, settings={"lr": 0.1}),
    example(state={"exp_avg_sq": 0.0}, settings=_SETTINGS, gradient=float("nan")),
)
