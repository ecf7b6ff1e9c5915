"""Trainer with the scheduled locality loss."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import Trainer, default_data_collator

from ..modeling import LocalistGPT2Config
from .localist_training_arguments import LocalistTrainingArguments
from .locality_loss import locality_loss
from .locality_meter import LocalityMeter


_MEASUREMENTS = ("fidelity", "fidelity_mask", "block_starts", "entropy")


class LocalistTrainer(Trainer):
    """
    A [`~transformers.Trainer`] whose loss is that of language modeling and the scheduled locality loss:
    `lm_loss + locality_weight * warm(t) * (1 / L) * sum_l lambda_l * loss_l`, with `lambda_l` from the model's
    configuration and `loss_l` from [`locality_loss`].

    Training logs hold `lm_loss`, `locality_loss` (the weighted sum above without `locality_weight * warm(t)`) and
    `fidelity_layer_<l>` of the layers that the schedule localises; the others cost nothing in training. Evaluation
    measures every layer: `eval_perplexity`, `eval_fidelity`, `eval_fidelity_layer_<l>`, `eval_entropy` and
    `eval_entropy_layer_<l>` (bits); `eval_loss` is the language modeling loss.

    Args:
        model ([`LocalistGPT2LMHeadModel`] or a [`~peft.PeftModel`] around one):
            The model; its configuration holds the schedule and the partition.
        args ([`LocalistTrainingArguments`], *optional*):
            Training arguments.
        data_collator (`Callable`, *optional*):
            Makes batches. By default it stacks sequences of one length, with the tokens themselves as labels where the
            data set has none.
        kwargs:
            Everything else that [`~transformers.Trainer`] takes.

    Raises:
        ValueError: for a model of another kind, or for sequences longer than the model's positions.

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
        super().__init__(model=model, args=args, data_collator=data_collator or causal_lm_collator, **kwargs)
        config = self.model.config
        # The class may come from a model repository's own code, so it is told by its model type.
        if getattr(config, "model_type", None) != LocalistGPT2Config.model_type:
            raise ValueError(
                f"`model` is a {type(self.model).__name__}; LocalistTrainer trains a LocalistGPT2LMHeadModel (load the "
                "checkpoint with `LocalistGPT2LMHeadModel.from_pretrained`)."
            )
        if args.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {args.label_smoothing_factor}; LocalistTrainer allows 0 only, because it "
                "reports the perplexity of the labels as they are."
            )
        for name, dataset in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            _check_sequence_length(name, dataset, config.max_position_embeddings)
        self._lambdas = {layer: value for layer, value in enumerate(config.locality_lambdas) if value > 0}
        self._num_sequences = 0  # of the accumulated batch
        self._training_sums: torch.Tensor | None = None  # since the last log, and the step at which they began
        self._first_step = 0
        self._meter = LocalityMeter()
        from ..hub import RunHistory  # goes to the top of the file once the circle of imports is gone

        self.add_callback(RunHistory(self.model.name_or_path))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Collects the batches of one optimizer step and counts their sequences, for the mean over all of them."""
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._num_sequences = sum(len(batch["input_ids"]) for batch in batch_samples)
        return batch_samples, num_items_in_batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The language modeling loss, and in training the locality loss; see the class."""
        if not model.training:
            inputs = {**inputs, "output_fidelity": True, "output_entropy": True}
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            self._meter.update(outputs, inputs["labels"])
            # What is measured is no prediction for `Trainer` to gather.
            outputs = {name: value for name, value in outputs.items() if name not in _MEASUREMENTS}
            return (loss, outputs) if return_outputs else loss

        if not self._lambdas or self.args.locality_weight == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        inputs = {**inputs, "output_fidelity": tuple(self._lambdas)}
        lm_loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # With `num_items_in_batch` the language modeling loss arrives as a part of the mean over the accumulated batch;
        # without it as the mean over this batch, which `Trainer` then divides by the number of accumulation steps.
        is_part = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        locality = self._locality_loss(outputs, self._num_sequences if is_part else len(inputs["input_ids"]))
        self._add_to_log(lm_loss, locality, outputs, 1 if is_part else self.current_gradient_accumulation_steps)
        loss = lm_loss + self.args.locality_weight * self._warmup() * locality
        return (loss, outputs) if return_outputs else loss

    def _locality_loss(self, outputs: Any, num_sequences: int) -> torch.Tensor:
        """`(1 / L) * sum_l lambda_l * loss_l`, summed over the batch's sequences and divided by `num_sequences`."""
        num_layers = self.model.config.num_hidden_layers
        total = 0.0
        for weight, fidelity, mask in zip(self._lambdas.values(), outputs.fidelity, outputs.fidelity_mask, strict=True):
            losses = locality_loss(fidelity, mask, self.args.target_fidelity, self.args.locality_exponent)
            total = total + weight / num_layers * losses.sum() / num_sequences
        return total

    def _warmup(self) -> float:
        """`warm(t)`: 1 after `locality_warmup_steps` steps, linear before."""
        steps = self.args.locality_warmup_steps
        steps = steps * self.state.max_steps if steps < 1 else steps
        return min(1.0, (self.state.global_step + 1) / steps) if steps else 1.0

    def _add_to_log(self, lm_loss: torch.Tensor, locality: torch.Tensor, outputs: Any, share: int) -> None:
        """Adds a batch's losses, and the sum and number of its counted fidelities, to those of the next log."""
        sums = [lm_loss.detach() / share, locality.detach() / share]
        for fidelity, mask in zip(outputs.fidelity, outputs.fidelity_mask, strict=True):
            sums += [(fidelity.detach().mean(1) * mask).sum(), mask.sum()]
        sums = torch.stack([value.float() for value in sums])
        if self._training_sums is None:
            self._training_sums, self._first_step = sums, self.state.global_step
        else:
            self._training_sums += sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs what `Trainer` logs; a training step's losses and fidelities with it."""
        if "loss" in logs and self._training_sums is not None:
            sums = self.accelerator.reduce(self._training_sums, "mean").tolist()
            steps = max(1, self.state.global_step - self._first_step)
            logs |= {"lm_loss": sums[0] / steps, "locality_loss": sums[1] / steps}
            for layer, total, count in zip(self._lambdas, sums[2::2], sums[3::2], strict=True):
                if count:
                    logs[f"fidelity_layer_{layer}"] = total / count
            self._training_sums = None
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As [`~transformers.Trainer.evaluation_loop`], with the perplexity and locality of every layer as metrics."""
        self._meter = LocalityMeter()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._meter.num_batches:  # none where there are no labels, as in `predict`
            measured = self._meter.compute(self.accelerator.reduce)
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
        # The one thing on the right that the trainer knows, and only here: `Trainer` makes cards.
        from ..hub import RunRecord, write_card

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
        from ..hub import full_repository_id, last_evaluation, repository_files, upload

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


def causal_lm_collator(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks sequences of one length; where there are no labels, they are the tokens."""
    batch = default_data_collator(features)
    if "labels" not in batch:
        batch["labels"] = batch["input_ids"].clone()
    return batch


def _check_sequence_length(name: str, dataset: Any, num_positions: int) -> None:
    try:
        length = len(dataset[0]["input_ids"])
    except (TypeError, KeyError, IndexError, NotImplementedError):
        return  # none, a stream, or a form that only the collator knows
    if length > num_positions:
        raise ValueError(f"`{name}` holds a sequence of {length} tokens; the model has {num_positions} positions.")
