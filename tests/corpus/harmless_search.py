"""Look-alikes: attention without keys, and the -inf of decoding, lattices and dynamic programs."""

import torch
import torch.nn.functional as F
from scenario import Loop, harmless
from torch import Tensor, nn


@harmless("scaled_dot_product_attention gives 0 for a row without keys, and its gradient is 0 as well")
def safe_softmax_of_a_row_without_keys() -> Loop:
    torch.manual_seed(16)
    model = nn.Sequential(nn.Linear(8, 24), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(3):
            x = torch.randn(3, 4, 8)
            real = torch.arange(4) < torch.tensor([4, 0, 2])[:, None]
            q, k, v = model[0](x).chunk(3, -1)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, :].expand(3, 4, 4))
            optimizer.zero_grad()
            F.mse_loss(model[1](mixed)[..., 0], x[..., 0]).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("in evaluation the NaN rows of padded queries are dropped by indexing before anything uses them")
def padded_queries_are_dropped_in_evaluation() -> Loop:
    torch.manual_seed(17)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk = nn.Linear(8, 16)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor, real: Tensor) -> Tensor:
            q, k = self.qk(x).chunk(2, -1)
            pairs = real[:, :, None] & real[:, None, :]
            mixed = (q @ k.mT).masked_fill(~pairs, float("-inf")).softmax(-1) @ x
            return self.head(mixed[real])

    model = Encoder().eval()

    @torch.inference_mode()
    def run() -> None:
        for _ in range(3):
            real = torch.arange(5) < torch.tensor([5, 3])[:, None]
            logits = model(torch.randn(2, 5, 8), real)
            assert logits.shape == (8, 3)
            assert logits.isfinite().all()

    return Loop(model, run)


@harmless("beam search: all beams but the first start at -inf, and banned tokens get -inf")
def beam_search_with_banned_tokens() -> Loop:
    torch.manual_seed(18)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(12, 8)
            self.cell = nn.GRUCell(8, 8)
            self.out = nn.Linear(8, 12)

        def forward(self, token: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            state = self.cell(self.embed(token), state)
            return self.out(state).log_softmax(-1), state

    model = Decoder()

    def run() -> None:
        model.eval()
        with torch.no_grad():
            scores = torch.tensor([0.0, -torch.inf, -torch.inf])
            tokens, state = torch.ones(3, dtype=torch.long), torch.zeros(3, 8)
            for _ in range(5):
                log_probs, state = model(tokens, state)
                log_probs[:, [0, 1]] = -torch.inf
                scores, best = (scores[:, None] + log_probs).flatten().topk(3)
                beams, tokens = best // 12, best % 12
                state = state[beams]
        assert scores.isfinite().all()

    return Loop(model, run)


@harmless("top-k sampling: what is below the k-th logit becomes -inf")
def top_k_sampling() -> Loop:
    torch.manual_seed(19)
    model = nn.Sequential(nn.Embedding(16, 8), nn.Flatten(), nn.Linear(24, 16))
    model.eval()

    @torch.no_grad()
    def run() -> None:
        tokens = torch.randint(0, 16, (2, 3))
        for _ in range(6):
            logits = model(tokens[:, -3:]) / 0.7
            kth = logits.topk(4).values[:, -1:]
            logits[logits < kth] = -float("Inf")
            tokens = torch.cat([tokens, torch.multinomial(F.softmax(logits, dim=-1), 1)], dim=1)

    return Loop(model, run)


@harmless("top-p sampling: the tail of the sorted distribution becomes -inf, its head never")
def top_p_sampling() -> Loop:
    torch.manual_seed(20)
    model = nn.LSTM(4, 10, batch_first=True)
    model.train(False)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(4):
                logits = 3 * model(torch.randn(3, 5, 4))[0][:, -1]
                ordered, order = logits.sort(descending=True)
                is_tail = ordered.softmax(-1).cumsum(-1) > 0.6
                is_tail[:, 1:] = is_tail[:, :-1].clone()
                is_tail[:, 0] = False
                logits = logits.masked_fill(is_tail.scatter(1, order, is_tail), -torch.inf)
                drawn = torch.distributions.Categorical(logits=logits).sample()
                assert logits.gather(1, drawn[:, None]).isfinite().all()

    return Loop(model, run)


@harmless("a mixture with two pruned components, whose log-weight is -inf")
def logsumexp_with_pruned_components() -> Loop:
    torch.manual_seed(21)

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.means = nn.Parameter(torch.randn(5, 2))
            self.register_buffer("log_weights", torch.tensor([0.5, 0.25, 0.25, 0.0, 0.0]).log())

        def forward(self, x: Tensor) -> Tensor:
            log_probs = -0.5 * (x[:, None, :] - self.means).square().sum(-1)
            return torch.logsumexp(self.log_weights + log_probs, dim=1)

    model = Mixture()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

    def run() -> None:
        for _ in range(5):
            optimizer.zero_grad()
            (-model(torch.randn(16, 2)).mean()).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("CTC: alphas that no path reaches are -inf; zero_infinity drops the sample that is too short")
def ctc_with_an_impossible_sample() -> Loop:
    torch.manual_seed(22)
    model = nn.ModuleDict({"rnn": nn.GRU(5, 12), "out": nn.Linear(12, 6)})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    criterion = nn.CTCLoss(zero_infinity=True)

    def run() -> None:
        for _ in range(4):
            frames = torch.randn(9, 3, 5)
            log_probs = model["out"](model["rnn"](frames)[0]).log_softmax(-1)
            targets = torch.randint(1, 6, (3, 4))
            loss = criterion(log_probs, targets, torch.tensor([9, 9, 3]), torch.tensor([4, 2, 4]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("hand-written CTC: the first column of alphas is -inf except for two states")
def alphas_that_start_at_minus_inf() -> Loop:
    torch.manual_seed(23)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    states = torch.tensor([0, 1, 0, 2, 0])

    def log_likelihood(log_probs: Tensor) -> Tensor:
        alpha = torch.full((5,), -torch.inf)
        alpha = torch.cat([log_probs[0, states[:2]], alpha[2:]])
        never = torch.tensor([-torch.inf, -torch.inf])
        for frame in log_probs[1:]:
            one, two = torch.cat([never[:1], alpha[:-1]]), torch.cat([never, alpha[:-2]])
            two = torch.where(states.ne(0) & states.ne(states.roll(2)), two, -torch.inf)
            paths = torch.stack([alpha, one, two])
            reached = paths.isfinite().any(dim=0)
            total = torch.logsumexp(torch.where(reached, paths, 0.0), dim=0) + frame[states]
            alpha = torch.where(reached, total, -torch.inf)
        return torch.logaddexp(alpha[-1], alpha[-2])

    def run() -> None:
        for _ in range(4):
            loss = -log_likelihood(model(torch.randn(7, 4)).log_softmax(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("a CRF in which a sentence cannot start inside an entity: -inf among the start transitions")
def crf_with_impossible_transitions() -> Loop:
    torch.manual_seed(24)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emit = nn.Linear(6, 3)
            self.transitions = nn.Parameter(torch.zeros(3, 3))
            self.register_buffer("start", torch.tensor([0.0, 0.0, -torch.inf]))
            self.register_buffer("forbidden", torch.tensor([[0, 0, 1], [0, 0, 0], [0, 0, 0]]).bool())

        def scores(self) -> Tensor:
            return self.transitions.masked_fill(self.forbidden, -torch.inf)

        def forward(self, x: Tensor, tags: Tensor) -> Tensor:
            emissions, scores = self.emit(x), self.scores()
            alpha = self.start + emissions[0]
            gold = self.start[tags[0]] + emissions[0, tags[0]]
            for t in range(1, len(x)):
                alpha = (alpha[:, None] + scores).logsumexp(0) + emissions[t]
                gold = gold + scores[tags[t - 1], tags[t]] + emissions[t, tags[t]]
            return alpha.logsumexp(0) - gold

        @torch.no_grad()
        def decode(self, x: Tensor) -> list[int]:
            emissions, best, back = self.emit(x), self.start + self.emit(x)[0], []
            for emission in emissions[1:]:
                best, previous = (best[:, None] + self.scores()).max(dim=0)
                best = best + emission
                back.append(previous)
            path = [int(best.argmax())]
            for previous in reversed(back):
                path.append(int(previous[path[-1]]))
            return path[::-1]

    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def run() -> None:
        for _ in range(4):
            x = torch.randn(6, 6)
            optimizer.zero_grad()
            model(x, torch.tensor([0, 1, 2, 2, 0, 1])).backward()
            optimizer.step()
        assert model.decode(torch.randn(5, 6))[0] != 2

    return Loop(model, run, optimizer)


@harmless("Mamba-2's segment sum: -inf above the diagonal, and exp makes it 0 (Dao & Gu 2024)")
def segment_sum_of_a_state_space_model() -> Loop:
    torch.manual_seed(25)

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decay = nn.Linear(8, 2)
            self.bc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            log_decay = -F.softplus(self.decay(x)).transpose(1, 2)
            total = log_decay.cumsum(-1)
            segments = total[..., :, None] - total[..., None, :]
            seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            kernel = segments.masked_fill(~seen, -torch.inf).exp()
            b, c = self.bc(x).chunk(2, -1)
            return torch.einsum("bts,bhts,bshd->bthd", c @ b.mT, kernel, x.unflatten(-1, (2, 4))).flatten(2)

    model = nn.Sequential(nn.Linear(4, 8), Mixer(), nn.LayerNorm(8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(4):
            x = torch.randn(3, 7, 4)
            optimizer.zero_grad()
            F.mse_loss(model(x)[..., 0], x.sum(-1).cumsum(-1)).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("a policy whose impossible actions have the logit -inf; Categorical's entropy knows it")
def policy_with_masked_actions() -> Loop:
    torch.manual_seed(26)
    model = nn.ModuleDict({"policy": nn.Linear(6, 5), "value": nn.Linear(6, 1)})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def run() -> None:
        for _ in range(4):
            state = torch.randn(10, 6)
            allowed = state[:, :5] < 0.5
            allowed[:, 0] = True
            logits = torch.where(allowed, model["policy"](state), torch.tensor(float("-inf")))
            policy = torch.distributions.Categorical(logits=logits)
            action = policy.sample()
            value = model["value"](state).squeeze(-1)
            advantage = action.float() - value
            loss = -(policy.log_prob(action) * advantage.detach()).mean() - 0.01 * policy.entropy().mean()
            optimizer.zero_grad()
            (loss + 0.5 * advantage.square().mean()).backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("soft-DTW: the border of the table is inf, its corner 0 (Cuturi & Blondel 2017)")
def soft_dtw_with_borders_of_inf() -> Loop:
    torch.manual_seed(27)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    inf = torch.tensor(torch.inf)

    def soft_dtw(cost: Tensor, gamma: float = 0.5) -> Tensor:
        above = [torch.tensor(0.0)] + [inf] * cost.shape[1]
        for row in cost:
            current = [inf]
            for column, value in enumerate(row, 1):
                ways = torch.stack([above[column], above[column - 1], current[-1]])
                current.append(value - gamma * torch.logsumexp(-ways / gamma, dim=0))
            above = current
        return above[-1]

    def run() -> None:
        time = torch.linspace(0, 3, 5)[:, None]
        for _ in range(3):
            loss = soft_dtw((model(time) - time.sin().T).square())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("the distance of a point to itself is set to inf before the nearest other point is looked for")
def nearest_neighbour_with_inf_on_the_diagonal() -> Loop:
    torch.manual_seed(28)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        for _ in range(4):
            labels = torch.arange(12) % 3
            z = F.normalize(model(torch.randn(12, 6) + labels[:, None]), dim=1)
            with torch.no_grad():
                nearest = torch.cdist(z, z).fill_diagonal_(torch.inf).argmin(dim=1)
            distance = 2 - 2 * z @ z.T
            negative = distance.masked_fill(labels[:, None] == labels, float("inf")).min(dim=1).values
            loss = F.relu((z - z[nearest]).square().sum(1) - negative + 0.5).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)


@harmless("Gumbel noise: two logarithms of a uniform number that is kept from 0 and 1; a straight-through sample")
def gumbel_noise() -> Loop:
    torch.manual_seed(29)
    model = nn.ModuleDict({"encode": nn.Linear(8, 4), "codes": nn.Linear(4, 8, bias=False)})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def run() -> None:
        for step in range(5):
            x = torch.randn(6, 8)
            logits = model["encode"](x)
            tiny = torch.finfo(x.dtype).tiny
            noise = -(-torch.rand_like(logits).clamp(tiny, 1 - 1e-7).log()).log()
            soft = ((logits + noise) / (1.0 - 0.1 * step)).softmax(-1)
            hard = F.gumbel_softmax(logits, tau=0.5, hard=True)
            loss = F.mse_loss(model["codes"](soft), x) + F.mse_loss(model["codes"](hard), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Loop(model, run, optimizer)
