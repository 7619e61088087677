"""Causes of faults in the optimizer step and of weights that it drove off, on the cases that real loops give.

The rule is asked directly: which of several rules that hold is asked first is the registry's affair.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nanhunt
import nanhunt.hunt
from nanhunt.rules.pages import find_rule

HOW = {"single": {"foreach": False}, "foreach": {"foreach": True}}
ALL_HOW = {**HOW, "fused": {"fused": True}}
every_way = pytest.mark.parametrize("how", HOW.values(), ids=HOW)
every_kernel = pytest.mark.parametrize("how", ALL_HOW.values(), ids=ALL_HOW)

CAUSES = ("NH301", *(f"NH3{number:02}" for number in range(5, 16)), "NH402", "NH604", "NH708")


@pytest.fixture
def case_of(monkeypatch):
    """Traces a loop and gives the case that the rules are asked about; None where nothing is wrong."""

    def trace(model, optimizer, run):
        cases = []
        asked = nanhunt.hunt.judge

        def note(case):
            cases.append(case)
            return asked(case)

        monkeypatch.setattr(nanhunt.hunt, "judge", note)
        with contextlib.suppress(RuntimeError), nanhunt.trace(model, optimizer) as hunt:
            run()
        hunt.report()
        return cases[0] if cases else None

    return trace


def holding(case):
    """Codes of the rules for state and optimizer that hold."""
    return [code for code in CAUSES if find_rule(code).judge(case) is not None]


def judged(code, case):
    return find_rule(code).judge(case)


def training(model, optimizer, batch, num_steps, loss=lambda output: output.float().square().mean()):
    def run():
        for step in range(num_steps):
            optimizer.zero_grad()
            loss(model(batch(step))).backward()
            optimizer.step()

    return model, optimizer, run


def linear(num_outputs=1, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(4, num_outputs).to(dtype)


def with_a_dead_input(dtype=torch.float32):
    torch.manual_seed(1)
    x = torch.randn(8, 4).to(dtype)
    x[:, 1] = 0.0
    return lambda step: x


# Division


@every_way
@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (torch.optim.Adam, "exp_avg_sq"),
        (torch.optim.AdamW, "exp_avg_sq"),
        (torch.optim.RMSprop, "square_avg"),
        (torch.optim.Adamax, "exp_inf"),
    ],
)
def test_eps_that_is_zero_in_half(case_of, kind, key, how):
    model = linear(2, torch.float16)
    case = case_of(*training(model, kind(model.parameters(), lr=1e-3, **how), with_a_dead_input(torch.float16), 2))
    judgement = judged("NH301", case)
    assert judgement.message == (
        f"{kind.__name__} divided by 0 in weight: eps=1e-08 is 0 in float16, and {key} is 0 at [0, 1]"
    )
    assert judgement.evidence["gradient"] == 0.0
    assert holding(case) == ["NH301"]


@pytest.mark.parametrize("options", [{"fused": True}, {"eps": 1e-4}], ids=["fused", "larger"])
def test_half_adam_that_does_not_divide_by_zero_is_fine(case_of, options):
    model = linear(2, torch.float16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, **options)
    assert case_of(*training(model, optimizer, with_a_dead_input(torch.float16), 2)) is None


@every_way
def test_no_eps_at_all(case_of, how):
    model = linear()
    optimizer = torch.optim.Adagrad(model.parameters(), eps=0.0, **how)
    case = case_of(*training(model, optimizer, with_a_dead_input(), 2))
    assert judged("NH305", case).message == "Adagrad divided by 0 in weight: eps is 0, and sum is 0 at [0, 1]"
    assert holding(case) == ["NH305"]


def test_the_bias_correction_of_step_zero(case_of):
    model = linear()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    loop = training(model, optimizer, lambda step: torch.ones(8, 4), 1)
    loop[2]()
    for state in optimizer.state.values():
        state["step"].fill_(-1.0)
    case = case_of(*loop)
    assert "divided by 1 - 0.9 ** 0 = 0" in judged("NH311", case).message
    assert holding(case) == ["NH311"]


# Overflow in the step


@every_kernel
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_square_of_a_finite_gradient(case_of, kind, how):
    model = linear()
    optimizer = kind(model.parameters(), **how)
    loop = training(model, optimizer, lambda s: torch.ones(8, 4) * (1e21 if s == 2 else 1), 4, lambda y: y.mean())
    case = case_of(*loop)
    judgement = judged("NH306", case)
    assert judgement.message == (
        "exp_avg_sq of weight became infinite: the gradient is 1e+21 at [0, 0]; its square is beyond 3.4e+38"
    )
    assert case.step == 2
    assert holding(case) == ["NH306"]


@every_way
def test_momentum_sums_half_gradients_past_the_limit(case_of, how):
    model = linear(dtype=torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.99, **how)
    loop = training(model, optimizer, lambda s: torch.full((4, 4), 5000.0).half(), 5, lambda y: y.float().sum())
    case = case_of(*loop)
    judgement = judged("NH307", case)
    assert judgement.evidence["momentum"] == 0.99
    assert judgement.evidence["gradient"] == 20000.0
    assert case.step == 3
    assert holding(case) == ["NH307"]


@every_kernel
@pytest.mark.parametrize("lr", [float("inf"), float("nan")])
def test_a_rate_that_is_not_finite(case_of, lr, how):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, **how)

    def batch(step):
        optimizer.param_groups[0]["lr"] = lr if step == 2 else 1e-3
        return torch.ones(8, 4)

    case = case_of(*training(model, optimizer, batch, 4))
    assert judged("NH308", case).message == f"lr is {lr:g} in group 0 of SGD, which holds weight"
    assert holding(case) == ["NH308"]


@every_kernel
def test_one_update_beyond_the_limit(case_of, how):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, **how)

    def batch(step):
        optimizer.param_groups[0]["lr"] = 1e38 if step == 2 else 1e-3
        return torch.full((8, 4), 9.0)

    case = case_of(*training(model, optimizer, batch, 4, lambda y: y.mean()))
    assert judged("NH309", case).message == "SGD took weight beyond 3.4e+38 at [0, 0]: lr=1e+38, gradient 9"
    assert holding(case) == ["NH309"]


@every_way
def test_a_second_moment_below_zero(case_of, how):
    model = linear()
    optimizer = torch.optim.Adam(model.parameters(), **how)
    loop = training(model, optimizer, lambda step: torch.ones(8, 4), 1)
    loop[2]()
    optimizer.state[model.weight]["exp_avg_sq"][0, 2] = -1.0
    case = case_of(*loop)
    assert judged("NH310", case).message.startswith("Adam took the root of exp_avg_sq of weight, which is -0.99")
    assert holding(case) == ["NH310"]


@every_way
def test_a_centred_mean_square_below_zero_by_rounding(case_of, how):
    torch.manual_seed(10)
    model = nn.Linear(50, 1, bias=False)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-4, alpha=0.9, centered=True, **how)
    x = torch.randn(1, 50)
    case = case_of(*training(model, optimizer, lambda step: x, 400, lambda y: y.mean()))
    judgement = judged("NH310", case)
    assert judgement.evidence["square_avg"] == pytest.approx(judgement.evidence["grad_avg"] ** 2, rel=1e-5)
    assert holding(case) == ["NH310"]


# Weights that were driven off


def least_squares(lr, **options):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
    generator = torch.Generator().manual_seed(2)
    return training(model, optimizer, lambda step: 3 * torch.randn(16, 4, generator=generator), 400)


@every_kernel
@pytest.mark.parametrize("lr", [0.5, 0.14])
def test_a_learning_rate_that_diverges(case_of, lr, how):
    case = case_of(*least_squares(lr, **how))
    judgement = judged("NH313", case)
    assert judgement.evidence["lr"] == lr
    assert judgement.evidence["factor_per_step"] > 1.2
    assert 4 <= judgement.evidence["num_steps"] <= 31
    assert holding(case) == ["NH313"]


def test_a_learning_rate_that_converges_is_fine(case_of):
    assert case_of(*least_squares(0.02)) is None


def test_weights_that_train_do_not_explain_an_overflow_of_the_input(case_of):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loop = training(model, optimizer, lambda step: torch.ones(8, 4) * (1e30 if step == 8 else 1), 9)
    case = case_of(*loop)
    assert case.step == 8
    assert holding(case) == []


def test_growing_weights_do_not_explain_a_logarithm_of_zero(case_of):
    model, optimizer, _ = least_squares(0.5)

    def run():
        for step in range(14):
            x = 3 * torch.randn(16, 4)
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if step == 13:
                loss = loss + torch.log(torch.zeros(1, requires_grad=True)).sum()
            loss.backward()
            optimizer.step()

    torch.manual_seed(2)
    case = case_of(model, optimizer, run)
    assert case.op.op == "aten::log"
    assert holding(case) == []


@every_kernel
def test_decay_that_makes_weights_larger(case_of, how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=3.0, **how)
    case = case_of(*training(model, optimizer, lambda step: torch.ones(8, 4), 200))
    judgement = judged("NH312", case)
    assert judgement.evidence["lr"] * judgement.evidence["weight_decay"] == 3.0
    assert judgement.evidence["factor_per_step"] == pytest.approx(2.0, rel=0.05)
    assert holding(case)[0] == "NH312"


def test_a_diverging_rate_is_not_laid_to_decay(case_of):
    case = case_of(*least_squares(1.0, weight_decay=3.0))
    assert holding(case) == ["NH313"]


def test_one_huge_gradient_throws_the_weights(case_of):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run():
        for step in range(8):
            y = model(torch.randn(8, 4))
            optimizer.zero_grad()
            ((y * 1e22).mean() if step == 4 else (y - 1).square().mean()).backward()
            optimizer.step()

    case = case_of(model, optimizer, run)
    judgement = judged("NH314", case)
    assert (case.step, judgement.evidence["thrown_in_step"]) == (5, 4)
    assert judgement.evidence["gradient_max"] == pytest.approx(1e22)
    assert holding(case) == ["NH314"]


# Clipping, statistics, conversions, sums


def clipped(how, scale):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run():
        for step in range(4):
            optimizer.zero_grad()
            (model(torch.ones(8, 4)).mean() * (scale if step == 2 else 1)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True, **how)
            optimizer.step()

    return model, optimizer, run


@every_way
def test_a_norm_of_finite_gradients_that_overflows(case_of, how):
    case = case_of(*clipped(how, 1e20))
    assert case.step == 2
    assert judged("NH315", case).evidence["gradient_max"] == pytest.approx(1e20)
    assert holding(case) == ["NH315"]


@every_way
def test_a_norm_that_is_infinite_over_an_infinite_gradient_is_not_to_blame(case_of, how):
    case = case_of(*clipped(how, float("inf")))
    assert case.op.op == "aten::mul"
    assert holding(case) == []


def test_one_batch_takes_the_running_statistics(case_of):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    xs = torch.randn(4, 8, 4)
    xs[2, 3, 1] = 1e25
    case = case_of(*training(model, optimizer, lambda step: xs[step], 4))
    judgement = judged("NH708", case)
    assert judgement.evidence["buffer"] == "0.running_var"
    assert judgement.notes == ("what reached loss and gradients is finite; evaluation reads the buffer",)
    assert case.step == 2


def test_a_number_that_the_loader_had_is_lost_in_the_conversion(case_of):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rows = torch.ones(3, 8, 4, dtype=torch.float64)
    rows[1, 5, 2] = 1e300
    case = case_of(*training(model, optimizer, lambda step: rows[step].float(), 3))
    assert judged("NH604", case).message == (
        "1 finite number of float64 lost to float32, which ends at 3.4e+38: first 1e+300 at [5, 2]"
    )
    assert holding(case) == ["NH604"]


def test_a_sum_in_half(case_of):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = lambda y: ((y * 0).half() + 70).sum()  # noqa: E731 - a loss in one line
    case = case_of(*training(model, optimizer, lambda step: torch.ones(2000, 4), 2, loss))
    assert judged("NH402", case).evidence == {"num_elements": 2000, "abs_max": 70.0, "limit": 65504.0}
    assert holding(case) == ["NH402"]


def test_the_look_at_the_weights_changes_nothing():
    def weights(is_traced):
        model, optimizer, _ = least_squares(0.02)
        x = torch.ones(4, 4)

        def run():
            for _ in range(6):
                optimizer.zero_grad()
                F.mse_loss(model(x), torch.zeros(4, 1)).backward()
                optimizer.step()

        if is_traced:
            with nanhunt.trace(model, optimizer):
                run()
        else:
            run()
        return model.weight.detach(), torch.get_rng_state()

    for plain, traced in zip(weights(False), weights(True), strict=True):
        assert torch.equal(plain, traced)
