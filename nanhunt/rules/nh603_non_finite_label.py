"""non-finite-label: a label of the batch was NaN or infinite before any operation of the step.

What it does:
    Like ``non-finite-input``, for what is called a label or target where it was found: the key of the batch, the
    variable of the loop, the argument of the model or of the loss that takes it.

Why it matters:
    The forward pass is finite: only the loss shows it. A missing value that is filled with NaN, a logarithm or a
    quotient of a target, and standardisation by a spread of 0 are the usual ways.

Use instead:
    Leave such samples out of the batch, or select the valid elements before the loss is formed. To multiply the loss by
    a mask of 0 does not help: 0 times NaN is NaN.
"""

from nanhunt.records.labels import is_label
from nanhunt.records.ops import Spread, StateSource, ValueFacts
from nanhunt.rules.batch_words import batch_judgement
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    source = case.offender
    if not isinstance(source, StateSource) or source.kind != "batch" or not is_label(source.name):
        return None
    help_text = "select the valid labels before the loss is formed; a mask of 0 times NaN is still NaN"
    return batch_judgement(source, help_text)


RULE = Rule("NH603", "non-finite-label", "non-finite-label", _judge)

_FACTS = ValueFacts((8, 1), "float32", num_nan=1)
_CALLED = ("batch.labels", "input 1 (target of MSELoss)", "batch['y_true']", "target", "rows[1] (target of mse_loss)")
_NOT = ("batch.windows", "y_pred", "label_mask", "input 0", "target_network", "", "w (weight of cross_entropy)")
FLAGGED = tuple(Case(StateSource(-1, "batch", name, _FACTS, (6, 0), spread=Spread(1, 1))) for name in _CALLED)
CLEAN = tuple(Case(StateSource(-1, "batch", name, _FACTS, (6, 0))) for name in _NOT)
