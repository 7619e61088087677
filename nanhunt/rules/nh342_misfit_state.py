"""misfit-state: the optimizer's state has another shape than the weights, a coarser type, or another number of entries.

What it does:
    Compares moments that belong to single weights with the parameter: their shape, and a type with fewer bits than the
    parameter's. With a target, it also compares the number of parameters in the groups.

Why it matters:
    torch assigns state to parameters by their number in the groups. Groups in another order, or of another model, load
    without complaint as long as the count agrees; the step then fails, or goes on with the moments of other weights.
    In float16 second moments the squares of ordinary gradients are 0.

Use instead:
    Load the state into an optimizer whose groups are made the same way, from the same model.

Known limits:
    State of another parameter of the same shape cannot be told. A type with more bits than the parameter's is common
    for half-precision weights and passes; ``load_state_dict`` of torch casts it down.
"""

from nanhunt.findings import Location, Skip
from nanhunt.numerics import LIMITS, count
from nanhunt.records.optimizer_audit import StateFacts, StoredState
from nanhunt.rules.registry import Judgement, Rule


def _judge(state: StoredState) -> tuple[Judgement, ...] | Skip | None:
    found = [one for one in (_number(state), _shape(state), _dtype(state)) if one is not None]
    if state.entries and not found and all(one.expected_shape is None for one in state.entries):
        return Skip("the state's shapes", "shapes and types of the parameters are not known: give --target")
    return tuple(found) or None


def _number(state: StoredState) -> Judgement | None:
    if state.num_expected is None or not state.num_parameters or state.num_expected == state.num_parameters:
        return None
    return Judgement(
        f"the state is of {count(state.num_parameters, 'parameter')}, the target's optimizer has"
        f" {state.num_expected:,}",
        evidence={"num_parameters": state.num_parameters, "num_expected": state.num_expected},
        help=("check --target and --config, or how the groups are made",),
        location=Location("optimizer"),
    )


def _shape(state: StoredState) -> Judgement | None:
    found = [one for one in state.entries if one.expected_shape is not None and one.shape != one.expected_shape]
    if not found:
        return None
    first = found[0]
    return Judgement(
        f"{first.what} in {state.origin} has shape {_text(first.shape)},"
        f" the weight {_text(first.expected_shape or ())}",
        evidence={
            "shape": list(first.shape),
            "weight_shape": list(first.expected_shape or ()),
            "num_misfits": len(found),
        },
        help=("make the groups in the order in which they were saved",),
        location=Location("optimizer", tensor=first.parameter),
    )


def _dtype(state: StoredState) -> Judgement | None:
    found = [one for one in state.entries if _is_coarser(one)]
    if not found:
        return None
    first = found[0]
    return Judgement(
        f"{first.what} in {state.origin} is {first.dtype}, the weight {first.expected_dtype}",
        evidence={"dtype": first.dtype, "weight_dtype": first.expected_dtype, "num_coarser": len(found)},
        help=("save the optimizer's state in the type of the weights",),
        location=Location("optimizer", tensor=first.parameter),
        severity="warning",
    )


def _is_coarser(entry: StateFacts) -> bool:
    both = LIMITS.get(entry.dtype), LIMITS.get(entry.expected_dtype)
    return both[0] is not None and both[1] is not None and both[0].eps > both[1].eps


def _text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


RULE = Rule("NH342", "misfit-state", "misfit-state", _judge, StoredState)


def _state(dtype: str = "float32", shape: tuple[int, ...] = (2, 3), expected: str = "float32") -> StoredState:
    return StoredState("the file", (StateFacts("head.weight", "exp_avg", dtype, shape, expected, (2, 3)),))


FLAGGED = (_state(shape=(3, 2)), _state("float16"), StoredState("the file", num_parameters=4, num_expected=6))
CLEAN = (_state(), _state(expected="bfloat16"), StoredState("the file", num_parameters=4, num_expected=4))
