"""Small random models of many architectures: each is answered as ``generate`` does, or refused at load."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from transformers import PreTrainedModel

from blaze.engines.llm import loading
from blaze.engines.llm.engine import LLMEngine
from blaze.engines.llm.fused_model import FusedModel, Layer, LinearFormat, fuse
from blaze.errors import ConfigError, ModelSourceError
from blaze.models.sources import FolderSource
from blaze.types import TokenId
from tests.golden.llm import Tally, ask_one, running, served_by, without
from tests.golden.tiny_models import BYTES, CONTEXT, FUSED, REFUSED, STOCK, save

pytestmark = pytest.mark.models

TOKENS = 20
# Chunked: the longest takes several steps, in which others decode.
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": CONTEXT,
    "max_batch_tokens": 32,
    "max_batch_size": 8,
    "kv_cache_memory": 2**24,
}


def _prompts() -> list[tuple[TokenId, ...]]:
    draw = random.Random(0)
    return [tuple(draw.randrange(BYTES) for _ in range(length)) for length in (1, 9, 23, 60, 150)]


def _generate(model: PreTrainedModel, prompt: tuple[TokenId, ...]) -> tuple[list[TokenId], list[float]]:
    """Ids, and the gaps between the two best logits."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=BYTES + 2,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(output.logits).topk(2, dim=-1).values
    return output.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


async def _ids(engine: LLMEngine) -> list[tuple[TokenId, ...]]:
    answers = await asyncio.gather(*(ask_one(engine, prompt, max_tokens=TOKENS) for prompt in _prompts()))
    return [answer.ids for answer in answers]


def _check_answers(engine: LLMEngine, model: PreTrainedModel) -> None:
    tally = Tally()
    for prompt, ids in zip(_prompts(), asyncio.run(_ids(engine)), strict=True):
        tally.compare(ids, *_generate(model, prompt))
    tally.report(type(model).__name__)
    assert tally.near_ties == 0
    assert tally.tokens >= 3 * TOKENS


@pytest.mark.parametrize("name", FUSED)
def test_the_llama_family_is_served_fused(name: str, tmp_path: Path) -> None:
    model = save(tmp_path, FUSED[name])
    with running(FolderSource(tmp_path), **OPTIONS, runner="fused") as engine:
        assert served_by(engine).startswith("fused")
        _check_answers(engine, model)


@pytest.mark.parametrize("name", STOCK)
def test_other_architectures_are_served_by_the_stock_model(name: str, tmp_path: Path) -> None:
    model = save(tmp_path, STOCK[name])
    with running(FolderSource(tmp_path), **OPTIONS) as engine:
        assert served_by(engine) == "stock"
        _check_answers(engine, model)


def test_a_compiled_model_answers_alike(tmp_path: Path) -> None:
    model = save(tmp_path, STOCK["gpt2"])
    with running(FolderSource(tmp_path), **OPTIONS, compile=True) as engine:
        _check_answers(engine, model)


@pytest.mark.parametrize("name", [name for name in FUSED if "llama-" not in name])
def test_the_stock_runner_serves_the_llama_family_alike(name: str, tmp_path: Path) -> None:
    model = save(tmp_path, FUSED[name])
    with running(FolderSource(tmp_path), **OPTIONS, runner="stock") as engine:
        assert served_by(engine) == "stock"
        _check_answers(engine, model)


@pytest.mark.parametrize("name", FUSED)
def test_torch_operators_serve_where_there_is_no_compiler(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "library")
    model = save(tmp_path, FUSED[name])
    with running(FolderSource(tmp_path), **OPTIONS, runner="fused") as engine:
        assert served_by(engine) == "fused, torch operators"
        _check_answers(engine, model)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_when_it_is_loaded(name: str, tmp_path: Path) -> None:
    save(tmp_path, REFUSED[name])
    with pytest.raises(ModelSourceError, match="source"), running(FolderSource(tmp_path), **OPTIONS):
        pass


def test_longrope_is_served_within_its_first_context(tmp_path: Path) -> None:
    model = save(tmp_path, REFUSED["phi3-longrope"])
    prompt = _prompts()[2]
    with running(FolderSource(tmp_path), **OPTIONS | {"max_model_len": 64}) as engine:
        answer = asyncio.run(ask_one(engine, prompt, max_tokens=TOKENS))
    Tally().compare(answer.ids, *_generate(model, prompt))


@pytest.mark.parametrize(
    "options", [{"runner": "fused"}, {"quantization": "int8"}, {"deterministic": True, "dtype": "bfloat16"}]
)
def test_what_needs_the_fused_runner_is_refused_without_it(options: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, STOCK["gpt2"])
    with (
        pytest.raises(ConfigError, match=r"fused.*GPT2LMHeadModel"),
        running(FolderSource(tmp_path), **OPTIONS | options),
    ):
        pass


# --- A fused model that computes something else is found out ------------------------------------------


Model: TypeAlias = FusedModel[Any]


def _each(model: Model, change: Callable[[int, Layer[Any]], Layer[Any]]) -> Model:
    return replace(model, layers=tuple(change(index, layer) for index, layer in enumerate(model.layers)))


def _scale(model: Model) -> Model:
    return _each(model, lambda _, layer: replace(layer, heads=replace(layer.heads, scale=1.0)))


def _window(model: Model) -> Model:
    return _each(model, lambda _, layer: replace(layer, heads=replace(layer.heads, window=8)))


def _weight(model: Model) -> Model:
    return _each(
        model, lambda index, layer: replace(layer, output=model.layers[1].output) if index == 0 else layer
    )


def _angles(model: Model) -> Model:
    return replace(model, sin=-model.sin)


def _epsilon(model: Model) -> Model:
    return replace(model, eps=0.1)


def _not_a_number(model: Model) -> Model:
    return replace(model, final_norm=model.final_norm * float("nan"))


WRONG = (_scale, _window, _weight, _angles, _epsilon, _not_a_number)


def _spoil(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Model], Model]) -> None:
    def spoilt(model: PreTrainedModel, max_model_len: int, linears: LinearFormat[Any]) -> Model:
        return wrong(fuse(model, max_model_len, linears))

    monkeypatch.setattr(loading, "fuse", spoilt)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_fused_model_gives_way_to_the_stock_one(
    wrong: Callable[[Model], Model], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(tmp_path, FUSED["llama-grouped-llama3"])
    _spoil(monkeypatch, wrong)
    with running(FolderSource(tmp_path), **OPTIONS | {"dtype": dtype}) as engine:
        assert served_by(engine) == "stock"
        if dtype == "float32" and wrong is _weight:  # its weights are whole again
            _check_answers(engine, model)


@pytest.mark.parametrize("options", [{"runner": "fused"}, {"quantization": "int8"}])
def test_a_wrong_fused_model_is_refused_where_nothing_else_will_do(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, FUSED["llama"])
    _spoil(monkeypatch, _window)
    with (
        pytest.raises(ConfigError, match="its logits differ from the stock model's"),
        running(FolderSource(tmp_path), **OPTIONS | options),
    ):
        pass


def test_a_fused_model_within_rounding_is_kept(tmp_path: Path) -> None:
    save(tmp_path, FUSED["llama"])
    for options in ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "int8"}):
        with running(FolderSource(tmp_path), **OPTIONS | options) as engine:
            assert served_by(engine).startswith("fused")
