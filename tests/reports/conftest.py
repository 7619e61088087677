"""A report with everything in it, made by hand: what a replay of the incident gives, and what it rarely does."""

import math

import pytest

from nanhunt.findings import ChainLink, Finding, Location, Report, Skip, Verdict
from nanhunt.records.ops import SourceLine
from nanhunt.records.steps import Determinism, ExperimentResult, GridCell, StepOutcome, Tally

_GOOD = StepOutcome(0.1733, Tally(0, 74, 0, 61_440), Tally(0, 74, 0, 61_440), Tally(0, 74, 0, 61_440), 0.81)
_BACKWARD = StepOutcome(
    0.173286795,
    gradients=Tally(31, 74, 20_480, 61_440, "encoder.0.weight"),
    clipped=Tally(74, 74, 61_440, 61_440, "encoder.0.weight"),
    weights=Tally(74, 74, 61_440, 61_440, "encoder.0.weight"),
    gradient_norm=math.nan,
    failed_phase="backward",
)
_FORWARD = StepOutcome(math.nan, error="LinAlgError: linalg.eigh: the input has NaN", failed_phase="forward")
_STEP = StepOutcome(0.5, Tally(0, 74, 0, 61_440), None, Tally(2, 74, 9, 61_440), failed_phase="step")
_DEAD = StepOutcome(0.1733, Tally(0, 74, 0, 61_440), num_zero_gradients=74)

_TIE = Finding(
    code="NH203",
    name="eigenvector-gradient-at-tie",
    severity="error",
    certainty="tested",
    cause="eigenvector-gradient-at-tied-spectrum",
    message="eigenvalue gap 0 at graph 371 of 1,280: values 15 and 16 are both 1.00000989",
    location=Location(
        phase="backward",
        op="aten::div_",
        forward_op="aten::_linalg_eigh",
        module="graph.encoding",
        source=SourceLine(
            "/home/ada/[runs]/detector/graph.py",
            118,
            "values_BTN, vectors_BTNN = torch.linalg.eigh(laplacian_BTNN + self.shift * torch.eye(19, device=device))",
            "forward",
        ),
        step=19,
    ),
    evidence={
        "matrix_index": 371,
        "tied_positions": [15, 16],
        "eigenvalue": 1.0000098943710327,
        "nodes_tied": list(range(19)),
        "spacing_of_floats_there": 1.1920928955078125e-07,
        "num_elements": 61_440,
        "min_gap": 0.0,
        "worst": -math.inf,
        "is_batched": True,
    },
    notes=(
        "the tied eigenvectors live on nodes 0, 1, 2, 3, 4, 5 and 13 more",
        "the backward pass divides by the gap between eigenvalues; the forward pass is finite",
    ),
    help=(
        "detach the eigenvectors, if the model only needs them as features",
        "adding eps to the diagonal moves all eigenvalues alike and leaves the gap at 0",
    ),
)
_STATE = Finding(
    code="NH701",
    name="non-finite-state",
    severity="warning",
    certainty="observed",
    cause="non-finite-state",
    message="optimizer state exp_avg_sq of detector.encoder.blocks.0.convolution.weight holds 1 NaN among 1 element",
    location=Location(phase="weights", module="exp_avg_sq of detector.encoder.blocks.0.convolution.weight", step=19),
)


@pytest.fixture
def full_report() -> Report:
    return Report(
        title="replay of bad_batch_000019.pt",
        facts=(
            ("step", "19"),
            ("target", "detector.small-incident"),
            ("loss", "0.173287"),
            ("operations", "14,302"),
            ("sample 0", "synthetic seed 0, window 76: flat Fp1 Fp2 F7 F3 Fz F4 F8 T3 C3 Cz C4 T4 T5 0.0-10.0 s"),
        ),
        findings=(_TIE, _STATE),
        chain=(
            ChainLink("aten::div_ in the backward of aten::_linalg_eigh", "722 of 462,080 elements"),
            ChainLink("later operations", "4,711 non-finite"),
            ChainLink("parameter gradients", "31 of 74 tensors (20,480 of 61,440 elements)"),
            ChainLink("after clip_grad_norm_", "74 of 74 tensors (61,440 of 61,440 elements)"),
            ChainLink("next forward", "raises LinAlgError: linalg.eigh: (Batch element 0): the input has NaN"),
        ),
        grid=(
            GridCell("captured", "bad", None, _BACKWARD),
            GridCell("captured", "control", None, _GOOD),
            GridCell("fresh", "bad", 0, _FORWARD),
            GridCell("fresh", "control", 11, _STEP),
        ),
        experiments=(
            ExperimentResult("detach-offender", "positional encoding detached", "model", _GOOD),
            ExperimentResult("float64", "weights and batch in float64", "precision", _BACKWARD),
            ExperimentResult("nan-to-num", "nan_to_num on the model's output and on all gradients", "mask", _DEAD),
            ExperimentResult("other-batch", "sample 3 replaced by one of the control batch", "data", _FORWARD),
            ExperimentResult(
                "lower-rate", "learning rate a tenth", "optimizer", None, skipped="the target makes no optimizer"
            ),
            ExperimentResult("groups", "no weight decay on norms and biases", "optimizer", _STEP),
        ),
        baseline=_BACKWARD,
        determinism=Determinism("bit-identical", "loss and 74 of 74 gradients"),
        verdict=Verdict(
            "tested",
            (
                "eigenvector-gradient-at-tied-spectrum: with the positional encoding detached the same step is finite",
                "nan_to_num (mask) makes it finite as well, with 74 of 74 gradients zero",
                "the batch alone does not explain it: captured weights, control batch, is finite",
            ),
            flipped=("detach-offender", "nan-to-num"),
            unmoved=("float64", "other-batch", "groups"),
        ),
        skips=(
            Skip("the captured control batch", "none was captured; the target made one from seed 0"),
            Skip("looking at 3 sparse tensors", "its values cannot be read"),
        ),
        seconds=12.345,
        num_steps=11,
    )
