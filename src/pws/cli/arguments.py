"""Parsers of the commands, whose errors are ours."""

from __future__ import annotations

from argparse import ArgumentError
from typing import Any

from jsonargparse import ArgumentParser

from pws.errors import PwsError
from pws.training.typed import parser_says


def command_parser(command: str, description: str, example: str) -> ArgumentParser:
    """A parser whose help ends with an example."""
    return ArgumentParser(
        prog=f"pws {command}", description=description, epilog=f"Example: {example}", exit_on_error=False
    )


def check_sizes(parsed: Any) -> None:
    """Raise `PwsError` unless --batch-size and --image-size, where given, are at least 1."""
    for flag, value in (("--batch-size", parsed.batch_size), ("--image-size", parsed.image_size)):
        if value is not None and value < 1:
            raise PwsError(f"{flag} must be at least 1; got {value}.")


def parse(parser: ArgumentParser, arguments: list[str]) -> Any:
    """What was given; raises `PwsError` where that is wrong."""
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        raise PwsError(f"{parser_says(error)} (`{parser.prog} --help` tells the options)") from error
