"""
Makes `docs/results.md`, its pictures and the answer in the README from the committed records, and from nothing else.

    python study/results.py          # or: make results

A study is a grid in this folder, its records (`collect.py`) and an entry of `MODELS`; it is asked what its runs can
answer of `questions.py` and `claims.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import agreement_tables
import choice_tables
from agreement_tables import Agreements, studied
from block_tables import at_as_many_keys, blocks_table, runs_of_kind
from claims import PRIMARIES, Primary, aims, findings, primary_table
from paper_claims import paper_table
from questions import answers
from records_of_runs import BASE, BASELINE, RECORDS, Study, figures, is_held, mean_figure
from statistics_of_runs import cost, own_minus
from tables_of_runs import held, partitions, ways_to_train, where_attention_goes

from localist_hf.configuration import PAPER_VARIANTS
from localist_hf.evaluation.pictures import plot_frontier, plot_over_dial
from localist_hf.evaluation.tables import table_of
from localist_hf.hub import write_card


#: What was trained without locality, but with the teacher.
_TAUGHT = f"{BASELINE}-taught0.9"
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
#: Between these lines of the README stands the answer.
MARKERS = ("<!-- results -->", "<!-- /results -->")


@dataclass(frozen=True)
class Model:
    """
    One of the models that the questions are asked of, by the name of its grid; there may be things that we aim at with
    it, the grid of a longer training that comes nearer, those of ways to train, and that of kinds of blocks.
    """

    name: str
    title: str
    #: In a list of several.
    short: str
    about: str
    has_aims: bool = False
    longer_name: str | None = None
    training_names: Sequence[str] = ()
    blocks_names: Sequence[str] = ()
    choice_names: Sequence[str] = ()
    agreement_name: str | None = None
    has_recall: bool = False
    #: Where blocks of given ends end, in ways to train.
    ends: str = "lines"

    @cached_property
    def study(self) -> Study:
        return Study(RECORDS / f"{self.name}.jsonl")

    @cached_property
    def longer(self) -> Study | None:
        return Study(RECORDS / f"{self.longer_name}.jsonl") if self.longer_name else None

    @cached_property
    def blocks(self) -> list[Study]:
        """The studies of kinds of blocks."""
        return _studies(self.blocks_names)

    @cached_property
    def choices(self) -> list[Study]:
        """The studies of attention that makes up its mind."""
        return _studies(self.choice_names)

    @cached_property
    def agreements(self) -> Agreements | None:
        """What attention says of what predictions rest on."""
        return studied(self.agreement_name) if self.agreement_name else None

    @cached_property
    def trainings(self) -> list[Study]:
        """The studies of ways to train, as far as there are records of them."""
        return _studies(self.training_names)


def _studies(names: Sequence[str]) -> list[Study]:
    """Those of which there are records."""
    paths = [RECORDS / f"{name}.jsonl" for name in names]
    return [Study(path) for path in paths if path.is_file()]


MODELS = (
    Model(
        "small",
        "The base of this package",
        "base",
        "The base was trained on Python's sources and reference, the same kind of text. It uses its attention: see "
        "[its card](../localist_hf/base/README.md).",
        training_names=("training", "training_seeds", "training_long"),
        blocks_names=("blocks", "blocks_seeds"),
        choice_names=("choice", "choice_seeds"),
        agreement_name="agreement",
    ),
    Model(
        "smollm2",
        "SmolLM2-135M-Instruct",
        "SmolLM2",
        "Only the upper half of the layers has an adapter, so that nothing can be asked of a reverse schedule: it "
        "would leave the early layers as they are. The text is WikiText-2's, its validation split to train on and its "
        "test split to measure on.",
        has_aims=True,
        longer_name="smollm2_long",
        training_names=("smollm2_training",),
        blocks_names=("smollm2_blocks",),
        choice_names=("smollm2_recall",),
        has_recall=True,
        ends="sentences and lines",
    ),
    Model(
        "book",
        "The base of this package, on a book",
        "book",
        "The book is the King James Bible, six of its 66 books held out whole (`study/book_text.py`). The base has "
        "read Python and its reference: to it such text is new, and what it predicts of it before is no teacher. So "
        "*how to train* and *which blocks* begin with a base that has learnt such text without locality (600 steps at "
        "a rate of 0.002, better by a tenth than 0.001), and predicts the held-out books with a perplexity of 16.2.",
        training_names=("book_training",),
        blocks_names=("book_blocks",),
        ends="clauses",
    ),
)

INTRODUCTION = """\
# Results

<!-- Made by `python study/results.py` (`make results`) from `study/records`; do not edit. -->

What progressive localisation costs and gives, on models whose attention matters, with the controls that would
expose a cheap number. Every number stands in `study/records`, and is written here by `make results`; `make study`
trains and measures everything anew (hours on two cores).

**How to read it.** *Perplexity ratios*, costs at dial 1 and differences of psi come with 95 % intervals in brackets,
for other seeds and other documents (sequences of the held-out text, taken as independent) together: Student's t of a
two-way layout in which both are random, with Satterthwaite's degrees of freedom. Differences are paired: the same
seeds, batches and documents.
p-values are of the same layout, corrected by Holm for the number of comparisons of their table; where the claim is
*within 5 %* they test for a ratio of 1.05, elsewhere for no difference. Hedges' g is the mean difference in standard
deviations over seeds, and ± half of the 95 % interval over seeds by Student's t: both on this text alone. *psi* is
context fidelity, *phi* fidelity, *other words* the share of the attention that goes to other words at all
([definitions](method.md#fidelity)).

**What a cost is measured against.** *The reference* of a study is the lower perplexity of two on the same text: that
of *the base*, the model before training, and that of `distributed`, trained alike without locality. Both stand in every
table. Where training does damage, as 150 steps at a rate of 1e-3 without a teacher do to the base of this package,
ratios to `distributed` alone would flatter.

**Primary comparisons** were named before anything was measured: quintic against distributed (perplexity), own against
another text's blocks (psi, no previous blocks), semantic blocks against windows and the last tokens at as many
visible keys (perplexity at dial 1), and quintic against its reverse (perplexity, cost at dial 1). All else is
exploration: its p-values are corrected within a table only, and the next study should test what it suggests.
"""


PAPER = (
    "Only the abstracts were read, of arXiv 2511.18375 (v1 to v3: v1 and v2 have seven configurations, v3 five), "
    "2510.09338, 2510.17358 and 2511.03559 ([what they state](method.md#claims), [their terms](terms.md)). Intervals "
    "are 95 %, for other seeds and documents. Of a study that has not the runs for a claim there is no figure."
)


def claims(models: Sequence[Model]) -> str:
    """What the abstracts claim, beside the figures of each model."""
    return f"{PAPER}\n\n{paper_table({model.title: model.study for model in models})}"


def about(study: Study) -> str:
    """What the numbers were measured on."""
    run = study.any_run()
    data, training = run["data"], run["training"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    adapter = run["adapter"]
    how = f"a LoRA adapter of rank {adapter['rank']}" if adapter else "all weights"
    return (
        f"{run['num_parameters'] / 1e6:.1f} million parameters, {how}; {training['steps']} steps of "
        f"{training['batch_size']} sequences of {data['evaluation_lengths'][1]} tokens, learning rate "
        f"{training['learning_rate']:g}; {len(study.runs)} configurations, seeds "
        f"{', '.join(map(str, study.seeds))}. Text: {data['name']}. {data['details']} Measured on "
        f"{data['evaluation_sequences']} sequences that no model has seen. {run['hardware']}; {versions}."
    )


def render(models: Sequence[Model]) -> str:
    """The whole page."""
    parts = [INTRODUCTION.rstrip(), "## In short", in_short(models), "## The paper's claims", claims(models)]
    for model in models:
        parts += [
            f"## {model.title}",
            about(model.study),
            model.about,
            "### Primary comparisons",
            primary_table(model.study),
            f"![Perplexity against context fidelity](frontier_{model.name}.png)",
            f"![Perplexity over the dial](perplexity_over_dial_{model.name}.png)",
            "### The questions",
            *answers(model.study),
        ]
        for study in model.trainings:
            parts += how_to_train(study, model.ends)
        for study in model.blocks:
            parts += which_blocks(study, model.ends)
        for study in model.choices:
            parts += choice_tables.section(study)
        if model.agreements is not None:
            parts += agreement_tables.section(model.agreements)
        if model.has_recall:
            parts += agreement_tables.recall_section()
        if model.has_aims:
            parts += ["### What we aim at", "Set beforehand; met or missed by the estimate.", aims(model.study)]
        if model.longer is not None:
            parts += longer_training(model.longer)
    return "\n\n".join(parts) + "\n"


def how_to_train(study: Study, ends: str) -> list[str]:
    """The section on one of the studies of ways to train."""
    training, seeds = study.any_run()["training"], ", ".join(map(str, study.seeds))
    return [
        f"### How to train: {training['steps']} steps, seed{'s' if len(study.seeds) > 1 else ''} {seeds}",
        f"Learning rate {training['learning_rate']:g}. *hold*: trained at dial 1 and taught by the model's own free "
        "predictions of before (weight 0.9), without the locality loss; *both*: the same, half of the rows at dial 0; "
        "*taught0*: without the teacher; *taught0.9*: by the locality loss, with it; *budget*: the locality loss "
        f"within so many nats of KL from the teacher. *delimiter*: blocks end where {ends} do; the others are "
        "semantic. "
        "*Self only* is the control: dial 1 with blocks of one token. Where that costs little, so does any locality. "
        "*Out of reach*: the mean share of the context that no prediction can depend on at dial 1, where all layers "
        "are local.",
        ways_to_train(study, [*study.runs]),
        *(
            [f"![Perplexity against context fidelity](frontier_{study.name}.png)", "*Those trained by the loss.*"]
            if by_loss(study)
            else []
        ),
        "What was aimed at, set beforehand:",
        aims(study),
    ]


def which_blocks(study: Study, ends: str) -> list[str]:
    """The section on kinds of blocks, each trained on its own."""
    training, seeds = study.any_run()["training"], ", ".join(map(str, study.seeds))
    blocks, windows, last_keys = (runs_of_kind(study, kind) for kind in ("blocks", "windows", "last keys"))
    found = at_as_many_keys(study, "upper_half-hold-recruited", "windows")
    said = f" Named beforehand, recruited against windows: {found}." if found is not None else ""
    also = ", and the last keys (*window-length1*: blocks of one token and those before)," if last_keys else ""
    return [
        f"### Which blocks: the upper half held and taught, {training['steps']} steps, seed"
        f"{'s' if len(study.seeds) > 1 else ''} {seeds}",
        "Where destroying attention costs a factor (*self only*), blocks can show what they are worth. Each kind was "
        "trained on its own. *recruited*: separators that `localist-hf recruit` found in what the base predicts of "
        f"text of the same kind; *elsewhere*: of WikiText-2; *delimiter*: ends of {ends}; without a name: by value "
        f"length. Windows{also} were trained at two lengths; the ratios are to what lies between at as many visible "
        "keys, linear in the losses. *Reach*: the local set and, for each further local layer, the blocks before it "
        "again. *Lift*: how many times "
        f"more often than chance a block starts after the end of one of the {ends}.{said}{precision_of(study)}",
        blocks_table(study, blocks),
        blocks_table(study, [*windows, *last_keys]),
    ]


def precision_of(study: Study) -> str:
    """A sentence on it, where it is not float32."""
    precision = study.any_run()["training"]["precision"]
    return "" if precision == "float32" else f" Trained and measured in {precision}, the base too."


def longer_training(study: Study) -> list[str]:
    """The section on trainings that the aims are set for."""
    free = [name for name, runs in study.runs.items() if not is_held(runs[0])]
    at_1 = [name for name in study.runs if name not in free]
    steps, seeds = study.any_run()["training"]["steps"], ", ".join(map(str, study.seeds))
    return [
        f"### After {steps} steps",
        f"The same data and settings, {steps} steps; seed {seeds} alone, so that intervals are over documents only. "
        "*quintic-contrast* is also asked to tell its own blocks from moved ones, *quintic-delimiter* has the ends of "
        "sentences and lines as the ends of its blocks, and *weight0-dial1* is trained at dial 1, without the locality "
        "loss.",
        aims(study),
        "Asked for psi alone, a model learns to look near, and near words lie in most blocks of that size, another "
        "text's too. Asked for the distance as well, it tells its own blocks from others, and pays for it; perplexity "
        "at dial 1 is no better on them for that. What costs next to nothing is to be trained at dial 1.",
        where_attention_goes(study, free),
        partitions(study, free[1:]),
        held(study, [*free[1:], *at_1]),
    ]


def in_short(models: Sequence[Model]) -> str:
    """The primary comparisons, a column for each model, and what each model gives and costs."""
    columns: dict[str, Callable[[Primary], str]] = {
        "comparison": lambda each: each.question,
        "figure": lambda each: each.unit,
    }
    for model in models:
        cells = dict.fromkeys(PRIMARIES, "not asked")
        cells |= {each.primary: f"{each.found}, {each.verdict}" for each in findings(model.study)}
        columns[f"{model.title} ({len(model.study.seeds)} seeds)"] = cells.__getitem__
    return "\n\n".join([table_of(PRIMARIES, columns), *map(gain_and_cost, models)])


def gain_and_cost(model: Model) -> str:
    """What the loss gives and costs on one model, and what training at dial 1 does."""
    study = model.study
    free, by_loss = (mean_figure(study.runs[name], "psi") for name in (BASELINE, "quintic"))
    text = (
        f"**{model.title}**: trained with the loss under the quintic schedule, the last layer keeps {by_loss:.0%} of "
        f"its attention to other words inside their block, where free training leaves {free:.0%}, at "
        f"{cost(study, 'quintic')} times the perplexity of {_reference(study)}; held there wholly, at dial 1, "
        f"{cost(study, 'quintic', setting='dial 1')} times."
    )
    parts = []
    for name, at_1 in study.held_pairs:
        if study.settings[name]["block_partition"] == "semantic":
            before = " and the one before" if study.settings[name]["num_previous_blocks"] else ""
            price, control = (cost(study, at_1, setting=each) for each in ("dial 1", "self only"))
            parts.append(f"to its block{before} at {price} times (with blocks of one token, the control: {control})")
    if parts:
        text += f" Trained at dial 1 instead, without the loss, it is held wholly {', and '.join(parts)}."
    if (longer := model.longer) is not None and (name := "quintic-contrast") in longer.runs:
        text += (
            f" After {longer.any_run()['training']['steps']} steps (one seed), with the objective `contrast`, it keeps "
            f"{mean_figure(longer.runs[name], 'psi'):.0%} inside, {own_minus(longer, name, 'wrong')} more than in "
            f"another text's blocks, at {cost(longer, name)} times the perplexity of {_reference(longer)}."
        )
    if model.trainings:
        said = taught(model)
        text += f" {said[0].upper()}{said[1:]}."
    return text


def taught(model: Model) -> str:
    """What it costs to be held at dial 1 after being taught there, of the study with the most seeds."""
    study = max(model.trainings, key=lambda study: len(study.seeds))
    said = {
        "quintic-hold": "quintic",
        "upper_half-hold": "the upper half",
        "upper_half-hold-delimiter-previous1": f"the upper half (blocks: {model.ends}, one before)",
        "localist-hold-delimiter-previous1": "all layers (the same)",
    }
    costs = []
    for name in study.those_of([*said]):
        at_1, control = (cost(study, name, setting=setting) for setting in ("dial 1", "self only"))
        costs.append(f"{said[name]} {at_1} times (self only: {control.estimate.mean:.2f})")
    number = len(study.seeds)
    how = f"{study.any_run()['training']['steps']} steps, {number} seed{'s' if number > 1 else ''}"
    return f"held at dial 1 and taught by itself ({how}): {', '.join(costs)} of {_reference(study)}"


def _reference(study: Study) -> str:
    """What costs are ratios to, and the other that it is the lower of."""
    names = {BASE: "the base", BASELINE: "training without locality", _TAUGHT: "such training without locality"}
    other = BASELINE if study.reference == BASE else BASE
    name, beside = (names.get(each, each) for each in (study.reference, other))
    figures = [mean_figure(study.runs_of(each), "perplexity") for each in (study.reference, other)]
    return f"{name} ({figures[0]:.2f}; {beside}: {figures[1]:.2f})"


def answer(models: Sequence[Model]) -> str:
    """What the README says, in a line for each model and for each of two claims."""
    lines = []
    for model in models:
        study = model.study
        free, by_loss = (mean_figure(study.runs[name], "psi") for name in (BASELINE, "quintic"))
        lines.append(
            f"**{model.title}**: by the loss the last layer keeps {by_loss:.0%} of its attention to other words inside "
            f"their block (free training: {free:.0%}), at {cost(study, 'quintic')} times the perplexity of "
            f"{_reference(study)}"
        )
        at_1 = dict(study.held_pairs).get("quintic-previous1")
        if model.trainings:
            lines[-1] += f"; {taught(model)}"
        elif at_1 is not None:
            price, control = (cost(study, at_1, setting=each) for each in ("dial 1", "self only"))
            lines[-1] += (
                f"; trained at dial 1 instead, it is held wholly to its block and the one before at {price} times "
                f"(blocks of one token, the control: {control})"
            )
    verdicts = [{each.primary: each.verdict for each in findings(model.study)} for model in models]
    for claim in (PRIMARIES[0], PRIMARIES[2]):  # what the paper claims, and what blocks by meaning are worth
        said = (f"{each[claim]} ({model.short})" for each, model in zip(verdicts, models, strict=True))
        lines.append(f"{claim.question[0].upper()}{claim.question[1:]}, {claim.unit}: {'; '.join(said)}")
    return "\n".join(f"- {line}." for line in lines)


def between_markers(text: str, new: str) -> str:
    """A text with what stands between the markers replaced."""
    before, rest = text.split(MARKERS[0])
    return f"{before}{MARKERS[0]}\n{new}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}"


def load_models() -> list[Model]:
    """Those that there are records of."""
    return [model for model in MODELS if (RECORDS / f"{model.name}.jsonl").is_file()]


def pages() -> dict[Path, str]:
    """Every text that holds numbers of the study, by its file."""
    models = load_models()
    readme = README.read_text(encoding="utf-8")
    return {RESULTS: render(models), README: between_markers(readme, answer(models))}


def draw(model: Model) -> None:
    """The pictures of one model."""
    study = model.study
    held = [name for name, runs in study.runs.items() if is_held(runs[0])]
    draw_frontier(study, f"{model.title}: cost and gain")
    for training in filter(by_loss, model.trainings):
        draw_frontier(training, f"By the loss, {training.any_run()['training']['steps']} steps")
    for choice in filter(choice_tables.has_weights, model.choices):
        choice_tables.draw(choice, RESULTS.parent / "choice.png")
    shown = study.those_of([*PAPER_VARIANTS, "reverse_quintic", "quintic-previous1", *held])
    dials = {name: [run["controls"]["dials"] for run in study.runs[name]] for name in shown}
    plot_over_dial(dials, RESULTS.parent / f"perplexity_over_dial_{model.name}.png")


def by_loss(study: Study) -> list[str]:
    """What was trained for locality and not at dials of its own."""
    settings = study.settings
    local = [name for name in study.runs if settings[name]["locality_schedule"] != BASELINE]
    return [name for name in local if settings[name]["training_dials"] is None]


def draw_frontier(study: Study, title: str) -> None:
    """
    Perplexity against psi: at dial 1 of what was measured there, elsewhere at dial 0. What was trained at dials has no
    place in it, since it was not taught to look inside at dial 0, and at dial 1 psi is 1.
    """
    names = [
        name for name in study.runs if study.settings[name]["training_dials"] is None and name != "reverse_quintic"
    ]
    metrics = {
        name: [
            {
                "perplexity": run["controls"]["dials"][-1 if name != BASE and is_held(run) else 0]["perplexity"],
                "fidelity_layer_0": 0.0,
                "context_fidelity_layer_0": figures(run)["psi"]
                if name == BASE
                else run["last_layer"]["context_fidelity"],
            }
            for run in (study.runs_of(name)[:1] if name == BASE else study.runs_of(name))
        ]
        for name in [BASE, *names]
    }
    plot_frontier(metrics, study.reference, RESULTS.parent / f"frontier_{study.name}.png", title=title)


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    for model in load_models():
        draw(model)
    for card in sorted((ROOT / "model_cards").glob("*/README.md")):
        write_card(card.parent)


if __name__ == "__main__":
    main()
