"""Matrices without an inverse among those that an operation was to invert or to solve with."""

from typing import Any

import torch
from torch import Tensor

from nanhunt.observe.op_info import FocusedOp
from nanhunt.records.evidence import Singular

# Operations that read a triangle, and the argument that holds it.
_TRIANGLES = {
    "linalg_solve_triangular": "self",
    "triangular_solve": "A",
    "linalg_lu_solve": "LU",
    "cholesky_solve": "input2",
    "cholesky_inverse": "self",
}


def singular_matrices(op: FocusedOp) -> Singular | None:
    """The matrices that an exact zero made impossible to invert; None where there is none.

    Args:
        op: The operation: its error codes, the sign of its determinant or the diagonal of its triangle tell.
    """
    name = op.op.removeprefix("aten::")
    if name in _TRIANGLES:
        values: dict[str, Any] = dict(zip(op.schema_names, op.args, strict=False)) | op.kwargs
        triangle = values.get(_TRIANGLES[name])
        if not isinstance(triangle, Tensor) or values.get("unitriangular"):
            return None
        zeros = triangle.detach().diagonal(dim1=-2, dim2=-1) == 0
        where = zeros.any(-1)
        return _described(where, zeros.to(torch.int8).argmax(-1), is_triangular=True) if bool(where.any()) else None
    if name in ("_linalg_solve_ex", "linalg_inv_ex") and op.outputs[-1].dtype == torch.int32:
        codes = op.outputs[-1].detach()
        return _described(codes > 0, codes - 1) if bool((codes > 0).any()) else None
    if name == "_linalg_slogdet":
        where = op.outputs[0].detach() == 0
        return _described(where) if bool(where.any()) else None
    return None


def _described(where: Tensor, zero_at: Tensor | None = None, *, is_triangular: bool = False) -> Singular:
    first = tuple(int(index) for index in where.nonzero()[0]) if where.dim() else ()
    return Singular(
        num_singular=int(where.sum()),
        num_matrices=where.numel(),
        position=first,
        zero_at=int(zero_at[first]) if zero_at is not None else None,
        is_triangular=is_triangular,
    )
