"""Look-alikes: non-finite values that nothing harmful is made of: unused heads, reports, caches, clamped constants."""

import torch
import torch.nn.functional as F
from scenario import Loop, harmless
from torch import Tensor, nn


def assert_finite(model: nn.Module) -> None:
    assert all(bool(value.isfinite().all()) for value in model.parameters())


@harmless("PPO: the old ratio overflows without gradient and is clamped before anything learns from it")
def overflowing_ratio_without_gradient() -> Loop:
    torch.manual_seed(220)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        for gap in (0.0, 200.0, 0.0):
            x = torch.randn(6, 4)
            with torch.no_grad():
                ratio = (torch.rand(6, 1) + gap).exp().clamp(max=5.0)
            loss = (model(x) * ratio).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_finite(model)

    return Loop(model, run, optimizer)


@harmless("a second head gives NaN and -inf, and neither is part of the loss")
def head_whose_values_nobody_uses() -> Loop:
    torch.manual_seed(221)
    heads = nn.ModuleDict({"used": nn.Linear(4, 1), "spare": nn.Linear(4, 1)})
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.05)

    def run() -> None:
        for _ in range(3):
            x = torch.randn(6, 4)
            heads["spare"](x).relu().log()
            heads["spare"](torch.zeros_like(x)).detach() / 0.0
            loss = heads["used"](x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_finite(heads)

    return Loop(heads, run, optimizer)


@harmless("the signal-to-noise ratio of a perfect reconstruction is inf, and is only logged")
def perfect_reconstruction_reported_in_decibel() -> Loop:
    torch.manual_seed(222)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> list[float]:
        history = []
        for _ in range(3):
            x = torch.randn(6, 4)
            loss = F.mse_loss(model(x), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                history.append((-10 * torch.log10(F.mse_loss(x, x.clone()))).item())
        assert_finite(model)
        return history

    return Loop(model, run, optimizer)


@harmless("the precision of a class that is never predicted is 0/0, shown while training goes on")
def precision_of_a_class_never_predicted() -> Loop:
    torch.manual_seed(223)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> list[Tensor]:
        shown = []
        for _ in range(3):
            x, label = torch.randn(6, 4), torch.randint(2, (6, 1)).float()
            logits = model(x)
            predicted = logits > 100
            shown.append((predicted & (label > 0)).sum() / predicted.sum())
            loss = F.binary_cross_entropy_with_logits(logits, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_finite(model)
        return shown

    return Loop(model, run, optimizer)


@harmless("a cache of keys starts as NaN, and only the part already written is read")
def cache_of_keys_that_starts_as_nan() -> Loop:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(4, 4)
            self.register_buffer("keys", torch.full((1, 8, 4), torch.nan), persistent=False)

        def forward(self, token: Tensor, position: int) -> Tensor:
            self.keys[:, position] = token
            seen = self.keys[:, : position + 1]
            weights = (self.query(token)[:, None] @ seen.mT).softmax(-1)
            return (weights @ seen)[:, 0]

    torch.manual_seed(224)
    model = Decoder().eval()

    def run() -> None:
        token = torch.randn(1, 4)
        with torch.no_grad():
            for position in range(8):
                token = model(token, position)
        assert bool(token.isfinite().all())

    return Loop(model, run)


@harmless("the saliency of a zero input is NaN; it is kept for a picture, and no parameter depends on it")
def saliency_map_of_a_zero_input() -> Loop:
    torch.manual_seed(225)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def run() -> list[Tensor]:
        pictures = []
        for _ in range(3):
            x = torch.randn(6, 4)
            x[0] = 0.0
            x.requires_grad_()
            length = x.square().sum(1).sqrt().sum()
            pictures += torch.autograd.grad(length, x)
            loss = model(x.detach()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_finite(model)
        return pictures

    return Loop(model, run, optimizer)


@harmless("the harmonic mean with a 0 among the values: 1 / 0 is inf, and 1 / inf is the 0 that it should be")
def harmonic_mean_with_a_zero() -> Loop:
    class HarmonicMean(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return 1 / (1 / values).mean(-1)

    torch.manual_seed(226)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), HarmonicMean()).eval()

    def run() -> None:
        with torch.no_grad():
            for _ in range(3):
                assert bool(model(torch.randn(20, 4)).isfinite().all())

    return Loop(model, run)


@harmless("the flatness of a silent spectrum: the mean of a log of 0 is -inf, and exp makes it 0 again")
def spectral_flatness_of_silence() -> Loop:
    class Flatness(nn.Module):
        def forward(self, sound: Tensor) -> Tensor:
            power = torch.fft.rfft(sound).abs().square()
            return power.log().mean(-1).exp() / power.mean(-1).clamp(min=1e-9)

    torch.manual_seed(227)
    model = Flatness().eval()

    def run() -> None:
        with torch.no_grad():
            assert model(torch.stack([torch.zeros(16), torch.randn(16)])).tolist()[0] == 0.0

    return Loop(model, run)


@harmless("the minimum over each segment starts at inf; the segment without a member is not read")
def minimum_of_segments_that_starts_at_inf() -> Loop:
    torch.manual_seed(228)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    segment = torch.tensor([0, 0, 1, 1, 3, 3])

    def run() -> None:
        for _ in range(3):
            hidden = model(torch.randn(6, 4))
            lowest = torch.full((4, 3), torch.inf).scatter_reduce(0, segment[:, None].expand(6, 3), hidden, "amin")
            loss = lowest[segment.unique()].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_finite(model)

    return Loop(model, run, optimizer)


@harmless("a table padded with NaN to the longest record, of which each record's own rows are read")
def rows_beyond_the_record_are_nan() -> Loop:
    torch.manual_seed(229)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def run() -> None:
        for length in (5, 8, 3):
            table = torch.full((8, 4), torch.nan)
            table[:length] = torch.randn(length, 4)
            loss = model(table[:length]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_finite(model)

    return Loop(model, run, optimizer)
