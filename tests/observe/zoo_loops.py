"""Animals that differ in their loop: precision, accumulation, several optimizers, functional transforms."""

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.optim import Optimizer
from zoo_entry import Entry, Training, mean_square, normal, plain_step, rows, seeded, sgd, unclipped_step


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))


def without_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 6), nn.LeakyReLU(0.2, inplace=True), nn.Linear(6, 5))
        self.critic = nn.Sequential(nn.Linear(5, 6), nn.LeakyReLU(0.2, inplace=True), nn.Linear(6, 1))

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)


def _generator_adam(model: Gan) -> Optimizer:
    return torch.optim.Adam(model.generator.parameters(), lr=1e-2, betas=(0.5, 0.999))


def _critic_adam(model: Gan, optimizer: Optimizer) -> dict[str, Any]:
    return {"critic optimizer": torch.optim.Adam(model.critic.parameters(), lr=1e-2, betas=(0.5, 0.999))}


def _gan_step(training: Training, batch: Tensor) -> Tensor:
    model, bce = training.model, nn.functional.binary_cross_entropy_with_logits
    critic_optimizer = training.extras["critic optimizer"]
    fake = model(torch.randn(6, 3))
    critic_optimizer.zero_grad()
    real_scores, fake_scores = model.critic(batch), model.critic(fake.detach())
    (bce(real_scores, torch.ones(6, 1)) + bce(fake_scores, torch.zeros(6, 1))).backward()
    critic_optimizer.step()
    training.optimizer.zero_grad()
    loss = bce(model.critic(fake), torch.ones(6, 1))
    loss.backward()
    training.optimizer.step()
    return loss


def _bfloat16_step(training: Training, batch: Tensor) -> Tensor:
    training.optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = training.loss(training.model, batch)
    loss.backward()
    training.optimizer.step()
    return loss


def _scaler(init_scale: float) -> Callable[[nn.Module, Optimizer], dict[str, Any]]:
    return lambda model, optimizer: {"scaler": torch.amp.GradScaler("cpu", init_scale=init_scale)}


def _float16_step(training: Training, batch: Tensor) -> Tensor:
    scaler = training.extras["scaler"]
    training.optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = training.loss(training.model, batch)
    scaler.scale(loss).backward()
    scaler.unscale_(training.optimizer)
    nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
    scaler.step(training.optimizer)
    scaler.update()
    return loss


def _penalty_step(training: Training, batch: Tensor) -> Tensor:
    training.optimizer.zero_grad()
    batch.requires_grad_()
    scores = training.model(batch)
    (slope,) = torch.autograd.grad(scores.sum(), batch, create_graph=True)
    loss = scores.square().mean() + (slope.norm(dim=1) - 1).square().mean()
    loss.backward()
    training.optimizer.step()
    return loss


def _accumulating_step(training: Training, batch: Tensor) -> Tensor:
    training.optimizer.zero_grad()
    total = torch.zeros(())
    for part in batch.split(2):
        loss = training.loss(training.model, part) / 3
        loss.backward()
        total += loss.detach()
    training.optimizer.step()
    return total


def _closure(training: Training, batch: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        training.optimizer.zero_grad()
        loss = training.loss(training.model, batch)
        loss.backward()
        return loss

    return closure


def _closure_step(training: Training, batch: Tensor) -> Tensor:
    return training.optimizer.step(_closure(training, batch))


def _closure_by_keyword(training: Training, batch: Tensor) -> Tensor:
    return training.optimizer.step(closure=_closure(training, batch))


def _double(parameter: Tensor) -> None:
    parameter.grad.mul_(2)


def _edited() -> nn.Module:
    """Gradients edited by hooks of all kinds; none of them is the observer's."""
    model = small()
    model[0].weight.register_hook(lambda gradient: gradient * 0.5)
    model[0].bias.register_post_accumulate_grad_hook(_double)
    model[1].register_forward_hook(lambda module, args, output: output + 0.1)
    model[3].register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * 3,))
    model[3].register_full_backward_pre_hook(lambda module, grad_output: (grad_output[0] * 2,))
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return model


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        members = [without_dropout() for _ in range(3)]
        self.shape = copy.deepcopy(members[0]).requires_grad_(False)
        weights, _ = stack_module_state(members)
        self.weights = nn.ParameterDict({name.replace(".", "_"): weight for name, weight in weights.items()})

    def forward(self, rows: Tensor) -> Tensor:
        weights = {name.replace("_", "."): weight for name, weight in self.weights.items()}
        return vmap(lambda own, x: functional_call(self.shape, own, (x,)), in_dims=(0, None))(weights, rows)


def _per_sample_step(training: Training, batch: Tensor) -> Tensor:
    model, named = training.model, dict(training.model.named_parameters())

    def loss_of_one(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, weights, (row[None],)).square().mean()

    weights = {name: parameter.detach() for name, parameter in named.items()}
    per_sample = vmap(grad(loss_of_one), in_dims=(None, 0))(weights, batch)
    for name, parameter in named.items():
        parameter.grad = per_sample[name].mean(0)
    training.optimizer.step()
    return training.loss(model, batch).detach()


def _no_foreach(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2, foreach=False, amsgrad=True)


def _foreach(model: nn.Module) -> Optimizer:
    return torch.optim.NAdam(model.parameters(), lr=1e-2, foreach=True)


def _fused(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def _nesterov(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-3)


def _rmsprop(model: nn.Module) -> Optimizer:
    groups = [{"params": [p]} for p in model.parameters()]
    return torch.optim.RMSprop(groups, lr=1e-2, momentum=0.5, centered=True)


def _lbfgs(model: nn.Module) -> Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")


def _one_cycle(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)}


def _scheduled_step(training: Training, batch: Tensor) -> Tensor:
    loss = plain_step(training, batch)
    training.extras["scheduler"].step()
    return loss


def _average(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    update = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    return {"average": torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=update)}


def _averaged_step(training: Training, batch: Tensor) -> Tensor:
    """Averages the weights and validates the average, without gradients and in inference mode."""
    loss = plain_step(training, batch)
    average = training.extras["average"]
    average.update_parameters(training.model)
    training.model.eval()
    with torch.no_grad():
        training.model(batch)
    with torch.inference_mode():
        average(batch)
        training.model(batch)
    training.model.train()
    return loss


def _frozen_features(training: Training, batch: Tensor) -> Tensor:
    """The input of the model was made in inference mode, as by a frozen backbone."""
    with torch.inference_mode():
        features = batch.tanh()
    return plain_step(training, features)


class Shift(nn.Module):
    """Saves none of its input, and so takes one from inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.linear = nn.Parameter(torch.randn(5)), nn.Linear(5, 1)

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear(rows + self.shift)


def _own_optimizers(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """One optimizer for each parameter, which moves it inside the backward pass; the observed one has the last."""
    own = {parameter: torch.optim.SGD([parameter], lr=1e-2) for parameter in list(model.parameters())[:-1]}
    own[list(model.parameters())[-1]] = optimizer

    def move(parameter: Tensor) -> None:
        own[parameter].step()
        own[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(move)
    return {f"optimizer {number}": other for number, other in enumerate(own.values())}


def _last_parameter(model: nn.Module) -> Optimizer:
    return torch.optim.SGD([list(model.parameters())[-1]], lr=1e-2)


def _backward_alone(training: Training, batch: Tensor) -> Tensor:
    loss = training.loss(training.model, batch)
    loss.backward()
    return loss


def _forgiving_step(training: Training, batch: Tensor) -> Tensor:
    """Tries a batch of the wrong width first, goes on from the error, and drops one finished backward pass."""
    for width in (4, 5):
        with contextlib.suppress(RuntimeError):
            training.loss(training.model, batch[:, :width]).backward()
    return plain_step(training, batch)


def _packing_step(training: Training, batch: Tensor) -> Tensor:
    """Keeps what autograd saves in float64, as one that moves it to the CPU or to disk."""
    training.optimizer.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda value: value.double(), lambda value: value.float()):
        loss = training.loss(training.model, batch)
    loss.backward()
    training.optimizer.step()
    return loss


class Marked(torch.Tensor):
    """A tensor subclass that comes through every operation."""


def _two_roots(training: Training, batch: Tensor) -> Tensor:
    """Goes backward from two roots with gradients of their own, one of them twice."""
    training.optimizer.zero_grad()
    scores = training.model(batch)
    roots = [scores.square(), scores.mean()]
    torch.autograd.backward(roots, [torch.full_like(roots[0], 0.1), None], retain_graph=True)
    roots[1].backward(inputs=list(training.model.parameters()))
    training.optimizer.step()
    return roots[1]


@contextlib.contextmanager
def _counted(calls: list[int]) -> Iterator[None]:
    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(1)
            return func(*args, **(kwargs or {}))

    with Counting():
        yield


def _own_mode_step(training: Training, batch: Tensor) -> Tensor:
    """Runs under a mode of the user's own, and uses what it counted."""
    calls: list[int] = []
    with _counted(calls):
        hidden = training.model(batch)
    training.optimizer.zero_grad()
    loss = hidden.square().mean() * len(calls)
    loss.backward()
    training.optimizer.step()
    return loss


def _truncated_step(training: Training, batch: Tensor) -> Tensor:
    """Carries a hidden state from step to step, as backpropagation through time does."""
    training.optimizer.zero_grad()
    hidden = training.extras.get("hidden", torch.zeros(6, 5))
    hidden = training.model(batch, hidden)
    loss = hidden.square().mean()
    loss.backward()
    training.optimizer.step()
    training.extras["hidden"] = hidden.detach()
    return loss


def _copying_step(training: Training, batch: Tensor) -> Tensor:
    """Keeps a copy of the best model, as early stopping does, and looks at what it says."""
    loss = plain_step(training, batch)
    training.extras["best"] = copy.deepcopy(training.model)
    with torch.no_grad():
        training.extras["best"].eval()(batch)
    return loss


def _saving_step(training: Training, batch: Tensor) -> Tensor:
    """Saves the model whole and the optimizer's state, and reads the model back."""
    loss = plain_step(training, batch)
    file = io.BytesIO()
    torch.save({"model": training.model, "optimizer": training.optimizer.state_dict()}, file)
    file.seek(0)
    training.extras["saved"] = torch.load(file, weights_only=False)["model"]
    return loss


def _growing_step(training: Training, batch: Tensor) -> Tensor:
    """Fills gradients with zeros, and gets another layer and another group of parameters after each step."""
    training.optimizer.zero_grad(set_to_none=False)
    loss = training.loss(training.model, batch)
    loss.backward()
    training.optimizer.step()
    training.model.append(nn.Linear(1, 1))
    training.optimizer.add_param_group({"params": list(training.model[-1].parameters())})
    return loss


def _tanh_mean(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).tanh().mean()


LOOPS = (
    Entry("gan", seeded(Gan), rows, mean_square, _generator_adam, _gan_step, _critic_adam),
    Entry("bfloat16-autocast", seeded(small), rows, mean_square, step=_bfloat16_step),
    Entry("float16-scaler", seeded(small), rows, mean_square, step=_float16_step, extras=_scaler(2.0**8)),
    Entry("float16-scaler-overflow", seeded(small), rows, mean_square, step=_float16_step, extras=_scaler(2.0**24)),
    Entry("gradient-penalty", seeded(small), rows, mean_square, step=_penalty_step),
    Entry("gradient-accumulation", seeded(small), rows, mean_square, step=_accumulating_step),
    Entry("lbfgs-closure", seeded(without_dropout), rows, mean_square, _lbfgs, _closure_step),
    Entry("closure-by-keyword", seeded(small), rows, mean_square, sgd, _closure_by_keyword),
    Entry("gradient-hooks", seeded(_edited), rows, mean_square),
    Entry("vmap-ensemble", seeded(Ensemble), rows, mean_square),
    Entry("per-sample-gradients", seeded(without_dropout), rows, mean_square, step=_per_sample_step),
    Entry("adam-for-loop", seeded(small), rows, mean_square, _no_foreach),
    Entry("nadam-foreach", seeded(small), rows, mean_square, _foreach),
    Entry("adamw-fused", seeded(small), rows, mean_square, _fused),
    Entry("sgd-nesterov", seeded(small), rows, mean_square, _nesterov),
    Entry("rmsprop-scheduler", seeded(small), rows, mean_square, _rmsprop, _scheduled_step, _one_cycle),
    Entry("ema-and-validation", seeded(small), rows, mean_square, step=_averaged_step, extras=_average),
    Entry("input-from-inference-mode", seeded(Shift), rows, mean_square, step=_frozen_features),
    Entry("optimizer-in-backward", seeded(small), rows, mean_square, _last_parameter, _backward_alone, _own_optimizers),
    Entry("errors-caught", seeded(small), rows, mean_square, step=_forgiving_step),
    Entry("saved-tensor-hooks", seeded(small), rows, mean_square, step=_packing_step),
    Entry("tensor-subclass", seeded(small), lambda seed: rows(seed).as_subclass(Marked), mean_square),
    Entry("two-roots", seeded(small), rows, mean_square, step=_two_roots),
    Entry("function-mode", seeded(small), rows, mean_square, step=_own_mode_step),
    Entry("truncated-recurrence", seeded(lambda: nn.GRUCell(5, 5)), rows, mean_square, step=_truncated_step),
    Entry("deepcopy-in-loop", seeded(small), rows, mean_square, step=_copying_step),
    Entry("saved-whole-in-loop", seeded(small), rows, mean_square, step=_saving_step),
    Entry("growing-model", seeded(small), rows, mean_square, step=_growing_step),
    Entry("large-values", seeded(small), lambda seed: normal(6, 5, seed=seed) * 1e30, _tanh_mean, step=unclipped_step),
)
