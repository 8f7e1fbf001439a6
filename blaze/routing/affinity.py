"""Whom a request comes from, and which replica its session is kept on."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from itertools import islice
from typing import TypeAlias

from blaze.checks import check
from blaze.clock import Clock
from blaze.errors import ConfigError
from blaze.types import ReplicaId

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

MAX_HOPS = 64  # that are looked at: no real chain of proxies is as long, a forged one may be
MAX_SESSION_ID = 256  # characters
_MAX_ENTRY = 100  # characters; an IPv6 address with brackets, zone and port has 70
_WITH_PORT = re.compile(r"\[(.+)\](?::\d{1,5})?|([^:]+):\d{1,5}", re.ASCII)

# --- The client's address --------------------------------------------------------------------------


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Addresses and CIDR networks of the config field ``trusted_proxies``.

    Raises :class:`ConfigError` naming every wrong entry.
    """
    networks: list[Network] = []
    wrong: list[str] = []
    for index, text in enumerate(texts):
        try:
            networks.append(_network(text))
        except ValueError as error:
            wrong.append(f"trusted_proxies[{index}]: {error}")
    if wrong:
        raise ConfigError("; ".join(wrong))
    return tuple(networks)


def normalised(address: str) -> str | None:
    """One text for each address, however it is written: no port, brackets or zone; IPv4-mapped IPv6 is IPv4.

    None where the text is no address ("unknown", "_hidden").
    """
    parsed = _parsed(address)
    return None if parsed is None else str(parsed)


def client_address(peer: str | None, forwarded_for: Sequence[str], trusted: Sequence[Network]) -> str | None:
    """The normalised address of whoever is the first, seen from here, that is not a trusted proxy.

    ``peer``: of the socket. ``forwarded_for``: all values of X-Forwarded-For, in the order of the request. A
    proxy appends the address that it was called from, so each entry is as good as the proxy that sent it:
    they are read from the right, as long as the sender is trusted and the entry is an address. None without
    the address of a peer.
    """
    client = None if peer is None else _parsed(peer)
    if client is None:
        return None
    for entry in islice(_from_the_right(forwarded_for), MAX_HOPS):
        if not any(client in network for network in trusted):
            break
        before = _parsed(entry)
        if before is None:
            break
        client = before
    return str(client)


def _from_the_right(values: Sequence[str]) -> Iterator[str]:
    for value in reversed(values):
        end = len(value)
        while end >= 0:
            comma = value.rfind(",", 0, end)
            yield value[comma + 1 : end]
            end = comma


def _parsed(text: str) -> Address | None:
    if len(text) > _MAX_ENTRY:
        return None
    host = text.strip()
    with_port = _WITH_PORT.fullmatch(host)
    if with_port is not None:
        host = with_port[1] or with_port[2]
    try:
        address = ip_address(host)
    except ValueError:
        return None
    if isinstance(address, IPv4Address):
        return address
    return address.ipv4_mapped or IPv6Address(int(address))  # the number leaves the zone behind


def _network(text: str) -> Network:
    network = ip_network(text)
    if isinstance(network, IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:  # as addresses are when they are compared with it
            return IPv4Network((mapped, network.prefixlen - 96))
    return network


# HAProxy of the same machine, which is the peer of the Router's socket.
LOOPBACK = parse_networks(("127.0.0.1", "::1"))

# --- Sessions --------------------------------------------------------------------------------------


def check_session_id(text: str) -> str:
    """Raises :class:`blaze.errors.InvalidRequest` unless it is 1 to 256 printable ASCII characters."""
    fits = 1 <= len(text) <= MAX_SESSION_ID and text.isascii() and text.isprintable()
    check(fits, "x-session-id", f"must be 1 to {MAX_SESSION_ID} printable ASCII characters")
    return text


@dataclass(slots=True)
class _Session:
    replica_id: ReplicaId
    used_at: float


class SessionTable:
    """The replica that each session is kept on. Lives on one event loop; no operation takes longer for more
    sessions.

    A session ends when it was not used for ``timeout_s``, or as the least recently used of more than
    ``capacity``. Its place may be taken until somebody asks for it.
    """

    def __init__(self, clock: Clock, *, timeout_s: float = 300.0, capacity: int = 65_536) -> None:
        self._clock = clock
        self._timeout_s = timeout_s
        self._capacity = capacity
        self._sessions: OrderedDict[str, _Session] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        """Places taken, also by sessions that have ended but were not asked for since."""
        return len(self._sessions)

    def replica_of(self, session_id: str) -> ReplicaId | None:
        """Asking is using: the session has ``timeout_s`` again."""
        session = self._sessions.get(session_id)
        if session is None:
            return None
        now = self._clock.now()
        if self._has_ended(session, now):
            del self._sessions[session_id]
            return None
        session.used_at = now
        self._sessions.move_to_end(session_id)
        return session.replica_id

    def keep(self, session_id: str, replica_id: ReplicaId) -> None:
        """From now on the session is on this replica, wherever it was."""
        now = self._clock.now()
        self._drop_ended(now)
        self._sessions[session_id] = _Session(replica_id, now)
        self._sessions.move_to_end(session_id)
        if len(self._sessions) > self._capacity:
            self._sessions.popitem(last=False)

    def _drop_ended(self, now: float) -> None:
        for _ in range(2):  # more than come, so that the table shrinks; few, so that nobody waits for it
            oldest = next(iter(self._sessions.values()), None)
            if oldest is None or not self._has_ended(oldest, now):
                return
            self._sessions.popitem(last=False)

    def _has_ended(self, session: _Session, now: float) -> bool:
        return now - session.used_at >= self._timeout_s
