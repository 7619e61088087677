"""Healthy learners of images, points, graphs, and by trial."""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from healthy import Learner, adamw, like, momentum
from torch import Tensor, nn
from torch.distributions import Categorical

with warnings.catch_warnings():
    # It scripts functions as it is imported, which this torch advises against.
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch_geometric.nn as graph_nn


def points() -> tuple[Tensor, Tensor]:
    """Points in the plane, by the quadrant they lie in."""
    x = torch.randn(64, 2)
    return x, (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()


def stripes(size: int = 8) -> tuple[Tensor, Tensor]:
    """Noisy images of stripes that lie or stand."""
    labels = torch.randint(2, (16,))
    wave = torch.arange(size).mul(1.5).sin()
    lying, standing = wave[:, None].expand(size, size), wave[None].expand(size, size)
    images = torch.stack([standing if label else lying for label in labels])[:, None].repeat(1, 3, 1, 1)
    return images + 0.5 * torch.randn_like(images), labels


def perceptron() -> Learner:
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))

    def loss() -> Tensor:
        x, y = points()
        return F.cross_entropy(model(like(model, x)).float(), y, label_smoothing=0.1)

    return adamw(model, loss)


def convolutions() -> Learner:
    head = (nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 2))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), *head)
    return momentum(model, lambda: _classified(model))


def _classified(model: nn.Module) -> Tensor:
    x, y = stripes()
    return F.cross_entropy(model(like(model, x)).float(), y)


class Residual(nn.Module):
    """Blocks whose last norm begins at zero, so that each begins as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(3)]
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(8, 2)
        nn.init.zeros_(blocks[-1][1].weight)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        for block in self.blocks:
            hidden = F.relu_(hidden + block(hidden))
        return self.head(F.adaptive_avg_pool2d(hidden, 1).flatten(1))


def residual() -> Learner:
    model = Residual()
    return momentum(model, lambda: _classified(model))


class Patches(nn.Module):
    """A vision transformer: patches, a class token, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 16, 4, stride=4)
        self.first, self.places = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16) * 0.02)
        layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 2))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.cut(images).flatten(2).mT
        tokens = torch.cat([self.first.expand(len(images), -1, -1), patches], 1) + self.places
        return self.head(self.encoder(tokens)[:, 0])


def patches() -> Learner:
    model = Patches()
    return adamw(model, lambda: _classified(model))


class Variational(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 8))
        self.decode = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x).chunk(2, 1)
        return self.decode(mean + torch.randn_like(mean) * (0.5 * log_variance).exp()), mean, log_variance


def variational() -> Learner:
    model = Variational()

    def loss() -> Tensor:
        pixels = (stripes()[0].mean(1).flatten(1) > 0).float()
        decoded, mean, log_variance = (part.float() for part in model(like(model, pixels)))
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)
        return (F.binary_cross_entropy_with_logits(decoded, pixels, reduction="none").sum(1) + divergence).mean()

    return adamw(model, loss)


def adversaries() -> Learner:
    """A generator and a critic, an optimizer each; what was generated is to come where the points lie."""
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    critic = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def critical() -> Tensor:
        fake = generator(torch.randn(32, 4)).detach()
        return F.softplus(critic(fake)).mean() + F.softplus(-critic(torch.randn(32, 2) + 2)).mean()

    def generated() -> Tensor:
        return F.softplus(-critic(generator(torch.randn(32, 4)))).mean()

    def distance() -> float:
        with torch.no_grad():
            return float((generator(torch.randn(512, 4)).mean(0) - 2).norm())

    optimizers = [torch.optim.Adam(part.parameters(), lr=2e-2, betas=(0.5, 0.9)) for part in (critic, generator)]
    model = nn.ModuleDict({"generator": generator, "critic": critic})
    return Learner(model, (critical, generated), tuple(optimizers), distance, None)


class Unet(nn.Module):
    """Says what noise was added; knows how much by a sine embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.SiLU())
        self.up, self.last = nn.ConvTranspose2d(16, 16, 2, 2), nn.Conv2d(32, 3, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        rates = time[:, None] * torch.logspace(0, 2, 4, dtype=time.dtype)
        embedded = self.time(torch.cat([rates.sin(), rates.cos()], 1))[..., None, None]
        wide = self.down(images) + embedded
        return self.last(torch.cat([wide, self.up(self.middle(wide))], 1))


def diffusion() -> Learner:
    model = Unet()

    def loss() -> Tensor:
        images, time = stripes()[0], torch.rand(16)
        kept = (time * torch.pi / 2).cos()[:, None, None, None]
        noise = torch.randn_like(images)
        mixed = kept * images + (1 - kept.square()).sqrt() * noise
        return F.mse_loss(model(like(model, mixed), like(model, time)).float(), noise)

    return adamw(model, loss)


class Graph(nn.Module):
    """A graph net of torch_geometric: convolution, attention over neighbours, mean over each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve, self.attend = graph_nn.GCNConv(4, 16), graph_nn.GATConv(16, 8, heads=2)
        self.norm, self.head = graph_nn.BatchNorm(16), nn.Linear(16, 2)

    def forward(self, nodes: Tensor, edges: Tensor, graphs: Tensor) -> Tensor:
        hidden = F.relu(self.convolve(nodes, edges))
        hidden = F.elu(self.norm(self.attend(hidden, edges)))
        return self.head(graph_nn.global_mean_pool(hidden, graphs))


def graphs() -> Learner:
    model = Graph()
    rings = torch.stack([torch.arange(48), torch.arange(48).roll(-1)])

    def loss() -> Tensor:
        labels = torch.randint(2, (8,))
        nodes = torch.randn(48, 4) + labels.repeat_interleave(6)[:, None]
        out = model(like(model, nodes), rings, torch.arange(8).repeat_interleave(6))
        return F.cross_entropy(out.float(), labels)

    return adamw(model, loss)


class Pairs(nn.Module):
    """Two towers whose embeddings of the same thing are to be alike, with a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(2.6593))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = F.normalize(self.left(left), dim=1), F.normalize(self.right(right), dim=1)
        # The limit of the published model: the scale is never above 100.
        return left @ right.T * self.log_scale.exp().clamp(max=100)


def pairs() -> Learner:
    model, turn = Pairs(), torch.randn(6, 6)

    def loss() -> Tensor:
        things = torch.randn(24, 6)
        scores = model(like(model, things), like(model, things @ turn)).float()
        return (F.cross_entropy(scores, torch.arange(24)) + F.cross_entropy(scores.T, torch.arange(24))) / 2

    return adamw(model, loss)


def by_trial() -> Learner:
    """Policy gradient: actions that are not allowed have a logit of -inf; the reward comes from the others."""
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 5))
    regrets: list[float] = []

    def loss() -> Tensor:
        states = torch.randn(256, 4)
        logits = model(like(model, states)).float()
        allowed = torch.ones(256, 5, dtype=torch.bool)
        allowed[torch.arange(256), torch.randint(4, (256,))] = False
        policy = Categorical(logits=logits.masked_fill(~allowed, -torch.inf))
        actions = policy.sample()
        gains = F.pad(states, (0, 1)).gather(1, actions[:, None])[:, 0]
        regrets.append(-float(gains.mean()))
        advantages = (gains - gains.mean()) / (gains.std() + 1e-8)
        return -(policy.log_prob(actions) * advantages).mean()

    return adamw(model, loss, distance=lambda: regrets[-1])


MODELS: dict[str, Callable[[], Learner]] = {
    "perceptron": perceptron,
    "convolutions with batch norm": convolutions,
    "residual blocks": residual,
    "vision transformer": patches,
    "variational autoencoder": variational,
    "generator and critic": adversaries,
    "diffusion": diffusion,
    "graph convolution and attention": graphs,
    "contrastive pairs": pairs,
    "policy gradient": by_trial,
}
