"""Publish a checkpoint folder on the Hub, verified first, in one commit: `fas publish FOLDER REPO`."""

import argparse
import logging
from collections.abc import Sequence

from ..commands import command_parser
from .card import CardOptions
from .upload import PublishError, publish


logger = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    example = "fas publish outputs/sst2/calibrate user/name --license mit --dry-run"
    parser = command_parser("fas publish", (__doc__ or "").partition(":")[0], example)
    parser.add_argument("folder", help="checkpoint folder: model, tokenizer, results")
    parser.add_argument("repo_id", nargs="?", help="user/name or organisation/name on the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to commit to, made if it does not exist")
    parser.add_argument(
        "--dry-run",
        nargs="?",
        const="",
        metavar="DIR",
        help="write the exact folder to be uploaded to DIR (FOLDER-to-publish if not given), and stop",
    )
    parser.add_argument("--license", help="license of the weights; by default that of an existing card or base model")
    parser.add_argument("--language", nargs="+", help="languages as ISO codes; by default those of an existing card")
    parser.add_argument("--base-model", help="name of the base model on the Hub, where the record has a local path")
    parser.add_argument("--message", default="Publish a FAS checkpoint", help="commit message")
    parser.add_argument(
        "--allow-changed-code",
        action="store_true",
        help="publish code files that are no release's; the difference is shown and stands in the card",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags; `--dry-run FOLDER REPO` is a dry run of FOLDER, though argparse takes it for its DIR."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.repo_id is None and args.dry_run:
        args.folder, args.repo_id, args.dry_run = args.dry_run, args.folder, ""
    if args.repo_id is None:
        parser.error("`repo_id` is required: user/name or organisation/name on the Hub")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "httpx2", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    dry_run = args.folder.rstrip("/") + "-to-publish" if args.dry_run == "" else args.dry_run
    card = CardOptions(license=args.license, language=args.language, base_model=args.base_model)
    try:
        where = publish(
            args.folder,
            args.repo_id,
            private=args.private,
            revision=args.revision,
            dry_run=dry_run,
            card=card,
            commit_message=args.message,
            allow_changed_code=args.allow_changed_code,
        )
    except (ValueError, PublishError) as error:
        logger.error(f"Not published: {error}", exc_info=args.debug)
        return 1
    except (OSError, RuntimeError, MemoryError, LookupError, TypeError, AttributeError) as error:
        text = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error} (--debug shows where)"
        logger.error(
            f"Not published: {text}. Nothing was uploaded, and no half-written folder is left.", exc_info=args.debug
        )
        return 1
    except KeyboardInterrupt as error:
        logger.error(f"Interrupted. {str(error) or 'Nothing was uploaded.'}")
        return 130
    logger.info(f"{'Written to' if dry_run else 'Published:'} {where}")
    return 0
