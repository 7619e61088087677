"""Finite forward passes whose derivative has a pole: roots, powers and arcs at the end of their domain."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn

DIV = ("aten::div", "aten::div_")
POW = ("aten::pow", "aten::pow_")


@fault("d sqrt(x) = 1 / (2 sqrt(x)) is 0/0 for a pair of equal images", phase="backward", op=DIV, module="", step=3)
def contrastive_loss_on_a_duplicated_pair() -> Loop:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    pairs = [(torch.randn(8, 12), torch.randn(8, 12), torch.randint(0, 2, (8,)).float()) for _ in range(5)]
    pairs[3][1][2] = pairs[3][0][2]

    def contrastive(left: Tensor, right: Tensor, same: Tensor, margin: float = 1.0) -> Tensor:
        distance = ((left - right) ** 2).sum(dim=1).sqrt()  # here
        return (same * distance**2 + (1 - same) * F.relu(margin - distance) ** 2).mean()

    def run() -> None:
        for left, right, same in pairs:
            optimizer.zero_grad()
            loss = contrastive(encoder(left), encoder(right), same)
            loss.backward()
            optimizer.step()

    return Loop(encoder, run, optimizer)


@fault("a clamp after the root does not cure it", phase="backward", op=DIV, module="project", step=2)
def unit_vectors_clamped_after_the_root() -> Loop:
    class Projection(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            norm = torch.sqrt(torch.sum(h**2, dim=-1, keepdim=True))  # here
            return h / norm.clamp(min=1e-6)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = Projection()
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.project(x))

    torch.manual_seed(1)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    windows, labels = torch.randn(4, 10, 6), torch.randint(0, 3, (4, 10))
    windows[2, 7] = 0.0

    def run() -> None:
        for x, y in zip(windows, labels, strict=True):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("0 ** -0.5 in the gradient of a standard deviation of silence", phase="backward", op=POW, module="pool", step=3)
def statistics_pooling_of_a_silent_recording() -> Loop:
    class StatisticsPooling(nn.Module):
        def forward(self, frames: Tensor) -> Tensor:
            mean = frames.mean(dim=1)
            variance = (frames.square().mean(dim=1) - mean.square()).clamp(min=0)
            spread = variance.pow(0.5)  # here
            return torch.cat([mean, spread], dim=-1)

    class Speaker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frames = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Tanh())
            self.pool = StatisticsPooling()
            self.classify = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.classify(self.pool(self.frames(x)))

    torch.manual_seed(2)
    model = Speaker()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(5):
            recordings = torch.randn(6, 20, 5)
            if step == 3:
                recordings[4] = 0.0
            loss = F.cross_entropy(model(recordings), torch.randint(0, 4, (6,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("x ** p with a learned p < 1 at x = 0", phase="backward", op=POW, module="frontend", step=2)
def learned_root_compression_of_dead_channels() -> Loop:
    class Frontend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filters = nn.Conv1d(1, 4, 5, padding=2, bias=False)
            self.exponent = nn.Parameter(torch.full((4, 1), 0.5))

        def forward(self, wave: Tensor) -> Tensor:
            energy = F.avg_pool1d(self.filters(wave).square(), 4)
            return energy**self.exponent  # here

    torch.manual_seed(3)
    model = nn.Sequential()
    model.add_module("frontend", Frontend())
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(4 * 16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    waves = torch.randn(4, 3, 1, 64)
    waves[2, 1, :, 20:40] = 0.0

    def run() -> None:
        for wave in waves:
            loss = F.binary_cross_entropy_with_logits(model(wave).squeeze(1), torch.tensor([0.0, 1.0, 0.0]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault(
    "d asin(s) = 1 / sqrt(1 - s * s), tanh(20) is 1", phase="backward", op=("aten::rsqrt",), module="heading", step=4
)
def arcsine_of_a_saturated_tanh() -> Loop:
    class Heading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.asin(torch.tanh(self.layer(x)))  # here

    class Pilot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
            self.heading = Heading()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"heading": self.heading(self.body(x))}

    torch.manual_seed(4)
    model = Pilot()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    readings = torch.randn(6, 5, 3)
    readings[4] *= 1000

    def run() -> None:
        for x in readings:
            out = model(x)
            loss = F.smooth_l1_loss(out["heading"], torch.zeros(5, 1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return Loop(model, run, optimizer)


@fault("d acos(1) = -1/0; clamp passes its bounds", phase="backward", op=("aten::rsqrt",), module="", step=1)
def angular_distance_of_a_vector_to_itself() -> Loop:
    torch.manual_seed(5)
    embed = nn.Embedding(10, 3)
    optimizer = torch.optim.SGD(embed.parameters(), lr=0.05)
    anchors, others = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[6, 7, 8], [3, 8, 9]])
    with torch.no_grad():
        embed.weight[3] = torch.tensor([0.0, 2.0, 0.0])

    def angles(a: Tensor, b: Tensor) -> Tensor:
        cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        return torch.acos(cosine.clamp(-1.0, 1.0))  # here

    def run() -> None:
        for a, b in zip(anchors, others, strict=True):
            loss = angles(embed(a), embed(b)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(embed, run, optimizer)


@fault("sqrt of a pairwise distance matrix at its diagonal", phase="backward", op=DIV, module="miner", step=0)
def hand_made_distance_matrix_with_itself() -> Loop:
    class HardestTriplet(nn.Module):
        def forward(self, z: Tensor, identity: Tensor) -> Tensor:
            squares = z.square().sum(1)
            squared = squares[:, None] + squares[None, :] - 2.0 * z @ z.T
            distance = squared.clamp(min=0.0).sqrt()  # here
            same = identity[:, None] == identity[None, :]
            furthest = (distance * same).amax(1)
            nearest = (distance + 1e4 * same).amin(1)
            return F.softplus(furthest - nearest).mean()

    class ReId(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Sequential(nn.Linear(7, 8), nn.ReLU6(), nn.Linear(8, 2))
            self.miner = HardestTriplet()

        def forward(self, x: Tensor, identity: Tensor) -> Tensor:
            return self.miner(self.encode(x), identity)

    torch.manual_seed(6)
    model = ReId()
    optimizer = torch.optim.Adam(model.parameters())
    identity = torch.tensor([0, 0, 1, 1, 2, 2])

    def run() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(6, 7), identity).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("hand-made RMS norm, eps outside the root", phase="backward", op=DIV, module="blocks.0.norm", step=4)
def rms_norm_of_a_row_of_zeros() -> Loop:
    class RMSNorm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            rms = x.pow(2).mean(-1, keepdim=True).sqrt()  # here
            return self.scale * x / (rms + 1e-8)

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm = RMSNorm(width)
            self.mix = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mix(self.norm(x))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 8, bias=False)
            self.blocks = nn.ModuleList(Block(8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            for block in self.blocks:
                h = block(h)
            return h.mean((1, 2))

    torch.manual_seed(7)
    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def run() -> None:
        for step in range(6):
            channels = torch.randn(2, 5, 4)
            if step == 4:
                channels[1, 3] = 0.0
            loss = F.mse_loss(model(channels), torch.ones(2))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return Loop(model, run, optimizer)


@fault(
    "square root of a predicted width (Redmon 2016, eq. 3) that underflows", phase="backward", op=DIV, module="", step=2
)
def detection_loss_on_boxes_of_no_width() -> Loop:
    @dataclass
    class Boxes:
        centre: Tensor
        size: Tensor

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten())
            self.centre, self.size = nn.Linear(36, 2), nn.Linear(36, 2)

        def forward(self, image: Tensor) -> Boxes:
            h = self.backbone(image)
            return Boxes(torch.sigmoid(self.centre(h)), F.softplus(self.size(h)))

    def box_loss(boxes: Boxes, target: Tensor) -> Tensor:
        place = F.mse_loss(boxes.centre, target[:, :2])
        shape = F.mse_loss(torch.sqrt(boxes.size), torch.sqrt(target[:, 2:]))  # here
        return 5 * place + 5 * shape

    torch.manual_seed(8)
    model = Detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images = [torch.randn(4, 1, 8, 8) * scale for scale in (1.0, 1.0, 1000.0, 1.0)]

    def run() -> None:
        for image in images:
            loss = box_loss(model(image), torch.rand(4, 4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("magnitude of an empty frequency bin by hand", phase="backward", op=DIV, module="mask", step=3)
def complex_spectrum_magnitude_at_an_empty_bin() -> Loop:
    class SpectralMask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(9, dtype=torch.complex64))

        def forward(self, wave: Tensor) -> Tensor:
            z = torch.fft.rfft(wave) * self.gain
            return torch.sqrt(z.real**2 + z.imag**2)  # here

    class Enhancer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = SpectralMask()
            self.head = nn.Linear(9, 1)

        def forward(self, wave: Tensor) -> Tensor:
            return self.head(self.mask(wave))

    torch.manual_seed(9)
    model = Enhancer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        for step in range(5):
            wave = torch.randn(4, 16)
            if step == 3:
                wave[0] = 0.0
            optimizer.zero_grad()
            model(wave).square().mean().backward()
            optimizer.step()

    return Loop(model, run, optimizer)
