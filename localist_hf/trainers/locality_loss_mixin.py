"""The scheduled locality loss beside the loss of any trainer."""

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.compute
import torch
from datasets import Dataset
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments
from transformers.utils import logging

from ..configuration import LocalityArguments
from ..evaluation import LocalityMeter
from ..evaluation.check_model import check_model, core_model, num_positions
from ..evaluation.kept_attention import KeptAttention
from ..evaluation.measure import everything
from ..evaluation.share_sums import share_means, share_sums
from ..modeling.fidelity import context_fidelity
from ..modeling.measurements import MEASUREMENTS, OF_BLOCKS, SHARES, LocalityMeasurements
from .locality_loss import locality_loss
from .measured_model import MeasuredModel
from .moved_blocks import moved_blocks
from .resumption import ResumptionMixin
from .run_history import RunHistory, find_history
from .self_teaching import SelfTeachingMixin, label_losses_of_rows
from .sequences import count_documents, count_sequences, is_packed


logger = logging.get_logger(__name__)

#: How much less of the attention is asked to go to moved blocks than to a text's own, and the weight of that beside the
#: shortfall, under `locality_objective="contrast"`.
CONTRAST, CONTRAST_WEIGHT = 0.5, 2.0
# What is rounding, of a loss or of a share.
_NOTHING = 1e-8
# What tells texts apart, of a batch.
_TEXT_ARGUMENTS = ("input_ids", "attention_mask", "position_ids")


class LocalityLossMixin(SelfTeachingMixin):
    """
    Adds the scheduled locality loss to the loss of a [`~transformers.Trainer`] of any kind, before which it stands
    among the bases of a class: `loss + locality_weight * warm(t) * (1 / L) * sum_l lambda_l * loss_l`, with `lambda_l`
    from the model's configuration and `loss_l` from [`locality_loss`]. Under `locality_objective="contrast"` a layer's
    loss is that of psi and `CONTRAST_WEIGHT` times that of `psi - psi_moved` with the target `CONTRAST`, where
    `psi_moved` is psi on the [`moved_blocks`] of the last layer, over the positions that count on both (this project's
    own definition). Under `locality_objective="choice"` a layer's loss is the mean over heads and counted positions of
    `w * max(0, H(q) - log(target_blocks))`, with `H(q)` the entropy of a query's attention to other words over the
    blocks of its text, and `w` how much of it that is, without gradients. Under the dial, be it the configuration's or
    one that is set, all are what the layer shows under it, each on its own local sets: blocks that are not moved differ
    by nothing. At dial 1 a layer with `lambda_l = 1` has psi 1 on any blocks, and `"context"` and `"contrast"` teach it
    nothing.

    Every token that the model reads counts, prompts too, whatever the trainer's own loss is taken of; padding does not.
    A sequence is a row of the batch; in rows in which `position_ids` mark packed documents, a document. Preference
    trainers, whose batches hold the chosen and the rejected completions, train both. Reference models are not measured.

    Training logs hold the trainer's own loss as `lm_loss` (`task_loss` where batches have no labels); `locality_loss`,
    the weighted sum above without `locality_weight * warm(t)`; and the attention shares, `fidelity_layer_<l>` and
    `context_fidelity_layer_<l>` of the layers that the schedule localises; the others cost nothing in training.
    Evaluation measures every layer: `eval_` and the names of [`~localist_hf.evaluation.LocalityMeter.compute`], the
    perplexity where batches have labels; `eval_loss` is the trainer's own. Where TRL's trainers log an `entropy`, it is
    that of the predictions; that of the attention stands in `eval_entropy_layer_<l>`.

    With `training_dials` the model trains at these places of the dial. With `distillation_weight` or
    `max_loss_increase` it has a [`Teacher`]: the logs hold the KL from it over the positions of the labels, in nats, as
    `distillation_loss`, and, under a budget, the weight that the locality loss has come to as `locality_weight`.

    A run that goes on from a checkpoint ends as if it had not been stopped; see [`ResumptionMixin`].

    Tested with `Trainer`, and TRL's `SFTTrainer` and `DPOTrainer`. Batches must hold `input_ids`: trainers that write
    the texts themselves, such as TRL's `GRPOTrainer` and `RLOOTrainer`, are refused.

    Args:
        args, kwargs:
            What the trainer takes. Its `args` must be [`LocalityArguments`] too.
        teacher (`nn.Module`, *optional*):
            A causal language model with the same tokenizer to learn from, in place of the model's own predictions
            before the training; it is frozen.

    Raises:
        ValueError: for a model, arguments or a trainer of another kind, or for sequences longer than the model's
            positions.

    Example:

    ```python
    >>> class MyTrainer(LocalityLossMixin, SFTTrainer):
    ...     pass
    >>> @dataclass
    ... class MyConfig(LocalityArguments, SFTConfig):
    ...     pass
    >>> MyTrainer(model=model, args=MyConfig(output_dir="runs/sft"), train_dataset=train_dataset).train()
    ```
    """

    _of_epoch = (*SelfTeachingMixin._of_epoch, "_log_sums", "_log_begin")
    #: Whether `eval_loss` is the mean over all labels, and not the trainer's own mean over batches.
    _measures_loss = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        trainer = super(ResumptionMixin, self)  # as the class after ours sees it
        if "reward_funcs" in inspect.signature(trainer.__init__).parameters:
            raise ValueError(
                f"{type(self).__name__} writes the texts that it trains on by itself, for `reward_funcs`, so that its "
                "batches hold prompts only; the locality loss needs batches that hold 'input_ids', as those of "
                "SFTTrainer and DPOTrainer do."
            )
        values = (*args, *kwargs.values())
        arguments = next((value for value in values if isinstance(value, TrainingArguments)), None)
        if not isinstance(arguments, LocalityArguments):
            raise ValueError(
                f"`args` is a {type(arguments).__name__}; its class must have LocalityArguments among its bases, "
                "before the trainer's own arguments."
            )
        if arguments.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {arguments.label_smoothing_factor}; {type(self).__name__} allows 0 only, "
                "because it reports the perplexity of the labels as they are."
            )
        if arguments.locality_objective == "contrast" and arguments.n_gpu > 1:
            raise ValueError(
                f"`locality_objective` is 'contrast', which one process cannot compute on {arguments.n_gpu} GPUs; "
                "start one process for each, with `torchrun`, or choose 'context'."
            )
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, nn.Module):  # and not a name, by which TRL's trainers load one
            check_model("model", model)
        # What the rows say of blocks, which trainers that write their batches from texts leave out.
        columns = getattr(kwargs.get("train_dataset"), "column_names", None) or ()
        self._told = sorted({"block_starts", "pointer_blocks"}.intersection(columns))
        super().__init__(*args, **kwargs)
        check_model("model", self.model)
        self._find_teacher()
        for name, dataset in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            parts = dataset if isinstance(dataset, Mapping) else {None: dataset}
            for part, rows in parts.items():
                label = name if part is None else f"{name}[{part!r}]"
                _check_sequence_length(label, rows, num_positions(self.model.config))
        self._meter = LocalityMeter()
        self._begin_run()
        self.add_callback(RunHistory(self.model.name_or_path))

    def _begin_run(self) -> None:
        """Forgets what a run before has left, however that ended: trainers are used again."""
        self._num_sequences: int | torch.Tensor = 0  # of the accumulated batch, the mean over processes
        self._log_sums: dict[str, torch.Tensor] = {}  # since the last log, and the step at which they began
        self._log_begin = 0
        self._has_labels = False
        super()._begin_run()

    @property
    def _lambdas(self) -> dict[int, float]:
        """Layers that the schedule localises, and how much."""
        return {layer: value for layer, value in enumerate(self.model.config.locality.locality_lambdas) if value > 0}

    @property
    def _logged_sums(self) -> tuple[str, ...]:
        """What the training log is made of, beside the losses."""
        of_blocks = OF_BLOCKS if self.args.locality_objective == "choice" else ()
        return (*SHARES, *of_blocks, "num_counted")

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """The model that `model_init` makes, of a class that can be trained; nothing has been done to its weights."""
        model = super().call_model_init(trial)
        check_model("model_init()", model)
        if "callback_handler" in vars(self):  # at the beginning of a run; before, the trainer is being made
            find_history(self).restart(model.name_or_path)
            self._find_teacher(model)
        return model

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Collects the batches of one optimizer step and counts their sequences, for the mean over all of them."""
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._num_sequences = sum(count_sequences(batch) for batch in batch_samples)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            # Gradients are averaged over processes, which may hold different numbers of sequences ("batch_rebalance").
            count = torch.as_tensor(self._num_sequences, dtype=torch.float32, device=device)
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
        The trainer's own loss, and in training the locality loss; see the class.

        Raises:
            ValueError: for sequences longer than the model's positions.
        """
        length, allowed = inputs["input_ids"].shape[1], num_positions(self.model.config)
        # Packed texts have positions of their own.
        if allowed is not None and length > allowed and "position_ids" not in inputs:
            raise ValueError(f"A batch holds a sequence of {length} tokens; the model has {allowed} positions.")
        if model.training and (missing := [name for name in self._told if inputs.get(name) is None]):
            raise ValueError(
                f"`train_dataset` has {missing[0]!r}, which {type(self).__name__} leaves out of its batches; train "
                "with `LocalistTrainer`, or leave it out of the data set."
            )
        labels = inputs.get("labels")  # which a `compute_loss_func` takes out
        self._has_labels = labels is not None
        if not model.training:
            measured = MeasuredModel(model, **everything(inputs), use_cache=False)
            result = super().compute_loss(measured, inputs, return_outputs, num_items_in_batch)
            if labels is None:
                # Preference trainers make two rows of a sample, so that accelerate can't tell which are fillers of a
                # last batch; several processes may count a few sequences twice, as TRL does in its own metrics.
                nothing = measured.measurements.fidelity_mask[0].new_zeros(len(inputs["input_ids"]))
                self._meter.add(measured.measurements, nothing, nothing, self.accelerator.gather)
            else:
                losses = label_losses_of_rows(measured.outputs, labels)
                self._meter.add(measured.measurements, *losses, self.accelerator.gather_for_metrics)
                if self._lambdas:
                    self._add_losses_at_dials(model, inputs, labels)
            if not return_outputs:
                return result
            loss, outputs = result
            # What is measured is no prediction for `Trainer` to gather.
            return loss, type(outputs)(**{name: outputs[name] for name in outputs if name not in MEASUREMENTS})

        is_local = bool(self._lambdas) and self.args.locality_weight > 0
        request = self._dial(inputs) if self._lambdas else {}
        if not is_local and not request and self._teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        dial = request.get("locality_dial")
        attended = None
        if is_local:
            objective = self.args.locality_objective
            if inputs.get("pointer_blocks") is not None and objective in ("contrast", "choice"):
                raise ValueError(
                    f"`locality_objective` is {objective!r}, and the batches have 'pointer_blocks', which say where to "
                    "look; choose 'context', by which the pointer fidelity is trained, or 'fidelity'."
                )
            request["output_fidelity"] = tuple(self._lambdas)
            request["output_block_choice"] = self.args.locality_objective == "choice"
            if self.args.locality_objective == "contrast":
                attended = KeptAttention(self.model.config)
                request["observer"] = attended.keep
        measured = MeasuredModel(model, self._teacher, **request)
        text = {name: inputs[name] for name in _TEXT_ARGUMENTS if inputs.get(name) is not None}
        result = super().compute_loss(measured, inputs, return_outputs, num_items_in_batch)
        own_loss = (result[0] if return_outputs else result).mean()  # `nn.DataParallel` gives one for each device
        is_part = self._is_part(num_items_in_batch)
        steps = 1 if is_part else self.current_gradient_accumulation_steps
        self._add_to_log(own=own_loss.detach() / steps)
        loss = own_loss
        if self._teacher is not None:
            divergence = self._divergence(measured, labels, num_items_in_batch if is_part else None)
            divergence = divergence.to(own_loss)
            self._add_to_log(divergence=divergence.detach() / steps)
            loss = loss.lerp(divergence, self.args.distillation_weight)
        if is_local:
            documents = measured.measurements.document_starts if is_packed(inputs) else None
            if is_part:
                num_sequences = self._num_sequences
            else:
                num_sequences = len(inputs["input_ids"]) if documents is None else count_documents(documents)
            moved = None if attended is None else self._on_moved_blocks(measured.measurements, attended, text, dial)
            locality = self._locality_loss(measured.measurements, moved, documents, num_sequences)
            locality = locality.to(own_loss.device)
            shares = share_sums(measured.measurements)
            shares = torch.stack([shares[name][..., 0].sum(0) for name in self._logged_sums])
            self._add_to_log(locality=locality.detach() / steps, shares=shares)
            weight = self.args.locality_weight if self.args.max_loss_increase is None else self._budget_weight
            loss = loss + weight * self._warmup() * locality
        return (loss, result[1]) if return_outputs else loss

    def _is_part(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """
        Whether a batch's own loss is a part of the mean over the accumulated batch, and not a mean over this batch,
        which `Trainer.training_step` then divides by the number of accumulation steps. It asks the same.
        """
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        is_normalized = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return is_normalized or self.compute_loss_func is not None

    def _on_moved_blocks(
        self,
        measured: LocalityMeasurements,
        attended: KeptAttention,
        text: dict[str, torch.Tensor],
        dial: float | torch.Tensor | None,
    ) -> LocalityMeasurements:
        """What the attention measures, given the same, on the text's blocks moved along it, anew in every batch."""
        starts = measured.block_starts[-1]
        if starts.shape != text["input_ids"].shape:
            raise ValueError(
                f"`locality_objective` is 'contrast', which a learned prompt ({starts.shape[1]} tokens where the text "
                f"has {text['input_ids'].shape[1]}) does not allow; choose 'context'."
            )
        moved = moved_blocks(starts, measured.document_starts.to(starts.device), torch.rand(()).item())
        settings = {"locality_dial": dial, "min_fidelity": None}  # as the model's own
        return attended.measure(text, tuple(self._lambdas), **settings, block_starts=moved)

    def _context(self, measured: LocalityMeasurements) -> list[torch.Tensor]:
        """psi of every query, of each localised layer."""
        is_half = self.args.bf16 or self.args.fp16 or self.model.dtype in (torch.bfloat16, torch.float16)
        eps = 1e-2 if is_half else 1e-3  # docs/method.md#context-fidelity
        pairs = zip(measured.block_share, measured.outside_share, strict=True)
        return [context_fidelity(block, outside, eps) for block, outside in pairs]

    def _locality_loss(
        self,
        measured: LocalityMeasurements,
        moved: LocalityMeasurements | None,
        documents: torch.Tensor | None,
        num_sequences: int | torch.Tensor,
    ) -> torch.Tensor:
        """`(1 / L) * sum_l lambda_l * loss_l`, summed over the batch's sequences and divided by `num_sequences`."""
        target, masks = self.args.target_fidelity, measured.fidelity_mask
        weights: list[torch.Tensor | None] = [None] * len(masks)
        match self.args.locality_objective:
            case "fidelity":
                objective = measured.fidelity
            case "choice":  # H(q) above log N* falls short as much
                objective = [-looked_at.log() for looked_at in measured.blocks_looked_at]
                target = -math.log(self.args.target_blocks)
                shares = zip(measured.block_share, measured.outside_share, strict=True)
                weights = [(block + outside).detach() for block, outside in shares]
            case _:
                objective, masks = self._context(measured), measured.context_mask
        settings = self.args.locality_exponent, documents
        losses = [
            locality_loss(fidelity, mask, target, *settings, weight)
            for fidelity, mask, weight in zip(objective, masks, weights, strict=True)
        ]
        if moved is not None:
            others = zip(objective, masks, self._context(moved), moved.fidelity_mask, strict=True)
            for layer, (psi, mask, psi_moved, mask_moved) in enumerate(others):
                contrast = locality_loss(psi - psi_moved, mask & mask_moved, CONTRAST, *settings)
                losses[layer] = losses[layer] + CONTRAST_WEIGHT * contrast
        total, num_layers = 0.0, self.model.config.locality.num_hidden_layers
        for weight, of_layer in zip(self._lambdas.values(), losses, strict=True):
            # Layers may lie on different devices.
            total = total + (weight / num_layers * of_layer.sum()).to(self.args.device)
        return total / num_sequences

    def _warmup(self) -> float:
        """`warm(t)`: 1 after `locality_warmup_steps` steps, linear before."""
        steps = self.args.locality_warmup_steps
        steps = steps * self.state.max_steps if steps < 1 else steps
        return min(1.0, (self.state.global_step + 1) / steps) if steps else 1.0

    def _add_to_log(self, **sums: torch.Tensor) -> None:
        """Adds to the sums of the next log."""
        if not self._log_sums:
            self._log_begin = self.state.global_step
        for name, value in sums.items():
            former = self._log_sums.get(name)
            value = value.float()
            self._log_sums[name] = value if former is None else former.to(value.device) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs what the trainer logs; a training step's losses and attention shares with it."""
        if "loss" in logs and self._log_sums:
            sums = self.accelerator.reduce(
                {name: value.to(self.args.device) for name, value in self._log_sums.items()}, "mean"
            )
            steps = max(1, self.state.global_step - self._log_begin)
            names = {"own": "lm_loss" if self._has_labels else "task_loss"}
            names |= {"divergence": "distillation_loss", "locality": "locality_loss"}
            logs |= {names[name]: value.item() / steps for name, value in sums.items() if name in names}
            if logs.get("locality_loss", 1.0) < _NOTHING:
                logger.warning_once(f"The locality loss is 0: {self._why_nothing(sums)}")
            if self.args.max_loss_increase is not None:
                logs["locality_weight"] = self._budget_weight
            if "shares" in sums:
                totals = sums["shares"].cpu().double()
                means = share_means(dict(zip(self._logged_sums, totals, strict=True)))
                for at, layer in enumerate(self._lambdas):
                    if totals[-1, at]:
                        of_others = ("context_fidelity", *OF_BLOCKS) if means["context_share"][at] > 0 else ()
                        for name in (*SHARES, "fidelity", *(name for name in of_others if name in means)):
                            logs[f"{name}_layer_{layer}"] = means[name][at].item()
            self._log_sums = {}
        super().log(logs, start_time)

    def _why_nothing(self, sums: dict[str, torch.Tensor]) -> str:
        totals = dict(zip(self._logged_sums, sums["shares"].cpu().double().sum(1).tolist(), strict=True))
        if totals["num_counted"] == 0:
            return "no token sees more than its local set; blocks are as long as the text."
        if totals["block_share"] + totals["outside_share"] < _NOTHING * totals["num_counted"]:
            return "no attention goes to other words; all is on sinks and on each query's own token."
        return "what it asks for is so already. At dial 1 a layer with `lambda_l` 1 cannot but look at its local set."

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As the trainer's own, with the perplexity and the locality of every layer as metrics."""
        self._meter = LocalityMeter()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if not self._meter.is_empty:  # as it is where no loss is computed, in `predict` without labels
            measured = self._meter.compute()
            if not self._measures_loss or self.compute_loss_func is not None:
                del measured["loss"]
            if not self._has_labels:
                del measured["perplexity"]
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # FSDP2 gives the model a class of its own, defined in torch: transformers would save torch's code as the
        # model's. With the weights at hand nothing of that class is needed.
        model = core_model(self.model)
        sharded = type(model)
        if isinstance(model, FSDPModule):
            model.__class__ = next(base for base in sharded.__bases__ if base is not FSDPModule)
        try:
            super()._save(output_dir, state_dict)
        finally:
            model.__class__ = sharded


def _check_sequence_length(name: str, dataset: Any, allowed: int | None) -> None:
    """Refuses sequences that are too long, as far as the data set can tell before its batches are made."""
    if allowed is None:
        return
    if isinstance(dataset, Dataset):
        columns = set(dataset.column_names)
        # Rows with these hold several texts.
        is_known = "input_ids" in columns and columns.isdisjoint(("position_ids", "seq_lengths"))
        longest = _longest(dataset, allowed) if is_known and len(dataset) else 0
    else:
        try:
            longest = len(dataset[0]["input_ids"])
        except (TypeError, KeyError, IndexError, NotImplementedError):
            return  # none, a stream, or a form that only the collator knows
    if longest > allowed:
        raise ValueError(f"`{name}` holds a sequence of {longest} tokens; the model has {allowed} positions.")


def _longest(dataset: Dataset, enough: int) -> int:
    """Length of the longest sequence; exact where it is more than `enough`."""
    # Lengths are differences of offsets: no token is read, unless the longest of all may not be among those selected.
    longest = pyarrow.compute.max(pyarrow.compute.list_value_length(dataset.data.column("input_ids"))).as_py()
    if longest <= enough or len(dataset) == dataset.data.num_rows:
        return longest
    return max(map(len, dataset.select_columns("input_ids").with_format(None)["input_ids"]))
