"""What the scripts that read results share: their command line, Markdown tables and files."""

import argparse
from pathlib import Path
from typing import NoReturn

from eval.result import EvalError


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is an EvalError, told in one sentence."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise EvalError(message)


def markdown_rows(rows: list[list[str]]) -> str:
    """A Markdown table of the first row as heading, its columns aligned for the terminal."""
    clean = [[" ".join(entry.split()).replace("|", r"\|") for entry in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*clean, strict=True)]
    lines = [[e.ljust(w) for e, w in zip(row, widths, strict=True)] for row in clean]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_files(out: Path, files: dict[str, str]) -> None:
    """Texts by file name into a folder that is made; EvalError where that cannot be done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (out / name).write_text(content, encoding="utf-8", errors="replace")
    except OSError as error:
        raise EvalError(f"cannot write to {out}: {error.strerror}; name another --out") from None
