"""Loops that never call the whole model: a generator and its critic, an actor, encoders, one tower, ``generate``."""

import torch
import torch.nn.functional as F
from scenario import Loop, fault
from torch import Tensor, nn

DIV = ("aten::div", "aten::div_")


@fault("log(1 - D(fake)) where the sigmoid of 1e4 is 1", phase="forward", op=("aten::log",), module="", step=2)
def critic_that_is_sure_of_an_exploded_fake() -> Loop:
    torch.manual_seed(0)
    nets = nn.ModuleDict(
        {"generator": nn.Linear(2, 4), "critic": nn.Sequential(nn.Linear(4, 1, bias=False), nn.Sigmoid())}
    )
    with torch.no_grad():
        nets["critic"][0].weight.fill_(0.5)
    makes = torch.optim.Adam(nets["generator"].parameters(), lr=1e-3)
    tells = torch.optim.Adam(nets["critic"].parameters(), lr=1e-3)

    def run() -> None:
        for gain in (1, 1, 1e5, 1):
            fake = nets["generator"](torch.randn(6, 2)).abs() * gain
            real, forged = nets["critic"](torch.randn(6, 4)), nets["critic"](fake.detach())
            loss = -(real.clamp(min=1e-6).log() + torch.log(1 - forged)).mean()  # here
            tells.zero_grad()
            loss.backward()
            tells.step()
            makes.zero_grad()
            (1 - nets["critic"](fake)).square().mean().backward()
            makes.step()

    return Loop(nets, run, tells)


@fault("p log p of an action whose softmax underflows to 0", phase="forward", op=("aten::log",), module="", step=2)
def entropy_bonus_of_an_actor_that_is_certain() -> Loop:
    class ActorCritic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.actor = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
            self.critic = nn.Linear(3, 1)

    torch.manual_seed(1)
    agent = ActorCritic()
    optimizer = torch.optim.RMSprop(agent.parameters(), lr=1e-3)

    def objective(state: Tensor, action: Tensor, reward: Tensor, sharpness: float) -> Tensor:
        policy = (agent.actor(state) * sharpness).softmax(-1)
        advantage = reward - agent.critic(state).squeeze(1)
        chosen = policy.gather(1, action[:, None]).squeeze(1)
        entropy = -(policy * torch.log(policy)).sum(1)  # here
        return advantage.square().mean() - ((chosen + 1e-6).log() * advantage.detach() + 0.01 * entropy).mean()

    def run() -> None:
        for sharpness in (1.0, 2.0, 5000.0, 1.0):
            loss = objective(torch.randn(9, 3), torch.randint(4, (9,)), torch.rand(9), sharpness)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(agent, run, optimizer)


@fault("generate() calls the parts itself; a beam of length 0", phase="forward", op=DIV, module="scorer")
def generation_through_a_method_other_than_forward() -> Loop:
    class Scorer(nn.Module):
        def forward(self, total: Tensor, lengths: Tensor) -> Tensor:
            return total / lengths  # here

    class Captioner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head, self.scorer = nn.Embedding(7, 5), nn.Linear(5, 7), Scorer()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

        @torch.no_grad()
        def generate(self, tokens: Tensor, lengths: Tensor) -> Tensor:
            best = self.head(self.embed(tokens)).log_softmax(-1).amax(-1)
            kept = torch.arange(tokens.shape[1]) < lengths[:, None]
            return self.scorer((best * kept).sum(1), lengths)

    torch.manual_seed(2)
    model = Captioner().eval()

    def run() -> list[int]:
        lengths = (torch.tensor([4.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 4.0]))
        return [int(model.generate(torch.randint(7, (3, 4)), given).argmax()) for given in lengths]

    return Loop(model, run)


@fault("two encoders called by name; a caption of no words", phase="forward", op=DIV, module="text.pool", step=2)
def text_tower_of_a_caption_without_words() -> Loop:
    class MeanPool(nn.Module):
        def forward(self, words: Tensor, present: Tensor) -> Tensor:
            return (words * present[..., None]).sum(1) / present.sum(1, keepdim=True)  # here

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.pool = nn.Embedding(11, 6), MeanPool()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.pool(self.embed(tokens), (tokens != 0).float())

    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.image = Text(), nn.Linear(8, 6)

        def encode_text(self, tokens: Tensor) -> Tensor:
            return F.normalize(self.text(tokens), dim=-1)

        def encode_image(self, pixels: Tensor) -> Tensor:
            return F.normalize(self.image(pixels), dim=-1)

    torch.manual_seed(3)
    model = TwoTowers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        for step in range(4):
            tokens = torch.randint(1, 11, (5, 4))
            if step == 2:
                tokens[3] = 0
            logits = model.encode_text(tokens) @ model.encode_image(torch.randn(5, 8)).mT / 0.07
            loss = F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.mT, torch.arange(5))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("root of 0 in one part of an accumulated step", phase="backward", op=DIV, module="", step=1, micro_step=1)
def accumulated_parts_through_one_tower_alone() -> Loop:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Linear(4, 3, bias=False)
            self.unused = nn.Linear(3, 2)

    torch.manual_seed(4)
    model = Siamese()
    optimizer = torch.optim.SGD(model.tower.parameters(), lr=0.05)

    def run() -> None:
        for step in range(3):
            optimizer.zero_grad()
            for part in range(3):
                x = torch.randn(5, 4)
                if (step, part) == (1, 1):
                    x[2] = 0.0
                length = model.tower(x).square().sum(1).sqrt()  # here
                ((length - 1).square().mean() / 3).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@fault("only the decoder of a frozen autoencoder is called", phase="backward", op=DIV, module="", step=0)
def latent_codes_fitted_from_zero() -> Loop:
    torch.manual_seed(5)
    autoencoder = nn.ModuleDict({"encode": nn.Linear(4, 2), "decode": nn.Linear(2, 4)}).requires_grad_(False)
    codes = torch.zeros(3, 2, requires_grad=True)
    optimizer = torch.optim.Adam([codes], lr=1e-2)

    def run() -> None:
        target = torch.randn(3, 4)
        for _ in range(3):
            error = F.mse_loss(autoencoder["decode"](codes), target)
            prior = (codes**2).sum(1).sqrt().mean()  # here
            optimizer.zero_grad()
            (error + 0.1 * prior).backward()
            optimizer.step()

    return Loop(autoencoder, run, optimizer)
