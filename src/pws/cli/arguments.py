"""Parsers of the commands, whose errors are ours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from pws._errors import PwsError
from pws.training.parsing import PARSER_ERRORS, parser_message
from pws.training.recipe import Recipe
from pws.training.recipe_file import find_recipe, parse_recipe
from pws.training.rules import PROCESSES


def command_parser(command: str, description: str, example: str, program: str = "pws") -> ArgumentParser:
    """A parser whose help ends with an example."""
    return ArgumentParser(
        prog=f"{program} {command}", description=description, epilog=f"Example: {example}", exit_on_error=False
    )


def check_jobs(jobs: int) -> None:
    """Raise `PwsError` unless that many processes can be started."""
    if not 1 <= jobs <= PROCESSES:
        raise PwsError(f"--jobs must be at least 1, and at most {PROCESSES} on this machine; got {jobs}.")


def check_folder(out: Path) -> None:
    """Raise `PwsError` unless files can be written to this folder, made or to be made: asked before the work."""
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise PwsError(f"--out must be a folder that can be written to; {nearest} is none. Name another one.")


def add_input_shape(parser: ArgumentParser) -> None:
    """Add the flag for models that take no square images."""
    parser.add_argument(
        "--input-shape",
        type=int,
        nargs="+",
        help="sizes of one random sample, in place of --image-size: '3 128' (a sequence), '3 16 112 112' (a clip), '20'",
    )


def add_force(parser: ArgumentParser) -> None:
    """Add the flag that lets a command replace files."""
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def check_free(*files: Path, force: bool) -> None:
    """Raise `PwsError` if one of the files to write is there already, unless `force`, or its folder can't be written to."""
    for path in files:
        check_folder(path.parent)
        if path.is_dir() or (path.is_file() and not force):  # a device or a pipe is written to
            raise PwsError(
                f"--out: {path} exists already, and nothing is overwritten without --force. Give that, or name another one."
            )


def check_failures(what: str, failures: Mapping[str, str], count: int) -> None:
    """Raise `PwsError` if some of the `count` cells or cases could not be done: the rest is stored by now."""
    if failures:
        first, reason = next(iter(failures.items()))
        raise PwsError(
            f"{len(failures)} of {count} {what} failed, the others are stored; {first}: {reason}. The same command tries "
            "them again."
        )


def check_counts(parsed: Any) -> None:
    """Raise `PwsError` unless --batch-size and --image-size, where they are given, are at least 1."""
    for flag, value in (("--batch-size", parsed.batch_size), ("--image-size", parsed.image_size)):
        if value is not None and value < 1:
            raise PwsError(f"{flag} must be at least 1; got {value}.")


def check_sizes(parsed: Any) -> None:
    """Raise `PwsError` unless the sizes that were given are at least 1, and not both of --image-size and --input-shape."""
    check_counts(parsed)
    shape = parsed.input_shape
    if shape is not None and (parsed.image_size is not None or not shape or min(shape) < 1):
        raise PwsError(
            f"--input-shape takes the sizes of one sample, each at least 1, without --image-size; got {shape}. A sequence of 3 "
            "channels: --input-shape 3 128."
        )


def parse(parser: ArgumentParser, arguments: list[str]) -> Any:
    """What was given; raises `PwsError` where that is wrong."""
    try:
        parsed = parser.parse_args(arguments)
    except PARSER_ERRORS as error:
        raise PwsError(f"{parser_message(error)} (`{parser.prog} --help` tells the options)") from error
    for key, value in vars(parsed).items():
        check_word(key, value)
    return parsed


def given_recipe(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Recipe, Any] | None:
    """The recipe that a command is given first, its settings over it, and all that was parsed; None where help was printed.

    Raises:
        PwsError: something else comes first, or the recipe or a setting is wrong.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return None
    if arguments[0].startswith("-"):
        raise PwsError(f"the recipe comes first: {parser.prog}; got {arguments[0]!r}.")
    check_word("RECIPE", arguments[0])
    return parse_recipe(parser, find_recipe(arguments[0]), arguments[1:])


def add_run(parser: ArgumentParser, resume: str) -> None:
    """Add the flags of a command that trains into a run's folder; `resume` says where it goes on."""
    parser.add_argument("--resume", action="store_true", help=resume)
    parser.add_argument("--runs", type=str, default="runs", help="folder in which the run's folder lies")


def given_run(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Recipe, Path, Any] | None:
    """The recipe, the run's folder, and all that was parsed (see `given_recipe`, `add_run`)."""
    given = given_recipe(parser, arguments)
    if given is None:
        return None
    recipe, parsed = given
    check_word("--runs", parsed.runs)
    named = Path(arguments[0])
    # A run's own folder is what --resume goes on in, wherever it lies.
    folder = named if parsed.resume and named.is_dir() else Path(parsed.runs) / recipe.name
    return recipe, folder, parsed


def check_word(key: str, value: Any) -> None:
    """Raise `PwsError` for a word that is empty, or that no path can be."""
    if value == "" or (isinstance(value, str) and "\0" in value):
        raise PwsError(f"{key.replace('_', '-')} must not be empty; got {value!r}. Is a variable of the shell not set?")
