"""Two processes on CPU: the gradients are those of one process with the whole batch, the locality term included."""

import subprocess
import sys
from pathlib import Path

import torch
from torch.testing import assert_close


SCRIPT = """
import sys
import torch
from datasets import Dataset
from transformers import TrainerCallback
from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments

model_folder, data, output = sys.argv[1:]

class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        model = getattr(model, "module", model)
        torch.save({name: parameter.grad.clone() for name, parameter in model.named_parameters()}, output)

args = LocalistTrainingArguments(
    output_dir=output + "-run", per_device_train_batch_size=int(8 / WORLD), max_steps=1, max_grad_norm=0, use_cpu=True,
    report_to="none", save_strategy="no", locality_weight=3.0, disable_tqdm=True,
    ddp_backend="gloo" if WORLD > 1 else None,
)
trainer = LocalistTrainer(
    model=LocalistGPT2LMHeadModel.from_pretrained(model_folder), args=args, callbacks=[KeepGradients()],
    train_dataset=Dataset.from_dict({"input_ids": torch.load(data).tolist()}),
)
trainer.train()
"""


def test_two_processes_give_the_gradients_of_one(make_model, make_text, tmp_path: Path) -> None:
    make_model(locality_schedule="linear").save_pretrained(tmp_path / "model")
    torch.save(make_text(8, 60), tmp_path / "ids.pt")
    gradients = []
    for processes in (1, 2):
        script, output = tmp_path / f"train_{processes}.py", tmp_path / f"gradients_{processes}.pt"
        script.write_text(SCRIPT.replace("WORLD", str(processes)))
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"] if processes == 2 else []
        done = subprocess.run(
            [sys.executable, *launch, script, tmp_path / "model", tmp_path / "ids.pt", output],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        gradients.append(torch.load(output))
    one, two = gradients
    for name, gradient in one.items():
        assert_close(two[name], gradient, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
