"""At which dials a model trains, what it is taught, and within which budget."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..evaluation.locality_meter import label_losses, perplexity
from ..modeling.locality_dial import current_setting
from .distillation import Teacher, counted_predictions, kl_divergence_sum
from .locality_loss import next_weight
from .measured_model import MeasuredModel
from .resumption import ResumptionMixin


class SelfTeachingMixin(ResumptionMixin):
    """
    Deals the rows of a step over the dials of a training, has a teacher, and keeps to a budget: what
    [`LocalityLossMixin`] makes its loss of.
    """

    _of_epoch = (*ResumptionMixin._of_epoch, "_budget_weight", "_mean_divergence", "_teacher_mark")

    def __init__(self, *args: Any, teacher: nn.Module | None = None, **kwargs: Any) -> None:
        self._given_teacher = teacher
        self._teacher: Teacher | None = None
        self._teacher_mark: float | None = None
        self._losses_at: dict[float, torch.Tensor] = {}
        super().__init__(*args, **kwargs)

    def _find_teacher(self, model: nn.Module | None = None) -> None:
        """The teacher of a model, before anything is done to its weights."""
        args = self.args
        if args.distillation_weight > 0 or args.max_loss_increase is not None:
            student = self.model if model is None else model
            self._teacher = Teacher(student, self._given_teacher, self.processing_class, self.accelerator.autocast)
            if self.args.process_index == 0:  # of a model that is shared out, the others may hold no weights yet
                self._teacher_mark = self._teacher.mark(student)
        elif self._given_teacher is not None:
            raise ValueError(
                "`teacher` is given, but `distillation_weight` is 0 and `max_loss_increase` None: nothing is learned "
                "from it."
            )

    def _begin_run(self) -> None:
        """Forgets what a run before has left."""
        #: Of each batch of a step, the number of rows before it.
        self._rows_before: list[int] = [0]
        #: Of each batch of a step, the sum of the divergences from the teacher and their number.
        self._divergences: list[torch.Tensor] = []
        self._num_batches = 1
        #: The weight of the locality loss under a budget, and the mean divergence of the last steps.
        self._budget_weight, self._mean_divergence = 1.0, None
        mark = self._teacher_mark
        super()._begin_run()
        marks, self._teacher_mark = (mark, self._teacher_mark), mark
        if None not in marks and not math.isclose(*marks, rel_tol=1e-9):  # in whatever order they were summed
            raise ValueError(
                f"`resume_from_checkpoint` is {self._resumed_from!r}, of a run whose teacher had other weights than "
                "the one there is now; make the trainer with the model, or the `teacher`, that the run began with."
            )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """As the trainer's own; notes which rows of the global batch each of the batches has."""
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(self.args.training_dials or ()) > 1:
            self._rows_before = self._count_rows(batch_samples, device)
        self._divergences, self._num_batches = [], len(batch_samples)
        return batch_samples, num_items_in_batch

    def _count_rows(self, batch_samples: list, device: torch.device) -> list[int]:
        """
        The number of rows before each batch, of all steps and processes: batches come one after the other, and of each
        the processes' parts.
        """
        args = self.args
        counts = torch.tensor([[len(batch["input_ids"]) for batch in batch_samples]], device=device)
        if args.world_size > 1:
            counts = self.accelerator.gather(counts)
        in_order = counts.T.flatten()
        before = (in_order.cumsum(0) - in_order).view(counts.T.shape)[:, args.process_index % len(counts)]
        of_step = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        return (before + self.state.global_step * of_step).tolist()

    def _dial(self, inputs: dict[str, Any]) -> dict[str, float | torch.Tensor]:
        """The dial of the step's next batch, as an argument of the model: of each row, where there are several."""
        dials = self.args.training_dials
        if dials is None:
            return {}
        if len(dials) == 1:
            return {"locality_dial": float(dials[0])}
        if "labels" not in inputs and self.compute_loss_func is None:
            raise ValueError(
                f"`training_dials` is {dials}, but the batches have no 'labels': rows that belong together, as those "
                "of a preference, would be dealt over the dials. Train at one."
            )
        rows = self._rows_before.pop(0) + torch.arange(len(inputs["input_ids"]))
        return {"locality_dial": torch.tensor(dials, dtype=torch.float64)[rows % len(dials)]}

    def _divergence(
        self, measured: MeasuredModel, labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The KL from the teacher over the positions of the labels: their mean, or, as the own loss, a part of one."""
        if labels is None:
            raise ValueError(
                "`distillation_weight` and `max_loss_increase` are of the positions of 'labels', which the batches of "
                f"{type(self).__name__} do not have."
            )
        args, is_counted = self.args, counted_predictions(labels)
        with self.accelerator.autocast():  # which holds for the model's own call alone
            logits = measured.logits[:, -labels.shape[1] :]  # before which PEFT may put learned tokens of its own
        total = kl_divergence_sum(logits, measured.teacher_logits, is_counted.to(logits.device))
        number = is_counted.sum().to(total.device)
        if args.max_loss_increase is not None:
            self._divergences.append(torch.stack((total.detach(), number)))
            if len(self._divergences) == self._num_batches:
                self._keep_to_budget(args.max_loss_increase)
        if num_items_in_batch is None:
            return total / number.clamp(min=1)
        # As `Trainer` does it with the own loss, of which the mean over devices is taken.
        num_items = torch.as_tensor(num_items_in_batch, device=total.device).flatten()[0].clamp(min=1)
        if args.average_tokens_across_devices:
            return total / num_items * (self.accelerator.num_processes // self.get_tp_size())
        return total / (num_items * max(1, args.n_gpu))

    def _keep_to_budget(self, budget: float) -> None:
        """At the end of a step, the weight of the locality loss from now on."""
        total, number = self.accelerator.reduce(torch.stack(self._divergences).sum(0), "sum").tolist()
        now = total / max(1.0, number)
        self._mean_divergence = now if self._mean_divergence is None else 0.9 * self._mean_divergence + 0.1 * now
        self._budget_weight = next_weight(self._budget_weight, self._mean_divergence, budget)

    def _add_losses_at_dials(self, model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor) -> None:
        """Adds what a batch of an evaluation loses at those dials of the training at which it is not measured."""
        is_set = current_setting(self.model.config).dial
        text = {name: value for name, value in inputs.items() if name not in ("labels", "num_items_in_batch")}
        for dial in self.args.training_dials or ():
            if dial != is_set:
                outputs = model(**text | {"use_cache": False, "locality_dial": float(dial)})
                rows = torch.stack(label_losses_of_rows(outputs, labels), dim=1)
                sums = self.accelerator.gather_for_metrics(rows).cpu().double().sum(0)
                self._losses_at[dial] = self._losses_at.get(dial, 0) + sums

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As the trainer's own, with loss and perplexity at the dials of the training."""
        self._losses_at = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for dial, (total, number) in self._losses_at.items():
            at_dial = {"loss": (total / number).item(), "perplexity": perplexity(total.item(), number.item())}
            output.metrics.update({f"{metric_key_prefix}_{name}_at_dial_{dial:g}": at_dial[name] for name in at_dial})
        return output


def label_losses_of_rows(outputs: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`~localist_hf.evaluation.locality_meter.label_losses`], of the outputs of TRL's head too."""
    length = labels.shape[1]  # before which PEFT may put learned tokens of its own
    if "log_probs" in outputs:
        return -outputs.log_probs[:, 1 - length :].sum(1), outputs.label_mask[:, 1 - length :].sum(1)
    return label_losses(outputs.logits[:, -length:], labels)
