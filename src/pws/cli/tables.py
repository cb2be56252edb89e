"""`pws bench tables`: fill the documents' tables from the result files."""

from __future__ import annotations

from pathlib import Path

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
    filled = {Path(name): fill_tables(Path(name).read_text(), Path(parsed.results)) for name in parsed.documents}
    for path, text in filled.items():
        changed = text != path.read_text()
        if changed:
            path.write_text(text)
        print(f"{path}: {'filled' if changed else 'up to date'}")
    return 0
