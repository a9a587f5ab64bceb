"""A checkpoint on the Hub: its card, what is verified before, the upload."""

from .card import CardOptions
from .code import VerificationError
from .upload import PublishError, PublishMixin, publish
from .verification import verify


__all__ = ["CardOptions", "PublishError", "PublishMixin", "VerificationError", "publish", "verify"]
