"""Look-alikes: NaN and inf that code for missing values, absent classes and results yet to come."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from scenario import Loop, harmless
from torch import Tensor, nn


@harmless("NaN targets are left out by indexing before the loss; nanmean and nanmedian only standardise")
def nan_targets_left_out_by_indexing() -> Loop:
    torch.manual_seed(40)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.randn(20, 4)
    y = torch.stack([x.sum(1), x[:, 0] * 10], dim=1)
    y[::3, 0] = torch.nan
    y[1::4, 1] = torch.nan

    def run() -> None:
        centre, spread = y.nanmedian(dim=0).values, (y - y.nanmean(dim=0)).square().nanmean(dim=0).sqrt()
        target = (y - centre) / spread
        for batch in torch.randperm(20).split(5):
            prediction, wanted = model(x[batch]), target[batch]
            known = ~wanted.isnan()
            loss = F.smooth_l1_loss(prediction[known], wanted[known])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("NaN targets are replaced by the prediction itself, which costs nothing")
def nan_targets_replaced_before_the_loss() -> Loop:
    torch.manual_seed(41)
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for _ in range(4):
            x = torch.randn(8, 3)
            y = x @ torch.ones(3, 4) + torch.randn(8, 4)
            y[torch.rand(8, 4) < 0.3] = float("nan")
            prediction = model(x)
            target = torch.where(torch.isnan(y), prediction.detach(), y)
            optimizer.zero_grad()
            ((prediction - target) ** 2).sum().div(y.isfinite().sum()).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("nansum over a loss table without gradient; the trained loss reads known entries only")
def nansum_of_a_logged_table() -> Loop:
    torch.manual_seed(42)
    model = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    logged = []

    def run() -> None:
        for _ in range(3):
            x = torch.randn(6, 3)
            y = x.roll(1, dims=1).clone()
            y[0] = torch.nan
            prediction = model(x)
            known = y.isfinite()
            weight = known.float() / known.sum()
            loss = (weight * (prediction - y.masked_fill(~known, 0.0)).square()).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                logged.append((prediction - y).abs().nansum(dim=0) / known.sum(dim=0))
        assert torch.stack(logged).isfinite().all()

    return Loop(model, run, optimizer)


@harmless("missing features are NaN; the model replaces them by the mean and adds an indicator")
def missing_features_are_imputed() -> Loop:
    torch.manual_seed(43)

    class Tabular(nn.Module):
        def __init__(self, num_features: int) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(num_features))
            self.default = nn.Parameter(torch.zeros(num_features))
            self.net = nn.Sequential(nn.Linear(2 * num_features, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

        def forward(self, x: Tensor) -> Tensor:
            is_missing = torch.isnan(x)
            if self.training:
                self.mean.lerp_(x.nanmean(dim=0), 0.1)
            x = torch.where(is_missing, self.mean + self.default, x)
            return self.net(torch.cat([x, is_missing.float()], dim=1))

    model = Tabular(5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def run() -> None:
        for _ in range(4):
            x, y = torch.randn(16, 5) + 1, torch.randint(0, 2, (16,))
            x[torch.rand(16, 5) < 0.2] = torch.nan
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("a ragged batch is padded with NaN, and the padding is set to zero before anything reads it")
def ragged_batch_padded_with_nan() -> Loop:
    torch.manual_seed(44)

    @dataclass
    class Batch:
        values: Tensor
        lengths: Tensor = field(default_factory=lambda: torch.tensor([4, 2, 5]))

    model = nn.ModuleDict({"conv": nn.Conv1d(2, 6, 3, padding=1), "head": nn.Linear(6, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def collate() -> Batch:
        rows = [torch.randn(n, 2) for n in (4, 2, 5)]
        return Batch(nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan")))

    def forward(batch: Batch) -> Tensor:
        is_pad = batch.values.isnan()
        x = batch.values.masked_fill(is_pad, 0.0).transpose(1, 2)
        h = model["conv"](x).relu() * ~is_pad[:, None, :, 0]
        return model["head"](h.sum(-1) / batch.lengths[:, None])

    def run() -> None:
        for _ in range(4):
            loss = F.cross_entropy(forward(collate()), torch.tensor([0, 1, 1]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("a table of results starts as NaN, and a row is filled in after each epoch")
def result_table_filled_later() -> Loop:
    torch.manual_seed(45)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results = torch.full((5, 2), torch.nan)
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))

    def run() -> None:
        for epoch in range(4):
            model.train()
            loss = F.cross_entropy(model(x[:20]), y[:20])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                logits = model(x[20:])
                results[epoch, 0] = loss.detach()
                results[epoch, 1] = (logits.argmax(1) == y[20:]).float().mean()
        assert results[:4].isfinite().all()
        assert math.isnan(results[4].mean().item())

    return Loop(model, run, optimizer)


@harmless("a correlation that is 0/0 is printed and never trained on")
def logged_correlation_of_a_constant() -> Loop:
    torch.manual_seed(46)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    history: list[dict[str, float]] = []

    def correlation(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / (a.norm() * b.norm())

    def run() -> None:
        for step in range(5):
            x = torch.randn(8, 3)
            y = torch.full((8,), 2.0) if step == 2 else x.sum(1)
            prediction = model(x).squeeze(1)
            loss = F.mse_loss(prediction, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append({"loss": loss.item(), "r": correlation(prediction.detach(), y).item()})
        assert math.isnan(history[2]["r"])

    return Loop(model, run, optimizer)


@harmless("in validation the accuracy of a class that does not occur is 0/0; nanmean leaves it out")
def accuracy_of_an_absent_class() -> Loop:
    torch.manual_seed(47)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = torch.randn(24, 4), torch.randint(0, 3, (24,))

    @torch.no_grad()
    def validate() -> dict[str, object]:
        model.eval()
        hit = F.one_hot(y, 4) * (model(x).argmax(1) == y)[:, None]
        per_class = hit.sum(0) / F.one_hot(y, 4).sum(0)
        model.train()
        return {"macro": per_class.nanmean().item(), "per_class": per_class.tolist()}

    def run() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            metrics = validate()
            assert math.isfinite(metrics["macro"])
            assert math.isnan(metrics["per_class"][3])

    return Loop(model, run, optimizer)


@harmless("no sample of one class in the batch: its mean is taken only if there is one")
def guarded_mean_of_an_empty_class() -> Loop:
    torch.manual_seed(48)
    model = nn.Sequential(nn.Linear(4, 6), nn.ELU(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def run() -> None:
        for step in range(4):
            x = torch.randn(6, 4)
            y = torch.zeros(6, dtype=torch.long) if step % 2 else torch.arange(6) % 2
            z = model(x)
            loss = z.new_zeros(())
            for label in (0, 1):
                of_class = z[y == label]
                if of_class.numel():
                    loss = loss + (of_class - of_class.new_tensor([label, -label])).square().mean()
            pairs = z[y == 1].sum() / max(int((y == 1).sum()), 1)
            optimizer.zero_grad()
            (loss + 0.1 * pairs**2).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("a detector's loss is divided by the number of objects, at least 1; an image without objects is fine")
def detection_without_objects() -> Loop:
    torch.manual_seed(49)
    model = nn.ModuleDict(
        {"backbone": nn.Conv2d(3, 8, 3, stride=2), "box": nn.Conv2d(8, 4, 1), "obj": nn.Conv2d(8, 1, 1)}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=1e-4)

    def run() -> None:
        for step in range(4):
            h = model["backbone"](torch.randn(2, 3, 9, 9)).relu()
            boxes, scores = model["box"](h).permute(0, 2, 3, 1), model["obj"](h).squeeze(1)
            is_object = torch.zeros(2, 4, 4, dtype=torch.bool)
            is_object[:, step % 3 : step % 3 + 1, 0] = step != 1
            losses = {
                "box": F.l1_loss(boxes[is_object], torch.ones(int(is_object.sum()), 4), reduction="sum"),
                "obj": F.binary_cross_entropy_with_logits(scores, is_object.float(), reduction="sum"),
            }
            optimizer.zero_grad()
            (sum(losses.values()) / is_object.sum().clamp(min=1)).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("the mean over an empty selection is NaN, and is shown beside a healthy loss")
def mean_of_an_empty_selection_is_shown() -> Loop:
    torch.manual_seed(50)
    model = nn.Linear(5, 1)
    optimizer = torch.optim.Adam(model.parameters())
    shown: list[str] = []

    def run() -> None:
        for _ in range(3):
            x = torch.randn(8, 5)
            error = (model(x).squeeze(1) - x[:, 0]).square()
            optimizer.zero_grad()
            error.mean().backward()
            optimizer.step()
            shown.append(f"large: {error[error > 1e6].mean():.2f} all: {error.mean():.2f}")
        assert "nan" in shown[0]

    return Loop(model, run, optimizer)


@harmless("outputs are written into torch.empty, every row before it is read")
def preallocated_outputs() -> Loop:
    torch.manual_seed(51)

    class Rollout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(2, 6)
            self.out = nn.Linear(6, 2)

        def forward(self, start: Tensor, num_steps: int) -> Tensor:
            state = None
            outputs = torch.empty(num_steps, *start.shape)
            x = start
            for step in range(num_steps):
                state = self.cell(x, state)
                x = self.out(state[0])
                outputs[step] = x
            return outputs

    model = Rollout()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(4):
            start = torch.randn(3, 2)
            buffer = torch.empty(4, 3, 2).fill_(torch.nan)
            torch.stack([start * 0.9**k for k in range(4)], out=buffer)
            optimizer.zero_grad()
            F.mse_loss(model(start, 4), buffer).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("a task without labels in this batch is left out of the sum")
def absent_task_is_skipped() -> Loop:
    torch.manual_seed(52)

    class MultiTask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(6, 12), nn.Mish())
            self.heads = nn.ModuleDict({"age": nn.Linear(12, 1), "sex": nn.Linear(12, 2), "site": nn.Linear(12, 3)})

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.trunk(x)
            return {name: head(h) for name, head in self.heads.items()}

    model = MultiTask()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(4):
            outputs = model(torch.randn(6, 6))
            labels = {
                "age": torch.full((6,), torch.nan if step % 2 else 40.0),
                "sex": torch.arange(6) % 2 if step != 2 else torch.full((6,), -100),
                "site": torch.arange(6) % 3,
            }
            terms = [F.cross_entropy(outputs["site"], labels["site"])]
            if not labels["age"].isnan().all():
                terms.append(F.mse_loss(outputs["age"].squeeze(1), labels["age"] / 100))
            if (labels["sex"] >= 0).any():
                terms.append(F.cross_entropy(outputs["sex"], labels["sex"]))
            optimizer.zero_grad()
            torch.stack(terms).sum().backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("a subject without an event has the time inf, which the horizon cuts off")
def times_of_inf_cut_at_the_horizon() -> Loop:
    torch.manual_seed(53)
    model = nn.Sequential(nn.Linear(3, 8), nn.Softplus(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def run() -> None:
        for _ in range(4):
            x = torch.randn(10, 3)
            time = torch.where(torch.rand(10) < 0.3, torch.inf, torch.rand(10) * 5 + 0.1)
            seen, happened = time.clamp(max=4.0), time <= 4.0
            log_hazard = model(x).squeeze(1)
            loss = (log_hazard.exp() * seen - happened * log_hazard).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)
