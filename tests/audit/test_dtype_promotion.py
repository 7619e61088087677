"""How torch promotes types, and that the report says so: a claim to the contrary is measured here."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import nanhunt
from nanhunt.audit.dtype_tables import promotions


class Types(TorchDispatchMode):
    """Types of every result of a step, written down by a few lines of the test's own."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.append((func._schema.name, str(result.dtype).removeprefix("torch.")))
        return result


def test_float32_with_float16_is_float32_and_its_backward_does_not_go_lower():
    wide, half = torch.randn(4, requires_grad=True), torch.randn(4, dtype=torch.float16, requires_grad=True)
    with Types() as types:
        product = wide * half
        forward, types.seen = types.seen, []
        product.backward(torch.ones(4))
    assert forward == [("aten::mul", "float32")]
    assert [dtype for name, dtype in types.seen if name == "aten::mul"] == ["float32", "float32"]
    # Only the gradient of the half operand is cast, at the end, to the type of that operand.
    assert [dtype for name, dtype in types.seen if name == "aten::_to_copy"] == ["float16"]
    assert (wide.grad.dtype, half.grad.dtype) == (torch.float32, torch.float16)
    assert torch.equal(wide.grad, half.detach().float())


def test_the_audit_sees_the_same():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = nn.Parameter(torch.randn(4))
            self.narrow = nn.Parameter(torch.randn(4).half())

        def forward(self):
            return self.wide * self.narrow

    tables = {table.title: table.rows for table in nanhunt.audit_dtype(Mixed(), ()).tables}
    changes = [(row[0], row[3]) for row in tables["where dtypes change, forward"]]
    assert changes == [("f32 + f16 -> f32", "mul")]
    assert [(row[0], row[3]) for row in tables["where dtypes change, backward"]] == [
        ("f32 + f16 -> f32", "mul"),
        ("f32 -> f16", "to_copy"),
    ]


def test_the_table_is_what_torch_says():
    table = promotions()
    assert dict(table.rows) == {
        "float16 and float32": "float32",
        "bfloat16 and float16": "float32",
        "float16 and a 0-dim float32 tensor": "float16",
        "float16 and a plain number": "float16",
        "float16 and int64": "float16",
        "float32 and a 0-dim float64 tensor": "float32",
    }
    assert table.note.endswith("a matrix product of two types raises")


@pytest.mark.parametrize(("one", "other"), [(torch.float32, torch.float16), (torch.bfloat16, torch.float16)])
def test_two_halves_of_different_kinds_widen(one, other):
    assert (torch.ones(2, dtype=one) + torch.ones(2, dtype=other)).dtype == torch.float32
