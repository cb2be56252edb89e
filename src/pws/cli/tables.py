"""`pws bench tables`: fill the documents' tables from the result files."""

from __future__ import annotations

from pathlib import Path

from pws._errors import PwsError, one_line
from pws._files import write_whole
from pws.bench.fill import fill_tables
from pws.cli.arguments import command_parser, parse


def run(arguments: list[str]) -> int:
    """Rewrite the documents whose tables differ, and say which."""
    parser = command_parser(
        "bench tables",
        "Fill the tables of documents, between <!-- table NAME: ROW; ROW --> and <!-- end -->, from the files of "
        "`pws bench accuracy` and `speed`; NAME is such as accuracy/collapse.",
        "pws bench tables README.md docs/*.md",
    )
    parser.add_argument("documents", type=str, nargs="+", help="Markdown files")
    parser.add_argument("--results", type=str, default="benchmarks", help="folder of NAME.json")
    parsed = parse(parser, arguments)
    texts = {Path(name): _text(Path(name)) for name in parsed.documents}
    filled = {path: fill_tables(text, Path(parsed.results)) for path, text in texts.items()}
    for path, text in filled.items():
        changed = text != texts[path]
        if changed:
            write_whole(path, text)
        print(f"{path}: {'filled' if changed else 'up to date'}")
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PwsError(f"{path} must be a text in UTF-8: {one_line(error)}.") from error
