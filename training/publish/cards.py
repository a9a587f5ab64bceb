"""Write the card of a checkpoint, and beside it, as JSON, the results files it is made from.

`python -m training.publish.cards FOLDER REPO_ID CARD.md` publishes nothing; `CARD.json` beside the card has the
files it was made from, whole. `python -m training.publish.cards CARD.json` makes the same card from that file alone.
"""

import argparse
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..results import read_results, write_json
from .card import CardOptions, build_card, inherited_options
from .files import REPORT, VerificationError, check_weights
from .records import Record, Sources, read_sources
from .verification import weights_sha256


def write_card(folder: Path, repo_id: str, options: CardOptions, path: Path) -> None:
    """Write the card of a checkpoint folder, and beside it, as JSON, the files it was made from.

    Raises:
        VerificationError: if the folder is no checkpoint, or holds results of other weights.
    """
    check_weights(folder)
    sources, options = read_sources(folder), inherited_options(folder, options)
    if any(record.rows for record in sources.records):
        weights = weights_sha256(folder)
        for record in sources.records:
            record.check(weights, folder)
    sources.forget_paths()
    content = {"repo_id": repo_id, "options": options, "sources": sources}
    write_json(path.with_suffix(".json"), content, indent=None)  # of a large model, in two fifths of the bytes
    build_card(sources, repo_id, options).save(path)


def card_beside(folder: Path, results: Mapping[str, Any], repo_id: str, options: CardOptions) -> ModelCard:
    """Write results as the report of a checkpoint folder, and its `README.md`; returns the card.

    Raises:
        VerificationError: if the folder is no checkpoint, or holds other weights than those that were measured.
    """
    check_weights(folder)
    record = Record(REPORT, dict(results))
    record.check(weights_sha256(folder), folder)
    write_json(folder / REPORT, results)
    card = build_card(read_sources(folder), repo_id, inherited_options(folder, options))
    card.save(folder / "README.md")
    return card


def rewrite_card(path: Path) -> None:
    """Write a card again from the JSON file beside it.

    Raises:
        VerificationError: for another file, or one whose results were edited.
    """
    content = read_results(path)
    if not {"sources", "repo_id", "options"} <= content.keys():
        raise VerificationError(
            f"`folder` must be a checkpoint, or the JSON file beside a card, got {str(path)!r} with "
            f"{', '.join(content) or 'nothing'}."
        )
    card = build_card(Sources.from_json(content["sources"]), content["repo_id"], CardOptions(**content["options"]))
    card.save(path.with_suffix(".md"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.publish.cards",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument(
        "folder", type=Path, help="checkpoint; or the JSON file beside a card, to write that card again"
    )
    parser.add_argument("repo_id", nargs="?", help="user/name or organisation/name on the Hub")
    parser.add_argument("card", type=Path, nargs="?", help="file to write, NAME.md; NAME.json goes beside it")
    parser.add_argument("--license", help="of the weights; by default that of an existing card or base model")
    parser.add_argument("--language", nargs="+", help="ISO codes; by default those of an existing card")
    parser.add_argument("--base-model", help="name of the base model on the Hub, where the record has a local path")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    again = args.folder.is_file() and args.repo_id is None
    if not again and (args.card is None or args.card.suffix != ".md"):
        parser.error(f"`card` must be a file NAME.md to write, got {args.card}.")
    try:
        if again:
            rewrite_card(args.folder)
        else:
            options = CardOptions(license=args.license, language=args.language, base_model=args.base_model)
            write_card(args.folder, args.repo_id, options, args.card)
    except (ValueError, OSError, TypeError) as error:
        if args.debug:
            traceback.print_exc()
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
