"""Training arguments that cannot be used: one line and status 2, before anything is loaded."""

import os
from pathlib import Path

import pytest

from localist_hf.cli.main import main
from localist_hf.experiments.base import BASE


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        # numbers
        ("--learning_rate nan", "`learning_rate` is nan; it must be a finite number"),
        ("--learning_rate -1", "`learning_rate` is -1.0; it must be at least 0"),
        ("--learning_rate fast", "--learning-rate: invalid float value: 'fast'"),
        ("--max_steps 0", "`max_steps` is 0; it must be at least 1, or -1"),
        ("--max_steps -1 --num_train_epochs 0", "`num_train_epochs` is 0.0; it must be greater than 0"),
        ("--per_device_train_batch_size 0", "`per_device_train_batch_size` is 0; it must be in 1 to 65536"),
        ("--per_device_eval_batch_size -2", "`per_device_eval_batch_size` is -2; it must be in 1 to 65536"),
        ("--per_device_eval_batch_size 4294967295", "_size` is 4294967295; it must be in 1 to 65536."),
        ("--dataloader_persistent_workers true", "`dataloader_persistent_workers` is true; it needs `dataloader_num_w"),
        ("--save_strategy best", "`save_strategy` is 'best'; it needs `metric_for_best_model`, such as 'loss'."),
        ("--fsdp x", "`fsdp` is 'x', which has 'x'; allowed are full_shard, "),
        ("--fsdp_config {}", "`fsdp_config` is '{}'; it needs `fsdp`, which is not given."),
        (
            '--fsdp_config {"version":2,"reshard_after_forward":"full_shard"}',
            "'full_shard'; with 'version' 2 it is true",
        ),
        (
            "--accelerator_config fifo",
            "`accelerator_config` is 'fifo'; it must be a JSON object, or a file with one: it is",
        ),
        ("--config fifo", "`config` is 'fifo', which cannot be read: it is no file that can be read twice."),
        ("--text-file /proc/self/mem", "`text_file` is '/proc/self/mem'; it cannot be read (Input/output error)."),
        ("--lora_rank 99999", "`lora_rank` is 99999; it must be at most 128"),
        ("--gradient_accumulation_steps 0", "`gradient_accumulation_steps` is 0"),
        ("--eval_accumulation_steps 0", "`eval_accumulation_steps` is 0"),
        ("--weight_decay inf", "`weight_decay` is inf"),
        ("--adam_beta1 1", "`adam_beta1` is 1.0; it must be at least 0 and below 1"),
        ("--max_grad_norm -1", "`max_grad_norm` is -1.0"),
        ("--warmup_steps nan", "`warmup_steps` is nan"),
        ("--logging_steps 0", "`logging_steps` is 0.0; it must be greater than 0"),
        ("--save_steps -1", "`save_steps` is -1.0"),
        ("--seed -1", "`seed` is -1; it must be between 0 and 2**32 - 1"),
        ("--data_seed 4294967296", "`data_seed` is 4294967296"),
        ("--dataloader_num_workers -1", "`dataloader_num_workers` is -1"),
        ("--neftune_noise_alpha -1", "`neftune_noise_alpha` is -1.0"),
        ("--locality_weight inf", "`locality_weight` is inf"),
        ("--locality_weight -1", "`locality_weight` is -1.0"),
        ("--locality_warmup_steps nan", "`locality_warmup_steps` is nan"),
        ("--target_fidelity 1.2", "`target_fidelity` is 1.2; it must lie in (0, 1]"),
        ("--locality_exponent 3", "`locality_exponent` is 3"),
        ("--validation-share nan", "`validation_share` is nan"),
        ("--validation-share 1", "`validation_share` is 1.0; it must be between 0 and 1"),
        ("--max_steps 100000000000000000000", "`max_steps` is 100000000000000000000; it must be below 2**32."),
        ("--learning_rate 1e300", "`learning_rate` is 1e+300; it must be below 2**32."),
        ("--dataloader_num_workers 1025", "`dataloader_num_workers` is 1025; it must be in 0 to 1024."),
        ("--dataloader_prefetch_factor 1025", "`dataloader_prefetch_factor` is 1025; it must be in 1 to 1024."),
        # what cannot work here
        ("--report_to wandb", "`report_to` is 'wandb', which is not installed or not known; allowed are"),
        ("--optim adamw_bnb_8bit", "`optim` is 'adamw_bnb_8bit', which cannot be used: You need to install"),
        ("--use_liger_kernel", "`use_liger_kernel` is true"),
        ("--torch_compile_backend fast", "`torch_compile_backend` is 'fast'; allowed are"),
        ("--label_names answers", "`label_names` is ['answers']"),
        ("--label_smoothing_factor 0.1", "`label_smoothing_factor` is 0.1"),
        ("--lr_scheduler_type cosine_with_min_lr", "`lr_scheduler_type` is 'cosine_with_min_lr'"),
        ("--lr_scheduler_kwargs {bad", "`lr_scheduler_kwargs` is '{bad'; it must be a JSON object"),
        ('--lr_scheduler_kwargs {"zz":1}', "`lr_scheduler_kwargs` {'zz': 1}: get_linear_schedule_with_warmup() got an"),
        (
            '--lr_scheduler_type polynomial --learning_rate 1e-4 --lr_scheduler_kwargs {"lr_end":1e-3}',
            "`learning_rate` 0.0001 and `lr_scheduler_kwargs` {'lr_end': 0.001}: lr_end (0.001) must be smaller",
        ),
        (
            '--lr_scheduler_type polynomial --lr_scheduler_kwargs {"lr_end":-1}',
            "`lr_scheduler_kwargs` {'lr_end': -1}: it gives a learning rate of -1.0.",
        ),
        (
            '--lr_scheduler_type cosine_with_min_lr --learning_rate 0 --lr_scheduler_kwargs {"min_lr":1}',
            "float division by zero",
        ),
        (
            '--lr_scheduler_type reduce_lr_on_plateau --eval_strategy steps --lr_scheduler_kwargs {"patience":"two"}',
            "`lr_scheduler_kwargs` {'patience': 'two'}: '>' not supported between instances of 'int' and 'str'",
        ),
        ("--optim_args fast", "`optim_args` is 'fast'; it must be NAME=VALUE, or several with commas between."),
        ("--optim_args fast=1", "`optim_args` is 'fast=1'; `optim` 'adamw_torch_fused' takes no 'fast'."),
        (
            "--optim sgd --optim_args momentum=much",
            "`optim` is 'sgd' and `optim_args` 'momentum=much', which cannot be used: could not convert string to",
        ),
        (
            "--optim sgd --optim_args momentum=-1",
            "`optim` is 'sgd' and `optim_args` 'momentum=-1', which cannot be used: Invalid momentum value: -1.0",
        ),
        ("--torch_compile_mode fast", "`torch_compile_mode` 'fast', which cannot be used: Unrecognized mode=fast"),
        (
            "--torch_compile_backend tensorrt",
            "`torch_compile_backend` is 'tensorrt' and `torch_compile_mode` None",
        ),
        ("--debug tpu_metrics_debug", "`debug` is 'tpu_metrics_debug', for which the package `torch_xla` is missing"),
        ("--hub_model_id a/b/c", "`hub_model_id` is 'a/b/c'; it must be NAMESPACE/NAME or NAME"),
    ],
)
def test_a_wrong_argument(flags: str, words: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("localist_hf.cli.train.load_tokenizer", lambda *_: pytest.fail("something is loaded"))
    Path("book.txt").write_text("Sentence number says something.")
    os.mkfifo("fifo")
    arguments = [
        "--model",
        str(BASE),
        "--text-file",
        "book.txt",
        "--output-dir",
        "run",
        "--use_cpu",
        "--max_steps",
        "1",
    ]
    with pytest.raises(SystemExit) as end:
        main(["train", *arguments, *flags.split(" ")])
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("localist-hf train: error: ")
    assert words in lines[-1]
    assert len(lines) == 1
    assert end.value.code == 2
    assert [path.name for path in sorted(Path().iterdir())] == ["book.txt", "fifo"]
