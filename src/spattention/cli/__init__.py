"""The command line: `spattention COMMAND`. One module per command, imported only when it is chosen.

A command module has a frozen dataclass `Options`, whose docstrings are its help, unless a function
`description()` says more, and `main(options)`.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "bench": "time the kernels beside dense attention and FlexAttention",
    "compare": "train one small model with dense and with banded attention, and compare",
    "draw": "draw which distances each head attends",
    "evaluate": "loss by position, recall, heads and tasks of a trained model",
    "fit": "fit bands to a pretrained dense model, and save it with them",
    "generate": "continue a text with a trained model",
    "prepare": "turn text into packed tokens to train on",
    "train": "pre-train or fine-tune a model by a recipe",
    "tune": "find the fastest launches of the kernels on this GPU",
}
# package -> the extra that installs it, whichever command misses it
EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "docstring_parser": "train",
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
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 2 for wrong options, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        from spattention import __version__

        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"there is no command {name!r}{_nearest(name)}; see `spattention --help`")
    try:
        import tyro

        module = import_module(f"spattention.cli.{name}")
        described = module.description() if hasattr(module, "description") else None
        options = tyro.cli(
            module.Options, prog=f"spattention {name}", description=described, args=rest
        )
        module.main(options)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        return _fail(
            f"`spattention {name}` needs the package {package!r}, which is not installed: "
            f"pip install 'spattention[{EXTRAS[package]}]'"
        )
    except (ValueError, OSError) as error:  # OSError: a folder that cannot be made, a full disk
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def overview() -> str:
    """The text of `spattention --help`."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: spattention COMMAND [OPTIONS]",
        "",
        "Sparse Patterned Attention: every head of a causal transformer attends its own band of "
        "distances.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()),
        "",
        "`spattention COMMAND --help` explains a command. To begin: `spattention compare`.",
    ]
    return "\n".join(lines)


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
