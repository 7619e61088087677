"""The verdict says what the replays showed, and nothing that was not tried."""

import math

import pytest

from nanhunt.experiments.verdict import decide
from nanhunt.findings import Finding, Location, Verdict
from nanhunt.records.steps import ExperimentResult, GridCell, StepOutcome, Tally

BAD_LOSS = StepOutcome(math.nan, failed_phase="forward")
BAD_GRADIENT = StepOutcome(1.0, failed_phase="backward")
FINITE = StepOutcome(1.0)


def finding(cause: str = "division-by-zero", op: str = "aten::div") -> Finding:
    certainty = "unknown" if cause == "unknown" else "observed"
    return Finding("NH000", "a-name", "error", certainty, cause, "a message", Location("forward", op))  # type: ignore[arg-type]


def tried(name: str, family: str, outcome: StepOutcome | None) -> ExperimentResult:
    return ExperimentResult(name, f"with {name}", family, outcome)  # type: ignore[arg-type]


def verdict(*experiments: ExperimentResult, found: Finding | None = None, baseline: StepOutcome | None = BAD_LOSS):
    return decide(baseline, found, experiments, (), is_legacy=False)


def test_step_that_was_not_run_is_unknown():
    assert verdict(baseline=None) == Verdict("unknown", ("the step was not run",))


def test_only_a_change_of_the_operation_makes_it_tested():
    hidden = verdict(tried("nan_to_num", "mask", FINITE), tried("sample", "data", FINITE), found=finding())
    cured = verdict(tried("detach", "offender", FINITE), found=finding())

    assert (hidden.certainty, hidden.flipped) == ("observed", ("nan_to_num", "sample"))
    assert (cured.certainty, cured.flipped) == ("tested", ("detach",))
    assert cured.sentences == ("division-by-zero: the step becomes finite with with detach",)


@pytest.mark.parametrize(
    ("cause", "lead"),
    [("unknown", "where it begins is known, why is not"), ("division-by-zero", "division-by-zero was observed")],
)
def test_change_that_was_tried_in_vain_is_not_called_untried(cause: str, lead: str):
    in_vain = verdict(tried("detach", "offender", BAD_GRADIENT), found=finding(cause))
    untried = verdict(tried("detach", "offender", None), found=finding(cause))

    assert in_vain.sentences[0] == f"{lead}: the step is still non-finite with with detach".replace(
        "observed:", "observed;"
    )
    assert untried.sentences[0] == (
        f"{lead}: no change that would take the operation out of the step could be run".replace(
            "observed:", "observed;"
        )
    )


def test_batch_or_weight_is_not_called_an_operation():
    [sentence] = verdict(found=finding("non-finite-input", op="")).sentences

    assert sentence == "non-finite-input was observed: it was there before any operation of the replayed step"


def test_change_that_moves_the_fault_to_the_backward_pass_is_not_said_to_have_no_effect():
    clamped = verdict(tried("clamp", "mask", BAD_GRADIENT), found=finding())

    assert clamped.sentences[1] == "still non-finite: with clamp"


def test_finite_in_float64_may_be_range_as_well_as_rounding():
    wide = verdict(tried("float64", "precision", FINITE), found=finding())

    assert wide.sentences[1] == ("with float64 is finite: it hangs on the range or the rounding of the captured types")


def test_samples_that_all_make_it_finite_blame_none():
    every = verdict(*(tried(f"sample {n}", "data", FINITE) for n in range(3)), found=finding())
    one = verdict(tried("sample 0", "data", BAD_LOSS), tried("sample 1", "data", FINITE), found=finding())
    none = verdict(tried("sample 0", "data", BAD_LOSS), found=finding())

    assert every.sentences[1] == "finite with each of 3 replacements of samples: no one sample carries it"
    assert one.sentences[1] == "finite with with sample 1"
    assert none.sentences[1] == "no single replaced sample makes it finite"


def test_finite_step_with_a_finding_does_not_deny_the_finding():
    harmed = verdict(found=finding(), baseline=FINITE)

    assert harmed == Verdict(
        "observed",
        ("division-by-zero: loss, gradients and weights stay finite, a buffer or the optimizer's state does not",),
    )


def test_finite_step_without_one_says_that_it_did_not_recur():
    assert verdict(baseline=FINITE).sentences == (
        "the step is finite when it is run again: what made it fail is not in the capture, or did not recur",
    )


def test_legacy_file_is_never_cleared_by_fresh_weights():
    grid = [GridCell("fresh", "bad", seed, StepOutcome(1.0, gradients=Tally())) for seed in range(2)]

    legacy = decide(FINITE, None, (), grid, is_legacy=True, is_captured=False)

    assert legacy.certainty == "unknown"
    assert legacy.sentences[0] == "on fresh weights the batch is finite with 2 of 2 seeds"
    assert "does not show that the data or the architecture are sound" in legacy.text


def test_optimizer_setting_that_helps_is_not_called_a_mask():
    helped = verdict(tried("a tenth of the rate", "optimizer", FINITE), tried("clamp", "mask", FINITE), found=finding())

    assert "finite with another optimizer setting: with a tenth of the rate" in helped.sentences
    assert "finite, but a mask: with clamp" in helped.sentences
