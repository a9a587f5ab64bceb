"""A checkpoint folder goes to the Hub, verified first, in one commit."""

import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..results import write_json
from . import files, verification
from .card import CardOptions, build_card, inherited_options
from .code import SIBLINGS, describe
from .files import VerificationError
from .records import Sources, read_sources


logger = logging.getLogger(__name__)

# Everything else stays at home: optimiser states, pickled arguments, logs, checkpoints of the run.
PUBLISHED = re.compile(
    rf"config\.json|generation_config\.json|({'|'.join(sorted(SIBLINGS))})\.py"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|\w+\.model|chat_template\.jinja"
    r"|(evaluation|conversion|calibration)\.json|[\w-]+\.png"
    r"|report/(results\.json|report\.(md|html)|[\w-]+\.png)"
)
# A pickle of these names is state of the Trainer, not weights: left out rather than refused.
TRAINER_STATE = re.compile(r"training_args\.bin|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state.*\.pth")
# What an earlier version of the repository may hold and this one replaces.
REPLACED = re.compile(r"[^/]+\.(safetensors|safetensors\.index\.json|bin|pt|pth|py)")
# Keys that say where the tokenizer was, or that only transformers 5 understands.
TOKENIZER_NOISE = ("backend", "is_local", "local_files_only", "name_or_path")

_CLIENT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    OSError,
    *(importlib.import_module(name).HTTPError for name in ("httpx", "httpx2") if importlib.util.find_spec(name)),
)
_REMEDIES = {
    401: "Log in with `hf auth login`, or set HF_TOKEN to a valid token with write access.",
    403: "The token may not write there: use one with write access to this account or organisation.",
    404: "No such account, repository or revision, or the token may not see it: check the spelling of REPO_ID.",
    409: "Someone else changed the repository at the same moment: look at it, then run the command again.",
    412: "Someone else changed the repository at the same moment: look at it, then run the command again.",
    429: "Too many requests: wait some minutes, then run the command again.",
}


class PublishError(RuntimeError):
    """The Hub did not take the checkpoint; the message says what is there now and what to do."""


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    dry_run: str | os.PathLike | None = None,
    card: CardOptions | None = None,
    model=None,
    commit_message: str = "Publish a FAS checkpoint",
    api: HfApi | None = None,
    allow_changed_code: bool = False,
) -> str:
    """Stage, verify and upload a checkpoint folder; nothing leaves this machine before all checks have passed.

    The upload is one commit, which the Hub takes whole or not at all; a second one adds to the card which commit to
    pin.

    Args:
        folder: As written by `save_pretrained`, with tokenizer and results files.
        repo_id: `user/name` or `organisation/name`; made if it does not exist.
        private: Whether a repository made now is private; the account's default if not given.
        revision: Branch to commit to, made if it does not exist.
        dry_run: Write the exact folder to be uploaded here instead of uploading it.
        card: What no results file knows: license, language, base model.
        model: The model in memory that the folder was saved from; verified against it if given.
        commit_message: Of the commit.
        api: Client to use; that of the environment by default.
        allow_changed_code: Publish code files that are no release's: the difference is logged and stands in the card.

    Returns:
        The address of the commit, or the path of the dry run.

    Raises:
        VerificationError: if the folder must not be published as it is.
        PublishError: if the Hub refused or could not be reached.
    """
    folder, revision = Path(folder), revision or "main"
    check_arguments(folder, repo_id, None if dry_run is None else Path(dry_run))
    api = api or HfApi()
    if dry_run is None and not (api.token or get_token()):
        raise PublishError(f"There is no access token. {_REMEDIES[401]} Nothing was uploaded.")
    with _scratch(dry_run) as scratch:
        staged = scratch / folder.resolve().name
        stage(folder, staged)
        sources, card = read_sources(folder), inherited_options(folder, card or CardOptions())
        if card.license is None:
            logger.warning("The card names no license: give --license with the license of the weights.")
        verified = verification.verify(staged, model, folder, allow_changed_code)
        for record in sources.records:
            record.check(verified.fingerprint, folder)
        sources.forget_paths()
        for record in sources.records:
            write_json(staged / record.file, record.content)
        sources.code = describe(verified.difference)
        build_card(sources, repo_id, card).save(staged / "README.md")
        files.check_file(staged / "README.md", "README.md")
        if dry_run is not None:
            if Path(dry_run).is_dir():
                Path(dry_run).rmdir()
            os.replace(staged, dry_run)
            return str(dry_run)
        return upload(sources, staged, repo_id, private, revision, card, commit_message, api)


def check_arguments(folder: Path, repo_id: str, dry_run: Path | None) -> None:
    if not folder.is_dir():
        raise VerificationError(f"`folder` must be a checkpoint folder, got {str(folder)!r}, which is none.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise VerificationError(f"`repo_id` must be a name on the Hub, got {repo_id!r}: {error}") from error
    if repo_id.count("/") != 1:
        raise VerificationError(f"`repo_id` must be of the form user/name, got {repo_id!r}.")
    if dry_run is not None and dry_run.exists() and not (dry_run.is_dir() and not any(dry_run.iterdir())):
        raise VerificationError(f"`dry_run` must be a new or empty folder, got {str(dry_run)!r}. Choose another.")


@contextmanager
def _scratch(target: str | os.PathLike | None) -> Iterator[Path]:
    """A temporary folder, on the file system of `target` if there is one, gone afterwards whatever happens."""
    parent = None if target is None else Path(target).absolute().parent
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fas-publish-", dir=parent) as scratch:
        yield Path(scratch)


def stage(folder: Path, target: Path) -> None:
    """Copy and check what is to be published, nothing else, with a tokenizer that older transformers can read."""
    target.mkdir(parents=True)
    for path in sorted([*folder.iterdir(), *folder.glob("report/*")]):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise VerificationError(f"`{name}` must be a file of its own, got a link to {os.readlink(path)!r}.")
        if path.is_dir() or path.name.startswith("."):
            continue
        if PUBLISHED.fullmatch(name):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)
        elif not TRAINER_STATE.fullmatch(path.name):
            files.refuse_pickle(path)
    files.check_files(target)
    settings_file = target / "tokenizer_config.json"
    if settings_file.exists():
        settings = portable_tokenizer_settings(files.read_json(settings_file))
        settings_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def portable_tokenizer_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a tokenizer under names that transformers 4 knows too, without traces of this machine."""
    settings = {key: value for key, value in settings.items() if key not in TOKENIZER_NOISE}
    name = settings.get("tokenizer_class", "")
    if name in ("TokenizersBackend", "PythonBackend", ""):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        extra = settings.pop("extra_special_tokens")
        settings["additional_special_tokens"] = settings.get("additional_special_tokens", []) + extra
    return settings


def upload(
    sources: Sources,
    staged: Path,
    repo_id: str,
    private: bool | None,
    revision: str,
    card: CardOptions,
    commit_message: str,
    api: HfApi,
) -> str:
    """Upload a verified folder in one commit, then say in its card which commit to pin; returns the commit's address.

    `upload_folder` would be shorter, but may split a folder into several commits.
    """
    done = lost = "Nothing was uploaded."
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = lost = f"No file of {repo_id} was changed."
        if revision != "main":
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        paths = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
        additions = [CommitOperationAdd(name, str(path)) for name, path in paths.items()]
        old = api.list_repo_files(repo_id, revision=revision)
        deletions = [CommitOperationDelete(name) for name in old if REPLACED.fullmatch(name) and name not in paths]
        lost = f"{repo_id} holds all of the checkpoint or nothing of it: look at {api.endpoint}/{repo_id}."
        commit = api.create_commit(repo_id, [*additions, *deletions], commit_message=commit_message, revision=revision)
        done = lost = f"The checkpoint is complete at {commit.commit_url}; only its card does not name this commit."
        build_card(sources, repo_id, card, pinned=commit.oid).save(staged / "README.md")
        readme = CommitOperationAdd("README.md", str(staged / "README.md"))
        api.create_commit(repo_id, [readme], commit_message="Name the commit to pin", revision=revision)
    except _CLIENT_ERRORS as error:
        raise PublishError(_explain(error, api.endpoint, done, lost)) from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"{lost} Run the command again to go on.") from error
    return commit.commit_url


def _explain(error: Exception, endpoint: str, done: str, lost: str) -> str:
    """What went wrong, what is on the Hub now, and what to do.

    Args:
        error: As the client raised it; a failed upload of one file comes wrapped in a RuntimeError.
        endpoint: Address of the Hub.
        done: What is there if the Hub refused the last request.
        lost: What is there if its answer to that request was lost.
    """
    cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error
    if not isinstance(cause, HfHubHTTPError):
        what = f"{type(cause).__name__}: {cause}"
        return f"The connection to {endpoint} failed ({what}). {lost} Check the network, then run the command again."
    status = cause.response.status_code if cause.response is not None else 0
    remedy = _REMEDIES.get(status, "The fault is the server's: wait some minutes, then run the command again.")
    reason = cause.server_message or str(cause).strip().splitlines()[0]
    return f"The Hub answered {status} ({reason}). {done} {remedy}"


class PublishMixin:
    """Makes a Trainer publish as this module does: `class MyTrainer(PublishMixin, Trainer)`.

    A stock Trainer uploads its whole output folder, pickled arguments included, whenever it saves.
    """

    args: Any
    accelerator: Any
    model: Any
    save_model: Any
    is_world_process_zero: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.push_to_hub:
            self.args.hub_strategy = type(self.args.hub_strategy)("end")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        card: CardOptions | None = None,
        **kwargs,
    ) -> str | None:
        """Save the model and publish the output folder; returns the address of the commit (on the main process)."""
        args = self.args
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        api = HfApi(token=token or args.hub_token)
        repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        return publish(
            args.output_dir,
            repo_id,
            private=args.hub_private_repo if private is None else private,
            revision=revision or args.hub_revision,
            card=card,
            model=self.accelerator.unwrap_model(self.model),
            commit_message=commit_message or "End of training",
            api=api,
        )
