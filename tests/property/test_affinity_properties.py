from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from blaze.routing.affinity import MAX_HOPS, SessionTable, client_address, normalised, parse_networks
from tests.fakes import FakeClock

PROXIES = parse_networks(["10.0.0.0/8", "fd00::/8"])
ADDRESS = st.ip_addresses()
TRUSTED = st.one_of(st.ip_addresses(network="10.0.0.0/8"), st.ip_addresses(network="fd00::/8"))
UNTRUSTED = st.one_of(
    st.ip_addresses(network="192.0.2.0/24"),
    st.ip_addresses(network="11.0.0.0/8"),
    st.ip_addresses(network="2001:db8::/32"),
)
# What clients may say: anything at all, and what looks as if it were meant to be believed.
SAID = st.lists(
    st.one_of(st.text(max_size=20), st.lists(ADDRESS.map(str), max_size=4).map(", ".join)), max_size=5
)


@st.composite
def written(draw: st.DrawFn, address: IPv4Address | IPv6Address) -> str:
    """One of the ways to write an address."""
    text = str(address)
    if isinstance(address, IPv4Address):
        ways = [text, f"{text}:4711", f"::ffff:{text}", f"[::FFFF:{text}]:80"]
    else:
        ways = [text, text.upper(), address.exploded, f"[{text}]", f"[{text}]:80", f"{text}%eth0"]
    space = st.sampled_from(["", " ", "\t "])
    return draw(space) + draw(st.sampled_from(ways)) + draw(space)


@st.composite
def lines(draw: st.DrawFn, entries: list[str]) -> list[str]:
    """The entries in the lines that proxies may have made of them: a comma, or a header of its own."""
    made: list[str] = []
    for entry in entries:
        joins = draw(st.booleans())
        if joins and made:
            made[-1] += "," + entry
        else:
            made.append(entry)
    return made


@given(st.one_of(st.text(max_size=120), st.text("012af:.[]% ", max_size=20), ADDRESS.flatmap(written)))
def test_normalised_is_idempotent_and_gives_addresses_only(text: str) -> None:
    address = normalised(text)
    if address is not None:
        assert normalised(address) == address == str(ip_address(address))


@given(st.data(), ADDRESS)
def test_all_ways_to_write_an_address_are_one(
    data: st.DataObject, address: IPv4Address | IPv6Address
) -> None:
    assert normalised(data.draw(written(address))) == normalised(str(address)) is not None


@given(st.one_of(st.none(), st.text(max_size=20), UNTRUSTED.map(str)), SAID)
def test_whatever_an_untrusted_peer_says_changes_nothing(peer: str | None, said: list[str]) -> None:
    assert client_address(peer, said, PROXIES) == client_address(peer, [], PROXIES)


@given(ADDRESS, SAID)
def test_without_trusted_proxies_no_header_changes_anything(
    peer: IPv4Address | IPv6Address, said: list[str]
) -> None:
    assert client_address(str(peer), said, ()) == normalised(str(peer))


@given(st.data(), st.lists(TRUSTED, min_size=1, max_size=5), UNTRUSTED, SAID)
def test_behind_proxies_the_client_is_found_whatever_it_says(
    data: st.DataObject,
    proxies: list[IPv4Address | IPv6Address],
    client: IPv4Address | IPv6Address,
    said: list[str],
) -> None:
    peer, *others = proxies
    chain = [data.draw(written(address)) for address in (client, *others)]
    values = data.draw(lines([*said, *chain]))
    assert client_address(data.draw(written(peer)), values, PROXIES) == str(client)


@given(TRUSTED, SAID)
def test_the_client_is_the_peer_or_among_what_was_said(
    peer: IPv4Address | IPv6Address, said: list[str]
) -> None:
    entries = [normalised(entry) for value in said for entry in value.split(",")]
    assert client_address(str(peer), said, PROXIES) in {str(peer), *filter(None, entries)}


@given(st.data(), st.integers(1, 3 * MAX_HOPS), st.integers(0, MAX_HOPS))
def test_no_more_than_so_many_hops_are_looked_at(data: st.DataObject, hops: int, more: int) -> None:
    seen = ["10.0.0.1"] * hops
    values = data.draw(lines(["10.0.0.2"] * more + ["10.0.0.3", *seen]))
    client = client_address("10.0.0.1", values, PROXIES)
    assert (client == "10.0.0.1") == (hops >= MAX_HOPS)


# --- The table of sessions ---------------------------------------------------------------------------

TIMEOUT_S = 10.0
SESSION = st.sampled_from("stuvw")
REPLICA = st.sampled_from("abc")
ACTION = st.one_of(
    st.tuples(st.just("ask"), SESSION),
    st.tuples(st.just("keep"), SESSION, REPLICA),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 4.0, 9.5, 10.0])),
)


class PlainTable:
    """What the table is meant to do, written down without haste: a dict, the least recently used first."""

    def __init__(self, clock: FakeClock, capacity: int) -> None:
        self._clock = clock
        self._capacity = capacity
        self._sessions: dict[str, tuple[str, float]] = {}  # replica, last used at

    def ask(self, session: str) -> str | None:
        replica, used_at = self._sessions.pop(session, ("", -TIMEOUT_S))
        if self._clock.now() - used_at >= TIMEOUT_S:
            return None
        self._sessions[session] = (replica, self._clock.now())
        return replica

    def keep(self, session: str, replica: str) -> None:
        self._sessions.pop(session, None)
        self._sessions[session] = (replica, self._clock.now())
        if len(self._sessions) > self._capacity:
            del self._sessions[next(iter(self._sessions))]

    @property
    def live(self) -> int:
        now = self._clock.now()
        kept = self._sessions.values()
        return sum(now - used_at < TIMEOUT_S for _, used_at in kept)

    def __len__(self) -> int:
        return len(self._sessions)


@given(st.integers(1, 4), st.lists(ACTION, max_size=60))
def test_the_table_does_what_a_plain_one_does(capacity: int, actions: list[tuple[Any, ...]]) -> None:
    clock = FakeClock()
    table = SessionTable(clock, timeout_s=TIMEOUT_S, capacity=capacity)
    plain = PlainTable(clock, capacity)
    for action in actions:
        match action:
            case ("ask", session):
                assert table.replica_of(session) == plain.ask(session)
            case ("keep", session, replica):
                table.keep(session, replica)
                plain.keep(session, replica)
            case (_, seconds):
                clock.advance(seconds)
        assert plain.live <= len(table) <= len(plain) <= capacity
    assert [table.replica_of(session) for session in "stuvw"] == [plain.ask(session) for session in "stuvw"]


@given(st.integers(1, 20), st.lists(st.tuples(st.text(max_size=2), REPLICA), max_size=100))
def test_the_table_never_exceeds_its_capacity(capacity: int, kept: list[tuple[str, str]]) -> None:
    table = SessionTable(FakeClock(), capacity=capacity)
    for session, replica in kept:
        table.keep(session, replica)
        assert len(table) <= capacity
        assert table.replica_of(session) == replica
