"""A report with everything in it, made by hand: what a replay of the incident gives, and what it rarely does."""

import math

import pytest

from nanhunt.findings import ChainLink, DataTable, Finding, Location, Magnitudes, Report, Skip, Verdict
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
            ChainLink("aten::div_ in the backward of aten::_linalg_eigh", "722 of 462,080 elements", 722, 462_080),
            ChainLink("later operations", "4,711 non-finite"),
            ChainLink("parameter gradients", "31 of 74 tensors (20,480 of 61,440 elements)", 20_480, 61_440),
            ChainLink("after clip_grad_norm_", "74 of 74 tensors (61,440 of 61,440 elements)", 61_440, 61_440),
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


_GROWTH = Finding(
    code="NH104",
    name="growing-activation",
    severity="warning",
    certainty="observed",
    cause="growing-activation",
    message="output 3.2e+05 at step 2, 3,200 times as large as at first",
    location=Location("forward", module="blocks.1.norm", step=2),
)
_LOG = Finding(
    code="NH501",
    name="log-of-nonpositive",
    severity="error",
    certainty="observed",
    cause="log-of-nonpositive",
    message="log of 0 at 2 elements, first at [1, 0]",
    location=Location(
        "forward", op="aten::log", source=SourceLine("/home/ada/train.py", 18, "loss = p.log().mean()"), step=4
    ),
    evidence={"lowest_argument": 0.0},
)


@pytest.fixture
def traced_report() -> Report:
    """A loop that grew, and then failed in a step that was not sampled."""
    inf, nan = math.inf, math.nan
    return Report(
        title="traced loop",
        facts=(("steps", "5"),),
        findings=(_LOG, _GROWTH),
        chain=(ChainLink("aten::log", "2 of 4 elements", 2, 4), ChainLink("loss", "loss")),
        verdict=Verdict("observed", ("log-of-nonpositive: the values at the offending elements say so",)),
        seconds=0.25,
        magnitudes=Magnitudes(
            modules=("embed", "blocks.0", "blocks.1", "head", ""),
            steps=(0, 1, 2, 5),
            activations=(
                (1.0, 1.0, 1.0, 1.0),
                (1.0, 10.0, 100.0, 1e3),
                (1.0, 1e3, 1e5, inf),
                (0.0, 0.0, None, nan),
                (1.0, 2.0, 3.0, nan),
            ),
            gradients=(
                (0.1, None, None, nan),
                (0.1, None, None, nan),
                (0.1, None, None, nan),
                (0.0, None, None, 1e-30),
                (1.0, None, None, 1.0),
            ),
        ),
    )


@pytest.fixture
def audit_report() -> Report:
    """Tables of several shapes, rules that found nothing, and one finding."""
    layers = tuple((f"encoder.blocks.{n}.attention.out_proj", 0.5 * n, f"{n}e-3", n == 2) for n in range(4))
    wide = tuple(f"column {number} of many" for number in range(12))
    return Report(
        title="audit-init of mymodel:target",
        facts=(("initialisations", "3"),),
        findings=(_GROWTH,),
        chain=(),
        verdict=Verdict("observed", ("0 errors, 1 warning; 2 rules found nothing", "audited, not run")),
        passes=("NH101", "NH203"),
        tables=(
            DataTable("layers", ("layer", "gain", "gradient", "dead"), layers, "gain: output over input"),
            DataTable("much of each", wide, (tuple(range(100_000, 100_012)), ("x" * 30,) * 12)),
            DataTable("empty", ("a", "b"), ()),
        ),
        skips=(Skip("the schedule", "no schedule was given"),),
        seconds=1.5,
    )


@pytest.fixture
def hostile_report(full_report) -> Report:
    """Names, paths, lines and messages that would like to be more than that."""
    script = "<script>document.documentElement.dataset.owned = 1</script>"
    image = '<img src=x onerror="document.documentElement.dataset.owned = 2">'
    link = "<a href='https://example.org/owned'>blocks</a>"
    breaking = "</script>--><script>document.documentElement.dataset.owned = 3</script><!--"
    ends = "\"' \u202egnp.exe\x00\x1b[31m \ud800 ]]>%0A::error::{{ 7 * 7 }} ${7 * 7} %3C"
    place = Location(script, image, breaking, link, link, SourceLine(f"/{script}/a,b:c.py", 3, breaking, image), 1)
    bad = Finding(
        script, ends, "error", "observed", image, breaking, place, {script: image, "n": [ends]}, (ends,), (link,)
    )
    row = (script, image, breaking, link, ends)
    numbers = (1.0, math.nan)
    return Report(
        title=f"{script}{ends}",
        facts=((image, breaking), (ends, link)),
        findings=(bad,),
        chain=(ChainLink(script, image, 1, 2), ChainLink(breaking, ends)),
        verdict=Verdict("tested", (script, image, breaking, ends)),
        grid=full_report.grid[2:3],
        experiments=(ExperimentResult(script, breaking, "mask", None, skipped=image, note=ends),),
        baseline=StepOutcome(math.nan, error=breaking, failed_phase="forward"),
        determinism=Determinism("differs", script),
        skips=(Skip(breaking, script), Skip(ends, image)),
        passes=(script, ends),
        tables=(DataTable(breaking, row, (row, row), script),),
        magnitudes=Magnitudes((link, breaking), (0, 1), (numbers, numbers), (numbers, numbers)),
        absence=script,
    )
