"""A model's own free predictions as its teacher."""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..evaluation.check_model import core_model
from ..modeling.locality_request import REQUEST_ARGUMENTS


# So many positions' predictions are compared at a time.
_POSITIONS = 256
# Ways to begin an adapter that leave the base other than it was.
_MOVES_BASE = ("pissa", "corda", "olora", "lora_ga", "loftq")
# Arguments of a call that ask for a loss, or for what the teacher has not.
_OF_LOSSES = ("labels", "shift_labels", "num_items_in_batch", "fused_lm_head")


class Teacher:
    """
    What a model in training is to keep to: the predictions of its starting weights at dial 0. Under an adapter they are
    those of the model with the adapter switched off; otherwise a frozen copy makes them.

    Args:
        student (`nn.Module`):
            The model before its training.
        given (`nn.Module`, *optional*):
            Another model to learn from, with the same tokenizer.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The student's, with which that of a given teacher is compared, if it lies beside it.
        autocast (`Callable`, *optional*):
            Gives the context in which a teacher apart from the student predicts as that does in mixed precision, such
            as [`~accelerate.Accelerator.autocast`].

    Raises:
        ValueError: for a teacher that is no language model, with other tokens or with weights that are trained, for an
            adapter beside which the base's own weights are trained, and for weights that are not there to be copied.
    """

    def __init__(
        self,
        student: nn.Module,
        given: nn.Module | None = None,
        tokenizer: Any = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self._autocast = autocast
        #: The model with the weights of the teacher; `None` for the student's own, without its adapter.
        self.model: nn.Module | None = given
        if given is not None:
            _check_is_another(given, student)
            _check_tokens(given, student, tokenizer)
        elif isinstance(student, PeftModel):
            _check_base_is_frozen(student)
        else:
            if any(each.is_meta or each.numel() == 0 for each in student.parameters()):
                raise ValueError(
                    "`model` has weights that are not in this process, which cannot be copied for a teacher; pass a "
                    "`teacher`, or train an adapter."
                )
            self.model = copy.deepcopy(student)
            if not hasattr(self.model, "_hf_hook"):
                # What TRL has put in its place would still call the student's.
                vars(self.model).pop("forward", None)
        if self.model is not None:
            self.model.requires_grad_(False).eval()

    def mark(self, student: nn.Module) -> float:
        """A number by which its weights, which of the student's are those that are not trained, can be known again."""
        teacher = student if self.model is None else self.model
        norms = [
            torch.linalg.vector_norm(each, dtype=torch.float64).item()
            for each in teacher.parameters()
            if not each.requires_grad and not each.is_meta and each.is_floating_point()
        ]
        return math.fsum(norms)

    def logits(self, student: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
        """
        The teacher's predictions.

        Args:
            student (`nn.Module`):
                The model in training, as the trainer calls it.
            arguments (`dict[str, Any]`):
                What it is called with.

        Returns:
            `torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`.
        """
        arguments = {name: value for name, value in arguments.items() if name not in _OF_LOSSES} | {"use_cache": False}
        teacher = student if self.model is None else self.model
        if "locality_dial" in inspect.signature(core_model(teacher).forward).parameters:
            arguments |= {"locality_dial": 0.0, "min_fidelity": 0.0}
        else:  # a plain model, which knows nothing of blocks
            arguments = {name: value for name, value in arguments.items() if name not in REQUEST_ARGUMENTS}
        if self.model is not None:
            device = arguments["input_ids"].device
            if next(self.model.parameters()).device != device and not hasattr(self.model, "_hf_hook"):
                self.model.to(device)
            with torch.no_grad(), self._autocast():
                return self.model(**arguments).logits
        student.eval()
        try:
            with torch.no_grad(), _without_adapter(student):
                return student(**arguments).logits
        finally:
            student.train()


def kl_divergence_sum(logits: torch.Tensor, teacher_logits: torch.Tensor, is_counted: torch.Tensor) -> torch.Tensor:
    """
    The sum of `KL(p_teacher || p)` over the counted positions, in nats.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`):
            The model's.
        teacher_logits (`torch.Tensor` of the same shape):
            The teacher's; overwritten.
        is_counted (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
            Positions that count.

    Returns:
        `torch.Tensor` without dimensions, float32; differentiable once.
    """
    return _KLDivergenceSum.apply(logits, teacher_logits, is_counted)


class _KLDivergenceSum(torch.autograd.Function):
    """
    The gradient, `p - p_teacher`, is made along with the value, a part of the positions at a time, and put where the
    teacher's logits were: there is no further tensor of that size, and no exponential is taken twice.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, teacher_logits: torch.Tensor, is_counted: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        teacher_logits = teacher_logits.to(logits.device).contiguous()
        gradient = teacher_logits.to(logits.dtype)  # the same memory, where the dtype is
        tensors = logits, teacher_logits, gradient, is_counted[..., None]
        parts = (each.flatten(0, 1).split(_POSITIONS) for each in tensors)
        for student, teacher, difference, counts in zip(*parts, strict=True):
            log_student, log_teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
            target = log_teacher.exp()
            divergence = (target * (log_teacher - log_student)).sum(-1, keepdim=True)
            total += divergence.masked_fill(~counts, 0.0).sum()
            difference.copy_((log_student.exp() - target).masked_fill(~counts, 0.0))
        ctx.gradient = gradient
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad), None, None


def logits_of_head(core: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    The predictions of a language model from its transformer's output, where a trainer makes none.

    Raises:
        ValueError: for a model whose head is not all that makes them, as where they are scaled or soft-capped.
    """
    head, seen = core.get_output_embeddings(), []
    hooks = [
        core.base_model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state)),
        head.register_forward_hook(lambda module, args, output: seen.extend((args[0], output))),
    ]
    try:
        with torch.no_grad():  # of one pass, since dropout and the like make another of each
            made = core(torch.zeros(1, 2, dtype=torch.long, device=hidden_states.device), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    is_all = len(seen) == 3 and torch.equal(seen[0], seen[1]) and torch.equal(seen[2].to(made.dtype), made)
    if not is_all:
        raise ValueError(
            f"`distillation_weight` and `max_loss_increase` need the predictions of {type(core).__name__}, which "
            "this trainer does not make and which are not those of the head alone; train with `LocalistTrainer`."
        )
    return head(hidden_states)


def counted_predictions(labels: torch.Tensor) -> torch.BoolTensor:
    """Where the loss of these labels is taken: at the position before each that counts."""
    return F.pad(labels, (0, 1), value=-100)[:, 1:] != -100


@contextmanager
def _without_adapter(model: nn.Module) -> Iterator[None]:
    adapted = next(module for module in model.modules() if isinstance(module, PeftModel))
    is_trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with adapted.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in is_trained:  # of which PEFT sets some otherwise
            parameter.requires_grad_(requires_grad)


def _check_is_another(teacher: nn.Module, student: nn.Module) -> None:
    core = core_model(teacher)
    if not hasattr(core, "get_output_embeddings") or core.get_output_embeddings() is None:
        raise ValueError(f"`teacher` is a {type(teacher).__name__}; it must be a causal language model.")
    trained = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in trained]
    if shared:
        raise ValueError(
            f"`teacher` has {shared[0]!r} in common with `model`, which is trained; pass a model with weights of its "
            "own, or none for `model`'s own predictions before the training."
        )


def _check_tokens(teacher: nn.Module, student: nn.Module, tokenizer: Any) -> None:
    teacher, student = core_model(teacher), core_model(student)
    sizes = [each.get_output_embeddings().weight.shape[0] for each in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`teacher` predicts {sizes[0]} tokens and `model` {sizes[1]}; both must have the same tokenizer."
        )
    name = getattr(teacher, "name_or_path", "")
    if not name or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    try:
        found = AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):  # there is none beside it
        return
    if found.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"`teacher` is {name!r}, whose tokenizer has other tokens than the `processing_class`.")


def _check_base_is_frozen(model: PeftModel) -> None:
    for config in model.peft_config.values():
        how = str(getattr(config, "init_lora_weights", None)).lower()
        if how.startswith(_MOVES_BASE):
            raise ValueError(
                f"`model` has an adapter with `init_lora_weights` {how!r}, for which PEFT takes a part out of the "
                "base's weights, so that the base is no teacher of the starting weights; pass a `teacher`."
            )
    with _without_adapter(model):
        trained = [name for name, parameter in model.get_base_model().named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(
            f"`model` trains {trained[0]!r} of its base beside the adapter, so that the base is no teacher of the "
            "starting weights; pass a `teacher`."
        )
