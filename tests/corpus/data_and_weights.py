"""Batches and labels that are non-finite before any operation touches them; for weights see data_and_weights_state."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset


@fault("one NaN sample among 24", phase="data", has_line=False, step=3)
def nan_in_one_sample_of_a_data_loader() -> Loop:
    torch.manual_seed(0)
    x, y = torch.randn(24, 6), torch.randint(0, 2, (24,))
    x[13, 4] = torch.nan
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=False, num_workers=0)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        model.train()
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("a missing target is NaN", phase="data", step=2)
def nan_in_a_regression_target() -> Loop:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(4)]
    batches[2][1][6] = torch.nan
    model = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 1))
    criterion = nn.SmoothL1Loss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def run() -> None:
        for features, target in batches:
            prediction = model(features)
            loss = criterion(prediction, target)  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("a ratio computed by the export divided by 0", phase="data", step=1)
def infinity_in_a_feature_column() -> Loop:
    torch.manual_seed(0)

    class Tabular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.categories, self.net = nn.Embedding(4, 3), nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 1))

        def forward(self, numeric: Tensor, category: Tensor) -> Tensor:
            scaled = numeric / 10  # here
            return self.net(torch.cat([scaled, self.categories(category)], dim=1))

    rows = [(torch.randn(6, 4), torch.randint(0, 4, (6,)), torch.rand(6, 1).round()) for _ in range(3)]
    rows[1][0][2, 3] = torch.inf
    model = Tabular()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        for numeric, category, label in rows:
            loss = F.binary_cross_entropy_with_logits(model(numeric=numeric, category=category), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("NaN in one entry of a nested batch", phase="data", step=2)
def nan_in_a_nested_batch() -> Loop:
    torch.manual_seed(0)

    class Fusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wave, self.notes, self.head = nn.Conv1d(1, 4, 5), nn.EmbeddingBag(9, 4), nn.Linear(8, 2)

        def forward(self, batch: dict[str, dict[str, Tensor] | Tensor]) -> dict[str, Tensor]:
            wave = self.wave(batch["signals"]["ecg"])  # here
            notes = self.notes(batch["signals"]["notes"])
            return {"logits": self.head(torch.cat([wave.amax(-1), notes], dim=1))}

    def batches() -> Iterator[dict[str, dict[str, Tensor] | Tensor]]:
        for number in range(4):
            ecg = torch.randn(3, 1, 20)
            values = ecg.numpy()
            values[1, 0, 5:9] = np.nan if number == 2 else 0.0
            signals = {"ecg": ecg, "notes": torch.randint(0, 9, (3, 4))}
            yield {"signals": signals, "label": torch.tensor([0, 1, 1])}

    model = Fusion()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for batch in batches():
            loss = F.cross_entropy(model(batch)["logits"], batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("standardised by numpy with a deviation of 0", phase="data", has_line=False, step=2)
def constant_channel_standardised_by_numpy() -> Loop:
    torch.manual_seed(0)

    class Recordings(Dataset):
        def __init__(self) -> None:
            self.waves = np.random.default_rng(0).normal(size=(16, 2, 32)).astype(np.float32)
            self.waves[9, 1] = 0.0

        def __len__(self) -> int:
            return len(self.waves)

        def __getitem__(self, index: int) -> dict[str, Tensor | int]:
            wave = self.waves[index]
            with np.errstate(invalid="ignore"):
                wave = (wave - wave.mean(-1, keepdims=True)) / wave.std(-1, keepdims=True)
            return {"wave": torch.from_numpy(wave), "label": index % 2}

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for batch in DataLoader(Recordings(), batch_size=4):
            loss = F.cross_entropy(model(batch["wave"]), batch["label"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return Loop(model, run, optimizer)


@fault("0 * NaN: a mask does not remove a missing label", phase="data", step=1)
def missing_targets_leak_through_their_mask() -> Loop:
    torch.manual_seed(0)
    targets = [torch.randn(6, 4) for _ in range(3)]
    targets[1][2, 3] = targets[1][5, 0] = torch.nan
    observed = [torch.isfinite(target) for target in targets]
    model = nn.Sequential(nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for target, mask in zip(targets, observed, strict=True):
            error = model(torch.randn(6, 5)) - target  # here
            loss = (error.square() * mask).sum() / mask.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("log10 of a count of 0 in numpy", phase="data", step=0)
def features_from_numpy_hold_minus_infinity() -> Loop:
    torch.manual_seed(0)
    counts = np.random.default_rng(0).integers(1, 50, size=(12, 5)).astype(np.float32)
    counts[7, 2] = 0
    with np.errstate(divide="ignore"):
        features = torch.from_numpy(np.log10(counts))
    labels = torch.from_numpy((counts.sum(1) > 120).astype(np.int64))
    model = nn.Linear(5, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = model(features)  # here
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        return loss

    def run() -> None:
        for _ in range(2):
            optimizer.step(closure)

    return Loop(model, run, optimizer)


@fault("'nan' parsed from a text file", phase="data", has_line=False, step=1, micro_step=2)
def nan_parsed_from_text_in_an_accumulated_step() -> Loop:
    torch.manual_seed(0)
    lines = [f"{0.1 * row},{1 - 0.1 * row},{row % 3}" for row in range(24)]
    lines[17] = "0.4,nan,2"

    class Lines(IterableDataset):
        def __iter__(self) -> Iterator[tuple[Tensor, float]]:
            for line in lines:
                *features, target = (float(cell) for cell in line.split(","))
                yield torch.tensor(features), target

    model = nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for number, (x, y) in enumerate(DataLoader(Lines(), batch_size=3), start=1):
            loss = F.l1_loss(model(x).squeeze(1), y.float()) / 3
            loss.backward()
            if number % 3 == 0:
                optimizer.step()
                optimizer.zero_grad()

    return Loop(model, run, optimizer)


@fault("a lost sample of a sensor, in evaluation", phase="data")
def infinite_sample_in_evaluation() -> Loop:
    torch.manual_seed(0)

    class Anomaly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.GRU(2, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, window: Tensor) -> Tensor:
            centred = window - window.mean(1, keepdim=True)  # here
            return (self.decode(self.encode(centred)[0]) - centred).abs().amax((1, 2))

    model = Anomaly()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    windows = [torch.randn(4, 10, 2) for _ in range(3)]
    windows[2][3, 9, 1] = -torch.inf

    def run() -> None:
        for window in windows[:2]:
            loss = model(window).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            scores = torch.cat([model(window) for window in windows])
            scores.argsort()

    return Loop(model, run, optimizer)
