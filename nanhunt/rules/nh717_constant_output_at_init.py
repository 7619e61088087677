"""constant-output-at-init: the model's output is the same for every sample, with fresh weights.

What it does:
    Compares the samples of the model's output. It holds where they differ by less than 1e-6 of its size although the
    samples of the batch differ, for every initialisation, and no rule about vanishing signals or dead units says why.

Why it matters:
    The loss does not depend on the input, so no gradient can tell the model to use it. An input that is overwritten,
    multiplied by zero, detached or left out does this.

Known limits:
    A layer whose weights begin at zero makes its output constant on purpose; where there is one, this is not judged.
    For a batch of one sample, positions are compared.
"""

from dataclasses import replace

from nanhunt.findings import Location
from nanhunt.records.init_audit import InitAudit, LayerPass, ParameterAtInit
from nanhunt.rules.nh711_vanishing_signal_at_init import falls
from nanhunt.rules.nh715_dead_units_at_init import most_dead
from nanhunt.rules.registry import Judgement, Rule

LIMIT = 1e-6


def _judge(audit: InitAudit) -> Judgement | None:
    if not audit.outputs or not audit.input_varies or not audit.is_finite or audit.has_zero_layers:
        return None
    if any(one.variation is None or one.variation > LIMIT * one.output_rms for one in audit.outputs):
        return None
    if falls(audit.signal_falls) or most_dead(audit) is not None:
        return None
    rms = [one.output_rms for one in audit.outputs]
    return Judgement(
        "the output is the same for every sample of the batch",
        evidence={"output_rms": rms, "variation": [one.variation for one in audit.outputs]},
        help=("follow the input through forward: is it used, and not detached or overwritten",),
        location=Location("forward"),
    )


RULE = Rule("NH717", "constant-output-at-init", "constant-output-at-init", _judge, judges=InitAudit)

_CONSTANT = InitAudit(1, outputs=(LayerPass(1.0, 0.5, 1e-9),))
FLAGGED = (_CONSTANT, InitAudit(1, outputs=(LayerPass(1.0, 0.0, 0.0),)))
CLEAN = (
    InitAudit(1, outputs=(LayerPass(1.0, 0.5, 0.1),)),
    replace(_CONSTANT, input_varies=False),
    replace(_CONSTANT, parameters=(ParameterAtInit("head.weight", (2, 4), (1.0,), is_zero=True),)),
    InitAudit(1, outputs=(LayerPass(1.0, 0.5, None),)),
)
