"""The command line: `spattention COMMAND`. One module per command, imported only when it is chosen.

A command module has a frozen dataclass `Options`, whose docstrings are its help, unless a function
`description()` says more, and `main(options)`. The options are in `cli.options`, which imports
nothing heavy, so that `--help` and a slip in the options take no time; nor do names of files and
fields that do not exist, where a function `check(options)` looks for them. A user's error is a
ValueError or an OSError, whose message becomes the one line that is shown. Any other exception is a
bug.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from ..files import check_place, did_you_mean

COMMANDS = {
    "bench": "time the kernels beside dense attention and FlexAttention",
    "compare": "train one small model with dense and with banded attention, and compare",
    "draw": "draw which distances each head attends",
    "evaluate": "loss by position, recall, heads and tasks of a trained model",
    "fit": "fit bands to a pretrained dense model, and save it with them",
    "generate": "continue a text with a trained model",
    "prepare": "turn text into tokens to train on",
    "train": "pre-train or fine-tune a model by a recipe",
    "tune": "find the fastest launches of the kernels on this GPU",
}
TRACEBACK = "--traceback"
LONGEST = 500  # characters of an unexpected exception's message
# package -> the extra that installs it, whichever command misses it
EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "docstring_parser": "train",
    "filelock": "train",
    "liger_kernel": "gpu",
    "lm_eval": "eval",
    "matplotlib": "train",
    "rich": "train",
    "safetensors": "train",
    "tensorboard": "train",
    "tokenizers": "train",
    "transformers": "train",
    "triton": "gpu",
    "tyro": "train",
    "zstandard": "train",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    It is 2 for a user's error, 1 for any other exception, 130 for Ctrl-C, and 141 where the reader
    of the output is gone. Before the command, `--traceback` raises exceptions instead of telling
    them in one line.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] == TRACEBACK:
        return _run(arguments[1:])
    try:
        return _run(arguments)
    except BrokenPipeError:  # whoever read the output has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell gives for SIGPIPE
    except (ValueError, OSError) as error:  # OSError: a folder that cannot be made, a full disk
        return _fail(" ".join(str(error).split()) or type(error).__name__)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit:  # tyro's, for --help and for options that it cannot read
        raise
    except BaseException as error:  # a panic in a library's Rust code is no `Exception`
        name = " ".join(arguments[:1])
        _fail(
            f"`spattention {name}` failed unexpectedly, with {type(error).__name__}: {_line(error)}"
            f"; `spattention {TRACEBACK} {name} ...` shows where it happened"
        )
        return 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        from spattention import __version__

        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(
            f"there is no command {name!r}{did_you_mean(name, COMMANDS)}; see `spattention --help`"
        )
    try:
        import tyro

        from .optional import OPTIONS

        described = import_module(f"spattention.cli.options.{name}")
        options = tyro.cli(
            described.Options,
            prog=f"spattention {name}",
            description=described.description() if hasattr(described, "description") else None,
            args=rest,
            registry=OPTIONS,
            config=(tyro.conf.PositionalMetavarFromFieldName,),  # as errors name them
        )
        output = getattr(options, "output", None)
        if output is not None:
            check_place("--output", output)
        if hasattr(described, "check"):
            described.check(options)
        import_module(f"spattention.cli.{name}").main(options)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        extra = EXTRAS[package]
        return _fail(
            f"`spattention {name}` needs the package {package!r}, which is not installed: "
            f"pip install 'spattention[{extra}]', or in a clone pip install -e '.[{extra}]'"
        )
    return 0


def overview() -> str:
    """The text of `spattention --help`."""
    width = max(map(len, COMMANDS))
    lines = [
        f"usage: spattention [{TRACEBACK}] COMMAND [OPTIONS]",
        "",
        "Sparse Patterned Attention: every head of a causal transformer attends its own band of "
        "distances.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()),
        "",
        "`spattention COMMAND --help` explains a command. To begin: `spattention compare`.",
        f"`{TRACEBACK}` shows where an error happened, instead of one line.",
    ]
    return "\n".join(lines)


def _line(error: BaseException) -> str:
    """An exception's message in one line; of a traceback in the message the last line."""
    text = str(error)
    if "Traceback (most recent call last)" in text:
        first, *_, last = filter(None, map(str.strip, text.splitlines()))
        text = f"{first} {last}"
    return " ".join(text.split())[:LONGEST]


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
