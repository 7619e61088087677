"""The model as a whole, where only a part of it is seen: a trainer calls a submodule, or a wrapper around the model."""

import gc
from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor, nn

_INNER = ("_orig_mod", "_fsdp_wrapped_module", "_original_module")
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def wrapped_by(module: nn.Module) -> nn.Module | None:
    """What a wrapper of a framework's is put around; None if the module is no such wrapper."""
    if isinstance(module, _WRAPPERS):
        return module.module
    return next((inner for name in _INNER if (inner := module._modules.get(name)) is not None), None)


def unwrapped(module: nn.Module) -> nn.Module:
    """The model itself, without what ``torch.compile``, DistributedDataParallel or Fabric put around it."""
    while (inner := wrapped_by(module)) is not None:
        module = inner
    return module


def holder_of(module: nn.Module) -> nn.Module:
    """The outermost module of the program that holds this one, wrappers looked through.

    Where several hold it and none of them the others, nothing tells which is meant, and it is the module itself.
    """
    module = unwrapped(module)
    roots = _roots({id(module): module})
    return roots[0] if len(roots) == 1 else module


def holder_of_tensors(tensors: Iterable[Tensor]) -> nn.Module | None:
    """The one outermost module that holds any of these parameters; None if there is none, or several."""
    wanted = {id(tensor) for tensor in tensors}
    owners = {
        id(module): module
        for module in _alive()
        if any(id(parameter) in wanted for parameter in module._parameters.values())
    }
    roots = _roots(owners)
    return roots[0] if len(roots) == 1 else None


def path_in(root: nn.Module, module: nn.Module) -> str:
    """The dotted path of the module in ``root``; '' for ``root`` itself and for what is not in it."""
    return next((name for name, part in root.named_modules() if part is module), "")


def _alive() -> list[nn.Module]:
    """Every module of the program; by type, for asking objects themselves may run code of theirs."""
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    return [module for module in modules if "_modules" in vars(module)]


def _roots(found: dict[int, nn.Module]) -> list[nn.Module]:
    """Those modules above the given ones that nothing but wrappers is above."""
    if not found:
        return []
    parents: dict[int, list[nn.Module]] = defaultdict(list)
    for module in _alive():
        for child in module._modules.values():
            if child is not None:
                parents[id(child)].append(module)
    roots: dict[int, nn.Module] = {}
    seen = set(found)
    waiting = list(found.values())
    while waiting:
        module = waiting.pop()
        above = parents.get(id(module), [])
        if not above:
            whole = unwrapped(module)
            roots[id(whole)] = whole
        waiting += [parent for parent in above if id(parent) not in seen]
        seen |= {id(parent) for parent in above}
    return list(roots.values())
