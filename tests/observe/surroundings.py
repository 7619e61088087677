"""What a run leaves behind: the bits of its values, and what is hooked, patched or switched on in the process."""

import builtins
import gc
import random
import sys
import threading
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_PATCHABLE = (
    *(torch, torch.autograd, torch.autograd.graph, torch.autograd.Function, torch.Tensor, torch.autocast, torch.linalg),
    *(nn.Module, torch_module, nn.functional, nn.Parameter, nn.utils, torch.nn.utils.clip_grad, torch.utils.checkpoint),
    *(Optimizer, torch_optimizer, torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS, LRScheduler),
    *(
        torch.amp.GradScaler,
        torch.amp.grad_scaler,
        torch.func,
        torch.utils.data.DataLoader,
        random,
        np.random,
        builtins,
    ),
)
_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")


def bits(value: Any) -> Any:
    """The value as plain data that is equal exactly where every bit is: zeros have signs, tensors a layout."""
    if isinstance(value, Tensor):
        about = (type(value).__name__, str(value.dtype), tuple(value.shape), value.requires_grad)
        if value.layout is torch.sparse_coo:
            plain = value.detach()
            return (*about, plain.is_coalesced(), bits(plain._indices()), bits(plain._values()))
        return (
            *about,
            value.stride(),
            value.detach().as_subclass(Tensor).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, dict):
        return {str(key): bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tobytes()
    return value if isinstance(value, int | float | str | None) else type(value).__name__


def generators() -> dict[str, Any]:
    """The states of the random generators."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}  # noqa: NPY002
    return {f"generator {name}": bits(value) for name, value in state.items()}


def held(model: nn.Module, optimizer: Optimizer, extras: dict[str, Any]) -> dict[str, Any]:
    """Weights, buffers, moments and the rest of what a run has at a moment, with how often each was written to."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    state = {name: (bits(tensor), tensor._version, tensor.is_leaf) for name, tensor in tensors.items()}
    others = {name: item.state_dict() if hasattr(item, "state_dict") else item for name, item in extras.items()}
    return state | {"optimizer": bits(optimizer.state_dict())} | {name: bits(item) for name, item in others.items()}


def attached(model: nn.Module, *optimizers: Any) -> dict[str, Any]:
    """How many hooks each module, parameter and optimizer has, and which attributes."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found |= {f"{name}.{key}": len(value) for key, value in vars(module).items() if key.endswith(_HOOKS)}
        found[f"attributes of {name}"] = sorted(vars(module))
        found[f"mode of {name}"] = module.training
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found[f"{name}.{hooks}"] = len(getattr(tensor, hooks) or ())
        found[f"attributes of {name}"] = sorted(vars(tensor))
    for number, optimizer in enumerate(optimizers):
        found |= {f"{number}.{key}": len(value) for key, value in vars(optimizer).items() if key.endswith(_HOOKS)}
        found[f"attributes of optimizer {number}"] = sorted(vars(optimizer))
    return found


def process() -> dict[str, Any]:
    """What is patched, hooked or switched on for the whole process, by identity where it is a function."""
    state: dict[str, Any] = {}
    for owner in _PATCHABLE:
        for name, value in vars(owner).items():
            if not isinstance(value, ModuleType | int | float | str | dict | set | list):
                state[f"{owner.__name__}.{name}"] = id(value)
    for owner in (torch_module, torch_optimizer):
        hooks = {
            name: value for name, value in vars(owner).items() if name.startswith("_global") and name.endswith("hooks")
        }
        assert hooks
        state |= {f"{owner.__name__}.{name}": len(value) for name, value in hooks.items()}
    return state | {
        "dispatch modes": [id(mode) for mode in _get_current_dispatch_mode_stack()],
        "function modes": [id(mode) for mode in _get_current_function_mode_stack()],
        "saved tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(False) is not None,
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()),
        "defaults": (
            str(torch.get_default_dtype()),
            str(torch.get_default_device()),
            torch.get_float32_matmul_precision(),
        ),
        "interpreter": [id(item) for item in (sys.excepthook, sys.gettrace(), sys.getprofile(), threading.excepthook)],
        "collector": (gc.isenabled(), gc.get_threshold(), len(gc.callbacks)),
        "warnings": ([str(item) for item in warnings.filters], id(warnings.showwarning)),
        "threads": sorted(thread.name for thread in threading.enumerate()),
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of what is not the same in both, what only one has included."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name, ...) != theirs.get(name, ...))
