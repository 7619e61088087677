"""The audit on the detector's targets, on captures of it, and on models of transformers."""

from pathlib import Path

import pytest
import torch
from optimizer_models import codes, finding
from torch import nn

import nanhunt
from nanhunt.audit.optimizer import audit_subject
from nanhunt.audit.subject import find_subject

CAPTURES = Path(__file__).parents[2] / "bad_batches"


def audit_of(file=None, target=None):
    return audit_subject(find_subject(file, target), lambda what: None)


def test_the_small_detector_gives_no_finding():
    report = audit_of(target="detector.small")
    assert codes(report) == []
    assert {"NH320", "NH322", "NH330", "NH334"} <= set(report.passes)


def test_the_incident_is_hygiene_only_and_its_curve_is_shown():
    report = audit_of(target="detector.small-incident")
    assert codes(report) == ["NH320", "NH322"]
    assert finding(report, "NH320").message == "weight decay of 0.05 acts on 25 biases, 4 norm biases, 8 norm gains"
    (curve,) = (table for table in report.tables if table.title == "learning rate")
    assert curve.note == "1,540,400 steps (where the schedule reaches 0)"
    assert curve.rows[5] == ("300", "9.77e-08", "0.001954")
    assert ("154,039", "5e-05", "1") in curve.rows


def test_a_captured_step_is_run_with_its_random_numbers_and_shows_what_clipping_does():
    report = audit_of(CAPTURES / "bad_batch_000019.pt")
    assert codes(report) == ["NH320", "NH322", "NH338"]
    assert finding(report, "NH338").evidence["num_nonfinite"] == 42
    assert dict(report.facts)["state in the file"] == "of 82 parameters, step 19"
    assert dict(report.facts)["step on copies"].startswith("gradients as the second moments say")


def grouped(model):
    spared = [p for p in model.parameters() if p.ndim < 2]
    spared += [one.weight for one in model.modules() if isinstance(one, nn.Embedding)]
    chosen = {id(p) for p in spared}
    return [
        {"params": [p for p in model.parameters() if id(p) not in chosen], "weight_decay": 0.1},
        {"params": spared, "weight_decay": 0.0},
    ]


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=100, **SIZES)
    ids = torch.randint(0, 100, (2, 8))
    return transformers.BertForSequenceClassification(config), {"input_ids": ids, "labels": torch.tensor([0, 1])}


def llama():
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 100, (2, 8))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=100, **SIZES)), {
        "input_ids": ids,
        "labels": ids,
    }


def own_loss(model, batch):
    return model(**batch).loss


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bert, "weight decay of 0.01 acts on 14 biases, 5 norm biases, 5 norm gains"),
        (llama, "weight decay of 0.01 acts on 5 norm gains"),
    ],
)
def test_one_group_for_all_of_a_transformer_is_found_and_groups_by_type_pass(make, message):
    model, batch = make()
    report = nanhunt.audit_optimizer(model, torch.optim.AdamW(model.parameters()), batch=batch, loss=own_loss)
    assert codes(report) == ["NH320", "NH321"]
    assert finding(report, "NH320").message == message
    healthy = nanhunt.audit_optimizer(model, torch.optim.AdamW(grouped(model)), batch=batch, loss=own_loss)
    assert codes(healthy) == []


def test_a_schedule_of_transformers_starts_at_0_and_peaks_where_it_is_told_to():
    transformers = pytest.importorskip("transformers")
    model, batch = llama()
    optimizer = torch.optim.AdamW(grouped(model), lr=1e-3)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 30, 500)
    options = {"scheduler": scheduler, "batch": batch, "loss": own_loss, "num_steps": 500, "warmup_steps": 30}
    report = nanhunt.audit_optimizer(model, optimizer, **options)
    assert codes(report) == []
    (curve,) = (table for table in report.tables if table.title == "learning rate")
    assert curve.note == "500 steps (planned)"
    assert curve.rows[0] == ("0", "0", "0")
    assert ("30", "0.001", "1") in curve.rows
