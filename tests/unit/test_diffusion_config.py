"""Options of the diffusion engine: what they may be, and which exclude each other."""

from __future__ import annotations

from typing import Any

import pytest

from blaze.config import parse_args
from blaze.engine_config import DiffusionConfig
from blaze.errors import ConfigError


def parse(**options: Any) -> DiffusionConfig:
    model = {"name": "m", "engine": "diffusion", "source": "org/model", "diffusion": options}
    parsed = parse_args({"models": [model]}).models[0].diffusion
    assert parsed is not None
    return parsed


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(**options)
    assert caught.value.message.startswith("models[0].diffusion")
    return caught.value.message


def test_every_option_can_be_set() -> None:
    options = parse(
        dtype="float32",
        device="cuda",
        deterministic=True,
        max_batch_size=16,
        max_steps=50,
        max_pixels=1024,
        threads=2,
        loras={"ink": "org/ink", "pencil-2": "/models/pencil.safetensors"},
        safety_checker=True,
        channels_last=True,
        attention_slicing=True,
        vae_slicing=True,
        vae_tiling=True,
        offload="model",
        quantization={"backend": "torchao", "weights": "float8", "components": ["transformer"]},
    )
    assert options.quantization is not None
    assert options.quantization.components == ("transformer",)
    assert options.loras["ink"] == "org/ink"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"offload": "disk"}, "offload"),
        ({"layerwise_casting": "int8"}, "layerwise_casting"),
        ({"quantization": {"backend": "gptq"}}, "quantization.backend"),
        ({"quantization": {"backend": "torchao", "weights": "int2"}}, "quantization.weights"),
        ({"quantization": {"backend": "bitsandbytes", "weights": "float8"}}, "float8"),
        ({"quantization": {"backend": "quanto", "weights": "int4"}}, "int4"),
        ({"quantization": {"weights": "int8"}}, "quantization.backend"),
        ({"quantization": "int8"}, "quantization"),
        ({"loras": {"a.b": "org/x"}}, "loras"),
        ({"loras": {"": "org/x"}}, "loras"),
        ({"loras": {"a": 1}}, "loras"),
        ({"loras": ["org/x"]}, "loras"),
        ({"compile": "yes"}, "compile"),
        ({"safety_checker": 1}, "safety_checker"),
        ({"attention_slice": True}, "attention_slice"),
        ({"max_batch_size": 0}, "max_batch_size"),
    ],
)
def test_a_wrong_value_is_named(options: dict[str, Any], named: str) -> None:
    assert named in refusal(**options)


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"device": "cpu", "offload": "model"}, "offload: model"),
    ({"device": "cpu", "offload": "sequential"}, "offload: sequential"),
    ({"device": "cpu", "quantization": {"backend": "bitsandbytes"}}, "quantization: bitsandbytes"),
    ({"compile": True, "offload": "group"}, "compile: excludes offload"),
    ({"compile": True, "layerwise_casting": "float8_e4m3fn"}, "compile: excludes layerwise_casting"),
    ({"compile": True, "loras": {"a": "org/a"}}, "compile: excludes loras"),
    (
        {"layerwise_casting": "float8_e5m2", "quantization": {"backend": "torchao"}},
        "quantization: excludes layerwise_casting",
    ),
    ({"offload": "sequential", "quantization": {"backend": "torchao"}}, "excludes offload sequential"),
    ({"offload": "group", "quantization": {"backend": "bitsandbytes"}}, "excludes offload group"),
    ({"offload": "sequential", "layerwise_casting": "float8_e5m2"}, "layerwise_casting: excludes offload"),
    ({"dtype": "bfloat16", "layerwise_casting": "float16"}, "layerwise_casting: float16 saves nothing"),
]


@pytest.mark.parametrize(("options", "reason"), CONTRADICTIONS)
def test_options_that_contradict_each_other_are_refused_together(
    options: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(**options)
    for name in options:  # neither alone is to blame
        parse(**{key: value for key, value in options.items() if key != name})


def test_all_contradictions_are_told_at_once() -> None:
    told = refusal(
        device="cpu", offload="model", compile=True, loras={"a": "org/a"}, layerwise_casting="float8_e5m2"
    )
    for reason in ("offload: model", "excludes offload", "excludes layerwise_casting", "excludes loras"):
        assert reason in told


def test_what_works_together_is_accepted() -> None:
    parse(device="cpu", offload="group", layerwise_casting="float8_e4m3fn", loras={"a": "org/a"})
    parse(device="cpu", compile=True, channels_last=True, attention_slicing=True, deterministic=True)
    parse(device="cpu", quantization={"backend": "quanto"}, offload="group", loras={"a": "org/a"})
    parse(dtype="float32", layerwise_casting="bfloat16")
