"""One process of a distributed run: trains under observation and writes down what it saw.

Started as ``ranks_run.py RANK RENDEZVOUS FOLDER SCENARIO...``.
"""

import contextlib
import functools
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import nanhunt
from nanhunt.findings import Finding, Report
from nanhunt.hunt import Hunt

NUM_STEPS, FAULT_STEP = 4, 2
Loss = Callable[[nn.Module, Tensor, bool], Tensor]


class Model(nn.Module):
    """A small network whose forward takes the logarithm of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.norm = nn.BatchNorm1d(4)
        self.is_bad = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.body(x.log()))  # mark: forward
        return y + (self.norm.bias[0] * 0).sqrt() if self.is_bad else y  # mark: first shard


def forward_fault(model: nn.Module, x: Tensor, is_bad: bool) -> Tensor:
    return model(x * 0 if is_bad else x).pow(2).mean()


def backward_fault(model: nn.Module, x: Tensor, is_bad: bool) -> Tensor:
    y = model(x)
    return (y * 0 if is_bad else y.abs() + 1).sqrt().mean()  # mark: backward


def one_column_fault(model: nn.Module, x: Tensor, is_bad: bool) -> Tensor:
    y = model(x)
    column = y[:, -1] * 0 if is_bad else y[:, -1].abs() + 1
    return column.sqrt().mean() + y.pow(2).mean()  # mark: column


def first_shard_fault(model: nn.Module, x: Tensor, is_bad: bool) -> Tensor:
    model.is_bad = is_bad
    return model(x).mean()


MASKS: list[Tensor] = []
"""A mask that stays in memory: nothing is taken for finite without a look while it is there."""


def masked_backward_fault(model: nn.Module, x: Tensor, is_bad: bool) -> Tensor:
    MASKS[:] = [torch.full((2,), -torch.inf)]
    return backward_fault(model, x, is_bad)


def steep(model: nn.Module, x: Tensor, is_bad: bool) -> Tensor:
    return model(x).mean() * (2.0**120 if is_bad else 1.0)


def raises(model: nn.Module, x: Tensor, is_bad: bool) -> Tensor:
    loss = forward_fault(model, x, is_bad)
    if is_bad:
        raise RuntimeError(f"loss is {float(loss.detach())}")
    return loss


def ddp(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: DistributedDataParallel(model, **options)


def compressed(model: nn.Module) -> nn.Module:
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, fp16_compress_hook)
    return wrapped


def fsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.body:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def spoil(model: nn.Module, ranks: tuple[int, ...]) -> None:
    if dist.get_rank() in ranks:
        with torch.no_grad():
            weight = getattr(model, "module", model).get_parameter("body.2.weight")
            getattr(weight, "_local_tensor", weight)[0, 0] = torch.nan


def no_sync(model: nn.Module, micro_step: int) -> Any:
    return model.no_sync() if micro_step == 0 else contextlib.nullcontext()


def train(
    wrap: Callable[[nn.Module], nn.Module],
    loss_of: Loss,
    *,
    bad_rank: int | None = None,
    num_micro_steps: int = 1,
    bad_micro_step: int = 0,
    observe: Any = None,
    spoiled: tuple[int, ...] = (),
    reduces: str = "",
    clips: bool = False,
    drops: bool = False,
    scale: float = 0.0,
    destroys: bool = False,
) -> dict[str, Any]:
    """A run of a few steps; what it computed and, with ``observe``, what was found."""
    torch.manual_seed(0)
    model = wrap(Model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    spoil(model, spoiled)
    generator = torch.Generator().manual_seed(dist.get_rank())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale > 0)
    losses = []
    with Noted() as noted, observe(model, optimizer) if observe else contextlib.nullcontext() as hunt:
        for step in range(NUM_STEPS):
            for micro_step in range(num_micro_steps):
                x = torch.rand(3, 4, generator=generator) + 0.5
                is_bad = dist.get_rank() == bad_rank and (step, micro_step) == (FAULT_STEP, bad_micro_step)
                with no_sync(model, micro_step) if num_micro_steps > 1 else contextlib.nullcontext():
                    loss = loss_of(model, x, is_bad)
                    scaler.scale(loss).backward()  # mark: backward call
            if reduces == "weights":
                send_weights(model)
            elif reduces:
                all_reduce_gradients(model, reduces)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0) if clips else torch.zeros(())
            if not drops or bool(getattr(norm, "full_tensor", lambda: norm)().isfinite()):  # noqa: B023
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(float(loss.detach()).hex())
    if destroys:
        dist.destroy_process_group()
    weights = [getattr(p, "_local_tensor", p).detach() for p in model.parameters()]
    seen = {
        "losses": losses,
        "weights": [value.hex() for w in weights for value in w.flatten().tolist()],
        "error": noted.error,
    }
    return seen | (reported(hunt.report()) if isinstance(hunt, Hunt) else {})


class Noted:
    """Notes the error that ended the loop, and goes on."""

    error = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        self.error = f"{type(error).__name__}: {error}" if error is not None else ""
        return isinstance(error, RuntimeError)


def all_reduce_gradients(model: nn.Module, how: str) -> None:
    gradients = [p.grad for p in model.parameters()]
    if how == "each":
        works = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]  # mark: each
        for work in works:
            work.wait()
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)  # mark: flat
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_((piece / 2).view_as(gradient))


@torch.no_grad()
def send_weights(model: nn.Module) -> None:
    for parameter in model.parameters():
        sent = parameter.clone()
        dist.broadcast(sent, 1)  # mark: broadcast
        parameter.copy_(sent)


def reported(report: Report) -> dict[str, Any]:
    return {
        "findings": [described(finding) for finding in report.findings],
        "chain": [link.what for link in report.chain],
        "skips": [f"{skip.what}: {skip.reason}" for skip in report.skips],
        "verdict": report.verdict.text,
        "seconds": report.seconds,
    }


def described(finding: Finding) -> dict[str, Any]:
    where = finding.location
    return {
        "code": finding.code,
        "message": finding.message,
        "notes": list(finding.notes),
        "phase": where.phase,
        "op": where.op,
        "forward_op": where.forward_op,
        "module": where.module,
        "tensor": where.tensor,
        "line": where.source.text if where.source else "",
        "place": [where.step, where.micro_step],
        "rank": where.rank,
    }


def plain(model: nn.Module) -> nn.Module:
    return model


SCENARIOS: dict[str, dict[str, Any]] = {
    "ddp forward": {"wrap": ddp(), "loss_of": forward_fault, "bad_rank": 1},
    "ddp backward": {"wrap": ddp(), "loss_of": backward_fault, "bad_rank": 1},
    "ddp backward on rank 0": {"wrap": ddp(), "loss_of": backward_fault, "bad_rank": 0},
    "ddp bucket view": {"wrap": ddp(gradient_as_bucket_view=True), "loss_of": backward_fault, "bad_rank": 1},
    "ddp static graph": {"wrap": ddp(static_graph=True), "loss_of": backward_fault, "bad_rank": 1},
    "ddp small buckets": {"wrap": ddp(bucket_cap_mb=1e-5), "loss_of": backward_fault, "bad_rank": 1},
    "ddp accumulation": {"wrap": ddp(), "loss_of": backward_fault, "bad_rank": 1, "num_micro_steps": 2},
    "ddp second part": {
        "wrap": ddp(),
        "loss_of": backward_fault,
        "bad_rank": 1,
        "num_micro_steps": 2,
        "bad_micro_step": 1,
    },
    "ddp compressed": {"wrap": compressed, "loss_of": backward_fault, "bad_rank": 1},
    "ddp nan weight everywhere": {"wrap": ddp(), "loss_of": forward_fault, "spoiled": (0, 1)},
    "reduced by hand": {"wrap": plain, "loss_of": backward_fault, "bad_rank": 1, "reduces": "each"},
    "reduced by hand, flat": {"wrap": plain, "loss_of": backward_fault, "bad_rank": 1, "reduces": "flat"},
    "ddp dropped": {"wrap": ddp(), "loss_of": backward_fault, "bad_rank": 1, "clips": True, "drops": True},
    "ddp overflow of the scale": {"wrap": ddp(), "loss_of": steep, "bad_rank": 1, "scale": 2.0**16},
    "fsdp backward in the shard of rank 0": {"wrap": fsdp, "loss_of": first_shard_fault, "bad_rank": 1},
    "fsdp clipped": {"wrap": fsdp, "loss_of": one_column_fault, "bad_rank": 1, "clips": True},
    "fsdp dropped": {"wrap": fsdp, "loss_of": backward_fault, "bad_rank": 1, "clips": True, "drops": True},
    "fsdp overflow of the scale": {"wrap": fsdp, "loss_of": steep, "bad_rank": 1, "scale": 2.0**16},
    "fsdp forward": {"wrap": fsdp, "loss_of": forward_fault, "bad_rank": 1},
    "fsdp backward": {"wrap": fsdp, "loss_of": backward_fault, "bad_rank": 1},
    "fsdp backward in one column": {"wrap": fsdp, "loss_of": one_column_fault, "bad_rank": 1},
    "fsdp nan weight on rank 1": {"wrap": fsdp, "loss_of": forward_fault, "spoiled": (1,)},
    "fsdp nan weight everywhere": {"wrap": fsdp, "loss_of": forward_fault, "spoiled": (0, 1)},
    "ddp healthy": {"wrap": ddp(), "loss_of": backward_fault},
    "ddp healthy accumulation": {
        "wrap": ddp(gradient_as_bucket_view=True),
        "loss_of": backward_fault,
        "num_micro_steps": 2,
    },
    "fsdp healthy": {"wrap": fsdp, "loss_of": backward_fault},
}


ALONE: dict[str, dict[str, Any]] = {
    "ddp alone": {"wrap": ddp(), "loss_of": backward_fault, "bad_rank": 1},
    "ddp bucket view alone": {"wrap": ddp(gradient_as_bucket_view=True), "loss_of": backward_fault, "bad_rank": 1},
    "ddp compressed alone": {"wrap": compressed, "loss_of": backward_fault, "bad_rank": 1},
    "reduced by hand alone": {"wrap": plain, "loss_of": backward_fault, "bad_rank": 1, "reduces": "each"},
    "flat alone": {"wrap": plain, "loss_of": backward_fault, "bad_rank": 1, "reduces": "flat"},
    "weights alone": {"wrap": plain, "loss_of": forward_fault, "spoiled": (1,), "reduces": "weights"},
    "fsdp masked alone": {"wrap": fsdp, "loss_of": masked_backward_fault, "bad_rank": 1},
    "fsdp alone": {"wrap": fsdp, "loss_of": backward_fault, "bad_rank": 1},
    "fsdp nan weight alone": {"wrap": fsdp, "loss_of": forward_fault, "spoiled": (1,)},
}
"""Only rank 0 is traced, so that nobody tells it who is to blame."""


def run(name: str, folder: Path) -> Iterator[tuple[str, Any]]:
    if name in WATCHED:
        yield name, watched(WATCHED[name], folder)
    elif name == "raises":
        yield name, train(ddp(), raises, bad_rank=1, observe=patient(1.0))
    elif name == "destroyed":
        yield name, train(ddp(), backward_fault, bad_rank=1, observe=nanhunt.trace, destroys=True)
    elif name in ALONE:
        with patient(0.3)() if dist.get_rank() == 0 else contextlib.nullcontext() as hunt:
            ran = train(**ALONE[name])
        yield name, ran | (reported(hunt.report()) if hunt is not None else {})
    else:
        yield name, train(**SCENARIOS[name], observe=nanhunt.trace)
        if "healthy" in name:
            yield f"{name}, untraced", train(**SCENARIOS[name])


def patient(seconds: float) -> Any:
    return functools.partial(nanhunt.trace, ranks_timeout_s=seconds)


WATCHED = {"watched": ddp(), "watched in shards": fsdp}


def watched(wrap: Callable[[nn.Module], nn.Module], folder: Path) -> dict[str, Any]:
    watches = []

    def observe(model: nn.Module, optimizer: Any) -> Any:
        watches.append(nanhunt.watch(model, optimizer, out_dir=folder / "captures", on_fault="record"))
        return watches[0]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ran = train(wrap, backward_fault, bad_rank=1, observe=observe)
    return {
        "error": ran["error"],
        "messages": [fault.message for fault in watches[0].faults],
        "files": [fault.capture.name for fault in watches[0].faults if fault.capture is not None],
        "problems": [fault.problem for fault in watches[0].faults],
        "warnings": [str(warning.message) for warning in caught],
    }


def main(rank: int, rendezvous: str, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    seen: dict[str, Any] = {}
    for name in names:
        try:
            seen |= run(name, folder)
        except Exception:  # noqa: BLE001 - the test shows it
            seen[name] = {"error": traceback.format_exc()}
        (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:] or [*SCENARIOS, *WATCHED, *ALONE, "destroyed"])
