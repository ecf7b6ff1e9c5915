"""`localist-hf export`: write a model for engines that know only GPT-2."""

from ..errors import INPUT_ERRORS
from ..hub.export import export_gpt2
from ..hub.loading import check_name
from .errors import CommandParser, as_command_error


def main(arguments: list[str]) -> None:
    """Runs `localist-hf export` with these arguments."""
    parser = CommandParser(
        prog="localist-hf export",
        description="Write a LocalistGPT2 model, or a LoRA adapter merged into its base, as a plain GPT-2 folder that "
        "needs no code of this project. It gives the logits that the model gives at dial 0; what was written is "
        "checked against the model before it gets its name.",
    )
    parser.add_argument("source", metavar="SOURCE", help="run folder of a model or of a LoRA adapter, or a Hub id")
    parser.add_argument("--to", required=True, choices=["gpt2"], help="what to write")
    parser.add_argument("folder", metavar="FOLDER", help="new or empty folder to write to")
    args = parser.parse_args(arguments)
    with as_command_error(2, *INPUT_ERRORS), as_command_error(1, RuntimeError):
        check_name(args.source, "source")
        export_gpt2(args.source, args.folder)
    print(f"{args.source} written to {args.folder} as plain GPT-2. Load it with")
    print(f"transformers.AutoModelForCausalLM.from_pretrained({args.folder!r})")
