"""Trainer with the scheduled locality loss."""

import os
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import HfApi
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..evaluation import causal_lm_collator, text_prefix
from ..evaluation.check_model import check_model
from ..evaluation.text_prefix import have_prefix
from ..hub import (
    CARD_FILE,
    card_on_hub,
    check_card,
    find_model,
    full_repository_id,
    repository_files,
    upload,
    write_card,
)
from ..hub.own_text import own_text
from ..whole_file import write_whole
from .localist_training_arguments import LocalistTrainingArguments
from .locality_loss_mixin import LocalityLossMixin
from .record_of_trainer import last_evaluation, record_of_trainer


logger = logging.get_logger(__name__)


class LocalistTrainer(LocalityLossMixin, Trainer):
    """
    A [`~transformers.Trainer`] whose loss is that of language modeling and the scheduled locality loss; see
    [`LocalityLossMixin`] for the loss, the logs and the metrics. It also pads, writes the model card, publishes, and
    goes on from whole checkpoints only. It warns of data sets without what the tokenizer (`processing_class`) puts
    before a text.

    `eval_loss` is the language modeling loss, or that of a `compute_loss_func`. Every label, counted position and token
    weighs the same, whatever batch, process or device it was in.

    Args:
        model (a localist language model, or a [`~peft.PeftModel`] around one):
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

    _measures_loss = True

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
        if model is not None:
            check_model("model", model)
        collator = causal_lm_collator if data_collator is None else data_collator
        super().__init__(model=model, args=args, data_collator=collator, **kwargs)
        tokenizer = self.processing_class
        if isinstance(tokenizer, PreTrainedTokenizerBase) and (prefix := text_prefix(tokenizer)):
            self._warn_of_sequences_without(prefix)

    def _warn_of_sequences_without(self, prefix: list[int]) -> None:
        for name in ("train_dataset", "eval_dataset"):
            dataset = getattr(self, name)
            if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names or not len(dataset):
                continue
            # The last: of pieces cut from one text the first has what the tokenizer put before it.
            if not have_prefix([dataset[len(dataset) - 1]], prefix):
                logger.warning(
                    f"The last sequence of `{name}` does not begin with {self.processing_class.decode(prefix)!r}, "
                    "which the tokenizer puts before every text: a model that has learned with it is measured and "
                    "trained without. See `localist_hf.evaluation.text_prefix`."
                )

    def train(
        self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As [`LocalityLossMixin.train`]."""
        is_data_parallel = self.args.world_size > 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if is_data_parallel and self.model_wrapped is self.model:
            # An evaluation before the training marks the model as prepared, without DistributedDataParallel around it;
            # accelerate would then leave it so, and each process would train a model of its own without a word.
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # By which our collator, and no model, tells packed texts apart.
        if self.data_collator is causal_lm_collator and "seq_lengths" not in self._signature_columns:
            self._signature_columns.append("seq_lengths")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`]; `model.push_to_hub` then finds tokenizer and card in that folder."""
        model = self.accelerator.unwrap_model(self.model)
        card = Path(output_dir or self.args.output_dir) / CARD_FILE
        before = card.read_bytes() if card.is_file() else None
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and isinstance(model, PeftModel):  # PEFT writes a draft, and into a card that is there
            card.unlink(missing_ok=True) if before is None else write_whole(card, before)
        if self.args.should_save and output_dir is None:
            model.name_or_path = self.args.output_dir

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
                cannot be made; and where the card in the output folder was edited, but for the part at its end that is
                kept.
        """
        if not self.is_world_process_zero():
            return
        check_card(self.args.output_dir)  # refused before the record is another
        record = record_of_trainer(
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
        api = self._hub_api(token)  # which finds the repository's name
        return upload(
            api,
            self.hub_model_id,
            repository_files(self.args.output_dir, self.hub_model_id),
            private=self.args.hub_private_repo if private is None else private,
            commit_message=commit_message,
            revision=revision or self.args.hub_revision,
            run_as_future=not blocking,
        )

    def check_push(self) -> None:
        """
        Checks, before a training whose end is [`~LocalistTrainer.push_to_hub`], that the card that is on the Hub may be
        replaced.

        Raises:
            ValueError: where it was edited, but for the part that is kept, or is not ours.
            PublishError: where the Hub cannot be asked.
        """
        if not self.is_world_process_zero():
            return
        api = self._hub_api()
        card = card_on_hub(api, self.hub_model_id, find_model(api, self.hub_model_id))
        if card is not None:
            own_text(card, f"{CARD_FILE} of {self.hub_model_id}", "Remove the file there")

    def _hub_api(self, token: str | None = None) -> HfApi:
        """The client, once the repository's name is known."""
        api = HfApi(token=self.args.hub_token if token is None else token)
        if self.hub_model_id is None:
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            self.hub_model_id = full_repository_id(api, name)
        return api
