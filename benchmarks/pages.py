"""Documents with generated parts: written from results files, or checked against them.

A part stands between `<!-- generated: NAME -->` and `<!-- end of NAME -->`; what has no name is a whole file.
"""

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Part:
    """A generated part of a document, or all of it.

    Args:
        path: The document, from the root of the project.
        name: In the marks, or None for a whole file.
        content: Text, or the bytes of a whole file.
    """

    path: str
    name: str | None
    content: str | bytes

    def within(self, page: str) -> str:
        """The page with this part renewed."""
        begin, end = f"<!-- generated: {self.name} -->", f"<!-- end of {self.name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"{self.path} must hold {begin} and {end} once each.")
        before, rest = page.split(begin)
        return f"{before}{begin}\n\n{self.content!s}\n\n{end}{rest.split(end)[1]}"


def update(parts: Iterable[Part], check: bool = False) -> list[str]:
    """Write the parts into their documents; with `check` write nothing. Returns the paths that were out of date."""
    before: dict[str, bytes] = {}
    after: dict[str, bytes] = {}
    for part in parts:
        path = ROOT / part.path
        before.setdefault(part.path, path.read_bytes() if path.is_file() else b"")
        if part.name is not None:
            page = after.get(part.path, before[part.path]).decode()
            after[part.path] = part.within(page).encode()
        else:
            after[part.path] = part.content if isinstance(part.content, bytes) else part.content.encode()
    outdated = [path for path in after if after[path] != before[path]]
    if not check:
        for path in outdated:
            (ROOT / path).write_bytes(after[path])
    return outdated


def command(parts: Callable[[], Iterable[Part]], argv: list[str] | None = None) -> int:
    """The command line of a generator: writes its parts, or with `--check` returns 1 if any is out of date."""
    parser = argparse.ArgumentParser(description="Write the generated parts of documents from results files.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document is out of date")
    check = parser.parse_args(argv).check
    outdated = update(parts(), check)
    for path in outdated:
        sys.stdout.write(f"{path}: {'out of date, run make tables' if check else 'written'}\n")
    return int(check and bool(outdated))


def source(record: Mapping[str, Any], *settings: str) -> str:
    """When, at which commit, on what (rows may name their own) and with which settings a results file was made."""
    versions, hardware, rows = record["versions"], record["hardware"], record["metrics"]
    threads, last = hardware["threads"], hardware.get("accelerator", hardware["processor"])
    own = [row.get("processor", last) for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    ran_on = [" and ".join(dict.fromkeys(own)) or last, f"{threads} thread{'s' * (threads != 1)}", *settings]
    return (
        f"{record['date'][:10]}, commit {(record['commit'] or 'unknown')[:7]}; {', '.join(ran_on)}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}."
    )


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph in lines of the usual width; further ones begin with `indent`."""
    return textwrap.fill(text, 119, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
