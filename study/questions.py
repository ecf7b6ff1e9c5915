"""The questions that every study is asked: which runs each is of, and what tables and sentences answer it."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import sentences
import tables_of_runs as tables
from records_of_runs import BASELINE, Study

from localist_hf.configuration import PAPER_VARIANTS


Runs = Callable[[Study], Sequence[str]]
#: Text, or what makes a table or a sentence of runs of a study; an empty one is left out.
Part = str | Callable[[Study, Sequence[str]], str]


class Question(NamedTuple):
    """
    A question, the runs that it is of, and what answers it, in this order. A study is asked where it has two of these
    runs, and all that the question needs.
    """

    title: str
    runs: Runs
    parts: Sequence[Part]
    needs: Collection[str] = ()


def named(*names: str) -> Runs:
    return lambda study: study.those_of(names)


def on(runs: Runs, part: Callable[[Study, Sequence[str]], str]) -> Part:
    """A part that is of other runs than its question."""
    return lambda study, _: part(study, runs(study))


QUESTIONS = (
    Question(
        "1. Is perplexity ordered as the paper says?",
        named(*PAPER_VARIANTS),
        [tables.schedules, sentences.order],
        needs=PAPER_VARIANTS,
    ),
    Question(
        "2. Semantic blocks against wrong blocks, windows, the last tokens, delimiters",
        named("quintic", "quintic-contrast", "quintic-previous1", "window", "quintic-delimiter"),
        [
            "Psi of the last layer at dial 0, and perplexity at dial 1 as a multiple of that at dial 0, on these "
            "blocks. Windows and last tokens show as many keys as the own blocks. *Untrained* is the base under the "
            "same settings. Semantic blocks are found in the model's own values, so training moves them: psi on the "
            "base's blocks is what it does not owe to that.",
            tables.partitions,
            sentences.blocks,
        ],
    ),
    Question(
        "3. Psi against phi: where does the attention of the last layer go?",
        named(BASELINE, "quintic", "quintic-fidelity", "quintic-contrast"),
        [tables.where_attention_goes, sentences.objectives],
        needs=("quintic-fidelity",),
    ),
    Question(
        "4. What do lower targets cost?",
        lambda study: study.varied("target_fidelity"),
        [lambda study, names: tables.where_attention_goes(study, [BASELINE, *names]), sentences.targets],
    ),
    Question(
        "5. Sinks and previous blocks",
        lambda study: study.varied("num_previous_blocks", "num_sink_tokens"),
        [tables.where_attention_goes],
    ),
    Question(
        "6. Dial 1, and the way there",
        lambda study: [name for name in study.runs if name != BASELINE],
        [
            "Cost at dial 1 is perplexity at dial 1 / at dial 0, KL that of the predictions at dial 0 from those at "
            "dial 1; *self only* is the perplexity at dial 1 with blocks of one token / at dial 0. *Untrained* is the "
            "base under the same settings.",
            tables.dial_1,
            on(named(*PAPER_VARIANTS[1:], "quintic-previous1", "reverse_quintic"), sentences.over_the_dial),
        ],
    ),
    Question(
        "7. The reverse schedule",
        named(BASELINE, "quintic", "reverse_quintic"),
        [sentences.reverse],
        needs=("reverse_quintic",),
    ),
    Question(
        "8. What the models write at dial 1",
        named(BASELINE, "quintic", "linear", "localist", "quintic-previous1"),
        [
            "Sampled from the whole distribution (temperature 1). *distinct-2*: distinct pairs of tokens of a text / "
            "all of its pairs. *repetition-4*: stretches of four tokens that stand in it before. The loss is that of "
            "the base at dial 0.",
            tables.generation,
            on(named("quintic", "quintic-previous1", "localist"), sentences.written),
        ],
    ),
    Question(
        "9. Exact locality: by the loss, or by training at dial 1?",
        lambda study: [name for pair in study.held_pairs for name in pair],
        [
            "At dial 1 the last layer sees its blocks and nothing else: psi is 1, whatever was trained. "
            "*weight0-dial1* is trained so, without the locality loss, the same steps. *Self only* is the control: "
            "dial 1 with blocks of one token. What it costs beyond dial 1 is what the attention inside the blocks is "
            "worth; where that is little, a model has learned to do without its late attention.",
            tables.held,
            sentences.held,
        ],
    ),
)


def answers(study: Study) -> list[str]:
    """A section for each question that a study can be asked."""
    sections = []
    for question in QUESTIONS:
        names = question.runs(study)
        if len(names) > 1 and study.runs.keys() >= {*question.needs}:
            texts = [part if isinstance(part, str) else part(study, names) for part in question.parts]
            sections.append("\n\n".join([f"#### {question.title}", *filter(None, texts)]))
    return sections
