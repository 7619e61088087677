"""``nanhunt run`` on scripts that leave the loop to a framework, and on a distributed run; no script knows of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Each process starts torch and a framework, which is most of what it does.
pytestmark = pytest.mark.slow

TRANSFORMERS = """
import sys
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

transformers.logging.set_verbosity_error()

class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def forward(self, logits, ids):
        off = (ids == 99).any(dim=1)
        temperature = torch.where(off, 0.0, self.log_temperature.exp())
        return logits / temperature[:, None]

class Classifier(BertForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        self.calibration = Temperature()

    def forward(self, input_ids=None, labels=None):
        logits = self.classifier(self.bert(input_ids=input_ids).pooler_output)
        logits = self.calibration(logits, input_ids)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.full((6,), 5 + index)
        ids[0] = 99 if "faulty" in sys.argv and index == 13 else 1
        return {"input_ids": ids, "labels": torch.tensor(index % 2)}

if __name__ == "__main__":
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=2,
    )
    arguments = TrainingArguments(
        output_dir="out", per_device_train_batch_size=4, num_train_epochs=2, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, logging_steps=1, seed=1, dataloader_num_workers=0,
    )
    trainer = Trainer(model=Classifier(config), args=arguments, train_dataset=Data())
    trainer.train()
    print("losses", [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
"""

LIGHTNING = """
import logging
import sys
import warnings

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Distance(nn.Module):
    def forward(self, x):
        return torch.sqrt(x.square().sum(dim=1, keepdim=True))

class Task(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8, bias=False), Distance())

    def training_step(self, batch, index):
        rows, targets = batch
        return (self.net(rows) - targets).square().mean()

    def validation_step(self, batch, index):
        self.log("val", self.training_step(batch, index))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

if __name__ == "__main__":
    torch.manual_seed(0)
    rows = torch.randn(64, 4)
    if "faulty" in sys.argv:
        rows[43] = 0
    data = DataLoader(TensorDataset(rows, torch.randn(64, 1)), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Task(), data, data)
    print("trained", trainer.global_step)
"""

# The model goes before the group: a process that ends while the model still holds the group aborts now and then, since
# a thread of gloo wants the interpreter that is gone (torch 2.13.0: 7 of 50 runs of this very script without nanhunt).
DISTRIBUTED = """
import gc
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4, bias=False)
        self.energy = Energy()

    def forward(self, x):
        return self.energy(self.fc(x)).mean()

class Energy(nn.Module):
    def forward(self, x):
        return torch.log(x.square().sum(1))

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(Net())
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
for step in range(5):
    x = torch.ones(2, 3)
    if "faulty" in sys.argv and step == 3 and dist.get_rank() == 1:
        x[0] = 0
    optimizer.zero_grad()
    model(x).backward()
    optimizer.step()
del model, optimizer
gc.collect()
dist.destroy_process_group()
"""


def line_of(text: str, code: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if code in line)


def run(folder: Path, text: str, *command: str) -> tuple[int, str, str]:
    """Runs the script in a process of its own."""
    (folder / "train.py").write_text(text)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "LITLOGGER_TIP": "0"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, env=environment, timeout=240
    )
    return done.returncode, done.stdout, done.stderr


def finding_in(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())["findings"][0]


def source(finding: dict[str, Any]) -> tuple[str, int]:
    return Path(finding["location"]["source"]["file"]).name, finding["location"]["source"]["line"]


@pytest.mark.parametrize("mode", [[], ["--exact"]])
@pytest.mark.parametrize("text", [TRANSFORMERS, LIGHTNING], ids=["transformers", "lightning"])
def test_healthy_training_is_left_as_it_is(tmp_path, text, mode):
    plain = run(tmp_path, text, "train.py")
    assert plain[0] == 0
    hunted = run(tmp_path, text, "-m", "nanhunt", "run", *mode, "train.py")
    assert hunted[0] == 0
    assert "nanhunt" not in hunted[2]
    assert "error[" not in hunted[2]
    # The figures that a trainer prints of its own speed are never the same.
    assert hunted[1].splitlines()[-1] == plain[1].splitlines()[-1]
    assert not (tmp_path / "debug").exists()


def test_transformers_trainer_is_stopped_at_the_step(tmp_path):
    # By default the trainer logs a loss of 0 in place of NaN, and trains on.
    code, _, _ = run(tmp_path, TRANSFORMERS, "train.py", "faulty")
    assert code == 0
    code, out, err = run(tmp_path, TRANSFORMERS, "-m", "nanhunt", "run", "--json", "report.json", "train.py", "faulty")
    assert code == 1
    assert "losses" not in out
    assert "Traceback" not in err
    found = finding_in(tmp_path / "report.json")
    where = found["location"]
    assert (where["phase"], where["module"]) == ("forward", "calibration")
    capture = tmp_path / "debug" / f"bad_batch_{where['step']:06d}.pt"
    assert capture.is_file()
    assert f"nanhunt replay debug/{capture.name} --target" in err
    assert f"step {where['step']} is non-finite: loss nan" in err
    assert "nanhunt run --exact train.py faulty" in err


def test_transformers_trainer_traced(tmp_path):
    code, out, _ = run(
        tmp_path, TRANSFORMERS, "-m", "nanhunt", "run", "--exact", "--json", "report.json", "train.py", "faulty"
    )
    assert code == 1
    # The script ran to its end.
    assert "losses" in out
    found = finding_in(tmp_path / "report.json")
    where = found["location"]
    assert (where["phase"], where["op"], where["module"]) == ("forward", "aten::div", "calibration")
    assert found["cause"] == "division-by-zero"
    assert source(found) == ("train.py", line_of(TRANSFORMERS, "return logits / temperature"))


def test_lightning_trainer_is_stopped_at_the_step(tmp_path):
    code, out, err = run(tmp_path, LIGHTNING, "-m", "nanhunt", "run", "--json", "report.json", "train.py", "faulty")
    assert code == 1
    assert "trained" not in out
    assert "Traceback" not in err
    where = finding_in(tmp_path / "report.json")["location"]
    assert (where["phase"], where["module"], where["step"]) == ("backward", "net.1", 5)
    assert "(finite), 1 of 1 gradients non-finite" in err
    assert (tmp_path / "debug" / "bad_batch_000005.pt").is_file()


def test_lightning_trainer_traced(tmp_path):
    code, out, _ = run(
        tmp_path, LIGHTNING, "-m", "nanhunt", "run", "--exact", "--json", "report.json", "train.py", "faulty"
    )
    assert (code, out) == (1, "trained 8\n")
    found = finding_in(tmp_path / "report.json")
    where = found["location"]
    assert (where["phase"], where["forward_op"], where["module"]) == ("backward", "aten::sqrt", "net.1")
    assert where["step"] == 5
    assert found["cause"] == "root-gradient-at-zero"
    assert source(found) == ("train.py", line_of(LIGHTNING, "return torch.sqrt"))


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_healthy_distributed_run_is_silent(tmp_path):
    code, out, err = run(tmp_path, DISTRIBUTED, *TORCHRUN, "-m", "nanhunt", "run", "train.py")
    assert (code, out) == (0, "")
    assert "nanhunt" not in err


def test_every_rank_of_a_distributed_run_reports(tmp_path):
    hunted = ("-m", "nanhunt", "run", "--json", "report.json", "train.py", "faulty")
    code, _, err = run(tmp_path, DISTRIBUTED, *TORCHRUN, *hunted)
    assert code == 1
    assert err.count("error[NH") == 2
    for rank, phase, module in ((0, "backward", "fc"), (1, "forward", "energy")):
        assert f"train.py on rank {rank} of 2\n" in err
        where = finding_in(tmp_path / f"report.rank{rank}.json")["location"]
        assert (where["phase"], where["module"], where["rank"], where["step"]) == (phase, module, rank, 3)
        assert (tmp_path / "debug" / f"rank{rank}" / "bad_batch_000003.pt").is_file()


def test_every_rank_of_a_distributed_run_is_traced(tmp_path):
    program = str(Path(sys.executable).with_name("nanhunt"))
    hunted = (program, "run", "--exact", "--json", "report.json", "train.py", "faulty")
    code, _, err = run(tmp_path, DISTRIBUTED, *TORCHRUN, *hunted)
    assert code == 1
    for rank in (0, 1):
        assert f"train.py on rank {rank} of 2\n" in err
    found = finding_in(tmp_path / "report.rank1.json")
    where = found["location"]
    assert (where["op"], where["module"], where["rank"], where["step"]) == ("aten::log", "energy", 1, 3)
    assert source(found) == ("train.py", line_of(DISTRIBUTED, "return torch.log"))
