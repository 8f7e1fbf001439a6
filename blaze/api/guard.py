"""The door of the HTTP API: who may come in, how often, and what their answers are charged."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from starlette.requests import Request as HTTPRequest

from blaze.api.charged import ChargedAnswers
from blaze.api.keys import KeyHolder, KeyRing
from blaze.api.limits import RateLimits
from blaze.api.service import Opener


class Guard:
    def __init__(self, keys: KeyRing, limits: RateLimits) -> None:
        self._keys = keys
        self._limits = limits

    def admit(self, http: HTTPRequest) -> KeyHolder:
        """A request for an answer. Raises :class:`Unauthorized` and :class:`RateLimited`."""
        holder = self._keys.authorize(http.headers.get("authorization"))
        self._limits.admit(holder)
        return holder

    def look(self, http: HTTPRequest) -> None:
        """A question that costs nothing, such as the list of models."""
        self._keys.authorize(http.headers.get("authorization"))

    def admit_operator(self, http: HTTPRequest) -> None:
        """Raises :class:`Unauthorized` and :class:`Forbidden`."""
        self._keys.authorize(http.headers.get("authorization"), admin=True)

    @contextmanager
    def charging(self, holder: KeyHolder, opener: Opener) -> Iterator[Opener]:
        """To open the answers to one HTTP request with; what they use is put down to the key."""
        if holder.limits.tokens_per_minute is None:
            yield opener
            return
        answers = ChargedAnswers(opener, partial(self._limits.charge, holder))
        try:
            yield answers
        except asyncio.CancelledError:  # what the server does to a request whose client is gone
            answers.charge_given_up()
            raise
