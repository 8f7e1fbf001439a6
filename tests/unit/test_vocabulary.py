from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blaze.engines.llm.vocabulary import TextDecoder, TokenizerNames


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's way: pieces in an alphabet that has a character for every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "Ġa", "â\u0082", "âĤ", "Ã©", "日"]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.add_tokens([AddedToken("Ġtool", special=False)])
    return tokenizer


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2's way: a piece of its own for each byte that no other piece has."""
    pieces = ["<unk>", "<0x0A>", "<0xE2>", "<0x82>", "<0xAC>", "▁word", "▁", "s", "<0xyz>", "é"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def names_of(tokenizer: PreTrainedTokenizerFast, *pieces: str) -> list[str]:
    names = TokenizerNames(tokenizer)
    return [names.name(tokenizer.convert_tokens_to_ids(piece)) for piece in pieces]


def test_a_byte_level_piece_is_named_by_the_bytes_it_stands_for() -> None:
    assert names_of(byte_level(), "a", "Ġ", "Ċ", "Ġa", "Ã©") == ["a", " ", "\n", " a", "é"]


def test_bytes_that_are_no_whole_character_are_surrogate_escapes() -> None:
    head, lone = names_of(byte_level(), "âĤ", "¬")
    assert (head, lone) == ("\udce2\udc82", "\udcac")
    assert (head + lone).encode("utf-8", "surrogateescape").decode() == "€"


def test_every_byte_has_its_name() -> None:
    tokenizer = byte_level()
    named = names_of(tokenizer, *pre_tokenizers.ByteLevel.alphabet())
    assert sorted(name.encode("utf-8", "surrogateescape") for name in named) == [
        bytes([byte]) for byte in range(256)
    ]


def test_a_piece_outside_the_alphabet_is_its_own_text_as_the_decoder_has_it() -> None:
    tokenizer = byte_level()
    token = tokenizer.convert_tokens_to_ids("日")
    assert TokenizerNames(tokenizer).name(token) == TextDecoder(tokenizer).decode([token]) == "日"


def test_added_and_special_tokens_are_named_as_they_were_written() -> None:
    assert names_of(byte_level(), "</s>", "Ġtool") == ["</s>", "Ġtool"]
    assert names_of(byte_fallback(), "<unk>") == ["<unk>"]


def test_pieces_of_bytes_are_bytes() -> None:
    names = names_of(byte_fallback(), "<0x0A>", "<0xE2>", "<0x82>", "<0xAC>")
    assert names == ["\n", "\udce2", "\udc82", "\udcac"]
    assert "".join(names[1:]).encode("utf-8", "surrogateescape").decode() == "€"


def test_sentencepiece_s_mark_is_a_space_also_where_the_decoder_strips_it() -> None:
    tokenizer = byte_fallback()
    assert names_of(tokenizer, "▁word", "▁", "s", "é") == [" word", " ", "s", "é"]
    assert TextDecoder(tokenizer).decode(tokenizer.convert_tokens_to_ids(["▁word", "s"])) == "words"


def test_what_only_looks_like_a_byte_is_text() -> None:
    assert names_of(byte_fallback(), "<0xyz>") == ["<0xyz>"]


def test_an_id_that_only_pads_the_embedding_has_an_empty_name() -> None:
    assert TokenizerNames(byte_level()).name(5000) == ""
    assert TokenizerNames(byte_fallback()).name(5000) == ""


def test_a_name_is_looked_up_once() -> None:
    tokenizer = byte_level()
    names = TokenizerNames(tokenizer)
    token = tokenizer.convert_tokens_to_ids("Ġa")
    assert names.name(token) is names.name(token)


def test_text_comes_without_special_tokens_and_otherwise_as_it_was_written() -> None:
    tokenizer = byte_level()
    ids = [*tokenizer(" a , b !")["input_ids"], tokenizer.eos_token_id]
    assert TextDecoder(tokenizer).decode(ids) == " a , b !"
