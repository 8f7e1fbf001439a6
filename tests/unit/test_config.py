from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from blaze.config import (
    STRATEGIES,
    BlazeConfig,
    blaze_application,
    cache_dir,
    load_serve_config,
    parse_args,
    state_dir,
)
from blaze.config_errors import field_path
from blaze.errors import ConfigError
from blaze.routing.strategies import STRATEGY_NAMES
from blaze.types import EngineKind

SIM: dict[str, Any] = {"name": "sim", "engine": "simulator"}


def parse(**args: Any) -> BlazeConfig:
    return parse_args({"models": [SIM], **args})


def parse_model(**fields: Any) -> BlazeConfig:
    """The second of two models."""
    return parse_args({"models": [SIM, {**SIM, "name": "other", **fields}]})


def refusal(**args: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(**args)
    return caught.value.message


def model_refusal(**fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_model(**fields)
    return caught.value.message


def test_a_minimal_config_has_the_documented_defaults() -> None:
    config = parse()
    assert config.router.strategy == "least_connections"
    assert (config.router.max_retries, config.router.request_timeout_s) == (2, 600.0)
    assert (config.router.max_queued, config.router.replicas) == (256, 1)
    assert (config.health.probe_period_s, config.health.missed_probes) == (1.0, 3)
    assert config.health.stall_after_s == 30.0
    (model,) = config.models
    assert (model.weight, model.replicas, model.autoscaling) == (1.0, None, None)
    assert (model.resources.num_cpus, model.resources.num_gpus) == (1.0, 0.0)
    assert (model.simulator_options.slots, model.simulator_options.tokens) == (8, 16)


@pytest.mark.parametrize("name", STRATEGIES)
def test_all_strategies_are_accepted(name: str) -> None:
    assert parse(router={"strategy": name}).router.strategy == name


# --- Every error names its field ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "path"),
    [
        ({"models": []}, "models: "),
        ({"models": 5}, "models: "),
        ({"rooter": {}}, "rooter: "),
        ({"router": 5}, "router: "),
        ({"router": {"strategy": "fastest"}}, "router.strategy: "),
        ({"router": {"replicas": 0}}, "router.replicas: "),
        ({"router": {"max_retries": -1}}, "router.max_retries: "),
        ({"router": {"request_timeout_s": math.inf}}, "router.request_timeout_s: "),
        ({"router": {"max_body_byte": 1}}, "router.max_body_byte: "),
        ({"health": {"stall_after_s": 0}}, "health.stall_after_s: "),
        ({"health": {"missed_probes": 1}}, "health.missed_probes: "),
        ({"health": {"stall_after_s": 1.0}}, "health: stall_after_s 1 must be above 4, "),
        ({"health": {"stall_after_s": 4.0}}, "health: stall_after_s 4 must be above 4, "),
        ({"health": {"probe_period_s": 40.0}}, "health: stall_after_s 30 must be above 160, "),
        ({"health": {"missed_probes": 29}}, "health: stall_after_s 30 must be above 30, "),
    ],
)
def test_case_27_a_wrong_setting_is_named_with_its_path(args: dict[str, Any], path: str) -> None:
    assert refusal(**args).startswith(path)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"wieght": 1}, "models[1].wieght: "),
        ({"engine": "vllm"}, "models[1].engine: "),
        ({"name": None}, "models[1].name: "),
        ({"weight": -1}, "models[1].weight: "),
        ({"weight": math.nan}, "models[1].weight: "),
        ({"weight": math.inf}, "models[1].weight: "),
        ({"replicas": 0}, "models[1].replicas: "),
        ({"max_in_flight": 0}, "models[1].max_in_flight: "),
        ({"resources": {"num_cpu": 1}}, "models[1].resources.num_cpu: "),
        ({"simulator": {"fail_rate": {1: 1.5}}}, "models[1].simulator.fail_rate[1]: "),
        ({"simulator": {"slowdown": {"one": 2}}}, "models[1].simulator.slowdown.one"),
        ({"simulator": {"tokens": 1.5}}, "models[1].simulator.tokens: "),
        ({"engine": "llm", "source": "x", "llm": {"max_batch_size": 0}}, "models[1].llm.max_batch_size: "),
        ({"engine": "llm", "source": "x", "llm": {"dtype": "int3"}}, "models[1].llm.dtype: "),
        ({"engine": "llm", "source": "x", "llm": {"runner": "vllm"}}, "models[1].llm.runner: "),
        ({"engine": "llm", "source": "x", "llm": {"quantization": "int3"}}, "models[1].llm.quantization: "),
        ({"engine": "llm", "source": "x", "llm": {"compile": 1}}, "models[1].llm.compile: "),
        ({"engine": "diffusion", "source": "x", "diffusion": {"steps": 1}}, "models[1].diffusion.steps: "),
    ],
)
def test_case_27_a_wrong_field_of_a_model_is_named_with_its_path(fields: dict[str, Any], path: str) -> None:
    assert model_refusal(**fields).startswith(path)


CACHE_MEMORY = "must be bytes, at least 1048576, or a fraction of free memory between 0 and 1"


@pytest.mark.parametrize(
    ("memory", "shown"),
    [
        (0, "0"),
        (-1, "-1"),
        (1, "1"),
        (2**20 - 1, "1048575"),
        (0.0, "0.0"),
        (1.0, "1.0"),
        (1.5, "1.5"),
        (2e9, "2000000000.0"),
        (math.nan, "nan"),
        ("3", "'3'"),
        ("1GiB", "'1GiB'"),
        (True, "True"),
    ],
)
def test_case_27_a_wrong_cache_memory_is_told_once(memory: object, shown: str) -> None:
    message = model_refusal(engine="llm", source="x", llm={"kv_cache_memory": memory})
    assert message == f"models[1].llm.kv_cache_memory: {CACHE_MEMORY} (got {shown})"


@pytest.mark.parametrize("memory", [None, [], {"bytes": 2**20}])
def test_case_27_a_cache_memory_that_is_no_number_is_told_once(memory: object) -> None:
    message = model_refusal(engine="llm", source="x", llm={"kv_cache_memory": memory})
    assert message == f"models[1].llm.kv_cache_memory: {CACHE_MEMORY}"


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"llm": {}}, "llm"),
        ({"engine": "llm", "source": "x", "simulator": {}}, "simulator"),
        ({"source": "x"}, "source"),
        ({"engine": "llm"}, "source"),
        ({"engine": "diffusion", "source": ""}, "source"),
        ({"name": "two words"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "../up"}, "name"),
        ({"name": "x" * 200}, "name"),
        ({"replicas": 2, "autoscaling": {}}, "autoscaling"),
        ({"autoscaling": {"target_in_flight": 4}, "max_in_flight": 4}, "autoscaling.target_in_flight"),
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "min_replicas"),
        ({"engine": "llm", "source": "x", "llm": {"max_batch_tokens": 16}}, "max_batch_tokens"),
        ({"engine": "llm", "source": "x", "llm": {"max_batch_size": 513}}, "max_batch_tokens"),
        ({"engine": "llm", "source": "x", "llm": {"prefill_chunk": 513}}, "prefill_chunk"),
    ],
)
def test_case_27_fields_that_do_not_fit_together_are_named(fields: dict[str, Any], names: str) -> None:
    message = model_refusal(**fields)
    assert message.startswith("models[1]")
    assert names in message


def test_an_unknown_strategy_is_refused_with_those_there_are() -> None:
    message = refusal(router={"strategy": "fastest"})
    assert message.startswith("router.strategy")
    assert all(known in message for known in STRATEGIES)


def test_the_names_in_configs_are_those_of_the_router() -> None:
    assert sorted(STRATEGIES) == sorted(STRATEGY_NAMES)


@pytest.mark.parametrize("proxies", [["10.0.0.0/8", "::1"], ["127.0.0.1"], []])
def test_proxies_are_addresses_and_networks(proxies: list[str]) -> None:
    assert parse(router={"trusted_proxies": proxies}).router.trusted_proxies == tuple(proxies)


@pytest.mark.parametrize("proxy", ["localhost", "10.0.0.0/33", ""])
def test_a_proxy_that_is_no_address_is_named(proxy: str) -> None:
    message = refusal(router={"trusted_proxies": ["10.0.0.1", proxy]})
    assert "router.trusted_proxies" in message
    assert repr(proxy) in message


def test_breaker_timeouts_out_of_order_are_refused() -> None:
    assert "recovery_timeout" in refusal(router={"breaker": {"recovery_timeout": 90}})


def test_duplicate_names_are_refused() -> None:
    message = refusal(models=[SIM, SIM])
    assert "models: " in message
    assert "'sim'" in message


def test_all_wrong_fields_are_told_at_once() -> None:
    message = refusal(router={"replicas": 0, "max_queued": -1}, health={"missed_probes": 0})
    assert all(
        path in message for path in ("router.replicas: ", "router.max_queued: ", "health.missed_probes: ")
    )
    assert "(got -1)" in message


def test_a_long_value_is_not_repeated_whole() -> None:
    assert len(model_refusal(name="x" * 5000)) < 1000


def test_field_paths_read_like_the_file() -> None:
    assert field_path(("models", 1, "llm", "threads")) == "models[1].llm.threads"
    assert field_path(()) == ""


# --- What follows from the settings ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "cap"),
    [
        ({"engine": "llm", "source": "x", "llm": {"max_batch_size": 5}}, 10),
        ({"engine": "diffusion", "source": "x"}, 16),
        ({"simulator": {"slots": 3}}, 6),
        ({"simulator": {"slots": 3}, "max_in_flight": 4}, 4),
    ],
)
def test_a_replica_may_have_twice_its_batch_in_flight(fields: dict[str, Any], cap: int) -> None:
    assert parse_model(**fields).models[1].in_flight_cap == cap


@pytest.mark.parametrize(
    ("fields", "zero"),
    [
        ({}, False),
        ({"autoscaling": {"min_replicas": 1}}, False),
        ({"autoscaling": {"min_replicas": 0}}, True),
    ],
)
def test_only_autoscaling_from_0_may_scale_to_zero(fields: dict[str, Any], zero: bool) -> None:
    assert parse_model(**fields).models[1].may_scale_to_zero is zero


@pytest.mark.parametrize(
    ("fields", "threads"),
    [
        ({"llm": {"threads": 3}}, 3),
        ({"resources": {"num_cpus": 2}}, 2),
        ({"resources": {"num_cpus": 5.9}}, 5),
    ],
)
def test_math_threads_follow_the_cpus_unless_set(fields: dict[str, Any], threads: int) -> None:
    assert parse_model(engine="llm", source="x", **fields).models[1].threads == threads


@pytest.mark.parametrize("memory", [2**20, 2**33, 0.2, 1e-6, 0.999])
def test_cache_memory_is_bytes_or_a_share(memory: float) -> None:
    model = parse_model(engine="llm", source="x", llm={"kv_cache_memory": memory}).models[1]
    assert model.llm_options.kv_cache_memory == memory
    assert type(model.llm_options.kv_cache_memory) is type(memory)


def test_replica_ranks_may_come_as_json_keys() -> None:
    model = parse_model(simulator={"slowdown": {"1": 5}, "hang": {2: 0.5}}).models[1]
    assert model.simulator_options.slowdown == {1: 5.0}
    assert model.simulator_options.hang == {2: 0.5}


def test_engines_have_default_options() -> None:
    model = parse_model(engine="llm", source="org/model").models[1]
    assert model.engine is EngineKind.LLM
    assert (model.llm_options.dtype, model.llm_options.max_batch_size) == ("auto", 32)
    assert (model.llm_options.runner, model.llm_options.quantization) == ("auto", "none")
    assert (model.llm_options.max_batch_tokens, model.llm_options.kv_cache_memory) == (512, 0.2)
    assert model.llm_options.prefix_caching
    assert model.diffusion_options.max_batch_size == 8


# --- The file ----------------------------------------------------------------------------------------

FILE = """
applications:
  - {name: other, import_path: "elsewhere:app"}
  - name: blaze
    import_path: deployments.app:build_app
    args: {models: [{name: sim, engine: simulator}]}
"""


def test_the_file_is_returned_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(FILE)
    loaded = load_serve_config(path)
    assert [entry["name"] for entry in loaded["applications"]] == ["other", "blaze"]
    assert parse_args(blaze_application(loaded)["args"]).models[0].name == "sim"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "not valid YAML"),
        ("", "applications"),
        ("[1, 2]", "applications"),
        ("applications: 5", "applications"),
        ("applications: []", "deployments.app:build_app"),
        ("applications: [{import_path: 'x:y'}, 7]", "deployments.app:build_app"),
    ],
)
def test_a_file_that_deploys_no_blaze_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_serve_config(path)


def test_case_27_a_missing_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load_serve_config(tmp_path / "nowhere.yaml")


# --- The environment ---------------------------------------------------------------------------------


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("BLAZE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path("/home/somebody/.cache/blaze")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert cache_dir() == Path("/fast/blaze")
    monkeypatch.setenv("BLAZE_CACHE", "/models")
    assert cache_dir() == Path("/models")


def test_the_state_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert state_dir() == Path("/home/somebody/.local/state/blaze")
    monkeypatch.setenv("XDG_STATE_HOME", "/run/state")
    assert state_dir() == Path("/run/state/blaze")


def test_math_threads_are_no_more_than_the_cores_that_the_process_may_run_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5, 8})
    assert parse_model(engine="llm", source="x", resources={"num_cpus": 0.5}).models[1].threads == 3
