"""Loading a causal language model and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blaze.engine_config import LLMConfig
from blaze.engines.llm.vocabulary import TextDecoder, TokenizerNames, Vocabulary
from blaze.engines.torch_setup import choose_device, choose_dtype, set_threads
from blaze.errors import ConfigError, ModelSourceError
from blaze.models.cache import local_model
from blaze.models.sources import HubSource, ModelSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    vocabulary_size: int
    max_model_len: int
    commit: str | None = None  # of a hub repository


def load_model(source: ModelSource, options: LLMConfig, threads: int, cache: Path) -> LoadedModel:
    """Blocking. Raises :class:`ModelSourceError` when the files cannot be loaded, and
    :class:`ConfigError` when the options ask for what the model or the hardware lacks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    set_threads(threads)
    device = choose_device(options.device)
    where = local_model(source, cache)
    try:
        commit = commit_of(source) if isinstance(source, HubSource) else None
        safe = {"trust_remote_code": False, **({"revision": commit} if commit else {})}
        tokenizer = AutoTokenizer.from_pretrained(where, **safe)
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=choose_dtype(options.dtype, device), use_safetensors=True, **safe
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelSourceError(f"source {where!r} cannot be loaded: {error}", param="source") from error
    model = model.to(device).eval()
    text_config = model.config.get_text_config()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        vocabulary=Vocabulary(TextDecoder(tokenizer), TokenizerNames(tokenizer), eos_ids(model, tokenizer)),
        vocabulary_size=text_config.vocab_size,
        max_model_len=_context(text_config, options.max_model_len),
        commit=commit,
    )


def commit_of(source: HubSource) -> str | None:
    """What its revision stands for now: a branch may move before the last file has been loaded. None: the
    files are no repository's. Raises ``OSError`` when they are not there."""
    from transformers.utils import cached_file, extract_commit_hash

    found = cached_file(source.repo, "config.json", revision=source.revision)
    commit: str | None = extract_commit_hash(found, None)
    return commit


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Models name their end in up to three places, and not always the same: all of them end a sequence."""
    named = (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id)
    ids: set[int] = set()
    for value in named:
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)


def _context(text_config: PretrainedConfig, wanted: int | None) -> int:
    made_for = getattr(text_config, "max_position_embeddings", None)
    if wanted is None:
        if made_for is None:
            raise ConfigError(
                "llm.max_model_len: the model's config names no context length; set it", param="llm"
            )
        return int(made_for)
    if made_for is not None and wanted > made_for:
        raise ConfigError(f"llm.max_model_len: {wanted} is above the model's own {made_for}", param="llm")
    return wanted
