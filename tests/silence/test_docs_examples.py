"""The examples in the docstrings of ``torch.nn`` and ``torch.nn.functional``, run under the tracer: nothing is found.

Every tensor that an example leaves is said to be a result, so that what is wrong with it would be found without a
backward pass too.
"""

import ast
import doctest
import inspect
import math
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, autograd, nn

import nanhunt

_NAMES = {"torch": torch, "nn": nn, "F": F, "autograd": autograd, "math": math, "print": lambda *values: None}

# Examples that do not run as they stand, and what torch says of their first statement that does not.
NOT_RUN = {
    "torch.nn.DataParallel": "NameError: name 'model' is not defined",
    "torch.nn.EmbeddingBag": "SyntaxError: '(' was never closed",
    "torch.nn.Fold": "AttributeError: 'builtin_function_or_method' object has no attribute 'shape'",
    "torch.nn.MaxUnpool2d": "SyntaxError: invalid syntax. Maybe you meant '==' or ':=' instead of '='?",
    "torch.nn.MultiheadAttention": "NameError: name 'embed_dim' is not defined",
    "torch.nn.SyncBatchNorm": "ValueError: Default process group has not been initialized",
    "torch.nn.TripletMarginWithDistanceLoss": "RuntimeError: Trying to backward through the graph a second time",
    "torch.nn.Unfold": "AttributeError: 'builtin_function_or_method' object has no attribute 'shape'",
    "torch.nn.functional.scaled_dot_product_attention": "AssertionError: Torch not compiled with CUDA enabled",
}
# Examples that are wrong: the power 1.2 of negative numbers is NaN, and half of torch.randn is negative.
WRONG = {"torch.nn.LPPool2d": "aten::pow"}
# Examples that are left out, and why.
LEFT_OUT = {"torch.nn.LPPool3d": "wrong as LPPool2d is, with 22 million elements"}


class Ran(NamedTuple):
    """What became of an example.

    Attributes:
        findings: Code and operation of each finding.
        skips: What the tracer could not look at.
        problem: What the first statement that failed said; empty where all ran.
    """

    findings: list[tuple[str, str]]
    skips: list[str]
    problem: str


def examples() -> Iterator[tuple[str, str]]:
    """Name and code of every public name whose own docstring has an example."""
    for space in (nn, F):
        for name in sorted(vars(space)):
            thing = getattr(space, name)
            doc = getattr(thing, "__doc__", None)
            if name.startswith("_") or inspect.ismodule(thing) or not isinstance(doc, str):
                continue
            code = "".join(example.source for example in doctest.DocTestParser().get_examples(doc))
            if code and f"{space.__name__}.{name}" not in LEFT_OUT:
                yield f"{space.__name__}.{name}", code


EXAMPLES = dict(examples())


@cache
def ran(name: str) -> Ran:
    return run(EXAMPLES[name])


def run(code: str) -> Ran:
    """Runs the statements one by one; after one that fails, those that do not need it still run."""
    torch.manual_seed(0)
    names: dict[str, Any] = dict(_NAMES)
    problems = []
    try:
        statements = ast.parse(code).body
    except SyntaxError as error:
        return Ran([], [], f"SyntaxError: {error.msg}")
    with nanhunt.trace() as hunt:
        for statement in statements:
            try:
                exec(compile(ast.Module([statement], []), "<example>", "exec"), names)
            except Exception as error:  # noqa: BLE001 - examples need what is not there; the test lists them
                problems.append(f"{type(error).__name__}: {error}")
        results = [(name, value) for name, value in names.items() if isinstance(value, Tensor)]
        hunt.reached("output", [pair for pair in results if pair[1].is_floating_point() or pair[1].is_complex()])
    report = hunt.report()
    found = [(finding.code, finding.location.op) for finding in report.findings]
    return Ran(found, [f"{skip.what}: {skip.reason}" for skip in report.skips], (problems or [""])[0])


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in WRONG])
@pytest.mark.filterwarnings("ignore")
def test_an_example_of_the_documentation_has_no_finding(name: str):
    assert ran(name).findings == []
    assert ran(name).skips == []


@pytest.mark.parametrize("name", WRONG)
def test_an_example_that_gives_nan_is_found(name: str):
    [(code, operation)] = ran(name).findings
    # Of the forward pass, whichever rule has a name for it.
    assert (code[:3], operation) == ("NH1", WRONG[name])


@pytest.mark.filterwarnings("ignore")
def test_examples_that_could_not_be_run_are_these():
    problems = {name: ran(name).problem for name in EXAMPLES}
    failed = {name: problem for name, problem in problems.items() if problem}
    unexpected = {name: problem for name, problem in failed.items() if not problem.startswith(NOT_RUN.get(name, "\0"))}
    assert unexpected == {}
    # One of them runs where there is a GPU.
    assert len(NOT_RUN) - 1 <= len(failed) <= len(NOT_RUN)
    assert len(EXAMPLES) - len(failed) >= 150


@pytest.mark.parametrize(
    ("code", "operation"),
    [
        ("x = torch.zeros(3, requires_grad=True)\ny = x.log()\n", "aten::log"),
        ("x = torch.zeros(3, requires_grad=True)\nx.sqrt().sum().backward()\n", "aten::div"),
        ("undefined(3)\nm = nn.Softmax(0)\ny = m(torch.full((3,), -torch.inf))\n", "aten::_softmax"),
    ],
)
def test_what_is_wrong_in_an_example_would_be_found(code: str, operation: str):
    assert [found for _, found in run(code).findings] == [operation]
