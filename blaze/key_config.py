"""API keys: who may call, and how much a minute."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from pydantic import ConfigDict, SecretStr, model_validator

from blaze.engine_config import PositiveInt, Settings

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-/:@]{0,63}")
_KEY = re.compile(r"[\x21-\x7e]{1,512}")  # what a header can carry, without blanks
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


class ApiKeyConfig(Settings):
    """One key. Its errors never repeat what was given: that may be the secret, in the wrong field."""

    model_config = ConfigDict(hide_input_in_errors=True)

    name: str  # shown in logs and in the status
    key: SecretStr | None = None
    key_sha256: str | None = None  # hex, instead of the key: a file that holds nothing to steal
    admin: bool = False
    requests_per_minute: PositiveInt | None = None  # per Router; None: no limit
    tokens_per_minute: PositiveInt | None = None  # of prompts and answers, per Router; None: no limit

    @model_validator(mode="after")
    def _is_one_usable_key(self) -> ApiKeyConfig:
        if not _NAME.fullmatch(self.name):
            raise ValueError("name must be letters, digits and . _ - / : @ (at most 64)")
        if (self.key is None) == (self.key_sha256 is None):
            raise ValueError("exactly one of key and key_sha256 is needed")
        if self.key is not None and not _KEY.fullmatch(self.key.get_secret_value()):
            raise ValueError("key must be ASCII letters, digits and signs without blanks (at most 512)")
        if self.key is not None and self.key.get_secret_value() == self.name:
            raise ValueError("name is shown in logs: it must not be the key")
        if self.key_sha256 is not None and not _SHA256.fullmatch(self.key_sha256):
            raise ValueError("key_sha256 must be 64 hexadecimal digits")
        return self

    @property
    def digest(self) -> bytes:
        """SHA-256 of the key, 32 bytes."""
        if self.key is not None:
            return hashlib.sha256(self.key.get_secret_value().encode("ascii")).digest()
        return bytes.fromhex(self.key_sha256 or "")


def check_unique(keys: Iterable[ApiKeyConfig]) -> None:
    """Raises :class:`ValueError` when two entries share their name or their key."""
    names: set[str] = set()
    owners: dict[bytes, str] = {}
    for entry in keys:
        if entry.name in names:
            raise ValueError(f"api_keys: the name {entry.name!r} is given twice")
        names.add(entry.name)
        owner = owners.setdefault(entry.digest, entry.name)
        if owner != entry.name:
            raise ValueError(f"api_keys: {owner!r} and {entry.name!r} have the same key")
