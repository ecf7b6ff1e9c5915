"""Everything that one text shows of a model's locality, with the control that no fidelity is reported without."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ..modeling.locality_mixin import SHARES
from .block_controls import Texts, on_blocks
from .check_model import check_model
from .control_results import BlockControls, as_json
from .locality_meter import LocalityMeter
from .locality_probe import LocalityProfile, ProfileSums
from .measure import evaluation_batches
from .progress import progress_of_passes
from .visible_keys import packed_documents


@dataclass(frozen=True, eq=False)
class LocalityReport:
    """
    What [`locality_report`] found.

    Args:
        metrics (`dict[str, float]`):
            Perplexity, and the means of every layer: see [`LocalityMeter.compute`].
        profile ([`LocalityProfile`]):
            The same of every head.
        controls ([`BlockControls`], *optional*):
            Every layer on the blocks that the last one has, and on those of another text. `None` for a single text.
    """

    metrics: dict[str, float]
    profile: LocalityProfile
    controls: BlockControls | None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it: `None` for what is undefined. Of heads a list for each layer."""
        names = ("context_fidelity", "context_share", *SHARES, "fidelity", "entropy")
        heads = {name: getattr(self.profile, name).tolist() for name in names}
        controls = None
        if self.controls is not None:
            values = asdict(self.controls)
            controls = {name: values[name] for name in ("num_previous_blocks", "num_counted", "own", "wrong")}
        lengths = self.profile.mean_block_length.tolist()
        return as_json({"metrics": self.metrics, "heads": heads, "mean_block_length": lengths, "controls": controls})


@torch.no_grad()
def locality_report(
    model: PreTrainedModel, dataset: Dataset, batch_size: int = 1, block_model: PreTrainedModel | None = None
) -> LocalityReport:
    """
    Perplexity, and context fidelity, attention shares, fidelity and entropy of every layer and head, over a data set,
    with every layer on wrong blocks too. Three passes over the data, in memory that grows linearly with the length of a
    sequence: none ever holds an attention matrix.

    Args:
        model (a localised language model, or a [`~peft.PeftModel`] around one):
            The model to measure, trained for locality or not; it is set to evaluation mode.
        dataset ([`~datasets.Dataset`]):
            As for [`measure`]. Read into memory.
        batch_size (`int`, *optional*, defaults to 1):
            Sequences at a time.
        block_model (a localised model, *optional*):
            The model whose blocks count, as for [`measure`].

    Returns:
        [`LocalityReport`]

    Raises:
        ValueError: as [`measure`].

    Example:

    ```python
    >>> report = locality_report(localize(model, num_sink_tokens=1), dataset)
    >>> report.profile.context_fidelity[-1]  # of the last layer's heads
    >>> report.controls.own.context_fidelity[-1], report.controls.wrong.context_fidelity[-1]
    (0.34, 0.33)
    ```
    """
    check_model("model", model)
    if block_model is not None:
        check_model("block_model", block_model, needs_head=False)
    locality = model.config.locality
    batches = list(evaluation_batches(model, dataset, batch_size, block_model))
    meter, sums, last_starts = LocalityMeter(model.config), ProfileSums(), []
    with progress_of_passes(model, 2 * len(batches), "Measuring"):
        for inputs, labels in batches:
            outputs = model(**inputs, output_fidelity=True, output_entropy=True, use_cache=False)
            meter.update(outputs, labels, documents=(documents := packed_documents(inputs)))
            sums.add(outputs, locality, documents)
            last_starts.append(outputs.block_starts[-1].cpu())
            del outputs  # before the next batch makes others
        controls = None
        if (texts := Texts([inputs for inputs, _ in batches])).number > 1:
            layers, own = list(range(locality.num_hidden_layers)), texts.line(last_starts)
            controls, *_ = on_blocks(model, batches, texts, layers, own, locality.num_previous_blocks, is_brief=True)
    return LocalityReport(meter.compute(), sums.profile(), controls)
