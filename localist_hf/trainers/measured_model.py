"""What a model measures while a trainer computes its own loss with it."""

from typing import Any

import torch
from torch import nn

from ..evaluation.check_model import core_model
from ..modeling.measurements import LocalityMeasurements
from .distillation import Teacher, logits_of_head


class MeasuredModel:
    """
    Stands for the model in a trainer's `compute_loss`, which need not know of locality: asks it to measure in the
    trainer's first call under gradients (in an evaluation, the first of all) and keeps what comes of it. Other calls,
    which trainers make for metrics, pass as they are, and so do those of a reference model, which is another object.

    Args:
        model (`nn.Module`):
            The model as the trainer calls it, perhaps wrapped or with an adapter.
        teacher ([`Teacher`], *optional*):
            Whose predictions of the same are wanted.
        request (`Any`):
            Arguments of the model's `forward` that ask for measurements.
    """

    def __init__(self, model: nn.Module, teacher: Teacher | None = None, **request: Any) -> None:
        self._model = model
        self._teacher = teacher
        self._request = request
        self._is_differentiated = torch.is_grad_enabled()
        self._measurements: LocalityMeasurements | None = None
        #: What the call returned.
        self.outputs: Any = None
        #: What the teacher predicts, where there is one.
        self.teacher_logits: torch.Tensor | None = None

    @property
    def measurements(self) -> LocalityMeasurements:
        """
        What the call measured: its outputs, or those of the transformer without its head.

        Raises:
            RuntimeError: where there was no such call.
        """
        if self._measurements is None:
            raise RuntimeError("The trainer's `compute_loss` did not call the model that it was given.")
        return self._measurements

    @property
    def logits(self) -> torch.Tensor:
        """What the call predicted, also where the trainer makes no logits."""
        if "logits" in self.outputs:
            return self.outputs.logits
        return logits_of_head(core_model(self._model), self.measurements.last_hidden_state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.outputs is not None or torch.is_grad_enabled() != self._is_differentiated:
            return self._model(*args, **kwargs)
        if self._teacher is not None:  # before the call, whose activations stay
            self.teacher_logits = self._teacher.logits(self._model, kwargs)
        kwargs |= self._request
        if not kwargs.get("fused_lm_head"):
            self.outputs = self._measurements = self._model(*args, **kwargs)
            return self.outputs
        # TRL's trainers put a head of their own on the transformer, which makes no logits and hands nothing on.
        with core_model(self._model).base_model.register_forward_hook(self._keep_measurements):
            self.outputs = self._model(*args, **kwargs)
        return self.outputs

    def _keep_measurements(self, module: nn.Module, args: Any, outputs: LocalityMeasurements) -> None:
        self._measurements = outputs
