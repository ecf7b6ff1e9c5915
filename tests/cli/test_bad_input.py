"""Every bad input ends in one line that says what is wrong, with status 2, before anything is trained or written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, T5Config

from localist_hf.cli.main import main
from localist_hf.trainers import LocalistTrainer


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A folder with a plain GPT-2, `gpt2`, and what can be wrong with one, with texts and with data sets."""
    root = tmp_path_factory.mktemp("workspace")
    config = GPT2Config(
        n_layer=4, n_embd=32, n_head=4, n_positions=64, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(root / "gpt2")
    tokenizer.save_pretrained(root / "gpt2")

    def damaged(name: str, file: str, change: Callable[[bytes], bytes] | None) -> None:
        shutil.copytree(root / "gpt2", root / name)
        path = root / name / file
        path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))

    damaged("truncated", "model.safetensors", lambda content: content[:20_000])
    damaged("no-weights", "model.safetensors", None)
    damaged("no-config", "config.json", None)
    damaged("broken-config", "config.json", lambda _: b"{")
    damaged("list-config", "config.json", lambda _: b"[]")
    damaged("no-tokenizer-file", "tokenizer.json", None)
    damaged("broken-tokenizer", "tokenizer.json", lambda content: content[:500])
    damaged("no-tokenizer", "tokenizer.json", None)
    (root / "no-tokenizer" / "tokenizer_config.json").unlink()
    fields = json.loads((root / "gpt2" / "config.json").read_text())
    for name, values in {
        "text-as-layers": {"n_layer": "four"},
        "no-layers": {"n_layer": 0},
        "fewer-layers": {"n_layer": 3},
        "more-layers": {"n_layer": 5},
        "wider": {"n_embd": 64},
        "no-heads": {"n_head": 0},
        "strange-activation": {"activation_function": "strange"},
        "small-vocabulary": {"vocab_size": 100},
    }.items():
        damaged(name, "config.json", lambda _, values=values: json.dumps(fields | values).encode())
    weights = load_file(root / "gpt2" / "model.safetensors")
    for name, changed in {
        "one-missing": {key: value for key, value in weights.items() if "h.2.attn.c_attn.weight" not in key},
        "not-finite": {key: value * float("nan") for key, value in weights.items()},
    }.items():
        shutil.copytree(root / "gpt2", root / name)
        save_file(changed, root / name / "model.safetensors", metadata={"format": "pt"})
    llama = LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=len(tokenizer)
    )
    LlamaForCausalLM(llama).save_pretrained(root / "llama")
    for name, config in {
        "no-weights-llama": llama,
        "t5": T5Config(vocab_size=10, num_layers=1, d_model=8, d_ff=8),
        "mamba": MambaConfig(vocab_size=10, num_hidden_layers=1, hidden_size=8),
        "foreign": LlamaConfig(auto_map={"AutoConfig": "ours.Config"}),
    }.items():
        config.save_pretrained(root / name)
    for name in ("llama", "no-weights-llama", "mamba"):
        tokenizer.save_pretrained(root / name)
    foreign = (root / "foreign" / "config.json").read_text().replace('"llama"', '"foreign"')
    (root / "foreign" / "config.json").write_text(foreign)
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text("{}")
    (root / "finished").mkdir()
    (root / "finished" / "config.json").write_text("{}")

    words = "Sentence number says something. "
    for name, content in {
        "book.txt": words * 400,
        "short.txt": "Sentence",
        "few.txt": words * 12,
        "empty.txt": "",
        "bad.jsonl": "{bad\n",
        "empty.csv": "",
        "bad.parquet": "no parquet",
        "numbers.jsonl": '{"text": 3}\n' * 9,
        "lists.jsonl": '{"text": ["a", "b"]}\n' * 9,
        "other.csv": "content\nhello\n",
    }.items():
        (root / name).write_text(content)
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "wide.txt").write_bytes(words.encode("utf-16-le"))
    Dataset.from_dict({"content": ["a"]}).to_json(root / "data" / "train.jsonl")
    Dataset.from_dict({"text": ["a"]}).to_json(root / "no-train" / "test.jsonl")
    (root / "nothing").mkdir()
    (root / "loop").symlink_to("loop")
    (root / "unfinished" / "checkpoint-1").mkdir(parents=True)
    (root / "begun").mkdir()
    for name in ("unfinished", "begun"):
        (root / name / "run_settings.json").write_text("{}")
    (root / "of-grid").mkdir()
    (root / "of-grid" / "plan.json").write_text("{}")

    for name, content in {
        "list.yaml": "- variant\n",
        "text.yaml": "variant",
        "empty.yaml": "",
        "broken.yaml": "variant: [linear\n",
        "twice.yaml": "seed: 1\nvariant: linear\nseed: 2\n",
        "twice-below.yaml": "locality:\n  num_sink_tokens: 1\n  num_sink_tokens: 2\n",
        "two-spellings.yaml": "max_steps: 1\nmax-steps: 2\n",
        "unknown.yaml": "learnin_rate: 1\n",
        "config.yaml": "config: other.yaml\n",
        "list-value.yaml": "learning_rate: [1, 2]\n",
        "mapping-value.yaml": "model: {a: 1}\n",
        "float-value.yaml": "max_steps: 2.5\n",
        "negative.yaml": "learning_rate: -1\n",
        "no-folder.yaml": "output_dir: ''\n",
        "choice.yaml": "eval_strategy: sometimes\n",
        "list-key.yaml": "[1, 2]: 3\n",
        "python.yaml": "locality: {a: !!python/object:os.system x}\n",
    }.items():
        (root / name).write_text(content)
    (root / "latin.yaml").write_bytes(b"license: caf\xe9")
    (root / "README.md").write_text("no markers")
    (root / "binary.md").write_bytes(b"\xff\xfe")
    (root / "broken-family" / "base").mkdir(parents=True)
    (root / "broken-family" / "base" / "run.json").write_text("{")
    (root / "broken-family" / ".localist-hf.json").write_text("{}")
    return root


def ends(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str]:
    """Exit status of a command, and the one line that it ends with."""
    with pytest.raises(SystemExit) as error:
        main(list(arguments))
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("localist-hf")
    assert [line for line in lines if "error:" in line] == lines[-1:]
    return error.value.code, lines[-1]


TRAIN = (
    "--model", "gpt2", "--text-file", "book.txt", "--output-dir", "run", "--sequence-length", "32", "--use_cpu",
    "--report_to", "none", "--max_steps", "1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--sequence-length 1", "`sequence_length` is 1; the model allows 2 to 64"),
        ("--sequence-length 65", "`sequence_length` is 65; the model allows 2 to 64"),
        ("--eval_strategy sometimes", "invalid choice: 'sometimes' (choose from 'no', 'steps', 'epoch')"),
        ("--metric_for_best_model accuracy", "`metric_for_best_model` is 'accuracy'; allowed are 'loss', 'perplexity'"),
        ("--load_best_model_at_end", "requires the save and eval strategy to match"),
        ("--no-such-flag 1", "unrecognized arguments: --no-such-flag"),
        ("--config", "--config: expected one argument"),
        # configuration
        ("--variant sextic", "`variant` is 'sextic'; allowed are 'distributed'"),
        ("--locality {bad", "`locality` is '{bad'; it must be a JSON object"),
        ("--locality 3", "`locality` is '3'; it must be a JSON object with fields among"),
        ('--locality {"n_layer":3}', "it must be a JSON object with fields among"),
        ('--locality {"min_block_length":9,"max_block_length":3}', "`min_block_length` is 9"),
        ('--locality {"block_partition":"sentences"}', "`block_partition` is 'sentences'; allowed are 'semantic'"),
        ('--locality {"locality_schedule":[0,1]}', "the model has 4 layers"),
        ('--locality {"locality_schedule":"sextic"}', "`variant` is 'sextic'; allowed are 'distributed'"),
        (
            '--variant linear --locality {"locality_schedule":"cubic"}',
            "`locality` sets `locality_schedule` to 'cubic', but `variant` is 'linear', which sets it to 'linear'",
        ),
        (
            '--variant window --locality {"block_partition":"semantic"}',
            "`locality` sets `block_partition` to 'semantic', but `variant` is 'window'",
        ),
        (
            '--variant quintic --locality {"block_partition":"window"}',
            "`variant` is 'quintic', but with the other fields that `locality` or the model sets (`block_partition` is "
            "'window') it would be 'window'",
        ),
        ("--language Klingon:yes", "`language` is 'Klingon:yes'; it must be a code of ISO 639, such as 'en'"),
        ("--license MIT", "`license` is 'MIT'; it must be as the Hub spells it, such as 'apache-2.0' or 'mit'"),
        # adapters
        ("--lora-rank -1", "`lora_rank` is -1; it must be at least 0"),
        ("--lora-alpha 4", "`lora_alpha` is 4; it needs `lora_rank`"),
        ("--lora-targets c_fc", "`lora_targets` is ['c_fc']; it needs `lora_rank`"),
        ("--lora-rank 2 --lora-alpha 0", "`lora_alpha` is 0; it must be at least 1"),
        ("--lora-rank 2 --lora-dropout 1", "`lora_dropout` is 1.0; it must be at least 0 and below 1"),
        ("--lora-rank 33", "`lora_rank` is 33; it must be at most 32, the rank of the largest weight that gets an"),
        ("--model llama --lora-rank 17", "`lora_rank` is 17; it must be at most 16"),
        ("--lora-rank 2 --lora-targets q_proj", "`lora_targets` is ['q_proj']; allowed are c_attn, c_fc, c_proj"),
        # models
        ("--model truncated", "`model` is 'truncated', which cannot be loaded: Error while deserializing header"),
        (
            "--model no-weights",
            "`model` is 'no-weights', which cannot be loaded: Error no file",
        ),
        ("--model one-missing", "its weights lack transformer.h.2.attn.c_attn.weight."),
        ("--model not-finite", "holds numbers that are not finite"),
        ("--model fewer-layers", "its weights have transformer.h.3"),
        ("--model more-layers", "its weights lack transformer.h.4"),
        ("--model wider", "has the shape (96,); by its configuration it is (192,)"),
        ("--model no-config", "`model` is 'no-config'; there is no config.json in this folder."),
        ("--model adapter", "there is no config.json in this folder. It holds an adapter; give its base."),
        ("--model broken-config", "`model` is 'broken-config', whose configuration cannot be used so"),
        ("--model list-config", "`model` is 'list-config', whose configuration cannot be used so"),
        ("--model text-as-layers", "Field 'n_layer' expected int, got str (value: 'four')"),
        ("--model no-layers", "`model` is 'no-layers', whose configuration cannot be used so: it has 0 layers."),
        ("--model no-heads", "`model` is 'no-heads', which cannot be loaded"),
        ("--model strange-activation", "which cannot be loaded: KeyError: 'strange'"),
        ("--model no-tokenizer", "whose tokenizer cannot be used: there is none, or its vocabulary is empty"),
        ("--model no-tokenizer-file", "whose tokenizer cannot be used"),
        ("--model broken-tokenizer", "`model` is 'broken-tokenizer', whose tokenizer cannot be used"),
        ("--model small-vocabulary", "wte.weight has the shape"),
        ("--model no-weights-llama", "`model` is 'no-weights-llama', which cannot be loaded: "),
        ("--model t5", "cannot be used so: its `model_type` is 't5', which is no causal language model."),
        ("--model mamba", "cannot be used so: MambaForCausalLM cannot be localised: not all of its layers are causal"),
        ("--model foreign", "whose configuration cannot be used so: The repository foreign contains custom code"),
        ('--model llama --locality {"attn_pdrop":0.1}', "`attn_pdrop`: no such setting; allowed are locality_schedule"),
        ('--model llama --locality {"semantic_layer":4}', "it must lie in [0, 1] for a model of 2 layers"),
        (
            "--model llama --lora-rank 2 --lora-targets c_attn",
            "is ['c_attn']; allowed are down_proj, gate_proj, ",
        ),
        ("--model llama --sequence-length 1", "`sequence_length` is 1; the model allows at least 2 positions"),
        ("--model book.txt", "`model` is 'book.txt', which is a file"),
        ("--model no/such/folder", "`model` is 'no/such/folder'; there is no such folder, and a model on the Hub is"),
        ("--model ./gpt", "`model` is './gpt'; there is no such folder, and a model on the Hub is called NAMESPACE/"),
        (
            "--model data/gpt2",
            "`model` is 'data/gpt2'; there is no such folder in 'data', and on the Hub: the cache does not hold",
        ),
        ("--model loop", "`model` is 'loop', a link that leads nowhere; it must be a model's folder or Hub id."),
        (
            "--model unfinished",
            "not finished; go on with `localist-hf train --output-dir unfinished --resume_from_chec",
        ),
        ("--model begun", "Its run is not finished, and left no checkpoint to go on from; start it again."),
        ("--model of-grid", "Its run is not finished; start the same `localist-hf family` again."),
        # texts
        ("--text-file missing.txt", "`text_file` is 'missing.txt'; there is no such file"),
        (f"--text-file {'a' * 300}", "a'; there is no such file"),
        ("--text-file gpt2", "`text_file` is 'gpt2'; it is a folder and must be a file."),
        ("--text-file empty.txt", "`text_file` is 'empty.txt'; the file is empty"),
        ("--text-file latin.txt", "`text_file` is 'latin.txt'; it must be UTF-8 text"),
        ("--text-file wide.txt", "`text_file` is 'wide.txt'; it must be UTF-8 text"),
        ("--text-file short.txt", "one sequence needs 32"),
        ("--text-file few.txt --validation-share 0.01", "`validation_share` is 0.01 and the text has"),
        ("--text-file bad.jsonl", "`text_file` is 'bad.jsonl', which cannot be read: line 1 is no JSON (Expecting"),
        ("--text-file empty.csv", "`text_file` is 'empty.csv'; the file is empty"),
        ("--text-file bad.parquet", "`text_file` is 'bad.parquet', which cannot be read"),
        (
            "--text-file numbers.jsonl",
            "`text_file` is 'numbers.jsonl', which cannot be read: line 1: `text_column` is 'text', which holds 3; it",
        ),
        ("--text-file lists.jsonl", "line 1: `text_column` is 'text', which holds ['a', 'b']; it must be text"),
        (
            "--text-file other.csv",
            "is 'other.csv', which cannot be read: `text_column` is 'text'; the columns are 'content'",
        ),
        ("--text-column content", "`text_column` is 'content'; `text_file` 'book.txt' is read as text"),
        ("--dataset data", "`dataset` is 'data' and `text_file` 'book.txt'; exactly one of them must be given"),
        ("--dataset-config en", "`dataset_config` is 'en'; it goes with `dataset`"),
        # folders
        ("--output-dir ", "argument --output-dir: it is empty"),
        ("--output-dir= ", "argument --output-dir: it is empty"),
        ("--output-dir book.txt", "`output_dir` is 'book.txt', which cannot be used"),
        ("--output-dir book.txt/run", "`output_dir` is 'book.txt/run', which cannot be used"),
        ("--output-dir finished", "`output_dir` is 'finished', which already holds a run"),
        ("--output-dir gpt2 --overwrite_output_dir", "`output_dir` is 'gpt2', which holds `model` 'gpt2'"),
        ("--resume_from_checkpoint true", "`resume_from_checkpoint` is True, but `output_dir` 'run' has no checkpoint"),
        ("--resume_from_checkpoint nowhere", "`resume_from_checkpoint` is 'nowhere'; there is no such folder"),
        (
            "--resume_from_checkpoint true --overwrite_output_dir",
            "`resume_from_checkpoint` is 'true' and `overwrite_output_dir` true",
        ),
        # YAML
        ("--config missing.yaml", "`config` is 'missing.yaml', which cannot be read"),
        ("--config gpt2", "`config` is 'gpt2', which cannot be read"),
        ("--config latin.yaml", "`config` is 'latin.yaml', which cannot be read"),
        ("--config list.yaml", "`config` is 'list.yaml', which must hold lines `flag: value`"),
        ("--config text.yaml", "which must hold lines `flag: value`"),
        ("--config empty.yaml", "which must hold lines `flag: value`"),
        ("--config broken.yaml", "`config` is 'broken.yaml', line 2"),
        ("--config twice.yaml", "`config` is 'twice.yaml', line 3: the key 'seed' stands there twice"),
        ("--config twice-below.yaml", "line 3: the key 'num_sink_tokens' stands there twice"),
        ("--config two-spellings.yaml", "which sets 'max-steps' twice"),
        ("--config unknown.yaml", "`config` is 'unknown.yaml', which sets 'learnin_rate', no flag"),
        ("--config config.yaml", "which sets 'config', no flag"),
        ("--config list-value.yaml", "which sets 'learning_rate' to a list; it takes one value"),
        ("--config mapping-value.yaml", "which sets 'model' to a mapping; it takes a value"),
        ("--config float-value.yaml", "in which argument --max-steps: invalid int value: '2.5'"),
        ("--config negative.yaml", "`learning_rate` is -1.0"),
        ("--config no-folder.yaml", "`config` is 'no-folder.yaml', in which argument --output_dir: it is empty"),
        ("--config choice.yaml", "`config` is 'choice.yaml', in which argument --eval-strategy: invalid choice"),
        ("--config list-key.yaml", "`config` is 'list-key.yaml', line 1: a key must be a word"),
        ("--config python.yaml", "`config` is 'python.yaml', line 1: could not determine a constructor"),
    ],
)
def test_train(workspace: Path, flags: str, words: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(LocalistTrainer, "train", lambda *args, **kwargs: pytest.fail("the training started"))
    before = sorted(workspace.rglob("*"))
    status, line = ends(capsys, "train", *TRAIN, *flags.split(" "))
    assert line.startswith("localist-hf train: error: ")
    assert words in line
    assert status == 2
    assert sorted(workspace.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ("", 2, "localist-hf: error: the following arguments are required: COMMAND"),
        ("retrain", 2, "localist-hf: error: argument COMMAND: invalid choice: 'retrain'"),
        ("--unknown", 2, "localist-hf: error: "),
        ("train", 2, "`dataset` is None and `text_file` None; exactly one of them must be given"),
        ("train --model gpt2 --dataset data", 2, "`text_column` is 'text'; the columns are 'content'"),
        ("train --model gpt2 --dataset no-train", 2, "cannot be read: it has the splits test; a split 'train'"),
        ("train --model gpt2 --dataset nothing", 2, "`dataset` is 'nothing', which cannot be read"),
        ("train --model gpt2 --dataset no/such/data", 2, "`dataset` is 'no/such/data', which cannot be read"),
        (
            'train --model gpt2 --text-file book.txt --locality {"locality_schedule":[0,0,0,1]}',
            2,
            "`output_dir` is missing; for a `locality_schedule` without a name there is no default",
        ),
        ("family nowhere.yaml", 2, "`grid` is 'nowhere.yaml', which cannot be read"),
        ("family binary.md", 2, "`grid` is 'binary.md', which cannot be read"),
        ("family book.txt", 2, "`grid` is 'book.txt', which is no grid"),
        ("family --jobs many", 2, "argument --jobs: invalid int value: 'many'"),
        ("family --model mamba", 2, "MambaForCausalLM cannot be localised"),
        (
            "family --model-cards book.txt",
            2,
            "`model_cards` is 'book.txt', which cannot be used: 'book.txt' is a file; it must be a folder",
        ),
        ("family --output-dir book.txt", 2, "`output_dir` is 'book.txt', which cannot be used"),
        ("family --output-dir broken-family", 2, "run.json' is no record of a run"),
        ("evaluate", 2, "the following arguments are required: MODEL"),
        (
            "evaluate missing",
            2,
            "`model` is 'missing'; the cache does not hold all of it, and with HF_HUB_OFFLINE=1 the Hub is not asked.",
        ),
        ("evaluate book.txt", 2, "`model` is 'book.txt', which is a file"),
        ("evaluate no-config", 2, "`model` is 'no-config'; there is no config.json in this folder"),
        ("evaluate adapter", 2, "`model` is 'adapter', which cannot be read"),
        (
            "evaluate mamba",
            2,
            "MambaForCausalLM cannot be localised: not all of its layers are causal softmax attention",
        ),
        ("evaluate no-weights", 2, "`model` is 'no-weights', which cannot be loaded"),
        ("evaluate gpt2 --text-file missing.txt", 2, "`text_file` is 'missing.txt'; there is no such file"),
        ("evaluate gpt2 --text-file book.txt empty.txt", 2, "`text_file` is 'empty.txt'; the file is empty"),
        ("evaluate gpt2 --text-file short.txt", 2, "The text of the data set has"),
        ("evaluate gpt2 --sequence-length 65", 2, "`sequence_length` is 65; the model allows 2 to 64 positions"),
        ("evaluate gpt2 --locality {bad", 2, "`locality` is '{bad'; it must be a JSON object"),
        ('evaluate gpt2 --locality {"layers":3}', 2, "it must be a JSON object with fields among"),
        ("evaluate gpt2 --block-model missing", 2, "`block_model` is 'missing'; the cache does not hold all of it"),
        (
            "evaluate gpt2 --block-model ./missing",
            2,
            "`block_model` is './missing'; there is no such folder, and a mod",
        ),
        (
            "evaluate gpt2 --block-model truncated",
            2,
            "`block_model` is 'truncated', which cannot be loaded: Error whil",
        ),
        ("evaluate gpt2 --block-model no-tokenizer", 2, "`block_model` is 'no-tokenizer', whose tokenizer cannot be"),
        ("evaluate loop", 2, "`model` is 'loop', a link that leads nowhere"),
        ("evaluate unfinished", 2, "`model` is 'unfinished'; there is no config.json in this folder. Its run is not f"),
        ("evaluate gpt2 --text-file data", 2, "`text_file` is 'data'; it is a folder and must be a file."),
        ("family --jobs 1025", 2, "`jobs` is 1025; it must be in 1 to 1024."),
        ("family --model ./missing", 2, "`model` is './missing'; there is no such folder"),
        (
            "publish gpt2 --namespace a/b",
            2,
            "argument --namespace: 'a/b'; it must be letters, digits, '-', '_' and '.'",
        ),
        ("publish gpt2 --namespace a --name b/c", 2, "argument --name: 'b/c'; it must be letters, digits"),
        ("export loop out", 2, "`source` is 'loop', a link that leads nowhere"),
        (
            "export gpt2 loop",
            2,
            "`folder` is 'loop', which cannot be used: 'loop' is a link that leads nowhere; it must be",
        ),
        ("export ./missing out", 2, "`source` is './missing'; there is no such folder, and a model on the H"),
        ("export unfinished out", 2, "`source` is 'unfinished'; there is no config.json in this folder. It"),
        ("evaluate gpt2 --output-dir book.txt", 2, "`output_dir` is 'book.txt', which cannot be used"),
        ("publish missing --namespace me --dry-run", 2, "`run` is 'missing'; there is no such folder"),
        ("publish gpt2 --namespace me --dry-run", 2, "'gpt2' holds no finished run"),
        ("publish gpt2", 2, "the following arguments are required: --namespace"),
        ("export missing out", 2, "`source` is 'missing'; the cache does not hold"),
        ("export book.txt out", 2, "`source` is 'book.txt', which is a file"),
        ("view gpt2 --max-tokens 9 --save page.html", 2, "`max_tokens` is 9; it goes with the live page, not with"),
        ("evaluate gpt2 --locality " + "[" * 5000, 2, "nested too deeply"),
        (f'evaluate gpt2 --locality {{"num_sink_tokens":{10**22}}}', 2, f"{10**22}; it must be below 2**31"),
        ("export gpt2 out", 2, "whose `model_type` is 'gpt2'; it must be 'localist-gpt2'"),
        ("export gpt2 gpt2", 2, "`folder` is 'gpt2', which is occupied"),
        ("export gpt2 --to llama out", 2, "unrecognized arguments: --to"),
    ],
)
def test_every_command(
    workspace: Path, arguments: str, status: int, words: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    before = sorted(workspace.rglob("*"))
    found, line = ends(capsys, *arguments.split())
    assert words in line
    assert found == status
    assert sorted(workspace.rglob("*")) == before
