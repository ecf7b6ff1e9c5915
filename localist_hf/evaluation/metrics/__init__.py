"""
Metric modules for `evaluate`, each a file that [`evaluate.load`] takes by its path, and usable by itself.

They are of numbers that somebody has measured already; what runs a model is [`measure_controls`].
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import evaluate


#: The paper that the shares are this project's measure for.
CITATION = """\
@misc{diederich2025progressive,
    title = {Progressive Localisation in Localist LLMs},
    author = {Joachim Diederich},
    year = {2025},
    eprint = {2511.18375},
    archivePrefix = {arXiv}
}
"""
_FOLDER = Path(__file__).parent
#: The names that [`load_metric`] takes.
METRICS = tuple(sorted(path.stem for path in _FOLDER.glob("*.py") if path.stem != "__init__"))
# Those of 0.2, which load for one release.
_FORMER_NAMES = {"faithfulness": "divergence", "retention": "cost_at_dial_1"}


def load_metric(name: str, **kwargs: Any) -> "evaluate.Metric":
    """
    One of this package's metrics, without a network.

    Args:
        name (`str`):
            `"attention_shares"`, `"block_lift"`, `"context_fidelity"`, `"cost_at_dial_1"` or `"divergence"`. What
            0.2 called `"retention"` and `"faithfulness"` is found under those names too, with a warning.
        kwargs:
            As for [`evaluate.load`], such as `num_process` and `process_id`.

    Raises:
        ValueError: for another name.

    Example:

    ```python
    >>> metric = load_metric("context_fidelity")
    >>> metric.compute(block_shares=[0.3, 0.1], outside_shares=[0.1, 0.3])
    {'context_fidelity': 0.5, 'context_share': 0.4}
    ```
    """
    import evaluate  # not before it is needed: it takes most of a second

    if name in _FORMER_NAMES:
        former, name = name, _FORMER_NAMES[name]
        warnings.warn(f"The metric {former!r} is called {name!r} now.", FutureWarning, stacklevel=2)
    if name not in METRICS:
        raise ValueError(f"`name` is {name!r}; allowed are {', '.join(map(repr, METRICS))}.")
    return evaluate.load(str(_FOLDER / f"{name}.py"), **kwargs)


__all__ = ["METRICS", "load_metric"]
