"""Faulty steps: what the audit finds, where, and how large it is."""

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nanhunt


class Model(nn.Module):
    """A linear layer, and after it whatever a test wants."""

    def __init__(self, after):
        super().__init__()
        self.linear, self.after = nn.Linear(8, 8), after
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.after(self.linear(x))


ROWS = torch.linspace(0.1, 1.0, 64).view(8, 8)


def audit(after, batch=ROWS, **options):
    return nanhunt.audit_dtype(Model(after), (batch,), **options)


def found(report, code):
    return [finding for finding in report.findings if finding.code == code]


def only(report, code):
    assert [finding.code for finding in report.findings] == [code]
    return report.findings[0]


# 0-dim tensors


def test_a_zero_dim_float32_tensor_beyond_half_overflows():
    report = audit(lambda y: (torch.tensor(1e5) * y.half()).float())
    finding = only(report, "NH410")
    assert finding.severity == "error"
    assert finding.evidence["num_overflow"] == 64
    assert finding.evidence["value_in_result_type"] == float("inf")
    assert finding.location.op == "aten::mul"
    assert finding.location.source.text == "report = audit(lambda y: (torch.tensor(1e5) * y.half()).float())"


def test_the_other_way_round_it_is_not_rounded_itself():
    finding = only(audit(lambda y: (y.half() * torch.tensor(1e5)).float()), "NH410")
    assert finding.evidence["num_overflow"] == 25


def test_a_zero_dim_tensor_that_rounds_to_zero_is_found():
    finding = only(audit(lambda y: (torch.tensor(1e-9) * (1e4 * y.half())).float()), "NH410")
    assert (finding.evidence["value_in_result_type"], finding.severity) == (0.0, "warning")
    assert finding.evidence["relative_error"] == 1.0


@pytest.mark.parametrize(
    "factor", [lambda: torch.tensor(100.0), lambda: torch.tensor(0.1), lambda: torch.tensor([1e3])]
)
def test_what_half_has_or_rounds_and_what_has_a_dimension_is_silent(factor):
    assert audit(lambda y: (y.half() * factor()).float()).findings == ()


def test_the_mean_of_a_tensor_may_be_subtracted():
    assert audit(lambda y: (y.half() - y.mean()).float()).findings == ()


# Reductions


def test_a_half_index_put_loses_what_float64_keeps():
    def pool(y):
        total = torch.zeros(1, 8, dtype=torch.float16)
        return total.index_put((torch.zeros(4096, dtype=torch.long),), y.half(), accumulate=True).float()

    finding = only(audit(pool, torch.ones(4096, 8)), "NH411")
    # Beyond 2048 adding 1 changes nothing.
    assert finding.evidence["relative_error"] == 0.5
    assert finding.evidence["largest_in_float64"] == 4096.0


def test_in_place_is_the_same():
    def pool(y):
        total = torch.zeros(1, dtype=torch.bfloat16)
        return total.index_add_(0, torch.zeros(1024, dtype=torch.long), y[:, 0].bfloat16()).float()

    assert only(audit(pool, torch.ones(1024, 8)), "NH411").evidence["relative_error"] == 0.75


def test_so_does_the_gradient_of_a_half_embedding():
    def loss(model, tokens):
        return model(tokens).float().sum()

    finding = only(
        nanhunt.audit_dtype(nn.Embedding(3, 4).half(), torch.zeros(4096, dtype=torch.long), loss=loss), "NH411"
    )
    assert (finding.location.phase, finding.location.forward_op) == ("backward", "aten::embedding")
    assert finding.evidence["relative_error"] == 0.5


def test_rows_that_index_add_adds_in_float32_are_silent():
    def pool(y):
        total = torch.zeros(1, 8, dtype=torch.float16)
        return total.index_add(0, torch.zeros(4096, dtype=torch.long), y.half()).float()

    assert audit(pool, torch.ones(4096, 8)).findings == ()


def test_a_half_sum_beyond_65504_is_an_error():
    finding = only(audit(lambda y: y.half().sum().float(), torch.full((100, 8), 100.0)), "NH411")
    assert (finding.severity, finding.evidence["largest_in_float64"]) == ("error", 80000.0)


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean, torch.std, torch.linalg.vector_norm])
def test_what_is_added_up_in_float32_and_rounded_once_is_silent(reduce):
    assert audit(lambda y: reduce(y.half()).float(), torch.rand(512, 8)).findings == ()


def test_terms_that_cancel_are_not_the_sums_fault():
    def pool(y):
        terms = torch.tensor([0.7, 0.0003, -0.7], dtype=torch.float16)
        zeros = torch.zeros(3, dtype=torch.long)
        return (y.mean() * 0 + torch.zeros(1, dtype=torch.float16).index_put((zeros,), terms, accumulate=True)).float()

    assert audit(pool).findings == ()


def test_a_sum_that_cancels_is_silent():
    def cancelling(y):
        y = y.half()
        return torch.cat([y, -y, y[:1] * 1e-3]).sum().float()

    assert audit(cancelling, torch.rand(512, 8)).findings == ()


# Linear algebra


def test_a_matrix_rounded_just_before_its_decomposition_is_found():
    finding = only(audit(lambda y: torch.linalg.eigvalsh((y @ y.T).bfloat16().float())), "NH412")
    assert finding.location.op == "aten::_linalg_eigh"
    assert 2e-4 < finding.evidence["relative_change"] < 2.0**-8
    assert finding.severity == "warning"


def test_autocast_casts_silently():
    def loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(*batch)
            return torch.linalg.eigvalsh(y @ y.T).sum()

    assert found(audit(lambda y: y, loss=loss), "NH412")


@pytest.mark.parametrize("solve", [torch.linalg.eigh, torch.linalg.svd, torch.linalg.inv])
def test_a_decomposition_that_refuses_half_ends_the_step_and_not_the_audit(solve):
    report = audit(lambda y: solve(y.half())[0])
    finding = only(report, "NH412")
    assert finding.severity == "error"
    assert finding.evidence["dtype"] == "float16"
    assert finding.location.source.text == "report = audit(lambda y: solve(y.half())[0])"
    assert any(name == "ended in" for name, _ in report.facts)
    assert [skip.what for skip in report.skips] == ["the rest of the step"]


def test_another_error_is_no_finding():
    def broken(y):
        raise KeyError("no such thing")

    report = audit(broken)
    assert report.findings == ()
    assert ("ended in", "KeyError: 'no such thing'") in report.facts


# Losses


def test_squares_that_overflow_are_an_error_of_the_loss():
    def loss(model, batch):
        return F.mse_loss(model(*batch).half() * 400, torch.zeros(8, 8, dtype=torch.float16))

    finding = only(audit(lambda y: y, loss=loss), "NH413")
    assert (finding.severity, finding.evidence["num_overflow"]) == ("error", 1)


def test_a_loss_put_together_by_hand_is_told_by_its_type():
    finding = only(audit(lambda y: y, loss=lambda model, batch: model(*batch).bfloat16().pow(2).mean()), "NH413")
    assert finding.location.op == "aten::mean"


# Labels and batches


def test_labels_that_a_cast_makes_zero_are_found():
    labels = torch.tensor([1.0, 1e-9, 0.5, 0.0])

    def loss(model, batch):
        return ((model(batch["x"]) - batch["labels"].half().float().sum()) ** 2).mean()

    report = nanhunt.audit_dtype(Model(lambda y: y), {"x": ROWS, "labels": labels}, loss=loss)
    finding = only(report, "NH414")
    assert finding.location.tensor == "batch.labels"
    assert (finding.evidence["num_to_zero"], finding.evidence["num_nonzero"]) == (1, 3)


def test_a_batch_in_half_with_subnormal_values_is_found():
    report = nanhunt.audit_dtype(Model(lambda y: y), {"x": ROWS, "w": torch.full((8,), 1e-6).half()}, loss=_weighted)
    finding = only(report, "NH414")
    assert (finding.location.phase, finding.evidence["num_subnormal"]) == ("data", 8)


def test_zeros_and_ones_in_half_are_labels():
    report = nanhunt.audit_dtype(Model(lambda y: y), {"x": ROWS, "w": torch.eye(8)[0].half()}, loss=_weighted)
    assert report.findings == ()


def _weighted(model, batch):
    return (model(batch["x"]) * batch["w"].float()).mean()


# Autocast


def switched_off(inside):
    def loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(*batch)
            with torch.autocast("cpu", enabled=False):
                return inside(y)

    return audit(lambda y: y, loss=loss)


def test_half_inherited_where_autocast_is_switched_off_is_found():
    report = switched_off(lambda y: (y.view(64) * 0.3).float().mean())
    finding = only(report, "NH415")
    assert finding.location.op == "aten::mul"
    assert 0 < finding.evidence["relative_error"] < 2.0**-8


def test_after_a_cast_it_is_float32():
    assert switched_off(lambda y: (y.float() * 0.3).mean()).findings == ()


# Constants


@pytest.mark.parametrize("eps", [1e-8, torch.tensor(1e-8)])
def test_an_eps_that_is_zero_in_half_is_found(eps):
    finding = found(audit(lambda y: (y.half() + eps).float()), "NH416")[0]
    assert (finding.evidence["rounded"], finding.evidence["num_elements"]) == (0.0, 64)


def test_an_eps_that_the_type_has_is_silent_beside_larger_elements():
    assert audit(lambda y: (y.bfloat16() + 1e-8).float()).findings == ()


def test_an_addend_that_changes_nothing_is_found():
    finding = only(audit(lambda y: ((512 + 0 * y).bfloat16() + 1).float()), "NH416")
    assert finding.message == "adding 1 in bfloat16 changed none of 64 elements"


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float16, 1e-6), (torch.bfloat16, 1e-6), (torch.float32, 1e-8)])
def test_an_upper_bound_that_rounds_to_one_is_found(dtype, eps):
    finding = found(audit(lambda y: y.to(dtype).clamp(eps, 1 - eps).float()), "NH416")[-1]
    assert finding.message.startswith("the upper bound 0.99999")
    assert finding.evidence["num_beyond_the_bound"] == 1
    assert finding.severity == "error"


def test_a_bound_that_the_type_has_is_silent():
    assert audit(lambda y: y.clamp(1e-6, 1 - 1e-6)).findings == ()


def test_a_tensor_filled_with_zeros_instead_is_found():
    finding = only(audit(lambda y: (y.half() + torch.full((8,), 1e-9, dtype=torch.float16)).float()), "NH416")
    assert finding.location.op == "aten::full"


# Sums


@pytest.mark.parametrize("add", [operator.iadd, operator.add, lambda total, row: row + total])
def test_a_total_that_outgrows_its_terms_is_found(add):
    def total(y):
        result = torch.zeros(8, dtype=torch.bfloat16)
        for _ in range(60):
            for row in y.bfloat16():
                result = add(result, row)
        return result.float()

    finding = only(audit(total, torch.ones(8, 8)), "NH417")
    # 480 terms of 1; beyond 256 none of them counts.
    assert finding.evidence["num_lost"] == 8 * 224
    assert finding.evidence["relative_error"] == pytest.approx(224 / 480)


def test_sum_over_a_generator_is_a_total_as_well():
    finding = found(
        audit(lambda y: sum(row for _ in range(60) for row in y.bfloat16()).float(), torch.ones(8, 8)), "NH417"
    )
    assert finding[0].evidence["num_lost"] == 8 * 224


def test_a_total_in_float32_is_silent():
    assert audit(lambda y: sum(row for _ in range(60) for row in y), torch.ones(8, 8)).findings == ()


def test_a_float32_sum_that_is_lost_is_found():
    def pool(y):
        return torch.full((1, 8), 2.0**24).index_add(0, torch.zeros(8192, dtype=torch.long), y)

    finding = only(audit(pool, torch.ones(8192, 8)), "NH417")
    assert finding.evidence["relative_error"] == pytest.approx(8192 / (2**24 + 8192))


# Conversions and overflow


def test_a_conversion_that_overflows_is_found():
    finding = only(audit(lambda y: (1e5 * y).half()), "NH419")
    assert (finding.severity, finding.evidence["num_overflow"]) == ("error", 25)


def test_times_in_seconds_since_1970_have_no_place_in_float32():
    times = 1.7e9 + torch.arange(64, dtype=torch.float64).view(8, 8)
    finding = only(nanhunt.audit_dtype(Model(lambda y: y), times, loss=lambda m, b: m(b.float()).mean()), "NH419")
    assert finding.evidence["rounding_over_spread"] > 0.5
    assert finding.location.tensor == "batch"


def test_a_mask_may_become_infinite():
    lowest = torch.finfo(torch.float32).min
    assert audit(lambda y: (y + torch.zeros(8, 8).fill_diagonal_(lowest)).half().softmax(-1).float()).findings == ()


def test_a_product_beyond_half_is_found():
    finding = only(audit(lambda y: (lambda q: (q @ q.T).softmax(-1).float())((400 * y).half())), "NH420")
    assert finding.location.op == "aten::mm"


def test_what_follows_an_overflow_is_a_symptom():
    report = audit(lambda y: ((y.detach().half() * 300) ** 2 * 0.5 - 1).float())
    assert [finding.location.op for finding in report.findings] == ["aten::pow"]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_complex32_is_found():
    report = audit(lambda y: y.half().to(torch.complex32).to(torch.complex64).abs())
    assert [finding.code for finding in report.findings] == ["NH418"]


def test_one_line_of_several_modules_is_one_finding():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.Sequential(*(Model(lambda y: (y.half() + 1e-8).float()) for _ in range(5)))

        def forward(self, x):
            return self.parts(x)

    finding = only(nanhunt.audit_dtype(Many(), ROWS), "NH416")
    assert finding.location.module == "parts.0"
    assert finding.notes == ("in 5 modules: parts.0, parts.1, parts.2 and 2 more",)
