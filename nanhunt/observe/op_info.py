"""What an operation is: its name, what it writes, and whether it can make a non-finite value at all."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Outputs that hold whatever the memory held.
_UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "resize_"}

# Operations that only move finite values, bound them or compare them: from finite inputs they make finite outputs, so
# the look is saved. A conversion may overflow and is looked at where the type gets smaller; what takes a constant that
# may be infinite is not among them. In order: views and copies; moves; constants and random numbers of bounded size;
# what is bounded by its argument or by 1; comparisons and counts.
_MOVES_OR_BOUNDS = """
alias as_strided as_strided_ clone contiguous detach detach_ diagonal diagonal_scatter expand expand_as flatten lift
movedim narrow permute reshape _reshape_alias _reshape_copy select select_scatter slice
slice_scatter split split_with_sizes squeeze squeeze_ swapaxes t t_ transpose transpose_ unbind unfold unflatten
unsqueeze unsqueeze_ view view_as view_as_complex view_as_real _unsafe_view real imag _conj _conj_physical
resolve_conj resolve_neg _neg_view conj_physical set_
cat concat stack hstack vstack flip roll repeat repeat_interleave tile gather index index_select take take_along_dim
embedding unfold_backward slice_backward select_backward diagonal_backward narrow_copy rot90 pixel_shuffle
pixel_unshuffle channel_shuffle masked_select masked_scatter tril triu tril_ triu_ diag_embed _foreach_copy
_pack_padded_sequence _pad_packed_sequence nonzero upsample_nearest1d upsample_nearest2d reflection_pad1d
reflection_pad2d replication_pad1d replication_pad2d
zeros zeros_like ones ones_like zero_ new_zeros new_ones eye arange rand rand_like randn randn_like randint
randint_like randperm bernoulli bernoulli_ multinomial random_ _foreach_zero_
neg sign sgn relu relu_ relu6 sigmoid sigmoid_ tanh tanh_ sin cos atan erf gelu gelu_
hardsigmoid threshold_backward
sigmoid_backward tanh_backward floor ceil round trunc frac max min
amax amin aminmax sort topk kthvalue median mode argmax argmin argsort
_foreach_neg _foreach_sign
max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d
eq ne lt le gt ge logical_and logical_or logical_not logical_xor isnan isinf isfinite isposinf isneginf any all
bitwise_and bitwise_or bitwise_not bitwise_xor count_nonzero searchsorted bucketize bincount
unique _unique2 _record_function_enter_new _record_function_exit _record_function_enter
_local_scalar_dense is_same_size equal size stride numel sym_size"""
_CANNOT_CREATE = frozenset(_MOVES_OR_BOUNDS.split())

# Conversions: what they can create depends on the types.
_CONVERSIONS = {"_to_copy", "to", "copy_", "_foreach_copy_"}

# Operations in place that do not read what they write to; those with ``out=`` do not either.
_OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "normal_", "uniform_", "bernoulli_"}

# Operations that write to the running statistics in training although their schema does not say so: the positions of
# the statistics and of the training flag.
_BATCH_NORMS = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"}
_STATISTICS, _TRAINING = slice(3, 5), 5

# A tensor made of Python numbers is seen for the first time here; its memory is not new.
_RENAMES = {"lift_fresh", "lift_fresh_copy"}

# Operations that put a constant where they are told to; others compute with it.
_PLACES_CONSTANTS = frozenset(
    f"{name}{in_place}"
    for name in (
        *("masked_fill", "fill", "full", "full_like", "new_full", "scalar_tensor", "constant_pad_nd", "scatter"),
        *("index_fill", "where", "fill_diagonal", "threshold", "clamp", "clamp_min", "clamp_max", "lift_fresh"),
    )
    for in_place in ("", "_")
)

_COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional", "_dtensor")
# Of these namespaces, what receives nothing: the end of a collective that was begun before, and what only sends.
_RECEIVES_NOTHING = {
    *("wait_tensor", "_wrap_tensor_autograd", "send", "isend", "barrier", "monitored_barrier_", "check_for_nan"),
    "mesh_get_process_group",
}


@dataclass(frozen=True)
class OpTraits:
    """What the schema of an operation and its name say once and for all.

    Attributes:
        name: ``div_`` for ``aten.div_.Tensor``.
        full_name: ``aten::div_``.
        creates: Whether a non-finite value can come out of finite ones.
        renames: Whether its result is the memory of its argument, but with other values or seen for the first time.
        writes_beside: Whether it writes to more than what it returns.
        shrinks: Whether it multiplies by a plain number, so that nothing can come of it if that number is at most 1.
        converts: Whether that depends on the types.
        writes: Positions and names of the arguments it writes to.
        overwrites: Whether it does not read them before.
        is_uninitialised: Whether the result is whatever the memory held.
        is_collective: Whether the result comes from other processes as well.
        is_batch_norm: Whether it writes running statistics that its schema does not name.
        is_foreach: Whether it works on lists of tensors, one after another.
        argument_names: Names of the arguments in its schema.
    """

    name: str
    full_name: str
    creates: bool
    renames: bool
    writes_beside: bool
    shrinks: bool
    converts: bool
    writes: tuple[tuple[int, str], ...]
    overwrites: bool
    is_uninitialised: bool
    is_collective: bool
    is_batch_norm: bool
    is_foreach: bool
    argument_names: tuple[str, ...]


# By identity, for the hash of an operation is worked out in Python; the operation is kept so that its identity stays.
TRAITS: dict[int, tuple[OpTraits, Any]] = {}


def traits_of(func: Any) -> OpTraits:
    """The traits of an operation, worked out once."""
    known = TRAITS.get(id(func))
    if known is None:
        known = TRAITS[id(func)] = (_worked_out(func), func)
    return known[0]


def _worked_out(func: Any) -> OpTraits:
    schema = getattr(func, "_schema", None)
    name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
    namespace = getattr(func, "namespace", "")
    arguments = schema.arguments if schema is not None and schema.is_mutable else ()
    written = [
        (position, argument.name, argument.is_out)
        for position, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    is_aten = namespace in ("aten", "prim", "profiler", "")
    is_harmless = is_aten and (name in _CANNOT_CREATE or name in _CONVERSIONS or name in _UNINITIALISED)
    has_out = any(is_out for *_, is_out in written)
    is_reinterpreting = name == "view" and getattr(func, "_overloadname", "") == "dtype"
    is_quiet = namespace in _COLLECTIVES and name in _RECEIVES_NOTHING
    is_collective = namespace in _COLLECTIVES and not is_quiet
    if is_collective and not written:
        written = _received(namespace, name, schema)
    return OpTraits(
        name=name,
        full_name=op_name(func),
        creates=not is_quiet and (not is_harmless or has_out or is_reinterpreting),
        renames=name in _RENAMES or is_reinterpreting,
        writes_beside=name in _BATCH_NORMS or (bool(written) and not _returns_what_it_writes(schema, len(written))),
        shrinks=_shrinks(func, name),
        converts=is_aten and name in _CONVERSIONS,
        writes=tuple((position, argument) for position, argument, _ in written),
        overwrites=bool(written) and (name in _OVERWRITES or all(is_out for *_, is_out in written)),
        is_uninitialised=is_aten and name in _UNINITIALISED,
        is_collective=is_collective,
        is_batch_norm=name in _BATCH_NORMS,
        is_foreach=name.startswith("_foreach_"),
        argument_names=tuple(argument.name for argument in schema.arguments) if schema is not None else (),
    )


def _received(namespace: str, name: str, schema: Any) -> list[tuple[int, str, bool]]:
    """The arguments that a collective writes to, which its schema does not say; none where it returns new memory."""
    names = list(enumerate(argument.name for argument in schema.arguments))
    outputs = [(position, argument, True) for position, argument in names if argument.startswith("output")]
    if outputs or namespace != "c10d":
        return outputs
    return [(0, names[0][1], name.startswith("recv"))]


def _returns_what_it_writes(schema: Any, num_written: int) -> bool:
    """Whether the one result is the one argument written to."""
    returned = schema.returns
    return num_written == 1 and len(returned) == 1 and returned[0].alias_info is not None


def _shrinks(func: Any, name: str) -> bool:
    overload = getattr(func, "_overloadname", "")
    return name in ("mul", "mul_", "_foreach_mul", "_foreach_mul_") and overload == "Scalar"


class FocusReached(BaseException):
    """Ends a step whose remaining operations nobody needs; no handler of the user's for ``Exception`` may stop it."""


@dataclass
class FocusedOp:
    """The values of one operation, kept for the rules: arguments before it ran, outputs after."""

    op: str
    schema_names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...] = ()


def op_name(func: Any) -> str:
    """``aten::div_`` for ``aten.div_.Tensor``."""
    schema = getattr(func, "_schema", None)
    return schema.name if schema is not None else str(func)


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors among arguments or results; lists and tuples of tensors, as operations take them, are opened."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(tensors_in(*value))
        elif isinstance(value, dict):
            found.extend(tensors_in(*value.values()))
    return found


def written(traits: OpTraits, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that the operation writes to: in place, ``out=``, lists, running statistics."""
    if traits.is_batch_norm:
        return [tensor for tensor in args[_STATISTICS] if tensor is not None] if args[_TRAINING] else []
    values = [args[position] if position < len(args) else kwargs.get(name) for position, name in traits.writes]
    return tensors_in(*values)


def bump_versions(traits: OpTraits, args: Any, kwargs: Any) -> None:
    """Operations on lists do not count up the versions of what they write to while a mode is on, as they should.

    Autograd would not notice that a saved tensor was written to.
    """
    tensors = [tensor for tensor in written(traits, args, kwargs) if not tensor.is_inference()]
    torch.autograd.graph.increment_version(tensors)


def is_narrowing(traits: OpTraits, args: Any, output: Any) -> bool:
    """Whether a conversion can overflow: its result has a smaller type than what it was made of."""
    if traits.name.startswith("_foreach"):
        made, given = args[0][0], args[1][0]
    elif traits.writes:
        made, given = args[0], args[1]
    else:
        made, given = output, args[0]
    if not (isinstance(given, Tensor) and isinstance(made, Tensor) and made.is_floating_point()):
        return False
    return made.dtype != given.dtype and torch.finfo(made.dtype).max < _largest(given.dtype)


def _largest(dtype: torch.dtype) -> float:
    if dtype.is_complex:
        return torch.finfo(dtype).max
    return (
        torch.finfo(dtype).max
        if dtype.is_floating_point
        else float(torch.iinfo(dtype).max)
        if dtype != torch.bool
        else 1.0
    )


def is_deliberate(name: str, args: Any, kwargs: Any, bad: Sequence[Tensor], *, makes_nan: bool) -> bool:
    """Whether a plain number among the arguments was put into the result on purpose.

    NaN accounts for NaN, an infinity for infinities; a sum with -inf is a mask if it gives nothing else.

    Args:
        name: Name of the operation.
        args: Its positional arguments.
        kwargs: Its others.
        bad: Its non-finite results.
        makes_nan: Whether NaN is among them.
    """
    if name.startswith("lift_fresh"):
        return not makes_nan and all(tensor.numel() == 1 for tensor in bad)
    constants = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, float) and not math.isfinite(leaf)]
    if not any(math.isnan(constant) or not makes_nan for constant in constants):
        return False
    if name in _PLACES_CONSTANTS:
        return True
    is_sum = name.rstrip("_") in ("add", "sub", "rsub")
    return is_sum and not makes_nan and all(bool((tensor < torch.inf).all()) for tensor in bad)


def has_nonfinite_number(args: Any, kwargs: Any) -> bool:
    """Whether a plain number among the arguments is NaN or infinite."""
    return any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in tree_leaves((args, kwargs)))


def is_log_of_mask(name: str, args: Any) -> bool:
    """Whether it is the logarithm of exact zeros and ones that no gradient is wanted of."""
    if name not in ("log", "log2", "log10", "log_") or args[0].requires_grad:
        return False
    return bool(((args[0] == 0) | (args[0] == 1)).all())


def is_refusal(error: Exception) -> bool:
    """Whether an operation raised over the values it was given, not over shapes or types."""
    if isinstance(error, torch.linalg.LinAlgError):
        return True
    return isinstance(error, RuntimeError | ValueError) and bool(re.search(r"\b(nan|inf)\b", str(error), re.IGNORECASE))


def speaks_of_values(error: Exception) -> bool:
    """Whether a program's own error is about non-finite values, as far as its type and words tell."""
    words = r"nan|inf|infinite|infinity|(non-?)?finite|overflow\w*|diverg\w*|explod\w*|invalid"
    return isinstance(error, ArithmeticError | AssertionError) or bool(re.search(rf"\b({words})\b", str(error), re.I))


def copied(values: Any) -> Any:
    """The same structure with copies of the tensors."""
    return torch.utils._pytree.tree_map(lambda leaf: copy_of(leaf) if isinstance(leaf, Tensor) else leaf, values)


def copy_of(tensor: Tensor) -> Tensor:
    """A copy with its own memory; autograd's zero tensors get theirs here."""
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.detach().clone()
