"""The command `fas`: everything that the modules of this package do, under one name."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib import metadata

from .commands import command_parser, run_command, show_messages


# Name: module, what a message of failure begins with (None: it has its own), and what it does. A module is imported
# when it is asked for.
COMMANDS: dict[str, tuple[str, str | None, str]] = {
    "convert": (
        "training.convert",
        "Not converted",
        "turn a stock model into a spiking one, with or without training",
    ),
    "train": (
        "training.train",
        "Not trained",
        "one stage of training, by the script that fits the model and the data",
    ),
    "calibrate": ("training.calibrate.command", "Not calibrated", "thresholds for T timesteps"),
    "evaluate": ("training.evaluate.command", "Not measured", "quality, spikes and energy of a checkpoint, by T"),
    "report": ("training.evaluate.report", None, "tables, plots and a page from results of evaluate"),
    "generate": ("training.generate", "Nothing generated", "continue a prompt with spikes"),
    "publish": ("training.publish.command", None, "verify a checkpoint, write its card, upload it"),
    "demo": ("training.demo", "Not shown", "the whole job on real data, in minutes (demo llm: a small Llama)"),
}
DEMO_LLM = ("training.demo_llm", "Not shown", "a small Llama that speaks in spikes")
EXAMPLE = """
example:
  fas convert openai-community/gpt2 --sites all --code phase --T 5 --calibration_file notes.txt --output_dir spiking
  fas generate spiking "The sea"

`fas COMMAND --help` says more of each. --debug, with any of them, shows the traceback of an error.
"""
SHELLS = ("bash", "zsh", "tcsh")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 1 for a failure, 2 for bad arguments, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(given[:1])
    if args.command is None:
        make_parser().print_help()
        return 2
    if args.command == "completion":
        return completion(given[1:])
    module, failed, _ = COMMANDS[args.command]
    rest = given[1:]
    if args.command == "demo" and rest[:1] == ["llm"]:
        (module, failed, _), rest = DEMO_LLM, rest[1:]
    show_messages()
    command = importlib.import_module(module).main
    if failed is None:
        status = command(rest)
        return status if isinstance(status, int) else 0
    return run_command(command, failed, rest)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the first word, whose help is one screen."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width + 2}}{what}" for name, (_, _, what) in COMMANDS.items()]
    lines.append(f"  {'completion':{width + 2}}print a script that completes commands and flags in bash or zsh")
    parser = argparse.ArgumentParser(
        prog="fas",
        usage="fas COMMAND …",
        description="Spiking language models on transformers.\n\ncommands:\n" + "\n".join(lines),
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [*COMMANDS, "completion"]
    parser.add_argument("command", metavar="COMMAND", nargs="?", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"fas-snn {_version()}")
    return parser


def completion(argv: Sequence[str]) -> int:
    """Print what a shell reads to complete the command: all flags of all of its commands."""
    example = "fas completion bash > ~/.local/share/bash-completion/completions/fas\n"
    example += '  fas completion zsh > "${fpath[1]}/_fas"'
    parser = command_parser("fas completion", "Print a script that completes commands and flags.", example)
    parser.add_argument("shell", choices=SHELLS, help="yours")
    shell = parser.parse_args(argv).shell
    import shtab

    sys.stdout.write(shtab.complete(_whole_parser(), shell=shell) + "\n")
    return 0


def _whole_parser() -> argparse.ArgumentParser:
    """One parser with the flags of every command, for completion alone."""
    import shtab

    whole = argparse.ArgumentParser(prog="fas", description="Spiking language models on transformers.")
    commands = whole.add_subparsers()
    for name, (module, _, what) in COMMANDS.items():
        flags = importlib.import_module(module).make_parser()
        for action in flags._actions:
            if action.dest.endswith("_file") or action.dest in ("results", "prompt_file"):
                action.complete = shtab.FILE
            elif action.dest.endswith(("_dir", "folder", "checkpoint", "model")) or action.dest.startswith("model_"):
                action.complete = shtab.DIRECTORY
        commands.add_parser(name, parents=[flags], add_help=False, conflict_handler="resolve", help=what)
    commands.add_parser("completion", help="print this").add_argument("shell", choices=SHELLS)
    return whole


def _version() -> str:
    try:
        return metadata.version("fas-snn")
    except metadata.PackageNotFoundError:
        return "of a clone"


if __name__ == "__main__":
    sys.exit(main())
