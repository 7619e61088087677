"""Losses that leave their domain: logarithms, quotients, exponentials and means over nothing."""

import warnings

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn


def classifier(features: int = 8, outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, outputs))


@fault("log(1 - p) where the sigmoid of 200 rounds to 1", phase="forward", op=("aten::log",), module="", step=3)
def hand_written_cross_entropy_of_a_saturated_sigmoid() -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    with torch.no_grad():
        model[2].weight.abs_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [(torch.randn(16, 8), torch.randint(0, 2, (16, 1)).float()) for _ in range(5)]
    batches[3][0][5] *= 1e4

    def binary_cross_entropy(p: Tensor, y: Tensor) -> Tensor:
        gain = y * torch.log(p + 1e-7)
        gain = gain + (1 - y) * torch.log(1 - p)  # here
        return -gain.mean()

    def run() -> None:
        for x, y in batches:
            optimizer.zero_grad()
            loss = binary_cross_entropy(torch.sigmoid(model(x)), y)
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("p / q where the student's softmax underflows to 0", phase="forward", op=("aten::div",), module="", step=2)
def distillation_by_a_hand_written_divergence() -> Loop:
    torch.manual_seed(0)
    student, teacher = classifier(8, 5), classifier(8, 5).requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    temperatures = [2.0, 1.0, 1e-3, 1e-3]

    def run() -> None:
        for temperature in temperatures:
            x = torch.randn(32, 8)
            p = F.softmax(teacher(x), dim=-1)
            q = F.softmax(student(x) / temperature, dim=-1)
            ratio = p / q  # here
            loss = (p * ratio.log()).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(student, run, optimizer)


@fault("mean over no token: every label is ignored", phase="forward", op=("aten::nll_loss_forward",), module="", step=2)
def every_label_ignored() -> Loop:
    torch.manual_seed(0)
    vocabulary = 20
    model = nn.Sequential(nn.Embedding(vocabulary, 16), nn.Linear(16, vocabulary))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prompt_lengths = [3, 4, 12, 5]

    def run() -> None:
        for prompt_length in prompt_lengths:
            tokens = torch.randint(0, vocabulary, (2, 12))
            labels = tokens.clone()
            labels[:, :prompt_length] = -100
            logits = model(tokens)
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, vocabulary), labels[:, 1:].reshape(-1))  # here
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return Loop(model, run, optimizer)


@fault("sum over mask / sum of mask, 0/0", phase="forward", op=("aten::div",), module="", step=3)
def masked_mean_over_an_empty_mask() -> Loop:
    torch.manual_seed(0)
    model = nn.GRU(4, 8, batch_first=True)
    head = nn.Linear(8, 4)
    network = nn.ModuleDict({"encoder": model, "head": head})
    optimizer = torch.optim.Adam(network.parameters())

    def reconstruction_loss(predicted: Tensor, target: Tensor, corrupted: Tensor) -> Tensor:
        error = (predicted - target).abs().mean(-1)
        return (error * corrupted).sum() / corrupted.sum()  # here

    def run() -> None:
        for step in range(5):
            series = torch.randn(3, 10, 4)
            corrupted = (torch.rand(3, 10) < (0.0 if step == 3 else 0.3)).float()
            hidden, _ = network["encoder"](series * (1 - corrupted).unsqueeze(-1))
            loss = reconstruction_loss(network["head"](hidden), series, corrupted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(network, run, optimizer)


@fault("mean of an empty selection", phase="forward", op=("aten::mean",), module="", step=2)
def hard_examples_of_which_there_are_none() -> Loop:
    torch.manual_seed(0)
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    thresholds = [0.1, 0.3, 50.0, 50.0]

    def run() -> None:
        for threshold in thresholds:
            x, y = torch.randn(16, 8), torch.randint(0, 2, (16,)).float()
            losses = F.binary_cross_entropy_with_logits(model(x).squeeze(1), y, reduction="none")
            hard = losses[losses > threshold]
            loss = hard.mean()  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("smooth L1 averaged over no matched box", phase="forward", op=("aten::smooth_l1_loss",), module="", step=2)
def detector_on_an_image_without_objects() -> Loop:
    torch.manual_seed(0)

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU())
            self.scores = nn.Conv2d(8, 1, 1)
            self.boxes = nn.Conv2d(8, 4, 1)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            features = self.backbone(images)
            return {"scores": self.scores(features).flatten(1), "boxes": self.boxes(features).flatten(2).mT}

    model = Detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    objects = [5, 2, 0, 3]

    def losses_of(outputs: dict[str, Tensor], matched: Tensor, targets: Tensor) -> dict[str, Tensor]:
        classification = F.binary_cross_entropy_with_logits(outputs["scores"], matched.float())
        regression = F.smooth_l1_loss(outputs["boxes"][matched], targets)  # here
        return {"classification": classification, "regression": regression}

    def run() -> None:
        for count in objects:
            outputs = model(torch.rand(1, 3, 16, 16))
            matched = torch.arange(16).unsqueeze(0) < count
            terms = losses_of(outputs, matched, torch.rand(count, 4))
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("log of the variance that a ReLU has set to 0", phase="forward", op=("aten::log",), module="", step=0)
def gaussian_likelihood_with_zero_variance() -> Loop:
    torch.manual_seed(0)

    class Regressor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(6, 12), nn.ELU())
            self.mean = nn.Linear(12, 1)
            self.variance = nn.Sequential(nn.Linear(12, 1), nn.ReLU())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.trunk(x)
            return self.mean(hidden), self.variance(hidden)

    model = Regressor()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(3):
            x = torch.randn(64, 6)
            mean, variance = model(x)
            penalty = variance.log()  # here
            loss = 0.5 * (penalty + (x[:, :1] - mean) ** 2 / variance).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("contrastive temperature annealed to exactly 0", phase="forward", op=("aten::div",), module="", step=4)
def contrastive_temperature_annealed_to_zero() -> Loop:
    torch.manual_seed(0)
    encoder = classifier(8, 4)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)

    def info_nce(anchor: Tensor, positive: Tensor, temperature: float) -> Tensor:
        similarity = F.normalize(anchor, dim=-1) @ F.normalize(positive, dim=-1).T
        logits = similarity / temperature  # here
        return F.cross_entropy(logits, torch.arange(len(anchor)))

    def run() -> None:
        for step in range(6):
            x = torch.randn(12, 8)
            first, second = encoder(x + 0.1 * torch.randn_like(x)), encoder(x + 0.1 * torch.randn_like(x))
            loss = info_nce(first, second, temperature=max(0.0, 1.0 - 0.25 * step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(encoder, run, optimizer)


@fault("exp(logvar) of a pixel range of 0..255", phase="forward", op=("aten::exp",), module="", step=3)
def variational_autoencoder_on_unscaled_pixels() -> Loop:
    torch.manual_seed(0)

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(16, 8)
            self.mu = nn.Linear(8, 3)
            self.logvar = nn.Linear(8, 3)
            self.decoder = nn.Linear(3, 16)
            with torch.no_grad():
                self.encoder.weight.fill_(0.05)
                self.logvar.weight.fill_(0.14)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            hidden = self.encoder(x)
            mu, logvar = self.mu(hidden), self.logvar(hidden)
            z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
            return self.decoder(z), mu, logvar

    model = Autoencoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(5):
            images = torch.rand(4, 16) * (255 if step == 3 else 1)
            reconstruction, mu, logvar = model(images)
            variance = logvar.exp()  # here
            divergence = -0.5 * (1 + logvar - mu.pow(2) - variance).sum(-1).mean()
            loss = F.l1_loss(reconstruction, images) + 1e-3 * divergence
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("fewer frames than the repeated labels need: CTC loss inf", phase="forward", op=("aten::_ctc_loss",), step=2)
def ctc_target_longer_than_the_audio() -> Loop:
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": nn.GRU(13, 16), "classes": nn.Linear(16, 6)})
    criterion = nn.CTCLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    targets = [[1, 2], [3, 1, 2], [2, 2, 3, 3], [1, 4]]

    def run() -> None:
        for target in targets:
            frames = 5
            hidden, _ = model["rnn"](torch.randn(frames, 1, 13))
            log_probs = model["classes"](hidden).log_softmax(-1)
            labels, length = torch.tensor([target]), torch.tensor([len(target)])
            loss = criterion(log_probs, labels, torch.tensor([frames]), length)  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("rate exp(x) of a count regression, x > 88.7", phase="forward", op=("aten::exp",), module="", step=2)
def poisson_regression_on_an_unscaled_feature() -> Loop:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.fill_(0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    incomes = [1.0, 2.0, 4000.0, 1.0]

    def run() -> None:
        for income in incomes:
            x = torch.cat([torch.randn(8, 2), torch.full((8, 1), income)], dim=1)
            counts = torch.poisson(torch.full((8, 1), 2.0))
            loss = F.poisson_nll_loss(model(x), counts)  # here
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("positives per batch: weight negatives / 0", phase="forward", op=("aten::div",), module="", step=2)
def class_weight_of_a_batch_without_positives() -> Loop:
    torch.manual_seed(0)
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    positives = [4, 1, 0, 2]

    def run() -> None:
        for count in positives:
            x = torch.randn(16, 8)
            y = (torch.arange(16) < count).float().unsqueeze(1)
            weight = (y == 0).sum() / (y == 1).sum()  # here
            loss = F.binary_cross_entropy_with_logits(model(x), y, pos_weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("1 - tanh(a)^2 of a saturated action is 0", phase="forward", op=("aten::log",), module="", step=2)
def squashed_gaussian_policy_of_a_saturated_action() -> Loop:
    torch.manual_seed(0)
    actor = classifier(4, 2)
    optimizer = torch.optim.Adam(actor.parameters(), lr=3e-4)

    def log_probability(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        raw = mean + log_std.exp() * torch.randn_like(mean)
        action = torch.tanh(raw)
        density = torch.distributions.Normal(mean, log_std.exp()).log_prob(raw)
        return action, (density - torch.log(1 - action.pow(2))).sum(-1)  # here

    def run() -> None:
        for step in range(4):
            observation = torch.randn(10, 4)
            mean = actor(observation) * (60.0 if step == 2 else 1.0)
            action, log_prob = log_probability(mean, torch.full_like(mean, -2.0))
            loss = (0.2 * log_prob - action.sum(-1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(actor, run, optimizer, raises=ValueError)


@fault("advantages normalised by the deviation of one", phase="forward", op=("aten::std",), module="", step=3)
def advantages_of_a_last_batch_of_one() -> Loop:
    torch.manual_seed(0)
    policy = classifier(4, 3)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4)
    observations, actions, returns = torch.randn(25, 4), torch.randint(0, 3, (25,)), torch.randn(25)

    def run() -> None:
        for rows in torch.arange(25).split(8):
            log_probs = policy(observations[rows]).log_softmax(-1).gather(1, actions[rows, None]).squeeze(1)
            advantage = returns[rows] - returns[rows].mean()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                scale = advantage.std()  # here
            loss = -(log_probs * advantage / (scale + 1e-8)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(policy, run, optimizer)


@fault("-log D(G(z)) where a discriminator at lr=50 is sure", phase="forward", op=("aten::log",), module="")
def adversarial_loss_of_a_discriminator_that_is_sure() -> Loop:
    torch.manual_seed(0)
    generator, discriminator = classifier(4, 2), nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    players = nn.ModuleDict({"generator": generator, "discriminator": discriminator})
    for_generator = torch.optim.SGD(generator.parameters(), lr=0.01)
    for_discriminator = torch.optim.SGD(discriminator.parameters(), lr=50.0)

    def run() -> None:
        for _ in range(4):
            real, noise = torch.randn(16, 2) + 3, torch.randn(16, 4)
            for_discriminator.zero_grad()
            logits = discriminator(torch.cat([real, generator(noise).detach()]))
            is_real = torch.cat([torch.ones(16, 1), torch.zeros(16, 1)])
            F.binary_cross_entropy_with_logits(logits, is_real).backward()
            for_discriminator.step()
            for_generator.zero_grad()
            belief = torch.sigmoid(discriminator(generator(noise)))
            loss = -torch.log(belief).mean()  # here
            loss.backward()
            for_generator.step()

    return Loop(players, run, for_generator)
