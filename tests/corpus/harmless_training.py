"""Look-alikes: zero gradients, zero weights, dropped steps and other things that belong to healthy training."""

import copy
import math

import torch
import torch.nn.functional as F
from scenario import Loop, harmless
from torch import Tensor, nn


@harmless("clipping of healthy gradients, by norm and by value")
def clipping_of_healthy_gradients() -> Loop:
    torch.manual_seed(80)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    def run() -> None:
        for _ in range(4):
            x = torch.randn(8, 4) * 100
            optimizer.zero_grad()
            F.mse_loss(model(x).squeeze(1), x.square().sum(1)).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            torch.nn.utils.clip_grad_value_(model.parameters(), 0.5)
            assert norm > 1e3
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("LoRA: B starts at zero, so A has no gradient at the first step; the base is frozen (Hu et al. 2021)")
def lora_with_zero_init() -> Loop:
    torch.manual_seed(81)

    class LoRA(nn.Module):
        def __init__(self, base: nn.Linear, rank: int) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            self.a = nn.Parameter(torch.randn(rank, base.in_features) * 0.02)
            self.b = nn.Parameter(torch.zeros(base.out_features, rank))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 2.0 * F.linear(F.linear(x, self.a), self.b)

    model = nn.Sequential(LoRA(nn.Linear(6, 12), 2), nn.GELU(), LoRA(nn.Linear(12, 3), 2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def run() -> None:
        for step in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 6)), torch.randint(0, 3, (8,))).backward()
            assert step > 0 or not model[0].a.grad.any()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("residual gates of zero, and a warm-up that starts at a learning rate of 0")
def zero_gates_and_a_warm_up_from_zero() -> Loop:
    torch.manual_seed(82)

    class ReZero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gate * self.body(x)

    model = nn.Sequential(*(ReZero() for _ in range(3)), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 3, 1.0))

    def run() -> None:
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(6, 8)), torch.arange(6) % 2).backward()
            optimizer.step()
            warm_up.step()

    return Loop(model, run, optimizer)


@harmless("a frozen trunk, a parameter that nothing uses, and gradients of None")
def frozen_and_unused_parameters() -> Loop:
    torch.manual_seed(83)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)).requires_grad_(False)
            self.head = nn.Linear(8, 2)
            self.auxiliary = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.trunk(x)
            return self.head(x.relu())

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-2)

    def run() -> None:
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(6, 5)), torch.arange(6) % 2).backward()
            optimizer.step()
        assert model.auxiliary.weight.grad is None

    return Loop(model, run, optimizer)


@harmless("a mixture of experts in which one expert gets no token, and the routing mask is -inf")
def expert_without_tokens() -> Loop:
    torch.manual_seed(84)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(6, 4)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            logits = self.router(x)
            chosen = logits[:, :3].topk(2).indices
            kept = torch.full_like(logits, -torch.inf).scatter(1, chosen, logits.gather(1, chosen))
            weights, y = kept.softmax(-1), torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                rows = (chosen == index).any(1).nonzero().squeeze(1)
                y = y.index_add(0, rows, weights[rows, index, None] * expert(x[rows]))
            return y

    model = nn.ModuleDict({"moe": Experts(), "head": nn.Linear(6, 1)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def run() -> None:
        for _ in range(4):
            x = torch.randn(10, 6)
            optimizer.zero_grad()
            F.mse_loss(model["head"](x + model["moe"](x)).squeeze(1), x.sum(1)).backward()
            assert not model["moe"].experts[3][0].weight.grad.any()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("dead units: no gradient reaches the layer before them, and weight decay alone moves it")
def dead_units_under_weight_decay() -> Loop:
    torch.manual_seed(85)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    def run() -> None:
        for _ in range(5):
            optimizer.zero_grad(set_to_none=False)
            F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 2).backward()
            assert not model[0].weight.grad.any()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("one batch is spoilt; the loop sees the NaN loss, drops the batch and goes on")
def spoilt_batch_dropped_by_the_loop() -> Loop:
    torch.manual_seed(86)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def run() -> None:
        num_dropped = 0
        for step in range(6):
            x = torch.randn(8, 4)
            if step == 2:
                x[3, 1] = torch.nan
            loss = F.mse_loss(model(x).squeeze(1), x[:, 0])
            if not torch.isfinite(loss):
                num_dropped += 1
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert num_dropped == 1

    return Loop(model, run, optimizer)


@harmless("two networks with two optimizers; the generator's loss goes through the discriminator")
def adversarial_training() -> Loop:
    torch.manual_seed(87)
    generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    discriminator = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    model = nn.ModuleDict({"generator": generator, "discriminator": discriminator})
    for_generator = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    for_discriminator = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))

    def run() -> None:
        for _ in range(4):
            real, fake = torch.randn(8, 2) * 0.1 + 1, generator(torch.randn(8, 3))
            for_discriminator.zero_grad()
            loss = F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake.detach())).mean()
            loss.backward()
            for_discriminator.step()
            for_generator.zero_grad()
            F.softplus(-discriminator(fake)).mean().backward()
            for_generator.step()

    return Loop(model, run, for_generator)


@harmless("a gradient penalty, differentiated twice, whose norm stays away from 0 (Gulrajani et al. 2017)")
def healthy_gradient_penalty() -> Loop:
    torch.manual_seed(88)
    critic = nn.Sequential(nn.Linear(3, 16), nn.Softplus(), nn.Linear(16, 1))
    optimizer = torch.optim.RMSprop(critic.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(4):
            real, fake = torch.randn(8, 3), torch.rand(8, 3)
            mixed = torch.lerp(real, fake, torch.rand(8, 1)).requires_grad_()
            (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
            penalty = (slope.square().sum(1).add(1e-12).sqrt() - 1).square().mean()
            optimizer.zero_grad()
            (critic(fake).mean() - critic(real).mean() + 10 * penalty).backward()
            optimizer.step()

    return Loop(critic, run, optimizer)


@harmless("four small batches to a step")
def gradient_accumulation() -> Loop:
    torch.manual_seed(89)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)

    def run() -> None:
        for part in range(12):
            loss = F.cross_entropy(model(torch.randn(3, 4)), torch.randint(0, 3, (3,))) / 4
            loss.backward()
            if part % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()

    return Loop(model, run, optimizer)


@harmless("L-BFGS calls the closure several times in a step")
def lbfgs_with_a_closure() -> Loop:
    torch.manual_seed(90)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5, line_search_fn="strong_wolfe")
    x = torch.randn(20, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.1 * torch.randn(20)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x).squeeze(1), y)
        loss.backward()
        return loss

    def run() -> None:
        for _ in range(3):
            optimizer.step(closure)

    return Loop(model, run, optimizer)


@harmless("a moving average of the weights is evaluated beside the model; SWA at the end")
def averaged_copies_of_the_weights() -> Loop:
    torch.manual_seed(91)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    swa = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.randn(16, 4)

    def run() -> None:
        for step in range(4):
            optimizer.zero_grad()
            F.mse_loss(model(x).squeeze(1), x[:, 0]).backward()
            optimizer.step()
            with torch.no_grad():
                for average, value in zip(ema.parameters(), model.parameters(), strict=True):
                    average.lerp_(value, 0.1)
                assert ema(x).isfinite().all()
            if step >= 2:
                swa.update_parameters(model)
        torch.optim.swa_utils.update_bn([x], swa)

    return Loop(model, run, optimizer)


@harmless("the loop checks everything itself, under torch's own anomaly mode")
def checks_by_the_user() -> Loop:
    torch.manual_seed(92)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.NAdam(model.parameters(), lr=1e-2)

    def run() -> None:
        with torch.autograd.detect_anomaly(check_nan=True):
            for _ in range(3):
                logits = model(torch.randn(6, 4))
                assert not torch.isnan(logits).any()
                loss = F.cross_entropy(logits, torch.arange(6) % 2)
                assert math.isfinite(loss.item())
                optimizer.zero_grad()
                loss.backward()
                assert all(torch.isfinite(p.grad).all() for p in model.parameters())
                optimizer.step()

    return Loop(model, run, optimizer)


@harmless("per-sample gradients by torch.func, clipped and made noisy (Abadi et al. 2016)")
def per_sample_gradients() -> Loop:
    torch.manual_seed(93)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_of_one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (torch.func.functional_call(model, parameters, (x,)).squeeze(0) - y).square()

    def run() -> None:
        per_sample = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))
        for _ in range(3):
            x = torch.randn(8, 3)
            gradients = per_sample({n: p.detach() for n, p in model.named_parameters()}, x, x.sum(1))
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
            for name, parameter in model.named_parameters():
                clipped = torch.einsum("b,b...->...", (1.0 / norms).clamp(max=1.0), gradients[name])
                parameter.grad = (clipped + 0.1 * torch.randn_like(clipped)) / 8
            optimizer.step()

    return Loop(model, run, optimizer)
