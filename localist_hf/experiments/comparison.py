"""The runs of a grid beside each other: tables, pictures, cards, and a text that one of them writes."""

from itertools import chain
from pathlib import Path
from statistics import fmean

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration import BASELINE_VARIANT
from ..evaluation import plot_shares_over_depth, text_prefix
from ..evaluation.differences import are_of_documents
from ..evaluation.generation import generate_as_told
from ..evaluation.pictures import plot_frontier, plot_over_depth, plot_over_dial
from ..evaluation.tables import comparison_table, differences_table, markdown_table, with_interval
from ..hub import RunRecord, write_card
from ..hub.card_controls import block_controls, dial_controls
from ..hub.card_tables import metrics_by_seed, metrics_of_runs
from ..hub.siblings import pair_to_show
from ..whole_file import write_whole
from .folders import CARD_FILES, claim
from .grid import GridRun
from .grid_runs import GridWork, Task


class Comparison:
    """
    The finished runs of a grid.

    Args:
        work ([`GridWork`]):
            What they share, and where they are.
    """

    def __init__(self, work: GridWork) -> None:
        self.work = work
        self.runs: dict[str, list[GridRun]] = {}
        for run in work.grid:
            self.runs.setdefault(run.name, []).append(run)
        self.folders = {name: [work.path(Task(run)) for run in group] for name, group in self.runs.items()}
        self.records = {name: [RunRecord.load(folder) for folder in group] for name, group in self.folders.items()}
        self.baseline = next(name for name, group in self.runs.items() if group[0].variant == BASELINE_VARIANT)
        #: The run that is shown beside the baseline.
        self.shown = pair_to_show({name: group[0] for name, group in self.records.items()})[0]

    def write_tables(self) -> str:
        """Writes the tables to the grid's folder, and returns them."""
        order = dict.fromkeys((self.baseline, self.shown, *self.records))  # what is to be compared stands together
        # The base at dial 0 is the same under every run's settings.
        perplexity = self.work.controls_of(Task(self.runs[self.baseline][0], is_trained=False))["perplexity"]
        text = tables({name: self.records[name] for name in order}, self.baseline, perplexity)
        write_whole(self.work.folder / "table.md", text)
        return text

    def draw(self) -> list[Path]:
        """Draws the pictures, and returns their paths."""
        own = metrics_of_runs(self.records)
        pair = dict.fromkeys((self.baseline, self.shown))
        names = ("context_fidelity_over_depth", "shares_over_depth", "frontier", "perplexity_over_dial")
        pictures = {name: self.work.folder / f"{name}.png" for name in names}
        plot_over_depth(own, "context_fidelity", pictures["context_fidelity_over_depth"])
        plot_shares_over_depth({name: own[name] for name in pair}, self.baseline, pictures["shares_over_depth"])
        plot_frontier(own, self.baseline, pictures["frontier"])
        dials = {name: [record.controls["dials"] for record in group] for name, group in self.records.items()}
        plot_over_dial(dials, pictures["perplexity_over_dial"])
        return list(pictures.values())

    def write_cards(self, has_own_base: bool, model_cards: Path | None) -> list[Path]:
        """
        Writes the cards anew, now that every run is there to be compared with.

        Args:
            has_own_base (`bool`):
                Whether the base lies among the runs, as that of this package does.
            model_cards (`Path`, *optional*):
                Where records and cards are written too, so that these can be written anew and checked without the
                models.

        Returns:
            `list[Path]`: the runs' cards there.
        """
        folders = [*chain(*self.folders.values()), *([Path(self.work.base)] if has_own_base else [])]
        for folder in folders:
            write_card(folder)
        if model_cards is None:
            return []
        for folder in folders:
            (model_cards / folder.name).mkdir(parents=True, exist_ok=True)
            claim(model_cards / folder.name, "card", CARD_FILES)
            RunRecord.load(folder).save(model_cards / folder.name)
        return [write_card(model_cards / name) for name in self.runs]

    def write_on(self, prompt: str) -> str:
        """Has the run that is shown go on from a prompt, and returns what it writes and how it was loaded."""
        if self.work.grid.lora is not None:
            model, how = self.work.load_run(self.runs[self.shown][0]).eval(), ""
        else:
            model = AutoModelForCausalLM.from_pretrained(self.folders[self.shown][0], trust_remote_code=True)
            how = ", loaded with AutoModelForCausalLM and trust_remote_code=True,"
        return f"{self.shown}{how} goes on from {prompt!r}:\n{continued(model, self.work.tokenizer, prompt)}"


def continued(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Returns a prompt and the likeliest words after it, up to the end of the text."""
    # Some tokenizers end every text, this one too.
    tokens = text_prefix(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    likeliest = GenerationConfig(
        max_new_tokens=40, do_sample=False, repetition_penalty=1.2, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    written = generate_as_told(model, torch.tensor([tokens]), likeliest)[0]
    return tokenizer.decode(written, clean_up_tokenization_spaces=False)


def costs(records: dict[str, list[RunRecord]], baseline: str, base_perplexity: float) -> str:
    """Perplexities as multiples of the reference, the lower one of the base and the baseline, with the control."""
    free = with_interval([record.controls["perplexity"] for record in records[baseline]])
    reference = min(base_perplexity, fmean(record.controls["perplexity"] for record in records[baseline]))
    rows = [["configuration", "dial 0", "dial 1", "self only"]]
    rows.append(["the base", with_interval([base_perplexity / reference], 3), "-", "-"])
    for name, group in records.items():
        found = [record.controls for record in group]
        settings = [[each["perplexity"] for each in found]]
        if any(group[0].lambdas):
            settings += [[each["dials"][-1]["perplexity"] for each in found]]
            settings += [[each["self_only_perplexity"] for each in found]]
        cells = [with_interval([value / reference for value in values], 3) for values in settings]
        rows.append([name, *cells, *["-"] * (3 - len(cells))])
    return (
        f"Perplexity, as multiples of the lower one of the base's ({base_perplexity:.2f}) and {baseline}'s ({free}); "
        f"the control is dial 1 with blocks of one token (self only):\n\n{markdown_table(rows)}"
    )


def tables(records: dict[str, list[RunRecord]], baseline: str, base_perplexity: float) -> str:
    """Compares the runs on each model's own blocks and on those of the base, with the controls."""
    own = metrics_of_runs(records)
    shared = {name: [record.metrics_on_base_blocks for record in group] for name, group in records.items()}
    layer = len(records[baseline][0].lambdas) - 1
    parts = [
        costs(records, baseline, base_perplexity),
        f"On the blocks that each model finds itself:\n\n{comparison_table(own, baseline)}",
    ]
    by_seed = metrics_by_seed(records)
    if differences := differences_table(by_seed, baseline):
        number = len(differences.splitlines()) - 2
        others = "and other text" if are_of_documents(by_seed) else "on this text"
        parts.append(
            f"Perplexity against {baseline}, paired by seed, for other seeds {others} (p by Holm for {number} "
            f"comparisons):\n\n{differences}"
        )
    parts += [
        f"On the blocks that the base finds:\n\n{comparison_table(shared, baseline)}",
        "The last layer's context fidelity (psi) on other blocks than its own, at dial 0:\n\n"
        f"{block_controls(records, layer)}",
        "Perplexity at dial 0; as multiples of it those at dial 1, with blocks of one token (self only), and with all "
        f"layers local; and how far predictions move from dial 0 to dial 1:\n\n{dial_controls(records)}",
    ]
    if len(records[baseline]) > 1:
        parts.append("± is half of the 95 % interval over seeds, by Student's t.")
    return "\n\n".join(parts) + "\n"
