"""What is wrong with a batch is found, and found where it is."""

import json
import math

import pytest
import torch
from torch import Tensor

from nanhunt.audit.data import audit_data
from nanhunt.errors import NanhuntError
from nanhunt.findings import Finding, Report
from nanhunt.reports.console import render
from nanhunt.reports.json_report import render as render_json


def waveforms(number: int = 8, channels: int = 19, length: int = 640) -> Tensor:
    return torch.randn(number, channels, length).cumsum(2) / 10


def only(report: Report) -> Finding:
    (finding,) = report.findings
    return finding


def damaged(*changes: tuple[object, float]) -> Tensor:
    """Waveforms with values put in at some places."""
    values = waveforms()
    for place, value in changes:
        values[place] = value
    return values


def test_a_non_finite_element_is_located():
    found = only(audit_data({"x": damaged(((3, 5, 100), math.nan), ((3, 5, 101), math.inf))}))
    assert (found.code, found.message) == ("NH610", "x holds 2 non-finite elements, in 1 of 8 samples")
    assert found.evidence["where"] == "5 in sample 3 (0% of it)"
    assert found.severity == "error"


def test_a_channel_flat_at_any_value_is_found_with_its_samples():
    found = only(audit_data(damaged(((1, 13), 0.0), ((4, 13), 2.5))))
    assert (found.code, found.message) == ("NH611", "channel 13 of batch is flat in 2 of 8 samples")
    assert found.evidence["where"] == "13 in samples 1, 4"


def test_the_last_channel_at_zero_is_flat_and_not_padding():
    assert only(audit_data(damaged(((slice(None), 18), 0.0)))).message == (
        "channel 18 of batch is flat in 8 of 8 samples"
    )


def test_a_channel_that_is_flat_for_most_of_a_sample_is_found():
    values = waveforms()
    values[2, 7, 100:500] = values[2, 7, 100]
    found = only(audit_data(values))
    assert (found.code, found.evidence["where"]) == ("NH611", "7 in sample 2 (62% of it)")


def test_a_constant_standardised_with_its_rounding_errors_is_flat():
    values = waveforms()
    values[0, 3] = -0.0538635664 + 4e-9 * torch.randn(640)
    assert only(audit_data(values)).code == "NH611"


def test_a_sample_of_zeros_is_empty():
    found = only(audit_data(damaged((2, 0.0))))
    assert (found.code, found.message) == ("NH612", "1 of 8 samples of batch holds one value throughout")


def test_a_batch_of_zeros_is_found_where_nothing_else_is_given():
    assert only(audit_data((torch.zeros(8, 3, 100), torch.arange(8)))).message == "every value of batch[0] is 0"


def test_clipping_is_found_and_the_rail_given():
    values = waveforms()
    values[5, 2] = values[5, 2].clamp(max=float(values[5, 2].quantile(0.9)))
    found = only(audit_data(values))
    assert (found.code, found.evidence["where"]) == ("NH613", "2 in sample 5 (10% of it)")


def test_samples_repeated_in_a_batch_and_across_batches_are_found():
    first, second = waveforms(), waveforms()
    first[6] = first[1]
    second[0] = first[3]
    found = only(audit_data([(first, torch.arange(8)), (second, torch.arange(8))]))
    assert found.code == "NH614"
    assert found.message == "2 of 16 samples of batch[0] repeat an earlier one: sample 6 is sample 1"
    assert found.evidence == {"num_copies": 2, "num_across_batches": 1}


@pytest.mark.parametrize(
    ("factor", "said"), [(1.0, "is channel 4 in"), (-2.5, "times -2.5 in"), (1e6, "times 1e+06 in")]
)
def test_a_channel_that_is_a_copy_up_to_a_factor_is_found(factor, said):
    values = waveforms()
    values[3, 9] = factor * values[3, 4]
    found = [finding for finding in audit_data(values).findings if finding.code == "NH615"]
    assert len(found) == 1
    assert said in found[0].message


def test_channels_that_are_merely_alike_are_no_copies():
    values = waveforms()
    values[:, 9] = values[:, 4] + 1e-3 * torch.randn(8, 640)
    assert audit_data(values).findings == ()


@pytest.mark.parametrize(("factor", "ratio"), [(1e6, 1e6), (1e-3, 1e-3), (1 / 120, 1 / 120)])
def test_a_channel_in_another_unit_is_found(factor, ratio):
    values = torch.randn(8, 19, 640)
    values[:, 5] *= factor
    found = only(audit_data(values))
    assert (found.code, found.evidence["out_of_scale"]) == ("NH616", [5])
    assert found.evidence["ratio"] == pytest.approx(ratio, rel=0.1)


def test_a_feature_in_another_unit_is_found():
    values = torch.randn(64, 12)
    values[:, 7] *= 1e4
    found = only(audit_data(iter([values[:32], values[32:]])))
    assert found.message.startswith("feature 7 of batch has ")


def test_a_sample_in_another_unit_is_found():
    values = waveforms()
    values[3] *= 1e-6
    found = only(audit_data(values))
    assert (found.code, found.evidence["where"]) == ("NH617", "sample 3")


def test_time_stamps_in_float32_are_found():
    values = torch.cat([torch.randn(64, 4), 1.7e9 + 1e4 * torch.randn(64, 1)], dim=1)
    codes = [finding.code for finding in audit_data(values).findings]
    assert codes == ["NH616", "NH618"]


def test_pixels_as_floats_are_found_and_scaled_ones_are_not():
    pixels = torch.randint(0, 256, (8, 3, 16, 16)).float()
    found = only(audit_data({"pixel_values": pixels}))
    assert (found.code, found.severity) == ("NH619", "warning")
    assert audit_data({"pixel_values": pixels / 255}).findings == ()


def test_subnormal_half_precision_is_found():
    found = only(audit_data((torch.randn(8, 4, 256) * 1e-5).half()))
    assert found.code == "NH620"


def test_labels_of_one_class_are_found_in_many_samples_and_a_skip_in_few():
    data = [(torch.randn(16, 20), torch.zeros(16, dtype=torch.long)) for _ in range(4)]
    found = only(audit_data(data))
    assert (found.code, found.message) == ("NH621", "all 64 labels are 0, in 64 samples")
    few = audit_data(data[0])
    assert few.findings == ()
    assert "NH621 labels-of-one-class" in {skip.what for skip in few.skips}


def test_labels_that_begin_at_one_are_found():
    found = only(audit_data((torch.randn(400, 20), torch.arange(400) % 3 + 1)))
    assert (found.code, found.message) == ("NH622", "no label of 400 is 0, while the largest is 3")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.0, math.nan, 1.0, 1.0]), "batch[1]: 1 label not finite, in 4 samples"),
        (
            torch.full((4,), -100),
            "batch[1]: every label of batch 0 is -100, which cross_entropy ignores: its mean is 0/0",
        ),
        (torch.tensor([0, 1, -7, 2]), "batch[1]: 1 label below 0, the least -7"),
        (
            torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.1, 0.9], [0.2, 0.2]]),
            "batch[1]: 1 of 4 rows do not sum to 1, though the others do",
        ),
    ],
)
def test_labels_that_cannot_be_used_are_errors(labels, message):
    found = only(audit_data((torch.randn(4, 20), labels)))
    assert (found.code, found.severity, found.message) == ("NH623", "error", message)


def test_the_mean_of_ignored_labels_is_nan():
    loss = torch.nn.functional.cross_entropy(torch.randn(4, 3), torch.full((4,), -100))
    assert loss.isnan()


def test_a_window_of_padding_is_found_unless_a_mask_tells_the_model():
    values = waveforms(length=2560)
    values[0, :, 26:] = 0.0
    found = only(audit_data({"x": values}))
    assert found.code == "NH624"
    assert found.message.endswith("26 positions are left of sample 0")
    assert audit_data({"x": values, "lengths": torch.full((8,), 2560)}).findings == ()


def test_labels_are_named_or_found_by_name_or_place():
    x, y = torch.randn(8, 20), torch.arange(8) % 2
    assert audit_data({"x": x, "target": y}).tables[1].rows[0][0] == "target"
    assert audit_data((x, y)).tables[1].rows[0][0] == "batch[1]"
    assert audit_data((y, x), labels=0).tables[1].rows[0][0] == "batch[0]"
    assert audit_data({"x": x, "klass": y}, labels="klass").tables[1].rows[0][0] == "klass"
    assert "labels" in {skip.what for skip in audit_data({"x": x, "klass": y}).skips}
    with pytest.raises(NanhuntError, match="the batch has no 'nothing'; it has: x, y"):
        audit_data({"x": x, "y": y}, labels="nothing")


def test_what_is_no_batch_is_one_line():
    for wrong in (3, object(), [], "abc", [{}]):
        with pytest.raises(NanhuntError):
            audit_data(wrong)


@pytest.mark.parametrize("offset", [3e3, 3e6, 1e7, 3e7])
def test_an_offset_is_found_however_little_it_leaves_of_the_signal(offset):
    found = only(audit_data({"x": torch.randn(16, 8, 500) + offset}))
    assert found.code == "NH618"
    assert found.evidence["mean_over_std"] == pytest.approx(offset, rel=0.3)


def test_sums_that_should_all_be_one_are_no_drowned_signal():
    sums = torch.softmax(torch.randn(16, 8, 500, 30), -1).sum(-1)
    assert sums.unique().numel() > 1
    assert audit_data({"x": sums}).findings == ()


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        (torch.empty(4, 8, device="meta"), "a meta tensor, which has no values"),
        (torch.randn(4, 8, dtype=torch.complex64), "of complex numbers, complex64"),
        (torch.eye(4).to_sparse(), "a sparse tensor"),
    ],
    ids=["meta", "complex", "sparse"],
)
def test_a_tensor_that_cannot_be_looked_at_is_said_to_be_one(batch, what):
    with pytest.raises(NanhuntError, match=f"batch is {what}"):
        audit_data(batch)
    report = audit_data({"x": waveforms(), "other": batch})
    assert f"it is {what}" in {skip.reason for skip in report.skips}


def test_no_more_than_fifty_batches_are_taken():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield torch.randn(2, 20)

    assert dict(audit_data(endless()).facts)["batches"] == "50"
    assert len(taken) == 50


def test_the_report_fits_eighty_columns_and_goes_to_json():
    report = audit_data(damaged(((3, 5, 100), math.nan), ((1, 13), 0.0)))
    assert max(map(len, render(report).splitlines())) <= 80
    assert [finding["code"] for finding in json.loads(render_json(report))["findings"]] == ["NH610", "NH611"]
