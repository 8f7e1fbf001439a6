"""Client addresses behind proxies, and sticky sessions."""

from __future__ import annotations

import pytest

from blaze.errors import ConfigError, InvalidRequest
from blaze.routing.affinity import (
    LOOPBACK,
    MAX_HOPS,
    SessionTable,
    check_session_id,
    client_address,
    normalised,
    parse_networks,
)
from tests.fakes import FakeClock

PROXIES = parse_networks(["127.0.0.1", "::1", "10.0.0.0/8", "fd00::/8"])
PEER = "127.0.0.1"
FORGED = "6.6.6.6"

# --- Networks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("10.1.2.3", "10.1.2.3/32"),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("10.0.0.0/255.0.0.0", "10.0.0.0/8"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("::1", "::1/128"),
        ("FD00:0::/8", "fd00::/8"),
        ("::ffff:10.1.2.3", "10.1.2.3/32"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::/0", "::/0"),
    ],
)
def test_addresses_and_networks_are_read(text: str, network: str) -> None:
    assert [str(parsed) for parsed in parse_networks([text])] == [network]


@pytest.mark.parametrize(
    "text",
    ["", "proxy.example", "10.0.0.0/33", "10.0.0.5/8", "10.0.0", "[::1]", "10.0.0.1:80", "fd00::/129", "*"],
)
def test_a_wrong_network_is_named(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_networks(["10.0.0.0/8", text, "::1"])
    assert caught.value.message.startswith("trusted_proxies[1]: ")
    assert text in caught.value.message


def test_every_wrong_network_is_named() -> None:
    with pytest.raises(ConfigError, match=r"trusted_proxies\[0\].*'a'.*trusted_proxies\[2\].*'b'"):
        parse_networks(["a", "::1", "b"])


def test_no_networks_are_none() -> None:
    assert parse_networks([]) == ()


# --- Addresses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("1.2.3.4:567", "1.2.3.4"),
        (" \t1.2.3.4 ", "1.2.3.4"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("[::1]:80", "::1"),
        ("::1:80", "::1:80"),  # without brackets it is the address's own
        ("2001:DB8:0:0:0:0:0:1", "2001:db8::1"),
        ("[2001:0db8::0001]:65535", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("[fe80::1%25eth0]:80", "fe80::1"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("::FFFF:102:304", "1.2.3.4"),
        ("[::ffff:1.2.3.4]:80", "1.2.3.4"),
        ("::ffff:1.2.3.4%eth0", "1.2.3.4"),
        ("0.0.0.0", "0.0.0.0"),
    ],
)
def test_an_address_has_one_text(text: str, address: str) -> None:
    assert normalised(text) == address
    assert normalised(address) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "unknown",
        "_hidden",
        "localhost:80",
        "1.2.3",
        "1.2.3.256",
        "01.2.3.4",
        "1.2.3.4:",
        "1.2.3.4:http",
        "1.2.3.4:123456",
        "1.2.3.4:٣",  # a digit, but not of a port
        "١.2.3.4",
        "1.2.3.4%eth0",
        "1.2.3.4 5.6.7.8",
        "1.2.3.4, 5.6.7.8",
        "1.2.3.4/32",
        "16909060",
        "[]",
        "[::1",
        "::1]",
        "[::1]80",
        "[::1]:",
        "[[::1]]",
        "fe80::1%",
        ":80",
        '"1.2.3.4"',
        "1" * 101,
        "1.2.3.4" + " " * 100,
    ],
)
def test_what_is_no_address_is_none(text: str) -> None:
    assert normalised(text) is None


# --- The client --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        # Nobody vouches for what an untrusted peer says.
        ("1.2.3.4", [], "1.2.3.4"),
        ("1.2.3.4", [FORGED], "1.2.3.4"),
        ("1.2.3.4", ["10.0.0.1", FORGED], "1.2.3.4"),
        # A trusted one says where it was called from.
        (PEER, [], PEER),
        (PEER, ["1.2.3.4"], "1.2.3.4"),
        ("::1", ["1.2.3.4"], "1.2.3.4"),
        ("::ffff:127.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("[::1]:4711", ["[2001:DB8::1]:99"], "2001:db8::1"),
        # What stands further to the left is the client's own.
        (PEER, [f"{FORGED}, 1.2.3.4"], "1.2.3.4"),
        (PEER, [FORGED, "1.2.3.4"], "1.2.3.4"),
        (PEER, ["10.0.0.1, 127.0.0.1", "1.2.3.4"], "1.2.3.4"),
        # Several proxies, in one header or several.
        (PEER, ["1.2.3.4, 10.0.0.1, 10.0.0.2"], "1.2.3.4"),
        (PEER, ["1.2.3.4,10.0.0.1", "10.0.0.2"], "1.2.3.4"),
        (PEER, [f"{FORGED}, 1.2.3.4", "fd00::1", "::ffff:10.0.0.2, 127.0.0.1:80"], "1.2.3.4"),
        # All of them proxies: the leftmost.
        (PEER, ["10.0.0.1, 10.0.0.2"], "10.0.0.1"),
        (PEER, ["10.0.0.1", "10.0.0.2"], "10.0.0.1"),
        # What is no address ends the walk; the last address before it counts.
        (PEER, ["unknown"], PEER),
        (PEER, ["1.2.3.4, unknown"], PEER),
        (PEER, ["1.2.3.4, unknown, 10.0.0.2"], "10.0.0.2"),
        (PEER, ["1.2.3.4", "", "10.0.0.2"], "10.0.0.2"),
        (PEER, ["1.2.3.4,, 10.0.0.2"], "10.0.0.2"),
        (PEER, [""], PEER),
        (PEER, [","], PEER),
        (PEER, ["unknown, 1.2.3.4"], "1.2.3.4"),
        # Without the peer's address there is nobody to trust: a Unix socket, or a name.
        (None, ["1.2.3.4"], None),
        ("", ["1.2.3.4"], None),
        ("testclient", ["1.2.3.4"], None),
    ],
)
def test_the_client_is_the_first_that_is_no_trusted_proxy(
    peer: str | None, forwarded_for: list[str], client: str | None
) -> None:
    assert client_address(peer, forwarded_for, PROXIES) == client


def test_without_trusted_proxies_the_client_is_the_peer() -> None:
    assert client_address(PEER, [FORGED], ()) == PEER


def test_the_proxy_of_the_same_machine_is_trusted_alone() -> None:
    assert client_address("127.0.0.1", [FORGED, "127.0.0.2"], LOOPBACK) == "127.0.0.2"
    assert client_address("::1", [FORGED, "10.0.0.1"], LOOPBACK) == "10.0.0.1"


@pytest.mark.parametrize("lines", [1, 100])
def test_a_huge_header_is_not_read_to_its_end(lines: int) -> None:
    entries = [f"10.0.{index // 256}.{index % 256}" for index in range(10_000)]
    size = len(entries) // lines
    values = [", ".join(entries[at : at + size]) for at in range(0, len(entries), size)]
    assert client_address(PEER, values, PROXIES) == entries[-MAX_HOPS]


def test_a_huge_entry_ends_the_walk() -> None:
    assert client_address(PEER, ["1.2.3.4, " + "1" * 1_000_000, "10.0.0.1"], PROXIES) == "10.0.0.1"


# --- Sessions ----------------------------------------------------------------------------------------


def test_a_session_stays_where_it_is_kept() -> None:
    table = SessionTable(FakeClock())
    assert table.replica_of("s") is None
    table.keep("s", "a")
    table.keep("t", "b")
    assert (table.replica_of("s"), table.replica_of("t"), len(table)) == ("a", "b", 2)


def test_a_session_that_moves_stays_with_the_new_replica() -> None:
    table = SessionTable(FakeClock())
    table.keep("s", "a")
    table.keep("s", "b")
    assert (table.replica_of("s"), len(table)) == ("b", 1)


@pytest.mark.parametrize(("idle_s", "replica"), [(299.0, "a"), (300.0, None), (301.0, None)])
def test_a_session_ends_after_the_timeout(idle_s: float, replica: str | None) -> None:
    clock = FakeClock()
    table = SessionTable(clock)
    table.keep("s", "a")
    clock.advance(idle_s)
    assert table.replica_of("s") == replica
    assert len(table) == (replica is not None)


@pytest.mark.parametrize("by", ["asking", "keeping"])
def test_using_a_session_renews_it(by: str) -> None:
    clock = FakeClock()
    table = SessionTable(clock, timeout_s=10)
    table.keep("s", "a")
    for _ in range(5):
        clock.advance(9)
        if by == "asking":
            assert table.replica_of("s") == "a"
        else:
            table.keep("s", "a")
    clock.advance(9)
    assert table.replica_of("s") == "a"


def test_beyond_capacity_the_least_recently_used_is_dropped() -> None:
    table = SessionTable(FakeClock(), capacity=3)
    for session in "stu":
        table.keep(session, "a")
    assert table.replica_of("s") == "a"
    table.keep("t", "b")
    table.keep("v", "a")  # "u" was used before all others
    assert [table.replica_of(session) for session in "stuv"] == ["a", "b", None, "a"]
    assert len(table) == 3


def test_keeping_a_session_again_drops_nobody() -> None:
    table = SessionTable(FakeClock(), capacity=2)
    for session in "stsst":
        table.keep(session, "a")
    assert [table.replica_of(session) for session in "st"] == ["a", "a"]


def test_sessions_that_have_ended_leave_as_new_ones_come() -> None:
    clock = FakeClock()
    table = SessionTable(clock, timeout_s=10)
    for number in range(100):
        table.keep(f"old {number}", "a")
    clock.advance(10)
    for number in range(50):
        table.keep(f"new {number}", "b")
    assert len(table) == 50


@pytest.mark.parametrize("text", ["s", "a b", " ", "~" * 256, "5f0c-..:/{}\"'"])
def test_a_session_id_is_printable_ascii(text: str) -> None:
    assert check_session_id(text) == text


@pytest.mark.parametrize("text", ["", "s" * 257, "a\tb", "a\n", "\x7f", "\x00", "ü", "\u2028", "日"])
def test_any_other_session_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_session_id(text)
    assert (caught.value.param, caught.value.http_status) == ("x-session-id", 400)
    assert "x-session-id: must be 1 to 256 printable ASCII characters." in caught.value.message
