"""Decompositions and inverses: finite in the forward pass, singular in the backward pass."""

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn

DIV = ("aten::div", "aten::div_")
MATMUL = ("aten::mm", "aten::bmm", "aten::matmul")
SOLVE = ("aten::linalg_solve_triangular", "aten::_linalg_solve_ex", "aten::triangular_solve")


@fault("pytorch#50942: 1 / (l_i - l_j) of a tied Laplacian", phase="backward", op=DIV, module="position", step=3)
def spectral_positions_of_a_flat_recording() -> Loop:
    class SpectralPosition(nn.Module):
        def __init__(self, channels: int, width: int) -> None:
            super().__init__()
            self.width = width
            self.similarity = nn.Linear(channels, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = F.normalize(self.similarity(x), dim=-1)
            adjacency = (h @ h.mT).relu()
            laplacian = torch.diag_embed(adjacency.sum(-1)) - adjacency
            laplacian = laplacian + 1e-4 * torch.eye(x.shape[1])
            _, vectors = torch.linalg.eigh(laplacian)  # here
            return vectors[..., : self.width].abs()

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = SpectralPosition(10, 3)
            self.head = nn.Linear(13, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([x, self.position(x)], dim=-1)).mean((1, 2))

    torch.manual_seed(0)
    model = Detector()
    with torch.no_grad():
        model.position.similarity.bias.copy_(torch.eye(8)[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = [(torch.randn(3, 6, 10), torch.randint(0, 2, (3,)).float()) for _ in range(5)]
    batches[3][0][1] = 0.0

    def run() -> None:
        for x, y in batches:
            loss = F.binary_cross_entropy_with_logits(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer, raises=torch.linalg.LinAlgError)


@fault("gradient of U V' at equal singular values", phase="backward", op=DIV, module="align", step=2)
def procrustes_alignment_of_a_symmetric_cloud() -> Loop:
    class Procrustes(nn.Module):
        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            covariance = source.mT @ target
            u, _, vh = torch.linalg.svd(covariance, full_matrices=False)  # here
            return source @ u + (target @ vh.mT).detach()

    class Register(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.align = Procrustes()

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            return self.align(self.scale * source, target)

    torch.manual_seed(1)
    model = Register()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    clouds = [torch.randn(6, 3) for _ in range(3)]
    clouds[2] = torch.cat([torch.eye(3), -torch.eye(3)])

    def run() -> None:
        for cloud in clouds:
            moved = model(cloud, cloud)
            loss = (moved - cloud).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("d inv(A) = -inv(A) dA inv(A) overflows before inv(A) does", phase="backward", op=MATMUL, module="", step=2)
def inverse_of_a_nearly_singular_kernel() -> Loop:
    torch.manual_seed(2)
    warp = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1, bias=False))
    optimizer = torch.optim.Adam(warp.parameters(), lr=1e-3)

    def posterior_trace(x: Tensor, amplitude: float, jitter: float) -> Tensor:
        z = warp(x)
        kernel = amplitude * torch.exp(-(z - z.T).square()) * torch.eye(len(x)) + jitter * torch.eye(len(x)) * z.cosh()
        return torch.linalg.inv(kernel).diagonal().mean()  # here

    def run() -> None:
        for amplitude in (1.0, 1.0, 0.0, 1.0):
            loss = posterior_trace(torch.randn(5, 2), amplitude, jitter=1e-25)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(warp, run, optimizer)


@fault("backward of QR solves with R, which has a 0", phase="backward", op=SOLVE, module="basis", step=2)
def orthogonal_basis_of_an_empty_set() -> Loop:
    class Basis(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            q, _ = torch.linalg.qr(h)  # here
            return q

    class Subspace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(4, 3, bias=False)
            self.basis = Basis()

        def forward(self, x: Tensor) -> Tensor:
            q = self.basis(self.embed(x))
            return x - q @ (q.mT @ x)

    torch.manual_seed(3)
    model = Subspace()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    sets = [torch.randn(8, 4) for _ in range(4)]
    sets[2] = torch.zeros(8, 4)

    def run() -> None:
        for x in sets:
            optimizer.zero_grad()
            model(x).abs().mean().backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("each normalised zero row scales its gradient by 1e12", phase="backward", op=DIV, module="layers.0", step=3)
def chain_of_normalised_layers_at_a_zero_row() -> Loop:
    class Sphere(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.mix = nn.Linear(width, width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(self.mix(x), dim=-1)  # here

    class Spheres(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Sphere(8) for _ in range(4))
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    torch.manual_seed(4)
    model = Spheres()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def run() -> None:
        for step in range(5):
            x, y = torch.randn(6, 8), torch.randint(0, 2, (6,))
            if step == 3:
                x[4] = 0.0
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)
