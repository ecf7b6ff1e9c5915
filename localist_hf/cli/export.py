"""`localist-hf export`: write a model for engines that know only GPT-2."""

from ..command_line import export_parser
from ..errors import INPUT_ERRORS, InputError, RunError, reraised_as
from ..hub.export import export_gpt2


def main(arguments: list[str]) -> None:
    """Runs `localist-hf export` with these arguments."""
    args = export_parser().parse_args(arguments)
    with reraised_as(InputError, *INPUT_ERRORS), reraised_as(RunError, RuntimeError):
        export_gpt2(args.source, args.folder)
    print(
        f"{args.source} written to {args.folder} as plain GPT-2: without code or dial, in neither of our two formats."
    )
    print("Load it, and its tokenizer, with nothing trusted:")
    print(f"transformers.AutoModelForCausalLM.from_pretrained({args.folder!r})")
