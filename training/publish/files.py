"""What a checkpoint folder may hold: each file must be what its name says, and nothing in it secret or code."""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from detect_secrets.plugins.aws import AWSKeyDetector
from detect_secrets.plugins.azure_storage_key import AzureStorageKeyDetector
from detect_secrets.plugins.base import BasePlugin, RegexBasedDetector
from detect_secrets.plugins.basic_auth import BasicAuthDetector
from detect_secrets.plugins.discord import DiscordBotTokenDetector
from detect_secrets.plugins.github_token import GitHubTokenDetector
from detect_secrets.plugins.gitlab_token import GitLabTokenDetector
from detect_secrets.plugins.jwt import JwtTokenDetector
from detect_secrets.plugins.mailchimp import MailchimpDetector
from detect_secrets.plugins.npm import NpmDetector
from detect_secrets.plugins.openai import OpenAIDetector
from detect_secrets.plugins.private_key import PrivateKeyDetector
from detect_secrets.plugins.pypi_token import PypiTokenDetector
from detect_secrets.plugins.sendgrid import SendGridDetector
from detect_secrets.plugins.slack import SlackDetector
from detect_secrets.plugins.square_oauth import SquareOAuthDetector
from detect_secrets.plugins.stripe import StripeDetector
from huggingface_hub import get_token
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from sentencepiece import SentencePieceProcessor

from configuration_fas import BACKBONES

from ..results import plain
from ..shards import check_shards
from .clean_load import auto_class_name
from .code import CODE_FILES, SIBLINGS, VerificationError


# Where a report of `training.evaluate` belongs, inside the checkpoint folder.
REPORT = "report/results.json"
AUTO_CLASSES = {"AutoConfig"} | {name for table in BACKBONES.values() for name in table.models}
# Names of settings that make transformers run code of the folder, or of another repository.
CODE_KEYS = ("auto_map", "custom_pipelines")
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib")
TEXTS = (".html", ".jinja", ".md", ".py", ".txt")
SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY", re.IGNORECASE)
PNG_END = b"IEND\xaeB`\x82"


class HuggingFaceDetector(RegexBasedDetector):
    """Access tokens of the Hub, in their three forms."""

    secret_type = "Hugging Face access token"
    denylist = [re.compile(r"(?<![A-Za-z0-9])hf_(?:(?:oauth|jwt)_[\w.-]{16,}|[A-Za-z0-9]{16,})")]


class FineGrainedGitHubDetector(RegexBasedDetector):
    """The tokens of GitHub that detect-secrets 1.5 does not know."""

    secret_type = "GitHub token"
    denylist = [re.compile(r"github_pat_[A-Za-z0-9_]{22,}")]


# Known by their form. Those of detect-secrets that judge by entropy or by a word before would find every vocabulary.
DETECTORS: tuple[BasePlugin, ...] = (
    HuggingFaceDetector(), FineGrainedGitHubDetector(), GitHubTokenDetector(), GitLabTokenDetector(),
    AWSKeyDetector(), AzureStorageKeyDetector(), BasicAuthDetector(), DiscordBotTokenDetector(), JwtTokenDetector(),
    MailchimpDetector(), NpmDetector(), OpenAIDetector(), PrivateKeyDetector(), PypiTokenDetector(),
    SendGridDetector(), SlackDetector(), SquareOAuthDetector(), StripeDetector(),
)  # fmt: skip


def check_files(folder: Path) -> None:
    """Raise unless every file of a folder is what its name says, and the folder a whole checkpoint.

    Raises:
        VerificationError: for pickles, links, names or references that leave the folder, and secrets.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise VerificationError(f"`{name}` must be a file of its own, got a link to {os.readlink(path)!r}.")
        if path.is_file():
            check_file(path, name)
    check_weights(folder)
    for name in CODE_FILES:
        if not (folder / name).is_file():
            raise VerificationError(
                f"`{name}` must be in the folder, which has none. Load the model with this project's classes and save "
                "it with `save_pretrained`, which writes the code files too."
            )


def check_weights(folder: Path) -> None:
    """Raise unless a folder holds a configuration, and weights as safetensors under names that stay in it."""
    if not (folder / "config.json").is_file():
        raise VerificationError(
            "`config.json` must be in the folder, which has none: it is no checkpoint. Save the model with "
            "`save_pretrained`."
        )
    check_config(read_json(folder / "config.json"))
    if not any(folder.glob("*.safetensors")):
        raise VerificationError(
            "`folder` must hold weights as safetensors, got none. Save the model with `save_pretrained`."
        )
    try:
        check_shards(folder)
    except ValueError as error:
        raise VerificationError(str(error)) from error


def check_config(config: dict[str, Any]) -> None:
    """Raise unless `config.json` names one FAS model, and code in the folder's own files alone."""
    kind, architectures = config.get("model_type"), config.get("architectures")
    if str(kind).removeprefix("fas_") not in BACKBONES or not str(kind).startswith("fas_"):
        raise VerificationError(f"`model_type` in config.json must be that of a FAS model, got {kind!r:.60}.")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise VerificationError(f"`architectures` in config.json must name a FAS model, got {architectures!r:.60}.")
    try:
        auto_class_name(config)
    except (ValueError, TypeError, AttributeError) as error:
        raise VerificationError(str(error)) from error


def check_file(path: Path, name: str) -> None:
    """Raise unless a file is what its name says, without secrets.

    Args:
        path: The file.
        name: What it is called in messages.
    """
    refuse_pickle(path)
    readers: dict[str, Callable[[Path], str]] = {
        ".safetensors": _safetensors, ".json": _json, ".png": _png, ".model": _sentencepiece
    }  # fmt: skip
    reader = _text if path.suffix in TEXTS else readers.get(path.suffix)
    if reader is None:
        raise VerificationError(
            f"`{name}` must be of a kind that is published ({', '.join([*readers, *TEXTS])}), got {path.suffix!r}."
        )
    try:
        text = reader(path)
    except VerificationError:
        raise
    except (OSError, ValueError, RuntimeError, SyntaxError, SafetensorError, Image.DecompressionBombError) as error:
        raise VerificationError(
            f"`{name}` must be a whole {path.suffix} file, got {error}. Write it again."
        ) from error
    if found := find_secret(text):
        raise VerificationError(
            f"`{name}` must not hold a secret, got {found}. Remove it there, and revoke it where it was made (for the "
            "Hub at https://huggingface.co/settings/tokens) if the file was ever shared."
        )


def _text(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if "\0" in text:
        raise ValueError("bytes that are no text")
    return text


def _json(path: Path) -> str:
    content = read_json(path)
    for key, value in _settings(content):
        if key in CODE_KEYS and not isinstance(value, int):  # an int: the id of a token of that name
            _check_reference(path.name, key, value)
    if json.dumps(plain(content)) != json.dumps(content):
        raise VerificationError(
            f"`{path.name}` must not hold the value of a setting that is secret (a token, password or key), in a "
            "command or by itself, got one. Remove it there, and revoke it if the file was ever shared."
        )
    return json.dumps(content, ensure_ascii=False)  # without escapes: a secret may be written in them


def _check_reference(file: str, key: str, value: Any) -> None:
    """Raise unless an `auto_map` maps Auto classes of models to classes of the folder's own code files."""
    references = value.items() if isinstance(value, dict) else [(key, value)]
    for auto_class, reference in references:
        module, _, name = reference.partition(".") if isinstance(reference, str) else ("", "", "")
        own = key == "auto_map" and auto_class in AUTO_CLASSES
        if not own or module not in SIBLINGS or not name.isidentifier():
            raise VerificationError(
                f"`{key}` in {file} must map Auto classes of models to classes of the folder's own code files, got "
                f"{reference!r:.80} for {auto_class}: who loads this checkpoint would run code from elsewhere."
            )


def _settings(content: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values at every depth."""
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield from value.items()
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def _safetensors(path: Path) -> str:
    with safe_open(path, framework="pt") as tensors:
        return "\n".join([*(f"{key} {value}" for key, value in (tensors.metadata() or {}).items()), *tensors.keys()])


def _png(path: Path) -> str:
    raw = path.read_bytes()
    if not raw.endswith(PNG_END):
        raise ValueError("bytes behind the end of the image")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=["PNG"]) as image:
                image.load()
                return f"{image.info}\n{dict(image.getexif())}\n{raw.decode('latin-1')}"
        except (UnidentifiedImageError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"no image: {error}") from error


def _sentencepiece(path: Path) -> str:
    raw = path.read_bytes()
    SentencePieceProcessor().LoadFromSerializedProto(raw)
    return raw.decode("latin-1")


def find_secret(text: str) -> str | None:
    """What kind of secret a text holds, or None: one of a known form, or one of this process's environment."""
    own = [value for name, value in os.environ.items() if SECRET_VARIABLE.search(name) and len(value) >= 12]
    if any(value in text for value in [*own, *filter(None, [get_token()])]):
        return "an access token of this session"
    return next((f"a {each.secret_type}" for each in DETECTORS if any(each.analyze_string(text))), None)


def refuse_pickle(path: Path) -> None:
    """Raise for a pickle, known by its name or its first bytes (the zip archives of torch included)."""
    with path.open("rb") as file:
        head = file.read(4)
    if path.suffix in PICKLES or head == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5"):
        raise VerificationError(
            f"`{path.name}` must not be a pickle, which can run code when it is loaded. Save the weights as "
            "safetensors with `model.save_pretrained(folder)`, and delete the old file."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        VerificationError: if it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VerificationError(f"`{path.name}` must be readable JSON, got {error}. Write it again.") from error
    if not isinstance(content, dict):
        raise VerificationError(f"`{path.name}` must hold a JSON object, got {type(content).__name__}.")
    return content
