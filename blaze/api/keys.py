"""Who is calling: the key of a request, compared with those of the config."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from blaze.errors import Forbidden, Unauthorized
from blaze.key_config import ApiKeyConfig

_BEARER = re.compile(r"bearer +([\x21-\x7e]+)", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Per Router; None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class KeyHolder:
    """``name``: the key's label, never a part of the key."""

    name: str
    admin: bool = False
    limits: KeyLimits = KeyLimits()


ANYBODY = KeyHolder("-", admin=True)  # of a cluster without keys; no key of a config can have this name


class KeyRing:
    """The keys of the config, by their digests only. Without any, everybody may do everything."""

    def __init__(
        self, keys: Iterable[ApiKeyConfig], *, same: Callable[[bytes, bytes], bool] = hmac.compare_digest
    ) -> None:
        self._holders = tuple((entry.digest, _holder(entry)) for entry in keys)
        self._same = same

    @property
    def required(self) -> bool:
        return bool(self._holders)

    def find(self, authorization_header: str | None) -> KeyHolder | None:
        """The holder of ``Bearer <key>``; None when the header is missing or malformed, or the key unknown.

        Takes as long for a wrong key as for a right one: digests are of one length, and each is compared.
        """
        match = _BEARER.fullmatch(authorization_header or "")
        if match is None:
            return None
        digest = hashlib.sha256(match[1].encode("ascii")).digest()
        found = None
        for known, holder in self._holders:
            if self._same(known, digest):
                found = holder
        return found

    def authorize(self, authorization_header: str | None, *, admin: bool = False) -> KeyHolder:
        """Who it is; :data:`ANYBODY` where no key is required.

        ``admin``: an administrator's key is needed. Raises :class:`Unauthorized` and :class:`Forbidden`.
        """
        if not self.required:
            return ANYBODY
        holder = self.find(authorization_header)
        if holder is None:
            if authorization_header is None:
                raise Unauthorized("An API key is needed, in the header `Authorization: Bearer <key>`.")
            raise Unauthorized("The API key is not known.")
        if admin and not holder.admin:
            raise Forbidden("This needs the API key of an administrator.")
        return holder


def _holder(entry: ApiKeyConfig) -> KeyHolder:
    return KeyHolder(entry.name, entry.admin, KeyLimits(entry.requests_per_minute, entry.tokens_per_minute))
