"""Trainer with the scheduled locality loss."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..evaluation import LocalityMeter, causal_lm_collator
from ..evaluation.check_model import check_model
from ..hub import RunHistory, RunRecord, full_repository_id, last_evaluation, repository_files, upload, write_card
from ..modeling.localist_model import MEASUREMENTS, SHARES
from ..modeling.locality import context_fidelity
from .checkpoints import find_checkpoint
from .localist_training_arguments import LocalistTrainingArguments
from .locality_loss import locality_loss


logger = logging.get_logger(__name__)


class LocalistTrainer(Trainer):
    """
    A [`~transformers.Trainer`] whose loss is that of language modeling and the scheduled locality loss:
    `lm_loss + locality_weight * warm(t) * (1 / L) * sum_l lambda_l * loss_l`, with `lambda_l` from the model's
    configuration and `loss_l` from [`locality_loss`].

    Training logs hold `lm_loss`, `locality_loss` (the weighted sum above without `locality_weight * warm(t)`) and
    `fidelity_layer_<l>` of the layers that the schedule localises; the others cost nothing in training. Evaluation
    measures every layer: `eval_perplexity`, `eval_fidelity`, `eval_fidelity_layer_<l>`, `eval_entropy` and
    `eval_entropy_layer_<l>` (bits); `eval_loss` is the language modeling loss, or that of a `compute_loss_func`. Every
    label, counted position and token weighs the same, whatever batch, process or device it was in.

    Args:
        model ([`LocalistGPT2LMHeadModel`] or a [`~peft.PeftModel`] around one):
            The model; its configuration holds the schedule and the partition.
        args ([`LocalistTrainingArguments`], *optional*):
            Training arguments.
        data_collator (`Callable`, *optional*):
            Makes batches. By default [`~localist_hf.evaluation.causal_lm_collator`], which pads sequences of different
            lengths and takes the tokens themselves as labels where the data set has none.
        kwargs:
            Everything else that [`~transformers.Trainer`] takes.

    Raises:
        ValueError: for a model or arguments of another kind, or for sequences longer than the model's positions.

    Example:

    ```python
    >>> trainer = LocalistTrainer(
    ...     model=LocalistGPT2LMHeadModel.from_pretrained("openai-community/gpt2", locality_schedule="quintic"),
    ...     args=LocalistTrainingArguments(output_dir="runs/quintic", target_fidelity=0.9),
    ...     train_dataset=train_dataset,
    ...     eval_dataset=eval_dataset,
    ... )
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: LocalistTrainingArguments | None = None,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        args = LocalistTrainingArguments(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, LocalistTrainingArguments):
            raise ValueError(f"`args` is a {type(args).__name__}; it must be a LocalistTrainingArguments.")
        if args.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {args.label_smoothing_factor}; LocalistTrainer allows 0 only, because it "
                "reports the perplexity of the labels as they are."
            )
        if model is not None:
            check_model("model", model)
        collator = causal_lm_collator if data_collator is None else data_collator
        super().__init__(model=model, args=args, data_collator=collator, **kwargs)
        for name, dataset in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            parts = dataset if isinstance(dataset, Mapping) else {None: dataset}
            for part, rows in parts.items():
                label = name if part is None else f"{name}[{part!r}]"
                _check_sequence_length(label, rows, self.model.config.max_position_embeddings)
        self._num_sequences: int | torch.Tensor = 0  # of the accumulated batch, the mean over processes
        self._training_sums: torch.Tensor | None = None  # since the last log, and the step at which they began
        self._first_step = 0
        self._meter = LocalityMeter(self.model.config)
        self.add_callback(RunHistory(self.model.name_or_path))

    @property
    def _lambdas(self) -> dict[int, float]:
        """Layers that the schedule localises, and how much."""
        return {layer: value for layer, value in enumerate(self.model.config.locality_lambdas) if value > 0}

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """The model that `model_init` makes, of the class that can be trained."""
        model = super().call_model_init(trial)
        check_model("model_init()", model)
        return model

    def train(
        self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """
        As [`~transformers.Trainer.train`]. A checkpoint that is not there is refused before anything is done; one that
        a crash has left half-written is passed over for the one before it, with a warning.

        Raises:
            ValueError: where there is no checkpoint to go on from.
        """
        if resume_from_checkpoint is not None and resume_from_checkpoint is not False:
            checkpoint, damaged = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
            for other, damage in damaged.items():
                logger.warning(f"{other} is no whole checkpoint and is passed over: {damage}.")
            resume_from_checkpoint = str(checkpoint)
        is_data_parallel = self.args.world_size > 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if is_data_parallel and self.model_wrapped is self.model:
            # An evaluation before the training marks the model as prepared, without DistributedDataParallel around it;
            # accelerate would then leave it so, and each process would train a model of its own without a word.
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Collects the batches of one optimizer step and counts their sequences, for the mean over all of them."""
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._num_sequences = sum(len(batch["input_ids"]) for batch in batch_samples)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            # Gradients are averaged over processes, which may hold different numbers of sequences ("batch_rebalance").
            count = torch.tensor(self._num_sequences, dtype=torch.float32, device=device)
            self._num_sequences = self.accelerator.reduce(count, "mean")
        return batch_samples, num_items_in_batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """
        The language modeling loss, and in training the locality loss; see the class.

        Raises:
            ValueError: for sequences longer than the model's positions.
        """
        length, num_positions = inputs["input_ids"].shape[1], self.model.config.max_position_embeddings
        if length > num_positions and "position_ids" not in inputs:  # by which packed texts have positions of their own
            raise ValueError(f"A batch holds a sequence of {length} tokens; the model has {num_positions} positions.")
        if not model.training:
            labels = inputs["labels"]  # which a `compute_loss_func` takes out
            inputs = {**inputs, "output_fidelity": True, "output_entropy": True, "use_cache": False}
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            self._meter.update(outputs, labels, self.accelerator.gather_for_metrics)
            # What is measured is no prediction for `Trainer` to gather.
            outputs = {name: value for name, value in outputs.items() if name not in MEASUREMENTS}
            return (loss, outputs) if return_outputs else loss

        if not self._lambdas or self.args.locality_weight == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        inputs = {**inputs, "output_fidelity": tuple(self._lambdas)}
        lm_loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        lm_loss = lm_loss.mean()  # `nn.DataParallel` gives one for each device
        # With `num_items_in_batch`, or from a `compute_loss_func`, the language modeling loss arrives as a part of the
        # mean over the accumulated batch; without it as the mean over this batch, which `Trainer` then divides by the
        # number of accumulation steps.
        is_part = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        is_part = is_part or self.compute_loss_func is not None
        num_sequences = self._num_sequences if is_part else len(inputs["input_ids"])
        locality = self._locality_loss(outputs, num_sequences).to(lm_loss.device)
        self._add_to_log(lm_loss, locality, outputs, 1 if is_part else self.current_gradient_accumulation_steps)
        loss = lm_loss + self.args.locality_weight * self._warmup() * locality
        return (loss, outputs) if return_outputs else loss

    def _objective(self, outputs: Any) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """What the loss asks for, and the positions that count, of each localised layer."""
        if self.args.locality_objective == "fidelity":
            return outputs.fidelity, outputs.fidelity_mask
        is_half = self.args.bf16 or self.args.fp16 or self.model.dtype in (torch.bfloat16, torch.float16)
        eps = 1e-2 if is_half else 1e-3  # METHOD.md
        pairs = zip(outputs.block_share, outputs.outside_share, strict=True)
        return [context_fidelity(block, outside, eps) for block, outside in pairs], outputs.context_mask

    def _locality_loss(self, outputs: Any, num_sequences: int | torch.Tensor) -> torch.Tensor:
        """`(1 / L) * sum_l lambda_l * loss_l`, summed over the batch's sequences and divided by `num_sequences`."""
        num_layers = self.model.config.num_hidden_layers
        total = 0.0
        for weight, fidelity, mask in zip(self._lambdas.values(), *self._objective(outputs), strict=True):
            losses = locality_loss(fidelity, mask, self.args.target_fidelity, self.args.locality_exponent)
            # Layers may lie on different devices.
            total = total + (weight / num_layers * losses.sum()).to(self.args.device)
        return total / num_sequences

    def _warmup(self) -> float:
        """`warm(t)`: 1 after `locality_warmup_steps` steps, linear before."""
        steps = self.args.locality_warmup_steps
        steps = steps * self.state.max_steps if steps < 1 else steps
        return min(1.0, (self.state.global_step + 1) / steps) if steps else 1.0

    def _add_to_log(self, lm_loss: torch.Tensor, locality: torch.Tensor, outputs: Any, share: int) -> None:
        """Adds a batch's losses, and the sums and number of its counted attention shares, to those of the next log."""
        sums = [lm_loss.detach() / share, locality.detach() / share]
        for mask, *shares in zip(outputs.fidelity_mask, *(outputs[name] for name in SHARES), strict=True):
            sums += [(share.detach().mean(1) * mask).sum() for share in shares] + [mask.sum()]
        sums = torch.stack([value.to(lm_loss.device, torch.float32) for value in sums])
        if self._training_sums is None:
            self._training_sums, self._first_step = sums, self.state.global_step
        else:
            self._training_sums += sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs what `Trainer` logs; a training step's losses and attention shares with it."""
        if "loss" in logs and self._training_sums is not None:
            sums = self.accelerator.reduce(self._training_sums, "mean").tolist()
            steps = max(1, self.state.global_step - self._first_step)
            logs |= {"lm_loss": sums[0] / steps, "locality_loss": sums[1] / steps}
            size = len(SHARES) + 1
            for at, layer in enumerate(self._lambdas):
                *shares, count = sums[2 + at * size :][:size]
                if count:
                    logs |= {f"{name}_layer_{layer}": total / count for name, total in zip(SHARES, shares, strict=True)}
                    block, outside = shares[-2:]
                    logs[f"fidelity_layer_{layer}"] = 1 - outside / count
                    if block + outside > 0:
                        logs[f"context_fidelity_layer_{layer}"] = context_fidelity(block, outside)
            self._training_sums = None
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As [`~transformers.Trainer.evaluation_loop`], with the perplexity and locality of every layer as metrics."""
        self._meter = LocalityMeter(self.model.config)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if not self._meter.is_empty:  # as it is where there are no labels, in `predict`
            measured = self._meter.compute()
            if self.compute_loss_func is not None:
                del measured["loss"]  # the loss is what the user says that it is, and `Trainer` has added it up
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`]; `model.push_to_hub` then finds tokenizer and card in that folder."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and output_dir is None:
            self.accelerator.unwrap_model(self.model).name_or_path = self.args.output_dir

    def create_model_card(
        self,
        model_name: str | None = None,
        language: str | None = None,
        license: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | None = None,
        dataset_tags: str | None = None,
        dataset_args: str | None = None,
        dataset_details: str = "",
        evaluation_split: str = "evaluation",
    ) -> None:
        """
        Writes the model card, its picture and the record that its numbers come from (`run.json`) to the output folder.
        Comparable runs in folders beside it, such as one of `distributed`, are compared with it.

        Args:
            model_name (`str`, *optional*):
                Name of the run. Defaults to the name of its locality configuration.
            language (`str`, *optional*), license (`str`, *optional*):
                As the Hub spells them (`"en"`, `"apache-2.0"`).
            finetuned_from (`str`, *optional*):
                Hub id of the model that the training started from. Defaults to where it was loaded from.
            dataset (`str`, *optional*), dataset_tags (`str`, *optional*), dataset_args (`str`, *optional*):
                Name of the text; Hub id and configuration of the data set, where it has one.
            dataset_details (`str`, *optional*), evaluation_split (`str`, *optional*, defaults to `"evaluation"`):
                How the text was used; name of the part that the model was evaluated on.

        Raises:
            ValueError: where the present weights have not been evaluated or not been saved: a card without its numbers
                cannot be made.
        """
        if not self.is_world_process_zero():
            return
        record = RunRecord.from_trainer(
            self,
            name=model_name,
            dataset=dataset,
            dataset_details=dataset_details,
            dataset_id=dataset_tags,
            dataset_config=dataset_args,
            evaluation_split=evaluation_split,
            base_model=finetuned_from,
            language=language,
            license=license,
        )
        record.save(self.args.output_dir)
        write_card(self.args.output_dir, self.hub_model_id)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Publishes the model in one commit: weights, configuration, code, tokenizer, card and picture, and nothing that
        only training needs. Evaluates first where the present weights have not been. Everything is checked before the
        upload.

        Args:
            commit_message (`str`, *optional*), blocking (`bool`, *optional*), token (`str`, *optional*), \
            revision (`str`, *optional*), private (`bool`, *optional*):
                As in [`~transformers.Trainer.push_to_hub`].
            kwargs:
                What [`~LocalistTrainer.create_model_card`] takes.

        Returns:
            [`~huggingface_hub.CommitInfo`], or a future of it with `blocking=False`; `None` on other processes than the
            first.

        Raises:
            ValueError, PublishError: see [`localist_hf.hub.publish`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if last_evaluation(self) is None:
            self.evaluate()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        api = HfApi(token=self.args.hub_token if token is None else token)
        if self.hub_model_id is None:
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            self.hub_model_id = full_repository_id(api, name)
        return upload(
            api,
            self.hub_model_id,
            repository_files(self.args.output_dir, self.hub_model_id),
            private=self.args.hub_private_repo if private is None else private,
            commit_message=commit_message,
            revision=revision or self.args.hub_revision,
            run_as_future=not blocking,
        )


def _check_sequence_length(name: str, dataset: Any, num_positions: int) -> None:
    """Refuses sequences that are too long, as far as the data set can tell before its batches are made."""
    if isinstance(dataset, Dataset):
        is_known = "input_ids" in dataset.column_names and "position_ids" not in dataset.column_names
        longest = _longest(dataset, num_positions) if is_known and len(dataset) else 0
    else:
        try:
            longest = len(dataset[0]["input_ids"])
        except (TypeError, KeyError, IndexError, NotImplementedError):
            return  # none, a stream, or a form that only the collator knows
    if longest > num_positions:
        raise ValueError(f"`{name}` holds a sequence of {longest} tokens; the model has {num_positions} positions.")


def _longest(dataset: Dataset, enough: int) -> int:
    """Length of the longest sequence; exact where it is more than `enough`."""
    # Lengths are differences of offsets: no token is read, unless the longest of all may not be among those selected.
    longest = pyarrow.compute.max(pyarrow.compute.list_value_length(dataset.data.column("input_ids"))).as_py()
    if longest <= enough or len(dataset) == dataset.data.num_rows:
        return longest
    return max(map(len, dataset.select_columns("input_ids").with_format(None)["input_ids"]))
