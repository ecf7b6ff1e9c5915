"""
The proof: what is published is loaded by processes that know nothing of this package, with an empty cache, from a Hub
that they know through `HF_ENDPOINT` only.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from peft import PeftModel
from python_process import run_python
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from localist_hf import LocalistGPT2LMHeadModel, localize
from localist_hf.cli.main import main
from localist_hf.hub import RunRecord
from localist_hf.hub.weights import weight_hashes


TOKEN = "hf_test_token"
TOKENS = torch.arange(2, 40).view(2, 19)

# What every stranger starts with. The package may be installed where the tests run: it is made to be missing.
STRANGER = """
import sys
sys.modules["localist_hf"] = None
import torch
torch.set_num_threads(1)
tokens = torch.arange(2, 40).view(2, 19)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer(users={TOKEN: {"name": "alice", "orgs": ["org"]}}) as server:
        yield server


@pytest.fixture(scope="module")
def runs(family: Path, llama_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("published") / "runs"
    for name in ("base", "distributed", "linear", "cubic", "quintic", "quintic-lora"):
        shutil.copytree(family / name, runs / name)
    return shutil.copytree(llama_runs, runs, dirs_exist_ok=True)


def run(hub: HubServer, home: Path, code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """A Python process that knows the test Hub through its environment."""
    return run_python(code, *arguments, env=hub.env(home, TOKEN) | env, cwd=home)


def stranger(hub: HubServer, home: Path, code: str, **env: str) -> str:
    home.mkdir(exist_ok=True)
    done = run(hub, home, STRANGER + code, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def published(hub: HubServer, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Publishes the family with the command; what it printed."""
    home = tmp_path_factory.mktemp("publisher")
    program = "from localist_hf.cli.main import main; main()"
    arguments = ("publish", str(runs), "--namespace", "org", "--collection", "Localist models")
    done = run(hub, home, program, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def local_logits(folder: Path, **kwargs: float) -> torch.Tensor:
    with torch.no_grad():
        return LocalistGPT2LMHeadModel.from_pretrained(folder)(TOKENS, **kwargs).logits


LOAD = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

repo_id = "org/localist-gpt2-quintic"
try:
    AutoModelForCausalLM.from_pretrained(repo_id)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("its code ran without a question")
config = AutoConfig.from_pretrained(repo_id, trust_remote_code=True)
assert type(config).__module__.startswith("transformers_modules."), type(config)
assert config.locality_lambdas[-1] == 1.0
model = AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True)
transformer = AutoModel.from_pretrained(repo_id, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(repo_id, trust_remote_code=True)
with torch.no_grad():
    outputs = model(tokens, output_fidelity=True, output_entropy=True)
    hidden = transformer(tokens).last_hidden_state
    dialled = model(tokens, locality_dial=1.0).logits
    assert torch.equal(model.lm_head(hidden), outputs.logits)
torch.save({"logits": outputs.logits, "dialled": dialled, "fidelity": outputs.fidelity[-1]}, "loaded.pt")
generator = pipeline("text-generation", model=repo_id, trust_remote_code=True)
text = generator("Sentence number", max_new_tokens=4, do_sample=False)[0]["generated_text"]
assert text.startswith("Sentence number") and len(text) > len("Sentence number"), text
"""


def test_strangers_who_trust_it_load_it_then_again_without_a_network(
    hub: HubServer, published: str, runs: Path, tmp_path: Path
) -> None:
    assert published.count("commit") == 9
    assert "/collections/" in published
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        requests = len(hub.requests)
        stranger(hub, tmp_path / "home", LOAD, **env)
        assert (len(hub.requests) > requests) == (not env)
        loaded = torch.load(tmp_path / "home" / "loaded.pt")
        assert torch.equal(loaded["logits"], local_logits(runs / "quintic"))
        assert torch.equal(loaded["dialled"], local_logits(runs / "quintic", locality_dial=1.0))
        assert loaded["fidelity"].shape == (2, 4, 19)


FACES = """
import pickle
from peft import AutoPeftModelForCausalLM
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers import pipeline

repo_id = "org/localist-llama-quintic"
greedy = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=[])
mask = torch.ones_like(tokens)

# Without a question it is what it was before, as engines see it: they choose by `architectures`.
config = AutoConfig.from_pretrained(repo_id)
assert type(config) is LlamaConfig and config.architectures == ["LlamaForCausalLM"], config
plain = AutoModelForCausalLM.from_pretrained(repo_id)
assert type(plain) is LlamaForCausalLM, type(plain)
expected = plain(tokens).logits
continued = plain.generate(tokens, attention_mask=mask, generation_config=greedy)

@torch.no_grad()
def check(model):
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert isinstance(model, LlamaForCausalLM) and type(model).__name__ == "LlamaForCausalLM"
    assert model.config.locality.locality_lambdas[-1] == 1.0
    outputs = model(tokens, output_fidelity=True)
    dialled = model(tokens, locality_dial=1.0).logits
    assert torch.equal(model(tokens).logits, expected) and not torch.allclose(dialled, expected)
    assert torch.equal(model.generate(tokens, attention_mask=mask, generation_config=greedy), continued)
    local = model.generate(tokens, attention_mask=mask, generation_config=greedy, locality_dial=1.0)
    assert not torch.equal(local, continued)
    return {"dialled": dialled, "fidelity": outputs.fidelity[-1], "local": local}

def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)

model = AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True)
loaded = check(model)
assert same(check(pickle.loads(pickle.dumps(model))), loaded)
model.save_pretrained("saved")
assert same(check(AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)), loaded)
assert same(check(AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True, device_map="cpu")), loaded)
half = AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True, dtype=torch.bfloat16)
assert half.dtype == torch.bfloat16
half.generate(tokens, attention_mask=mask, generation_config=greedy, locality_dial=1.0)
transformer = AutoModel.from_pretrained(repo_id, trust_remote_code=True)
assert torch.equal(transformer(tokens, locality_dial=1.0).last_hidden_state @ model.lm_head.weight.T, loaded["dialled"])
# Who has trusted one still gets the plain one without a word.
for folder in (repo_id, "saved"):
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is LlamaForCausalLM and torch.equal(again(tokens).logits, expected), type(again)
assert type(pipeline("text-generation", model=repo_id).model) is LlamaForCausalLM
# An adapter, whose base's own code and settings are those of the base's repository.
adapter = AutoPeftModelForCausalLM.from_pretrained(f"{repo_id}-lora")
trusted = AutoPeftModelForCausalLM.from_pretrained(f"{repo_id}-lora", trust_remote_code=True)
assert type(adapter.get_base_model()) is LlamaForCausalLM
assert trusted.get_base_model().config.locality.locality_schedule == "distributed"
assert torch.equal(adapter(tokens).logits, trusted(tokens).logits)
torch.save({"logits": expected.detach(), "dialled": loaded["dialled"]}, "faces.pt")
"""


@pytest.mark.slow
def test_a_native_model_has_two_faces(hub: HubServer, published: str, runs: Path, tmp_path: Path) -> None:
    stranger(hub, tmp_path / "home", FACES)
    loaded = torch.load(tmp_path / "home" / "faces.pt")
    model = localize(AutoModelForCausalLM.from_pretrained(runs / "llama-quintic"))
    with torch.no_grad():
        assert torch.equal(loaded["logits"], model(TOKENS).logits)
        assert torch.equal(loaded["dialled"], model(TOKENS, locality_dial=1.0).logits)


CARDS = """
import contextlib, io, json

printed = {}
with open("cards.json") as file:
    cards = json.load(file)
for name, code in cards.items():
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, name, "exec"), names := {})
    assert names["starts"].shape == names["inputs"]["input_ids"][0].shape, name
    assert names["tokens"].shape[1] > 100, name
    assert name.startswith("gpt2") or type(names["plain"]).__module__.startswith(("transformers.", "peft.")), name
    printed[name] = output.getvalue()
print(json.dumps(printed))
"""


@pytest.mark.slow
def test_the_code_on_the_cards_runs_and_prints_what_they_say(hub: HubServer, published: str, tmp_path: Path) -> None:
    codes, expected = {}, {}
    for name in ("gpt2-quintic", "gpt2-quintic-lora", "llama-quintic", "llama-quintic-lora"):
        card = hub.repo(f"org/localist-{name}").files()["README.md"].decode()
        codes[name] = "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
        (expected[name],) = re.findall(r"^It prints.*?```\n(.*?)```", card, re.DOTALL | re.MULTILINE)
        assert len(expected[name].splitlines()) > 3  # blocks
        numbers = [[float(number) for number in line.split()[:5]] for line in expected[name].splitlines()]
        assert len({psi for *_, psi in numbers}) > 2  # and not the same everywhere
        for own, sink, block, outside, psi in numbers:
            assert own + sink + block + outside == pytest.approx(1, abs=0.021)
            assert psi == pytest.approx(block / (block + outside), abs=0.02)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "cards.json").write_text(json.dumps(codes))
    assert json.loads(stranger(hub, tmp_path / "home", CARDS)) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_a_pinned_revision_stays_what_it_was(hub: HubServer, published: str, runs: Path, tmp_path: Path) -> None:
    first = hub.repo("org/localist-gpt2-linear").head
    before = local_logits(runs / "linear")
    weights = load_file(runs / "linear" / "model.safetensors")
    weights["transformer.ln_f.bias"] += torch.linspace(-1, 1, 32)
    save_file(weights, runs / "linear" / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((runs / "linear" / "run.json").read_text())
    (runs / "linear" / "run.json").write_text(json.dumps(record | {"weights": weight_hashes(runs / "linear")}))
    main(["publish", str(runs / "linear"), "--namespace", "org"])
    assert hub.repo("org/localist-gpt2-linear").head != first
    code = f"""
from transformers import AutoModelForCausalLM
for name, revision in (("pinned", "{first}"), ("main", "main")):
    model = AutoModelForCausalLM.from_pretrained("org/localist-gpt2-linear", revision=revision, trust_remote_code=True)
    assert name == "main" or revision in type(model).__module__, type(model)  # the code is the commit's too
    with torch.no_grad():
        torch.save(model(tokens).logits, name + ".pt")
"""
    stranger(hub, tmp_path / "home", code)
    assert torch.equal(torch.load(tmp_path / "home" / "pinned.pt"), before)
    assert torch.equal(torch.load(tmp_path / "home" / "main.pt"), local_logits(runs / "linear"))
    assert not torch.equal(before, local_logits(runs / "linear"))


PUSH = """
import sys
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.hub import export_gpt2
from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments

base, folder = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
ids = tokenizer("Sentence number 12 says something more of the words. " * 20)["input_ids"]
sequences = Dataset.from_dict({"input_ids": [ids[start : start + 40] for start in range(0, 160, 40)]})

def trainer(name, model, **settings):
    args = LocalistTrainingArguments(
        output_dir=f"{folder}/{name}", max_steps=1, save_steps=1, report_to="none", use_cpu=True, **settings
    )
    return LocalistTrainer(
        model=model, args=args, train_dataset=sequences, eval_dataset=sequences, processing_class=tokenizer
    )

# A script that asks for it by argument, and one that calls the method.
model = LocalistGPT2LMHeadModel.from_pretrained(base, locality_schedule="cubic")
pushed = trainer("cubic", model, push_to_hub=True, hub_model_id="org/pushed", hub_private_repo=True)
pushed.train()
pushed.save_model()

adapted = get_peft_model(LocalistGPT2LMHeadModel.from_pretrained(base, locality_schedule="cubic"), LoraConfig(
    r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", init_lora_weights=False
))
adapter = trainer("adapter", adapted, hub_model_id="org/pushed-adapter")
adapter.train()
export_gpt2(base, f"{folder}/plain")
HfApi().create_repo("org/plain")
HfApi().upload_folder(repo_id="org/plain", folder_path=f"{folder}/plain")
adapter.push_to_hub(finetuned_from="org/plain", dataset="sentences", language="en", license="mit")

pushed.model.push_to_hub("org/from-model")
LocalistGPT2LMHeadModel.from_pretrained(f"{folder}/cubic").push_to_hub("alice/localist-gpt2-cubic")
"""


@pytest.mark.slow
def test_trainer_and_model_push_complete_repositories(
    hub: HubServer, published: str, runs: Path, tmp_path: Path
) -> None:
    done = run(hub, tmp_path, PUSH, str(runs / "base"), str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    expected = set(hub.repo("org/localist-gpt2-cubic").files())
    pushed = hub.repo("org/pushed").files()
    assert set(pushed) == expected
    assert hub.repo("org/pushed").private
    assert len(hub.repo("org/pushed").commits) == 2
    for name in ("org/from-model", "alice/localist-gpt2-cubic"):
        files = hub.repo(name).files()
        assert set(files) == expected
        assert f'repo_id = "{name}"'.encode() in files["README.md"]
        assert b"org/pushed" not in files["README.md"]
        for path in expected - {"README.md"}:
            assert files[path] == pushed[path], path
    adapter = hub.repo("org/pushed-adapter").files()
    assert set(adapter) == set(hub.repo("org/localist-gpt2-quintic-lora").files())
    assert b"license: mit" in adapter["README.md"]

    loaded = """
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("org/pushed", trust_remote_code=True)
with torch.no_grad():
    loaded = {"model": model(tokens).logits}
    # An adapter on plain GPT-2, whose repository holds no code, and one on a model of the family.
    for name, repo_id, base_id in (
        ("pushed", "org/pushed-adapter", "org/plain"),
        ("published", "org/localist-gpt2-quintic-lora", "org/localist-gpt2-base"),
    ):
        adapter = AutoPeftModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True)
        config = AutoConfig.from_pretrained(repo_id, trust_remote_code=True)
        base = AutoModelForCausalLM.from_pretrained(base_id, config=config, trust_remote_code=True)
        local = PeftModel.from_pretrained(base, repo_id)
        outputs = local(tokens, output_fidelity=True)
        dialled = local(tokens, locality_dial=1.0).logits
        loaded[name] = [config.locality_schedule, adapter(tokens).logits, outputs.logits, outputs.fidelity[-1], dialled]
torch.save(loaded, "loaded.pt")
"""
    stranger(hub, tmp_path / "home", loaded)
    loaded = torch.load(tmp_path / "home" / "loaded.pt")
    assert torch.equal(loaded["model"], local_logits(tmp_path / "runs" / "cubic"))
    for name, folder, variant in (
        ("pushed", tmp_path / "runs" / "adapter", "cubic"),
        ("published", runs / "quintic-lora", "quintic"),
    ):
        schedule, in_one_line, logits, fidelity, dialled = loaded[name]
        base = LocalistGPT2LMHeadModel.from_pretrained(runs / "base", locality_schedule=variant)
        with torch.no_grad():
            adapted = PeftModel.from_pretrained(base, folder)
            outputs = adapted(TOKENS, output_fidelity=True)
            assert torch.equal(dialled, adapted(TOKENS, locality_dial=1.0).logits)
        assert not torch.allclose(dialled, outputs.logits)  # the dial that the card's code gives does something
        assert schedule == variant
        assert torch.equal(in_one_line, outputs.logits)
        assert torch.equal(logits, outputs.logits)
        assert torch.equal(fidelity, outputs.fidelity[-1])


def test_a_dry_run_shows_everything_without_a_network(hub: HubServer, runs: Path, capsys) -> None:
    requests = len(hub.requests)
    main(["publish", str(runs / "cubic"), "--namespace", "me", "--dry-run"])
    printed = capsys.readouterr().out
    size = (runs / "cubic" / "model.safetensors").stat().st_size
    assert f"  {size:>12,}  model.safetensors" in printed
    assert "/me/localist-gpt2-cubic" in printed
    assert f"| {RunRecord.load(runs / 'cubic').metrics['perplexity']:.2f} |" in printed
    assert "nothing was uploaded" in printed
    assert "could not be asked" in printed  # without a network it says so, and shows the rest
    assert len(hub.requests) == requests


@pytest.mark.usefixtures("environment")
def test_the_command_ends_with_a_message_not_a_traceback(runs: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["publish", str(runs / "quintic"), "--namespace", "nobody"])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.strip().startswith("localist-hf publish: error: `namespace` is 'nobody'")
    assert "Traceback" not in said
