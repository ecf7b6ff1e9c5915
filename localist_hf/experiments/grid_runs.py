"""The runs of a grid: each trained from the same base and measured on the same text, by one process or by several."""

import dataclasses
import hashlib
import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import active_children, get_context, parent_process, resource_tracker
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from ..errors import InputError, RunError, one_line
from ..evaluation import measure, measure_controls, measure_generation
from ..evaluation.control_results import ControlResults
from ..hub import RunRecord, check_card
from ..hub.loading import PLAN_FILE, load_adapter, load_config, load_model
from ..hub.weights import find_base
from ..trainers import LocalistTrainer, LocalistTrainingArguments
from ..trainers.checkpoints import checkpoint_damage, is_own_checkpoint, list_checkpoints, remove_checkpoint
from ..whole_file import write_whole
from .data import follows_end
from .folders import RUN_FILES, TRAINING_FILES, FolderLocked, check_own, claim, lock_folder
from .grid import Grid, GridRun
from .training_checks import check_training, check_types
from .training_run import run_training


#: Folder of what the base does under the settings of the runs, before any training.
UNTRAINED = "untrained"
#: How many texts each model writes, and their length with the prompt at most.
_NUM_WRITTEN, _WRITTEN_LENGTH = 32, 256
_NUM_CHECKPOINTS = 4
_CAN_MASK = hasattr(signal, "pthread_sigmask")  # but for Windows


def training_arguments(folder: Path, /, **given: Any) -> LocalistTrainingArguments:
    """Makes the training arguments that the base and a grid's runs share, with those that are given in their place."""
    shared = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "per_device_eval_batch_size": 16,
        "logging_steps": 25,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    names = {field.name for field in dataclasses.fields(LocalistTrainingArguments) if field.init}
    if unknown := given.keys() - names:
        raise ValueError(f"`training` has {min(unknown)!r}, which is no training argument.")
    check_types("training", given, LocalistTrainingArguments)
    check_training(shared | given)
    return LocalistTrainingArguments(output_dir=str(folder), **(shared | given))


class Task(NamedTuple):
    """A run to train and measure; or, with `run.seed` of no account, the base to measure under its settings."""

    run: GridRun
    is_trained: bool = True

    def __str__(self) -> str:
        return str(self.run) if self.is_trained else f"the base as {self.run.name}"


class Done(NamedTuple):
    """The end of a task: what is to be said of it, and the seconds that it took; none where it was done before."""

    message: str
    seconds: float | None = None


@dataclass(frozen=True)
class GridWork:
    """
    What the runs of a grid share.

    Args:
        grid ([`Grid`]):
            The grid.
        folder (`Path`):
            Where the runs are put, each in a folder of its own.
        base (`str`):
            Folder or Hub id of the model that every run starts from.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The base's.
        train (`Dataset`), held_out (`Dataset`):
            The sequences to train on and to measure on.
        card (`dict[str, Any]`):
            What model cards say about the text.
        delimiter_token_ids (`dict[str | None, list[int]]`):
            The tokens that end a block of the `"delimiter"` partition, by [`GridRun`]'s `separators`.
    """

    grid: Grid
    folder: Path
    base: str
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    held_out: Dataset
    card: dict[str, Any]
    delimiter_token_ids: dict[str | None, list[int]]

    @property
    def tasks(self) -> list[Task]:
        """`list[Task]`: every run, and the base under the settings of each."""
        runs = list(self.grid)
        untrained = {json.dumps(self.settings_of(run)): Task(run, is_trained=False) for run in reversed(runs)}
        return [*reversed(untrained.values()), *map(Task, runs)]

    def path(self, task: Task) -> Path:
        """The folder of a run, or the file of what is measured of the base."""
        name = task.run.folder_name if task.is_trained else f"{UNTRAINED}/{task.run.name}.json"
        return self.folder / name

    def settings_of(self, run: GridRun) -> dict[str, Any]:
        """The fields of [`LocalityFields`] of a run."""
        is_delimiter = run.settings.get("block_partition") == "delimiter"
        if not is_delimiter:
            return run.settings
        return run.settings | {"delimiter_token_ids": self.delimiter_token_ids[run.separators]}

    def arguments(self, run: GridRun, **others: Any) -> LocalistTrainingArguments:
        return training_arguments(self.folder / run.folder_name, **run.training | {"seed": run.seed} | others)

    def plan(self, task: Task) -> dict[str, Any]:
        """Returns what must be as it was for a task to be gone on with, as JSON has it."""
        plan = self._shared_plan | {"locality": self.settings_of(task.run)}
        if task.is_trained:
            plan |= {"seed": task.run.seed, "training": task.run.training, "lora": self.grid.lora}
            plan["trained on"] = self._trained_on
        return json.loads(json.dumps(plan))

    @cached_property
    def _shared_plan(self) -> dict[str, Any]:
        measured_on = _fingerprint(self.held_out)
        return {"base": find_base(self.base), "measured on": measured_on, "controls": self.grid.controls}

    @cached_property
    def _trained_on(self) -> str:
        return _fingerprint(self.train)

    def is_done(self, task: Task) -> bool:
        """Whether a task is finished."""
        if not task.is_trained:
            return self.path(task).is_file()
        record = RunRecord.find(self.path(task))
        return record is not None and record.controls is not None

    def controls_of(self, task: Task) -> dict[str, Any]:
        """The controls of a finished task."""
        if task.is_trained:
            return RunRecord.load(self.path(task)).controls
        return json.loads(self.path(task).read_text(encoding="utf-8"))["controls"]

    def check(self, task: Task) -> None:
        """
        Refuses what is there of a task already and is not what the grid says.

        Raises:
            ValueError: for another plan, weights that were not measured, or what is not ours.
        """
        path, plan = self.path(task), self.plan(task)
        if task.is_trained:
            check_own(path, "run", (*TRAINING_FILES, *RUN_FILES))
            check_card(path)
        try:
            if task.is_trained:
                found = json.loads((path / PLAN_FILE).read_text(encoding="utf-8"))
            else:
                found = json.loads(path.read_text(encoding="utf-8"))["plan"]
        except FileNotFoundError:
            if task.is_trained and RunRecord.find(path) is not None:
                raise ValueError(f"{path} holds a run of no grid; choose another `--output-dir`.") from None
            return
        if different := sorted(name for name in plan.keys() | found.keys() if plan.get(name) != found.get(name)):
            name = different[0]
            raise ValueError(
                f"{path} was begun with `{name}` {found.get(name)} where the grid now says {plan.get(name)}; choose "
                "another `--output-dir`, or remove it."
            )
        if task.is_trained and (record := RunRecord.find(path)) is not None:
            record.check_weights(path)

    def load(self, settings: dict[str, Any]) -> PreTrainedModel:
        """Loads the base in float32, under these settings."""
        return load_model(self.base, load_config(self.base, settings), dtype=torch.float32)

    def precision(self, run: GridRun) -> AbstractContextManager:
        """In which a run is measured: that in which its trainer trains and evaluates it."""
        args = self.arguments(run)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        return nullcontext() if dtype is None else torch.autocast(args.device.type, dtype)

    def load_run(self, run: GridRun) -> PreTrainedModel:
        """Loads a trained run."""
        folder = self.folder / run.folder_name
        if self.grid.lora is not None:
            return load_adapter(self.load(self.settings_of(run)), str(folder))
        return load_model(str(folder), load_config(str(folder), {}), dtype=torch.float32)


def do_task(work: GridWork, task: Task, is_quiet: bool = False) -> Done:
    """Does what is left of a task, unless another process is at it."""
    start = time.perf_counter()
    path = work.path(task)
    try:
        # Of the base nothing but a file is left, beside which the lock would stay.
        with lock_folder(path if task.is_trained else path.parent / f".{path.stem}"):
            if work.is_done(task):  # by another process, since this one looked
                return Done(_summary(work, task))
            if task.is_trained:
                claim(path, "run", TRAINING_FILES)
                write_whole(path / PLAN_FILE, f"{json.dumps(work.plan(task), indent=2)}\n")
                if RunRecord.find(path) is None:
                    _train(work, task.run, path, is_quiet)
                _measure(work, task.run, path)
            else:
                model = work.load(work.settings_of(task.run))
                found = {"plan": work.plan(task), "controls": _controls(work, task.run, model).to_dict()}
                path.parent.mkdir(exist_ok=True)
                write_whole(path, f"{json.dumps(found)}\n")
    except FolderLocked:
        return Done("another process is at it")
    return Done(_summary(work, task), time.perf_counter() - start)


def _train(work: GridWork, run: GridRun, folder: Path, is_quiet: bool) -> None:
    """Trains a run, from its last checkpoint where it was stopped, to its record."""
    set_seed(run.seed)
    model = work.load(work.settings_of(run))
    if work.grid.lora is not None:
        model = get_peft_model(model, LoraConfig(**work.grid.lora))
    steps = run.training.get("max_steps", 0)
    saving = {"save_strategy": "steps", "save_steps": -(-steps // _NUM_CHECKPOINTS), "save_total_limit": 2}
    whole = [each for each in list_checkpoints(folder) if checkpoint_damage(each) is None]
    args = work.arguments(
        run,
        **({} if "save_strategy" in run.training or steps < 1 else saving),
        disable_tqdm=is_quiet or run.training.get("disable_tqdm"),
        resume_from_checkpoint=str(whole[0]) if whole else None,
    )
    trainer = LocalistTrainer(
        model=model,
        args=args,
        train_dataset=work.train,
        eval_dataset=work.held_out,
        processing_class=work.tokenizer,
    )
    if is_quiet:
        trainer.remove_callback(PrinterCallback)
    run_training(trainer, model_name=run.name, **work.card)


def _measure(work: GridWork, run: GridRun, folder: Path) -> None:
    """Adds to a run's record what is measured of it beside the evaluation; by that it is known to be finished."""
    base, model = work.load(work.grid.locality), work.load_run(run)
    batch_size = work.arguments(run).per_device_eval_batch_size
    with work.precision(run):
        on_base_blocks = measure(model, work.held_out, batch_size, block_model=base).metrics
    texts = torch.tensor(work.held_out[:_NUM_WRITTEN]["input_ids"])[:, :_WRITTEN_LENGTH]
    generation = measure_generation(model, base, texts, prompt_length=texts.shape[1] // 8)
    record = RunRecord.load(folder).with_measurements(on_base_blocks, _controls(work, run, model), generation)
    # Before the record, which says that nothing is left to do.
    for checkpoint in filter(is_own_checkpoint, list_checkpoints(folder)):
        remove_checkpoint(checkpoint)
    record.save(folder)


def _controls(work: GridWork, run: GridRun, model: PreTrainedModel) -> ControlResults:
    batch_size, arguments = work.arguments(run).per_device_eval_batch_size, dict(work.grid.controls)
    if ends := arguments.pop("boundaries", None):
        tokens = torch.tensor(work.held_out["input_ids"])
        arguments["boundaries"] = follows_end(tokens, ends, work.tokenizer, model.config.locality.vocab_size).tolist()
    with work.precision(run):
        return measure_controls(model, work.held_out, batch_size, **arguments)


def _summary(work: GridWork, task: Task) -> str:
    controls = work.controls_of(task)
    psi = controls["dials"][0]["locality"]["context_fidelity"][-1]
    numbers = [
        f"perplexity {controls['perplexity']:.2f}",
        *([] if psi is None else [f"psi of the last layer {psi:.2f}"]),
    ]
    if len(controls["dials"]) > 1:
        numbers.append(f"cost at dial 1 {controls['cost_at_dial_1']:.3f}")
    return ", ".join(numbers)


def do_tasks(work: GridWork, tasks: Sequence[Task], jobs: int) -> None:
    """
    Does those tasks that are not done, as many side by side as there are jobs, and says how far it is after each.

    Raises:
        RunError: for those that fail, once the others are done.
    """
    start, failures, seconds = time.perf_counter(), [], {True: [], False: []}
    open_tasks = [task for task in tasks if not work.is_done(task)]
    print(f"{len(tasks) - len(open_tasks)} of {len(tasks)} are there already, {len(open_tasks)} are left", flush=True)
    tasks = open_tasks
    left = {True: sum(task.is_trained for task in tasks), False: sum(not task.is_trained for task in tasks)}
    for number, (task, done) in enumerate(_results(work, tasks, jobs), start=1):
        left[task.is_trained] -= 1
        if isinstance(done, Exception):
            failures.append(f"{task}: {one_line(done)}")
            text = f"failed: {one_line(done)}"
        elif done.seconds is None:
            text = done.message
        else:
            seconds[task.is_trained].append(done.seconds)
            text = f"{done.message} ({_duration(done.seconds)})"
        print(f"[{number}/{len(tasks)}] {task}: {text}; {_left(seconds, left, jobs)}", flush=True)
    if tasks:
        print(f"{len(tasks)} in {_duration(time.perf_counter() - start)}", flush=True)
    if failures:
        raise RunError(f"{len(failures)} of {len(tasks)} failed. {' '.join(failures)}")


def _results(work: GridWork, tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, Done | Exception]]:
    if jobs == 1:
        for task in tasks:
            try:
                yield task, do_task(work, task)
            except (InputError, RunError) as error:
                yield task, error
        return
    context = get_context("spawn")  # threads of torch do not survive a fork
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with TemporaryDirectory() as folder:
        # Through a file, which a process reads once: through a pipe, the start of each would wait for its imports.
        path = Path(folder) / "work.pickle"
        path.write_bytes(pickle.dumps(work))
        with ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(path, threads)) as executor:
            try:
                with _interrupts_blocked():
                    futures = {executor.submit(_do_in_worker, task): task for task in tasks}
                for future in as_completed(futures):
                    error = future.exception()
                    if error is not None and not isinstance(error, InputError | RunError):
                        executor.shutdown(wait=False, cancel_futures=True)
                        raise error
                    yield futures[future], error or future.result()
            except (KeyboardInterrupt, GeneratorExit):
                executor.shutdown(wait=False, cancel_futures=True)
                for process in active_children():
                    process.terminate()
                raise


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """
    Blocks Ctrl-C meanwhile, and in processes that are started until [`_start_worker`]: while they import, each would
    end in a traceback of its own.
    """
    if not _CAN_MASK:
        yield
        return
    resource_tracker.ensure_running()  # which would lift the mask when the first process starts it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _start_worker(work: Path, threads: int) -> None:
    """Prepares a worker process."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process says that it was interrupted
    if _CAN_MASK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _work = pickle.loads(work.read_bytes())
    threading.Thread(target=_exit_with, args=(parent_process(),), daemon=True).start()
    torch.set_num_threads(threads)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # lines of several processes, none of which says which run it is about


def _exit_with(parent: Any) -> None:
    """Exits together with the parent process, however that ends."""
    parent.join()
    os._exit(1)


def _do_in_worker(task: Task) -> Done:
    return do_task(_work, task, is_quiet=True)


def _left(seconds: dict[bool, list[float]], left: dict[bool, int], jobs: int) -> str:
    left = {kind: number for kind, number in left.items() if number}
    if not left:
        return "none left"
    if not all(seconds[kind] for kind in left):  # what measuring a base takes says nothing of a training
        return f"{sum(left.values())} left"
    total = sum(fmean(seconds[kind]) * number for kind, number in left.items())
    return f"about {_duration(total / jobs)} left"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _fingerprint(dataset: Dataset) -> str:
    """Returns a digest that tells sequences from others."""
    return hashlib.sha256(json.dumps(dataset["input_ids"][:]).encode()).hexdigest()[:16]
