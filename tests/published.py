"""What a Hub of the tests holds of published runs, and runs that are changed before they are published again."""

import json
from pathlib import Path

from hub_server import HubServer
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from localist_hf import modeling
from localist_hf.hub.weights import weight_hashes


TOKEN = "hf_test_token"
SHARED_CODE = {path.name for path in Path(modeling.__file__).parent.glob("*.py")} - {
    "__init__.py", "modeling_localist.py", "configuration_localist_gpt2.py", "modeling_localist_gpt2.py"
}  # fmt: skip
CODE = SHARED_CODE | {"configuration_localist_gpt2.py", "modeling_localist_gpt2.py"}
TEXTS = {
    "README.md", "config.json", "shares_over_depth.png", "run.json", "tokenizer.json", "tokenizer_config.json"
}  # fmt: skip
MODEL = CODE | TEXTS | {"generation_config.json", "model.safetensors"}
ADAPTER = CODE | TEXTS | {"adapter_config.json", "adapter_model.safetensors"}


def files_of(hub: HubServer, name: str, revision: str = "main") -> dict[str, bytes]:
    files = hub.repo(f"org/localist-gpt2-{name}").files(revision)
    return {path: content for path, content in files.items() if path != ".gitattributes"}


def titles(hub: HubServer, name: str) -> list[str]:
    return [commit.title for commit in hub.repo(f"org/localist-gpt2-{name}").commits]


def repositories(hub: HubServer) -> set[str]:
    return {model.id for model in HfApi(endpoint=hub.endpoint, token=TOKEN).list_models(author="org")}


def change_weights(folder: Path) -> None:
    """Other weights, and a record that was measured on them."""
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((folder / "run.json").read_text())
    record["weights"] = weight_hashes(folder)
    record["metrics"]["perplexity"] = 123.45
    (folder / "run.json").write_text(json.dumps(record))


def change_record(folder: Path, **changes: object) -> None:
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | changes))
