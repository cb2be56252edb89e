"""The command `pws`: one file a command. Exit codes: 0 done, 2 bad input, 3 non-finite loss, 130 interrupted."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Final

from pws._error_messages import frames_of_others
from pws._errors import PwsError, UnknownNameError
from pws.cli.exit_code import exit_code_of

COMMANDS: Final = {
    "demo": "see networks collapse at a large learning rate, and train there with PWS and BatchNorm; takes a minute",
    "train": "train a recipe: pws train fashion-mnist-allconv-pws --optim.lr 0.5",
    "federate": "train a recipe on clients that keep their images: pws federate RECIPE --federated.clients 10",
    "diagnose": "explain layer by layer why a network collapses: pws diagnose runs/NAME --out report.html",
    "export": "write a run's network for other programs: pws export runs/NAME --format onnx",
    "convert": "remove BatchNorm from a model: pws convert --model timm:resnet18 --out converted",
    "bench": "measure a model's speed, or compare methods on your data: pws bench speed --model timm:resnet18",
    "evaluate": "measure a run on its test images: pws evaluate runs/NAME",
    "predict": "look at image files with a run's network: pws predict runs/NAME photo.jpg",
    "pack": "write images into shards that training streams: pws pack data/imagenet data/shards",
    "scenes": "draw detection data, with boxes and masks, without a download: pws scenes data/scenes",
}
GOES_ON: Final = {
    "pack": "; the same command goes on",
    "train": "; `pws train runs/NAME --resume` goes on",
    "federate": "; `pws federate runs/NAME --resume` goes on",
    "bench": "; `pws bench accuracy` goes on when the same command is given again",
}
USAGE: Final = "\n".join(
    [
        "usage: pws COMMAND [options]     (pws COMMAND --help lists a command's options)",
        "",
        "Parametric Weights Standardization: train convolutional networks without BatchNorm.",
        "",
        *(f"  {name:10}{line}" for name, line in COMMANDS.items()),
        "",
        "exit codes: 0 done, 2 bad input, 3 the loss went non-finite, 130 interrupted",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: _run(arguments), "pws", GOES_ON.get(arguments[0], "") if arguments else "")


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    command = arguments[0]
    if command == "--version":
        from importlib.metadata import version

        print(f"pws {version('pws-torch')}")
        return 0
    if command not in COMMANDS:
        raise UnknownNameError("command", command, COMMANDS)
    try:
        code: int = importlib.import_module(f"pws.cli.{command}").run(arguments[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pws") or frames_of_others(error):
            raise
        raise PwsError(f"pws {command} needs {error.name}: pip install 'pws-torch[train]'.") from error
    return code
