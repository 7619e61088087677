"""What was there before a step, told from what the step made: overflow in place, unwritten memory, log tables."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nanhunt
from nanhunt.observe.exact import ExactTracer
from nanhunt.observe.finite_state import look_before_step, note_step
from nanhunt.observe.memory import Memory
from nanhunt.observe.updates import UpdateProbe


def traced(loss, model, optimizer=None, num_steps=1, each=lambda step: None):
    """First finding of a few steps of plain descent, or of this optimizer's."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    with nanhunt.trace(model, optimizer) as hunt:
        for step in range(num_steps):
            each(step)
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    return hunt.report().first


def with_velocity(value, **settings):
    """A linear model whose optimizer has stepped once, and then got this velocity."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=1.5, **settings)
    model(torch.ones(1, 2)).mean().backward()
    optimizer.step()
    optimizer.state[model.weight]["momentum_buffer"].fill_(value)
    return model, optimizer


# Overflow in place


@pytest.mark.parametrize("settings", [{"foreach": False}, {"foreach": True}, {"nesterov": True}])
def test_a_velocity_that_overflows_in_the_step_was_finite_before_it(settings):
    model, optimizer = with_velocity(3e38, **settings)
    finding = traced(lambda: model(torch.ones(1, 2)).mean(), model, optimizer)
    assert (finding.code, finding.location.phase) == ("NH307", "optimizer")
    assert finding.location.op in ("aten::mul_", "aten::_foreach_mul_")


def test_a_velocity_made_inside_the_trace_is_known_as_well():
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=1.5)

    def loss():
        return F.l1_loss(model(torch.ones(1, 2)).sigmoid(), torch.zeros(1, 1))

    finding = traced(loss, model, optimizer, num_steps=260)
    assert (finding.code, finding.location.phase) == ("NH307", "optimizer")


@pytest.mark.parametrize("settings", [{"foreach": False}, {"foreach": True}, {"nesterov": True}])
def test_a_velocity_that_was_infinite_before_the_trace_is_poisoned_state(settings):
    model, optimizer = with_velocity(torch.inf, **settings)
    finding = traced(lambda: model(torch.ones(1, 2)).mean(), model, optimizer)
    assert (finding.code, finding.location.tensor) == ("NH704", "momentum_buffer of weight")
    assert "it was there before this step: it was loaded so, or something outside the traced steps wrote it" in (
        finding.notes
    )


def test_state_that_is_loaded_between_two_steps_is_poisoned_state():
    model, optimizer = with_velocity(0.0)
    bad = copy.deepcopy(optimizer.state_dict())
    bad["state"][0]["momentum_buffer"] = torch.full((1, 2), torch.inf)

    def load(step):
        if step == 2:
            optimizer.load_state_dict(bad)

    finding = traced(lambda: model(torch.ones(1, 2)).mean(), model, optimizer, num_steps=4, each=load)
    assert (finding.code, finding.location.step) == ("NH704", 2)


def test_memory_that_is_written_to_unseen_is_looked_at_before_the_next_step():
    model, optimizer = with_velocity(1.0)
    memory, velocity = Memory(), optimizer.state[model.weight]["momentum_buffer"]
    assert look_before_step(memory, optimizer) == []
    assert memory.is_known_finite(velocity)
    optimizer.step()
    note_step(memory, optimizer)
    assert not memory.is_changed(velocity)
    velocity[0, 1] = torch.nan
    (found,) = look_before_step(memory, optimizer)
    assert found is velocity


def test_what_is_added_in_place_is_blamed_and_not_what_it_is_added_to():
    offset, total = torch.tensor(torch.nan), torch.zeros(2)
    with ExactTracer() as tracer:
        total.add_(offset)
    assert [source.facts.shape for source in tracer.trace.sources] == [()]


# Unwritten memory


@pytest.fixture
def _filled_memory():
    """Memory that nobody has written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def by_index(values):
    out = torch.empty(3, 2)
    out[torch.tensor([0, 2])] = values
    return out


def by_mask(values):
    out = torch.empty(3, 2)
    out[torch.tensor([True, False, True])] = values
    return out


def by_index_copy(values):
    return torch.empty(3, 2).index_copy_(0, torch.tensor([0, 2]), values)


def by_scatter(values):
    return torch.empty(3, 2).scatter_(0, torch.tensor([[0, 0], [2, 2]]), values)


def by_product(values):
    return torch.empty(3, 2).mul_(values[:1])


@pytest.mark.usefixtures("_filled_memory")
@pytest.mark.parametrize("fill", [by_index, by_mask, by_index_copy, by_scatter, by_product])
def test_the_part_of_memory_that_was_not_written_is_told(fill):
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    finding = traced(lambda: fill(model(torch.ones(2, 2))).mean(), model)
    assert (finding.code, finding.location.op) == ("NH705", "aten::empty")
    assert "torch.empty" in finding.location.source.text


@pytest.mark.usefixtures("_filled_memory")
def test_unwritten_memory_inside_a_backward_of_the_users_is_told_there():
    class Rows(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x[torch.tensor([0, 2])]

        @staticmethod
        def backward(ctx, gradient):
            return by_index(gradient)

    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    finding = traced(lambda: Rows.apply(model(torch.ones(3, 2))).sum(), model)
    assert (finding.code, finding.location.phase) == ("NH705", "backward")


@pytest.mark.usefixtures("_filled_memory")
def test_memory_that_two_writes_fill_is_no_fault():
    torch.manual_seed(0)
    model = nn.Linear(2, 2)

    def loss():
        out = by_index(model(torch.ones(2, 2)))
        out[torch.tensor([1])] = 0.0
        return out.mean()

    assert traced(loss, model) is None


@pytest.mark.usefixtures("_filled_memory")
def test_unwritten_memory_that_is_given_to_a_model_is_no_data():
    model = nn.Linear(2, 2)
    finding = traced(lambda: model(torch.empty(3, 2)).mean(), model)
    assert (finding.code, finding.location.op) == ("NH705", "aten::empty")


@pytest.mark.usefixtures("_filled_memory")
def test_a_parameter_that_nobody_initialised_does_not_speak_of_a_checkpoint_alone():
    model = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(torch.empty(2, 2))
    finding = traced(lambda: model(torch.ones(3, 2)).mean(), model)
    assert finding.code == "NH702"
    assert finding.notes[0].startswith("it was there when it was first looked at: made so at construction")


# Tables of logarithms


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_table_of_logarithms_is_not_blamed_for_a_logsumexp_over_nothing(num_steps):
    torch.manual_seed(0)
    model = nn.Linear(1, 3)
    moves = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]).log()

    def loss():
        emission = model(torch.ones(1, 1))[0]
        return -torch.logsumexp(torch.logsumexp(emission[:, None] + moves, 0), 0)

    assert traced(loss, model, num_steps=num_steps).code == "NH217"


@pytest.mark.parametrize("given_to", ["the model", "an operation"])
def test_scores_of_a_mask_with_other_numbers_are_not_blamed_for_a_softmax_over_nothing(given_to):
    class Scores(nn.Linear):
        def forward(self, x, bias=0.0):
            return super().forward(x) + bias

    torch.manual_seed(0)
    model = Scores(2, 3)
    distances = torch.tensor([[0.0, -1.0, -2.0], [-torch.inf] * 3])

    def loss():
        x = torch.ones(2, 2)
        scores = model(x, distances) if given_to == "the model" else model(x) + distances
        return scores.softmax(-1).square().mean()

    assert traced(loss, model).code == "NH105"


def test_lost_data_is_blamed_where_a_layer_has_mixed_it_before_the_softmax():
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.fill_(-1.0)
        model.weight[0] = 1.0
    levels = torch.tensor([[1.0, 2.0, 3.0], [0.5, -torch.inf, 1.0]])
    finding = traced(lambda: model(levels).softmax(-1).square().mean(), model)
    assert (finding.code, finding.location.phase) == ("NH601", "data")


def test_the_help_for_a_mask_that_is_the_loss_speaks_of_labels():
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    ban = torch.tensor([0.0, -torch.inf, 0.0])
    finding = traced(lambda: F.cross_entropy(model(torch.ones(2, 2)) + ban, torch.tensor([0, 1])), model)
    assert "no label may be of a masked class" in finding.help[0]


# Names and samples of inputs


def test_a_tensor_inside_a_batch_is_named_by_its_key():
    class Joined(nn.Linear):
        def forward(self, batch):
            return super().forward(torch.cat([batch["x"], batch["more"]["age"]], -1))

    model = Joined(3, 1)
    batch = {"x": torch.ones(4, 2), "more": {"age": torch.ones(4, 1)}}
    batch["more"]["age"][2] = torch.nan
    finding = traced(lambda: model(batch).mean(), model)
    assert finding.location.tensor == "input 0['more']['age']"
    assert finding.evidence["sample"] == 2


@pytest.mark.parametrize("is_batch_first", [True, False])
def test_no_sample_is_claimed_for_the_state_of_a_recurrent_module(is_batch_first):
    torch.manual_seed(0)
    model = nn.GRU(2, 3, num_layers=4, batch_first=is_batch_first)
    state = torch.zeros(4, 4, 3)
    state[3, 1, 2] = torch.nan
    finding = traced(lambda: model(torch.ones(4, 4, 2), state)[0].mean(), model)
    assert (finding.code, finding.location.tensor) == ("NH601", "input 1")
    assert set(finding.evidence) == {"num_nonfinite", "first_position"}
    assert finding.notes == ()


def test_no_sample_is_claimed_where_time_comes_first():
    torch.manual_seed(0)
    model = nn.GRU(2, 3)
    x = torch.ones(5, 4, 2)
    x[3, 1] = torch.nan
    finding = traced(lambda: model(x)[0].mean(), model)
    assert "sample" not in finding.evidence


# The size of weights


def test_weights_that_grow_up_the_gradient_say_so():
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, maximize=True)
    finding = traced(lambda: model(torch.ones(4, 2)).square().mean(), model, optimizer, num_steps=80)
    assert finding.code == "NH313"
    assert any("maximize=True" in note for note in finding.notes)
    assert "maximize=False" in finding.help[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_largest_weight_is_kept_with_its_gradient_and_the_rate_of_its_group(dtype):
    small, large = (nn.Parameter(torch.full((3,), size, dtype=dtype)) for size in (0.5, -8.0))
    optimizer = torch.optim.SGD([{"params": [small]}, {"params": [large], "lr": 0.25}], lr=1.0)
    probe = UpdateProbe()
    large.grad = torch.tensor([0.0, 4.0, -2.0], dtype=dtype)
    probe.before_step(optimizer, 0)
    optimizer.step()
    probe.after_step(optimizer, {id(small): "small", id(large): "large"}, 0)
    (history,) = probe.records().histories
    assert (history.parameter, history.maximizes) == ("large", False)
    assert [(s.weight_max, s.gradient_max, s.lr) for s in history.samples] == [(8.0, None, None), (9.0, 4.0, 0.25)]


def test_a_weight_that_is_nan_has_no_size():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    probe = UpdateProbe()
    weight.grad = torch.tensor([0.0, torch.nan])
    probe.before_step(optimizer, 0)
    optimizer.step()
    probe.after_step(optimizer, {}, 0)
    last = probe.records().histories[0].samples[-1]
    assert last.weight_max != last.weight_max
