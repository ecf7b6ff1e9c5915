# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
What is measured, as a table. A *task* is something that one can run and time (see peers.py); an *experiment* runs its
tasks in turns in one process; a *row* is a ratio of two sums of its experiment's tasks, with a target.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """
    Shape of the model and of its batch: GPT-2 small's width, few layers, a small vocabulary; a Llama where
    `num_key_value_heads` is given.
    """

    length: int
    batch_size: int = 1
    num_layers: int = 4
    num_heads: int = 12
    width: int = 768
    vocab_size: int = 8192
    prompt_length: int = 64
    new_tokens: int = 64
    num_key_value_heads: int | None = None
    device: str = "cpu"
    #: Of the weights.
    dtype: str = "float32"

    def tiny(self) -> "Shape":
        """Of the same number of layers, and small enough to run at once; on the CPU, in place of a GPU too."""
        return replace(
            self,
            device="cpu",
            length=max(self.length // 16, 16),
            num_heads=2,
            num_key_value_heads=self.num_key_value_heads and 1,
            width=32,
            vocab_size=128,
            prompt_length=8,
            new_tokens=4,
        )

    @property
    def eager_bytes(self) -> int:
        """About what a step with explicit attention matrices needs: those kept by each layer, and some in passing."""
        matrix = self.batch_size * self.num_heads * self.length**2 * 4
        return (self.num_layers + 6) * matrix + 2 * 2**30


@dataclass(frozen=True)
class Row:
    """
    A ratio: the sum of tasks `over`, each times its factor, divided by the sum `under`.

    Args:
        name (`str`):
            What `--rows` selects by, and the key in results.json.
        title (`str`):
            What the table says.
        over (`dict[str, float]`), under (`dict[str, float]`):
            Task names and their factors.
        at_most (`float`, *optional*), at_least (`float`, *optional*):
            The target; a row without one is there to explain another.
        is_share (`bool`, *optional*, defaults to `False`):
            Print the ratio as a percentage.
    """

    name: str
    title: str
    over: dict[str, float]
    under: dict[str, float]
    at_most: float | None = None
    at_least: float | None = None
    is_share: bool = False

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that the row needs."""
        return list(dict.fromkeys([*self.over, *self.under]))

    @property
    def target(self) -> str:
        """The target in words."""
        if self.at_most is not None:
            return f"at most {self.format(self.at_most)}"
        return f"at least {self.format(self.at_least)}" if self.at_least is not None else "none"

    def ratios(self, measured: dict[str, list[float]]) -> list[float]:
        """The ratio of each round."""
        over = zip(*([factor * value for value in measured[task]] for task, factor in self.over.items()), strict=True)
        under = zip(*([factor * value for value in measured[task]] for task, factor in self.under.items()), strict=True)
        return [sum(numerator) / sum(denominator) for numerator, denominator in zip(over, under, strict=True)]

    def is_met(self, ratio: float) -> bool | None:
        """Whether a ratio meets the target; None without a target."""
        if self.at_most is not None:
            return ratio <= self.at_most
        return ratio >= self.at_least if self.at_least is not None else None

    def format(self, ratio: float) -> str:
        """The ratio as the table prints it."""
        return f"{ratio:.1%}" if self.is_share else f"{ratio:.2f}" if abs(ratio) >= 2 else f"{ratio:.3f}"


@dataclass(frozen=True)
class Experiment:
    """
    Tasks measured in turns.

    Args:
        rows (`tuple[Row, ...]`):
            What is read from the measurements.
        shape ([`Shape`]):
            Shape of every task.
        rounds (`int`, *optional*, defaults to 5):
            Rounds at the least.
        seconds (`float`, *optional*, defaults to 0):
            More rounds, up to `max_rounds`, are run while they end within this time.
        max_rounds (`int`, *optional*, defaults to 40):
            Rounds at the most.
        warm_up_length (`int`, *optional*):
            Run the warm-up with texts of this length, where a full round takes too long; default is the full length.
        is_memory (`bool`, *optional*, defaults to `False`):
            Measure the peak memory of a process that runs the task, not the task's time.
        is_prepared (`bool`, *optional*, defaults to `False`):
            Each run of a task prepares, out of the clock's sight, and gives what is timed.
        is_returned (`bool`, *optional*, defaults to `False`):
            A run of a task gives the number that is measured; nothing is timed.
    """

    rows: tuple[Row, ...]
    shape: Shape
    rounds: int = 5
    seconds: float = 0.0
    max_rounds: int = 40
    warm_up_length: int | None = None
    is_memory: bool = False
    is_prepared: bool = False
    is_returned: bool = False

    def tiny(self) -> "Experiment":
        """The same at tiny shapes, two rounds, or for memory one."""
        return replace(
            self, shape=self.shape.tiny(), rounds=1 if self.is_memory else 2, seconds=0.0, warm_up_length=None
        )


def _findings(num_layers: int) -> int:
    """How many layers find blocks where all are localised: those up to 3/4 of the depth; others share the last ones."""
    return 3 * num_layers // 4 + 1


def _parts(shape: Shape) -> tuple[Row, ...]:
    """What our step adds to the plain one, taken apart: the lower bound of the ratio."""
    layers = shape.num_layers
    attention = {"fused attention with LSE": layers, "plain attention": -layers}
    band, blocks = {"band": layers}, {"block finding": _findings(layers)}
    plain = {"plain step": 1}
    step = f"T = {shape.length}, share of the plain step"
    name = f"part-{{}}-{shape.length}"
    return (
        Row(name.format("lse"), f"{step}: attention with LSE less plain attention", attention, plain, is_share=True),
        Row(name.format("band"), f"{step}: the shares, from the LSE", band, plain, is_share=True),
        Row(name.format("blocks"), f"{step}: block finding", blocks, plain, is_share=True),
        Row(
            name.format("sum"),
            f"bound from these parts, T = {shape.length}: (plain + parts) / plain",
            plain | attention | band | blocks,
            plain,
        ),
    )


def _steps(shape: Shape, quintic: bool, seconds: float) -> Experiment:
    title = f"training step, T = {shape.length}, batch {shape.batch_size}: ours / plain SDPA"
    rows = [Row(f"step-{shape.length}", title, {"our step": 1}, {"plain step": 1}, at_most=1.05)]
    if quintic:
        title = f"the same under quintic, T = {shape.length}"
        rows.append(
            Row(f"step-quintic-{shape.length}", title, {"our quintic step": 1}, {"plain step": 1}, at_most=1.04)
        )
    return Experiment((*rows, *_parts(shape)), shape, seconds=seconds)


def _taught(length: int) -> Experiment:
    title = f"training step held and taught, quintic, T = {length}: ours / plain SDPA"
    plain = {"plain step": 1}
    row = Row(f"taught-{length}", f"{title}, a frozen copy", {"taught step": 1}, plain, at_most=1.4)
    adapter = {"taught adapter step": 1}, {"plain adapter step": 1}
    return Experiment((row, Row(f"taught-adapter-{length}", f"{title}, LoRA", *adapter)), Shape(length), seconds=60)


def _taught_memory(name: str, teacher: str, kind: str, at_most: float) -> Row:
    title = f"peak memory held and taught, quintic, T = 4096: ours / plain SDPA, {teacher}"
    return Row(name, title, {f"taught {kind}step": 1}, {f"plain {kind}step": 1}, at_most=at_most)


def _eager(length: int, at_least: float, warm_up_length: int | None = None) -> Experiment:
    title = f"training step, T = {length}: eager `output_attentions` / ours"
    row = Row(f"eager-{length}", title, {"eager step": 1}, {"our step": 1}, at_least=at_least)
    bound = Row(
        f"eager-bound-{length}",
        f"bound, T = {length}: eager `output_attentions` / plain SDPA, what a step without any locality would reach",
        {"eager step": 1},
        {"plain step": 1},
    )
    return Experiment((row, bound), Shape(length), warm_up_length=warm_up_length)


def _gpu_step(length: int, batch_size: int) -> Experiment:
    title = f"GPU, bf16, training step, T = {length}, batch {batch_size}: ours / plain SDPA"
    row = Row(f"gpu-step-{length}", title, {"our step": 1}, {"plain step": 1}, at_most=1.05)
    return Experiment((row,), Shape(length, batch_size, device="cuda"), rounds=20, seconds=15)


def _gpu_rows() -> tuple[Experiment, ...]:
    """On a GPU: training steps, a local layer, the prefill of a 1B-class Llama, decoding."""
    dial = Row(
        "gpu-dial-1-attention",
        "GPU, bf16, attention of a localised layer at dial 1, T = 16384, forward: plain SDPA / ours",
        {"plain attention forward": 1},
        {"local attention forward": 1},
        at_least=12.0,
    )
    prefill = {"our measured prefill": 1}, {"plain prefill": 1}
    long = Shape(
        32_768, num_layers=16, num_heads=32, num_key_value_heads=8, width=2048, vocab_size=32_000,
        prompt_length=32_768, device="cuda", dtype="bfloat16",
    )  # fmt: skip
    what = "GPU, bf16, prefill of a 1B-class Llama with all shares of every layer, T = 32768: ours / plain SDPA"
    decoding = tuple(
        Row(
            f"gpu-decode-{value:g}",
            f"GPU, bf16, the same Llama, decoding alone at dial {value:g}, prompt of 4096: ours / plain",
            {f"our decoding at dial {value:g}": 1},
            {"plain decoding": 1},
        )
        for value in (0.5, 1.0)
    )
    return (
        _gpu_step(1024, batch_size=8),
        _gpu_step(4096, batch_size=2),
        Experiment((Row("gpu-prefill", what, *prefill, at_most=1.10),), long, rounds=5, seconds=20),
        Experiment(
            (Row("gpu-prefill-memory", f"{what}, peak memory", *prefill, at_most=1.05),), long, 1, is_memory=True
        ),
        Experiment((dial,), Shape(16_384, device="cuda", dtype="bfloat16"), rounds=20, seconds=5),
        Experiment(
            decoding,
            replace(long, length=4128, prompt_length=4096, new_tokens=32),
            rounds=5,
            seconds=15,
            is_prepared=True,
        ),
    )


def _dial_forward(dial: float) -> Row:
    title = f"whole-model forward at dial {dial:g}, T = 2048: explicit scores with a bias / ours"
    tasks = {"over": {f"explicit forward at dial {dial:g}": 1}, "under": {f"our forward at dial {dial:g}": 1}}
    return Row(f"dial-forward-{dial:g}", title, **tasks)


def _dial_generation(dial: float) -> Row:
    title = f"greedy generation at dial {dial:g}, prompt of 900, 64 new tokens, batch 1: ours / plain GPT-2"
    return Row(f"dial-generation-{dial:g}", title, {f"our generation at dial {dial:g}": 1}, {"plain generation": 1})


def _decoding(prompt_length: int, at_half: float, at_one: float) -> Experiment:
    """Steps of a generation alone, the prompt in the cache."""
    title = f"decoding alone at dial {{:g}}, prompt of {prompt_length}, batch 1: ours / plain GPT-2"
    plain = {"plain decoding": 1}
    rows = tuple(
        Row(
            f"decode-{dial:g}-{prompt_length}",
            title.format(dial),
            {f"our decoding at dial {dial:g}": 1},
            plain,
            at_most,
        )
        for dial, at_most in ((0.5, at_half), (1.0, at_one))
    )
    shape = Shape(prompt_length + 32, prompt_length=prompt_length, new_tokens=32)
    return Experiment(rows, shape, rounds=9, seconds=30, is_prepared=True)


def _llama(length: int, prompt_length: int, **settings) -> Shape:
    """SmolLM2-135M's width and grouped queries."""
    return Shape(length, num_heads=9, num_key_value_heads=3, width=576, prompt_length=prompt_length, **settings)


def _llama_decoding(prompt_length: int) -> tuple[Experiment, Experiment]:
    shape = _llama(prompt_length + 32, prompt_length, new_tokens=32)
    what = f"Llama with grouped queries, dial 1, prompt of {prompt_length}, batch 1"
    plain, ours = {"plain decoding": 1}, {"our decoding at dial 1": 1}
    speed = Row("llama-decode-1", f"{what}: decoding alone, plain / ours", plain, ours, at_least=1.5)
    plain, ours = {"plain cache": 1}, {"our cache at dial 1": 1}
    memory = Row("llama-cache-1", f"{what}: bytes of the cache, ours / plain", ours, plain, at_most=0.1)
    return (
        Experiment((speed,), shape, rounds=9, seconds=30, is_prepared=True),
        Experiment((memory,), shape, rounds=1, is_returned=True),
    )


EXPERIMENTS: tuple[Experiment, ...] = (
    _steps(Shape(2048), quintic=True, seconds=60),
    _steps(Shape(4096), quintic=False, seconds=60),
    Experiment(
        (
            Row(
                "memory-4096",
                "peak memory, T = 4096: ours / plain SDPA",
                {"our step": 1},
                {"plain step": 1},
                at_most=1.02,
            ),
        ),
        Shape(4096),
        rounds=1,
        is_memory=True,
    ),
    _taught(2048),
    Experiment(
        (
            Row(
                "choice-2048",
                "training step with the objective `choice` on the last two layers, T = 2048: ours / plain SDPA",
                {"choice step": 1},
                {"plain step": 1},
                at_most=1.25,
            ),
        ),
        Shape(2048),
        seconds=60,
    ),
    Experiment(
        (
            Row(
                "choice-memory-4096",
                "peak memory with the objective `choice` on the last two layers, T = 4096: ours / plain SDPA",
                {"choice step": 1},
                {"plain step": 1},
                at_most=1.05,
            ),
        ),
        Shape(4096),
        rounds=1,
        is_memory=True,
    ),
    Experiment(
        (
            Row(
                "both-ends-2048",
                "training step with rows dealt over both ends of the dial, quintic, T = 2048, batch 2: ours / plain "
                "SDPA",
                {"both ends step": 1},
                {"plain step": 1},
                at_most=1.05,
            ),
        ),
        Shape(2048, 2),
        seconds=60,
    ),
    Experiment(
        (
            _taught_memory("taught-memory-4096", "a frozen copy", "", at_most=1.25),
            _taught_memory("taught-memory-adapter-4096", "LoRA, the adapter off", "adapter ", at_most=1.1),
        ),
        Shape(4096),
        rounds=1,
        is_memory=True,
    ),
    _eager(2048, at_least=2.2),
    _eager(4096, at_least=5.0, warm_up_length=512),
    Experiment(
        (
            Row(
                "eager-memory-2048",
                "peak memory, T = 2048: eager `output_attentions` / ours",
                {"eager step": 1},
                {"our step": 1},
                at_least=1.7,
            ),
        ),
        Shape(2048),
        rounds=1,
        is_memory=True,
    ),
    Experiment(
        (
            Row(
                "dial-1-attention",
                "attention of a localised layer at dial 1, T = 4096, forward: plain SDPA / ours",
                {"plain attention forward": 1},
                {"local attention forward": 1},
                at_least=8.0,
            ),
            Row(
                "dial-1-attention-and-blocks",
                "the same, ours with the block finding that one layer does for all above it",
                {"plain attention forward": 1},
                {"local attention forward": 1, "block finding": 1},
            ),
        ),
        Shape(4096),
        seconds=10,
    ),
    Experiment(
        (
            Row(
                "dial-0-training",
                "dial 0, no locality output, training step, T = 1024: ours / plain GPT-2",
                {"our unmeasured step": 1},
                {"plain step": 1},
                at_most=1.01,
            ),
        ),
        Shape(1024),
        seconds=150,
    ),
    Experiment(
        (
            Row(
                "dial-0-generation",
                "dial 0, greedy generation, prompt of 64, 64 new tokens, batch 1: ours / plain GPT-2",
                {"our generation": 1},
                {"plain generation": 1},
                at_most=1.01,
            ),
        ),
        Shape(1024),
        seconds=30,
    ),
    Experiment((_dial_generation(0.5), _dial_generation(1)), Shape(1024, prompt_length=900), seconds=30),
    _decoding(64, at_half=1.15, at_one=1.05),
    _decoding(900, at_half=1.15, at_one=1.05),
    _decoding(4096, at_half=1.15, at_one=0.6),
    Experiment(
        (
            Row(
                "llama-step-2048",
                "Llama with grouped queries, training step, T = 2048, batch 1: ours / plain SDPA",
                {"our step": 1},
                {"plain step": 1},
                at_most=1.06,
            ),
        ),
        _llama(2048, prompt_length=64),
        seconds=60,
    ),
    *_llama_decoding(4096),
    Experiment((_dial_forward(0.5), _dial_forward(1)), Shape(2048), seconds=20),
    Experiment(
        (
            Row(
                "block-finding",
                f"block finding, share of our training step, 12 layers, T = 1024, batch 1 ({_findings(12)} findings)",
                {"block finding": _findings(12)},
                {"our step": 1},
                at_most=0.03,
                is_share=True,
            ),
        ),
        Shape(1024, num_layers=12),
    ),
    *_gpu_rows(),
)
