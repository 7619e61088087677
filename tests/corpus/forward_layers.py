"""Layers and recurrences that leave their domain in the forward pass, and training that diverges."""

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn

BATCH_NORM = ("aten::native_batch_norm", "aten::_native_batch_norm_legit_no_training", "aten::_batch_norm_no_update")


@fault("a running variance below -eps", phase="forward", op=BATCH_NORM, module="features.1")
def batch_norm_of_evaluation_with_a_negative_variance() -> Loop:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 3))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            features = self.features(x)  # here
            return self.head(features.mean(-1))

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        for _ in range(3):
            loss = F.cross_entropy(model(torch.randn(8, 2, 12)), torch.randint(0, 2, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # Extrapolated weight averaging: fine for a weight, not for a variance.
        with torch.no_grad():
            variance = model.features[1].running_var
            variance += 3 * (variance - 1.5)
        model.eval()
        with torch.no_grad():
            model(torch.randn(4, 2, 12)).argmax(-1)

    return Loop(model, run, optimizer)


@fault("x / |x| of a row of zeros", phase="forward", op=("aten::div",), module="tower.normalise", step=2)
def unit_vectors_of_a_padded_item() -> Loop:
    torch.manual_seed(0)

    class Normalise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.norm(dim=-1, keepdim=True)  # here

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Embedding(10, 6, padding_idx=0)
            self.normalise = Normalise()

        def forward(self, ids: Tensor) -> Tensor:
            return self.normalise(self.items(ids))

    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.query = Tower(), nn.Linear(4, 6)

        def forward(self, query: Tensor, ids: Tensor) -> Tensor:
            return F.cosine_similarity(self.query(query), self.tower(ids))

    model = TwoTowers()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def run() -> None:
        for step in range(4):
            ids = torch.randint(1, 10, (5,))
            ids[4] *= step != 2
            loss = (1 - model(torch.randn(5, 4), ids)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("CLIP without the clamp: exp(logit_scale), lr 10", phase="forward", op=("aten::exp",), module="")
def learned_temperature_that_runs_away() -> Loop:
    torch.manual_seed(0)

    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = nn.Linear(8, 4), nn.Linear(6, 4)
            self.logit_scale = nn.Parameter(torch.tensor(2.6))

        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            image, text = F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)
            scale = self.logit_scale.exp()  # here
            return scale * image @ text.T

    model = Clip()
    with torch.no_grad():
        model.text.weight.zero_()[:, :4] = torch.eye(4)
        model.image.weight.zero_()[:, :4] = torch.eye(4)
    optimizer = torch.optim.Adam([{"params": model.logit_scale, "lr": 30.0}, {"params": model.image.parameters()}])

    def run() -> None:
        for _ in range(6):
            shared = torch.eye(4) + 0.1 * torch.randn(4, 4)
            pair = torch.cat([shared, torch.randn(4, 4)], 1), torch.cat([shared, torch.randn(4, 2)], 1)
            loss = F.cross_entropy(model(*pair), torch.arange(4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("Glow's 1x1 convolution, singular at initialisation", phase="forward", op=("aten::_linalg_slogdet",))
def flow_with_a_singular_invertible_convolution() -> Loop:
    torch.manual_seed(0)

    class Mix(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(channels, channels))
            with torch.no_grad():
                self.weight[1] = 0

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            log_determinant = torch.linalg.slogdet(self.weight).logabsdet  # here
            return x @ self.weight.T, log_determinant

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.shift = Mix(4), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            z, log_determinant = self.mix(x + self.shift)
            return (-0.5 * z.square().sum(-1) + log_determinant).mean()

    model = Flow()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            (-model(torch.randn(16, 4))).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("affine coupling: exp(s) of an unbounded s", phase="forward", op=("aten::exp",), module="couplings.1", step=2)
def coupling_layer_with_an_unbounded_scale() -> Loop:
    torch.manual_seed(0)

    class Coupling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            fixed, moved = x.chunk(2, dim=-1)
            scale, shift = self.net(fixed).chunk(2, dim=-1)
            moved = moved * scale.exp() + shift  # here
            return torch.cat([moved, fixed], dim=-1), scale.sum(-1)

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.couplings = nn.ModuleList(Coupling() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            total = 0
            for coupling in self.couplings:
                x, log_determinant = coupling(x)
                total = total + log_determinant
            return -0.5 * x.square().sum(-1) + total

    model = Flow()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(4):
            x = torch.randn(32, 4)
            if step == 2:
                x[3, 2:] = torch.tensor([2e4, -1.5e4])
            loss = -model(x).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("log of the sum of exp in a CRF, scores of 100", phase="forward", op=("aten::exp",), module="crf", step=2)
def log_partition_of_a_crf_by_hand() -> Loop:
    torch.manual_seed(0)

    class Crf(nn.Module):
        def __init__(self, tags: int) -> None:
            super().__init__()
            self.transitions = nn.Parameter(torch.randn(tags, tags))

        def forward(self, emissions: Tensor, tags: Tensor) -> Tensor:
            alpha, score = emissions[0], emissions[0, tags[0]]
            for t in range(1, len(emissions)):
                paths = alpha[:, None] + self.transitions + emissions[t]
                alpha = torch.log(torch.exp(paths).sum(0))  # here
                score = score + self.transitions[tags[t - 1], tags[t]] + emissions[t, tags[t]]
            return torch.logsumexp(alpha, 0) - score

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emit, self.crf = nn.Linear(5, 3), Crf(3)

        def forward(self, x: Tensor, tags: Tensor) -> Tensor:
            return self.crf(self.emit(x), tags)

    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def run() -> None:
        for length in (5, 10, 400):
            x = torch.randn(length, 5)
            loss = model(x, torch.randint(0, 3, (length,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("|a|^2 + |b|^2 - 2ab is below 0 by rounding", phase="forward", op=("aten::sqrt",), module="distance", step=1)
def distances_from_an_expanded_square() -> Loop:
    torch.manual_seed(0)

    class Distance(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            squared = (a * a).sum(-1, keepdim=True) + (b * b).sum(-1) - 2 * a @ b.T
            return torch.sqrt(squared)  # here

    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.distance = nn.Linear(6, 32), Distance()

        def forward(self, x: Tensor, prototypes: Tensor) -> Tensor:
            return -self.distance(self.embed(x), self.embed(prototypes))

    model = Prototypes()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)

    def run() -> None:
        for step in range(3):
            x, prototypes = 100 * torch.randn(200, 6), torch.randn(4, 6)
            if step == 1:
                prototypes = x + 0
            loss = F.cross_entropy(model(x, prototypes), torch.arange(200) % 4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("angle between rotations: acos of 1 + rounding", phase="forward", op=("aten::acos",), module="", step=2)
def angle_between_two_rotations() -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def geodesic(predicted: Tensor, target: Tensor) -> Tensor:
        trace = torch.einsum("bij,bij->b", predicted, target)
        return torch.acos((trace - 1) / 2)  # here

    def rotation(vector: Tensor) -> Tensor:
        zero = torch.zeros_like(vector[:, 0])
        x, y, z = vector.unbind(-1)
        skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).view(-1, 3, 3)
        return torch.matrix_exp(skew)

    def run() -> None:
        for step in range(4):
            predicted = rotation(model(torch.randn(64, 4)))
            target = rotation(torch.randn(64, 3))
            if step == 2:
                target = predicted.detach()
            loss = geodesic(predicted, target).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("x ** gamma of a pixel below 0", phase="forward", op=("aten::pow",), module="augment.gamma", step=1)
def gamma_correction_of_a_negative_pixel() -> Loop:
    torch.manual_seed(0)

    class Gamma(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.exponent = nn.Parameter(torch.tensor(2.2))

        def forward(self, image: Tensor) -> Tensor:
            return image**self.exponent  # here

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.augment = nn.ModuleDict({"gamma": Gamma()})
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))

        def forward(self, image: Tensor) -> Tensor:
            return self.net(self.augment["gamma"](image))

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        for step in range(3):
            image = torch.rand(4, 3, 4, 4) + 0.1
            if step == 1:
                image = image - image.mean((2, 3), keepdim=True)
            loss = F.cross_entropy(model(image), torch.randint(0, 4, (4,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("hyperbolic distance: atanh of a norm of 1", phase="forward", op=("aten::atanh",), module="ball", step=2)
def hyperbolic_embedding_on_the_boundary() -> Loop:
    torch.manual_seed(0)

    class Ball(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.points = nn.Parameter(0.3 * torch.randn(8, 2))

        def forward(self, index: Tensor) -> Tensor:
            norm = self.points[index].norm(dim=-1)
            return 2 * torch.atanh(norm)  # here

    model = nn.ModuleDict({"ball": Ball()})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(4):
            if step == 2:
                with torch.no_grad():
                    model["ball"].points[5] = torch.tensor([1.0, 0.0])
            loss = (model["ball"](torch.arange(8)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)
