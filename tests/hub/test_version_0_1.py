"""
A repository that version 0.1 published still loads: by its own code, which `localist-hf update` mends for transformers
5.24, and by ours where both mean the same.
"""

import inspect
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from python_process import run_python
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GPT2Model

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.hub.model_code import renewed_code


FOLDER = Path(__file__).with_name("version_0_1")
REPOSITORY = FOLDER / "repository"
EXPECTED = load_file(FOLDER / "expected.safetensors")
REFUSAL = r"saved by localist-hf 0\.1, whose semantic blocks were found by another rule"

# What a process that loads the repository starts with.
COMPARE = f"""
import shutil
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

torch.set_num_threads(1)
repository, saved = sys.argv[1:]
expected = load_file({str(FOLDER / "expected.safetensors")!r})
tokens = expected["input_ids"]
greedy = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=1, eos_token_id=[])

@torch.no_grad()
def compare(model):
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    outputs = model(tokens, output_fidelity=True, output_entropy=True)
    torch.testing.assert_close(outputs.logits, expected["logits"])
    for name in ("fidelity", "fidelity_mask", "block_starts", "entropy"):
        torch.testing.assert_close(torch.stack(outputs[name]), expected["semantic." + name])
    dialled = model(tokens, locality_dial=1.0).logits[:, -1]
    torch.testing.assert_close(dialled, expected["semantic.dialled_logits"])
    generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy)
    assert torch.equal(generated, expected["generated"]), generated
    # Step by step from the cache, the blocks go on as they were.
    last = model(tokens[:, -1:], past_key_values=model(tokens[:, :-1], locality_dial=1.0).past_key_values,
                 locality_dial=1.0).logits[:, -1]
    torch.testing.assert_close(last, expected["semantic.dialled_logits"])
"""


@pytest.fixture(params=["as it was", "mended"])
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "as it was":
        if "past_key_values" not in inspect.signature(GPT2Model.forward).parameters:
            pytest.skip("its code is wrong with transformers 5.24 and newer")
        return REPOSITORY
    repository = shutil.copytree(REPOSITORY, tmp_path / "mended")
    code = {path.name: path.read_bytes() for path in repository.glob("*.py")}
    mended, _ = renewed_code(json.loads((repository / "config.json").read_text()), code)
    for name, content in mended.items():
        (repository / name).write_bytes(content)
    return repository


def run(folder: Path, repository: Path, code: str) -> None:
    """Runs code after `COMPARE` in a fresh process, with an empty cache."""
    env = os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    done = run_python(COMPARE + code, str(repository), str(folder / "saved"), env=env, cwd=folder)
    assert done.returncode == 0, done.stderr


def test_strangers_load_it_and_what_they_save_of_it_and_then_import_ours(repository: Path, tmp_path: Path) -> None:
    """Whichever was loaded last: what one registers does not change what the other does."""
    run(
        tmp_path,
        repository,
        """
sys.modules["localist_hf"] = None  # it may be installed where the tests run
for folder in (repository, saved):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    compare(model)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(tokens).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), expected["logits"])
    model.save_pretrained(saved)

del sys.modules["localist_hf"]
theirs = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from localist_hf import LocalistGPT2Config, LocalistGPT2LMHeadModel

compare(theirs)

def measure(model):
    with torch.no_grad():
        outputs = model(tokens, output_fidelity=True, locality_dial=0.5)
    return [outputs.logits, *outputs.fidelity, *outputs.outside_share]

config = LocalistGPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, bos_token_id=1, eos_token_id=1,
                            min_block_length=2, initializer_range=0.5)
ours = LocalistGPT2LMHeadModel(config).eval()
before = measure(ours)
# The way to it where localist_hf is imported, whose class AutoModelForCausalLM prefers. Of another folder, so that it
# registers after ours.
copy = shutil.copytree(repository, "copy")
again = get_class_from_dynamic_module("modeling_localist_gpt2.LocalistGPT2LMHeadModel", copy)
assert all(map(torch.equal, measure(ours), before))
compare(again.from_pretrained(copy))
assert again is not type(theirs)
compare(theirs)
""",
    )


@pytest.mark.parametrize("trust_remote_code", [True, False])
def test_where_localist_hf_is_imported_semantic_blocks_of_0_1_are_refused(trust_remote_code: bool) -> None:
    # A class registered by hand is preferred to a repository's code, so that the sentence is all that can be given.
    for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=REFUSAL):
            load(REPOSITORY, trust_remote_code=trust_remote_code)
    with pytest.raises(ValueError, match=REFUSAL):
        LocalistGPT2LMHeadModel.from_pretrained(REPOSITORY)


def test_the_rule_of_this_version_can_be_asked_for(tmp_path: Path) -> None:
    model = LocalistGPT2LMHeadModel.from_pretrained(REPOSITORY, semantic_threshold=1.25)
    with torch.no_grad():
        outputs = model(EXPECTED["input_ids"], output_fidelity=True)
    torch.testing.assert_close(outputs.logits, EXPECTED["logits"])
    assert not torch.equal(torch.stack(outputs.block_starts), EXPECTED["semantic.block_starts"])
    model.save_pretrained(tmp_path)
    assert LocalistGPT2LMHeadModel.from_pretrained(tmp_path).config.semantic_threshold == 1.25  # it is ours from now on


@pytest.mark.parametrize("partition", ["delimiter", "window"])
@pytest.mark.parametrize("auto", [False, True])
def test_our_class_measures_other_blocks_of_0_1_as_it_did(partition: str, auto: bool, tmp_path: Path) -> None:
    folder = shutil.copytree(REPOSITORY, tmp_path / "repository")
    config = json.loads((folder / "config.json").read_text())  # no other field of it depends on the partition
    (folder / "config.json").write_text(json.dumps(config | {"block_partition": partition}))
    if auto:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    else:
        model = LocalistGPT2LMHeadModel.from_pretrained(folder)
    assert type(model) is LocalistGPT2LMHeadModel
    tokens = EXPECTED["input_ids"]
    with torch.no_grad():
        outputs = model(tokens, output_fidelity=True, output_entropy=True)
        dialled = model(tokens, locality_dial=1.0).logits[:, -1]
    torch.testing.assert_close(outputs.logits, EXPECTED["logits"])
    for name in ("fidelity", "fidelity_mask", "block_starts", "entropy"):
        torch.testing.assert_close(torch.stack(outputs[name]), EXPECTED[f"{partition}.{name}"])
    torch.testing.assert_close(dialled, EXPECTED[f"{partition}.dialled_logits"])
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=1, eos_token_id=[])
    generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy)
    assert torch.equal(generated, EXPECTED["generated"])
