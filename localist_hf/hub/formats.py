"""The formats in which models are saved, as commands tell of them; `docs/guides/formats.md` has the whole of it."""

from .run_record import RunRecord


def how_to_load(record: RunRecord) -> str:
    """Which of the formats a run is saved in, and how it is loaded, with trusted code and without."""
    if record.adapter:
        return (
            "Format: a LoRA adapter. Its base decides which code is asked for; README.md beside it has the lines that "
            "load it."
        )
    if record.is_native:
        return (
            f"Format: a localised native model. AutoModelForCausalLM and AutoTokenizer load plain "
            f"{record.architecture.removesuffix('ForCausalLM')} without a question; with trust_remote_code=True, or by "
            "localist_hf.localize(plain), it is the localist model."
        )
    return (
        "Format: the LocalistGPT2 family. AutoModelForCausalLM and AutoTokenizer both want trust_remote_code=True, or "
        "`import localist_hf` before; without any code of ours GPT2LMHeadModel loads the weights as plain GPT-2."
    )
