from __future__ import annotations

import hashlib
import hmac
import json
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from blaze.api.keys import ANYBODY, KeyHolder, KeyLimits, KeyRing
from blaze.errors import BlazeError, Forbidden, Unauthorized
from blaze.key_config import ApiKeyConfig, check_unique

SECRET = "sk-correct-horse-battery"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()


def entry(**fields: Any) -> ApiKeyConfig:
    """Read as `parse_args` reads it."""
    return ApiKeyConfig.model_validate_json(json.dumps({"name": "ann", **fields}), strict=True)


def refusal(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        entry(**fields)
    assert SECRET not in str(caught.value)
    assert all(SECRET not in item["msg"] for item in caught.value.errors(include_url=False))
    return str(caught.value)


def three_keys() -> list[ApiKeyConfig]:
    return [
        entry(name="ann", key=SECRET, requests_per_minute=3, tokens_per_minute=50),
        entry(name="bob", key="sk-bob"),
        entry(name="root", key="sk-root", admin=True),
    ]


class Comparisons:
    """Compares, and remembers what it was asked to compare."""

    def __init__(self) -> None:
        self.pairs: list[tuple[bytes, bytes]] = []

    def __call__(self, known: bytes, given: bytes) -> bool:
        self.pairs.append((known, given))
        return hmac.compare_digest(known, given)


# --- The config --------------------------------------------------------------------------------------


def test_a_key_is_given_itself_or_as_its_hash() -> None:
    assert entry(key=SECRET).digest == entry(key_sha256=DIGEST).digest == bytes.fromhex(DIGEST)
    assert entry(key_sha256=DIGEST.upper()).digest == bytes.fromhex(DIGEST)


def test_a_key_is_no_administrators_and_has_no_limits_unless_the_config_says_so() -> None:
    plain = entry(key=SECRET)
    assert (plain.admin, plain.requests_per_minute, plain.tokens_per_minute) == (False, None, None)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "exactly one of key and key_sha256"),
        ({"key": SECRET, "key_sha256": DIGEST}, "exactly one of key and key_sha256"),
        ({"key": ""}, "key must be"),
        ({"key": SECRET + " "}, "key must be"),
        ({"key": SECRET + "\n"}, "key must be"),
        ({"key": SECRET + "é"}, "key must be"),
        ({"key": SECRET * 100}, "key must be"),
        ({"key": 5}, "key"),
        ({"key": [SECRET]}, "key"),
        ({"kee": SECRET}, "kee"),
        ({"key_sha256": SECRET}, "key_sha256 must be"),
        ({"key_sha256": DIGEST[:-1]}, "key_sha256 must be"),
        ({"key_sha256": DIGEST[:-1] + "g"}, "key_sha256 must be"),
        ({"key": SECRET, "name": ""}, "name must be"),
        ({"key": SECRET, "name": "-"}, "name must be"),
        ({"key": SECRET, "name": "a" * 65}, "name must be"),
        ({"key": SECRET, "name": "two words"}, "name must be"),
        ({"key": SECRET, "name": "line\nbreak"}, "name must be"),
        ({"key": SECRET, "name": SECRET}, "name is shown"),
        ({"key": SECRET, "name": None}, "name"),
        ({"key": SECRET, "admin": "yes"}, "admin"),
        ({"key": SECRET, "requests_per_minute": 0}, "requests_per_minute"),
        ({"key": SECRET, "tokens_per_minute": -1}, "tokens_per_minute"),
        ({"key": SECRET, "tokens_per_minute": 1.5}, "tokens_per_minute"),
    ],
)
def test_a_wrong_entry_is_refused_without_repeating_it(fields: dict[str, Any], named: str) -> None:
    assert named in refusal(**fields)


def test_names_and_keys_are_given_once() -> None:
    check_unique([])
    check_unique(three_keys())
    with pytest.raises(ValueError, match=r"^api_keys: the name 'ann' is given twice$"):
        check_unique([*three_keys(), entry(name="ann", key="another")])


@pytest.mark.parametrize("again", [{"key": SECRET}, {"key_sha256": DIGEST}, {"key_sha256": DIGEST.upper()}])
def test_a_key_has_one_holder(again: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"^api_keys: 'ann' and 'eve' have the same key$") as caught:
        check_unique([*three_keys(), entry(name="eve", **again)])
    assert SECRET not in str(caught.value)


def test_an_entry_survives_the_way_to_another_process() -> None:
    config = entry(key=SECRET, admin=True, requests_per_minute=3)
    there: ApiKeyConfig = pickle.loads(pickle.dumps(config))
    assert there == config
    assert KeyRing([there]).find(f"Bearer {SECRET}") == KeyHolder("ann", True, KeyLimits(3))


def test_the_secret_is_in_no_text() -> None:
    config = entry(key=SECRET)
    ring = KeyRing([config])
    holder = ring.find(f"Bearer {SECRET}")
    there = pickle.loads(pickle.dumps(config))
    for value in (config, there, config.key, ring, vars(ring), holder, config.model_dump()):
        for text in (repr(value), str(value)):
            assert SECRET not in text
            assert DIGEST not in text
    assert SECRET not in config.model_dump_json()


def test_a_ring_holds_no_secret() -> None:
    ring = KeyRing([entry(key=SECRET)])
    assert SECRET.encode() not in pickle.dumps(ring)


# --- The header --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", [f"Bearer {SECRET}", f"bearer {SECRET}", f"BEARER {SECRET}", f"Bearer   {SECRET}"]
)
def test_the_holder_of_a_key_is_found(header: str) -> None:
    assert KeyRing(three_keys()).find(header) == KeyHolder("ann", limits=KeyLimits(3, 50))


@pytest.mark.parametrize("name", ["ann", "bob", "root"])
def test_every_key_is_found_by_itself_and_by_its_hash(name: str) -> None:
    (plain,) = (given for given in three_keys() if given.name == name)
    assert plain.key is not None
    hashed = [
        given if given.name != name else entry(name=name, admin=given.admin, key_sha256=given.digest.hex())
        for given in three_keys()
    ]
    for keys in (three_keys(), hashed):
        found = KeyRing(keys).find(f"Bearer {plain.key.get_secret_value()}")
        assert found is not None
        assert (found.name, found.admin) == (name, name == "root")


NO_KEYS = [
    None,
    "",
    " ",
    "Bearer",
    "Bearer ",
    SECRET,
    f"Bearer{SECRET}",
    f"Bearer\t{SECRET}",
    f" Bearer {SECRET}",
    f"Bearer {SECRET} ",
    f"Bearer {SECRET}\n",
    f"Bearer {SECRET} {SECRET}",
    f"Bearer {SECRET}, Bearer {SECRET}",
    f"Bearer: {SECRET}",
    f"Basic {SECRET}",
    f"Token {SECRET}",
    f"ⓑearer {SECRET}",
    f"Bearer {SECRET[:-1]}",
    f"Bearer {SECRET}x",
    f"Bearer {SECRET.upper()}",
    f"Bearer {DIGEST}",  # who has read the hashes has no key
    "Bearer ann",
    "Bearer None",
    "Bearer *",
    f"Bearer {SECRET}\u00e9",
    "Bearer \udcff",
    "Bearer " + "x" * 1_000_000,
    " " * 1_000_000,
    "Bearer" + " " * 1_000_000,
]


@pytest.mark.parametrize("header", NO_KEYS, ids=lambda header: repr(header)[:40])
def test_missing_malformed_and_forged_headers_find_nobody(header: str | None) -> None:
    ring = KeyRing([*three_keys(), entry(name="hash", key_sha256="00" * 32)])
    assert ring.find(header) is None
    with pytest.raises(Unauthorized) as caught:
        ring.authorize(header)
    assert SECRET not in caught.value.message
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("key", [SECRET, "sk-bob", "sk-root", "sk-forged", "x"])
def test_every_digest_is_compared_whichever_key_it_is(key: str) -> None:
    compare = Comparisons()
    keys = three_keys()
    KeyRing(keys, same=compare).find(f"Bearer {key}")
    given = hashlib.sha256(key.encode()).digest()
    assert compare.pairs == [(known.digest, given) for known in keys]


def test_the_comparison_is_that_of_the_standard_library_unless_told() -> None:
    assert KeyRing.__init__.__kwdefaults__ == {"same": hmac.compare_digest}


# --- Who may do what ---------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "", "Bearer anything", "nonsense"])
def test_without_keys_everybody_may_do_everything(header: str | None) -> None:
    ring = KeyRing([])
    assert not ring.required
    assert ring.authorize(header) == ring.authorize(header, admin=True) == ANYBODY
    assert (ANYBODY.admin, ANYBODY.limits) == (True, KeyLimits())


def test_one_key_closes_the_door() -> None:
    assert KeyRing([entry(key=SECRET)]).required


@pytest.mark.parametrize(
    ("header", "admin", "refused"),
    [
        (f"Bearer {SECRET}", False, None),
        ("Bearer sk-root", False, None),
        ("Bearer sk-root", True, None),
        (f"Bearer {SECRET}", True, Forbidden),
        ("Bearer sk-forged", False, Unauthorized),
        ("Bearer sk-forged", True, Unauthorized),
        (None, True, Unauthorized),
    ],
)
def test_admission(header: str | None, admin: bool, refused: type[BlazeError] | None) -> None:
    ring = KeyRing(three_keys())
    if refused is None:
        assert ring.authorize(header, admin=admin) == ring.find(header)
    else:
        with pytest.raises(refused):
            ring.authorize(header, admin=admin)


@pytest.mark.parametrize(
    ("header", "admin", "status", "code"),
    [(None, False, 401, "invalid_api_key"), ("Bearer sk-bob", True, 403, "admin_key_required")],
)
def test_refusals_are_in_openais_terms(header: str | None, admin: bool, status: int, code: str) -> None:
    with pytest.raises(BlazeError) as caught:
        KeyRing(three_keys()).authorize(header, admin=admin)
    info = caught.value.info
    assert (info.http_status, info.type, info.code) == (status, "invalid_request_error", code)
    assert (info.retryable, info.is_failure, info.retry_after_s) == (False, False, None)
