"""Options of the engines: what a model's entry says under ``llm``, ``diffusion`` or ``simulator``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def _is_bytes_or_a_fraction(value: object) -> object:
    """One rule ahead of the union: errors of its members would each name a path of their own."""
    is_bytes = type(value) is int and value >= 2**20
    if not is_bytes and not (type(value) is float and 0 < value < 1):
        raise ValueError("must be bytes, at least 1048576, or a fraction of free memory between 0 and 1")
    return value


KVCacheMemory = Annotated[int | float, BeforeValidator(_is_bytes_or_a_fraction)]


class Settings(BaseModel):
    """A misspelt field is an error, not a setting that silently does nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LLMConfig(Settings):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    runner: Literal["auto", "fused", "stock"] = "auto"  # fused: the Llama family, checked against stock
    quantization: Literal["none", "int8"] = "none"  # of the weights
    compile: bool = False  # torch.compile of the stock model
    deterministic: bool = False  # refuse to start where the batch may change the bits of an answer
    max_batch_size: PositiveInt = 32  # sequences in one step
    max_batch_tokens: Annotated[int, Field(ge=1, le=65_536)] = 512  # tokens in one step
    prefill_chunk: PositiveInt | None = None  # of them, of prompts while others generate; None: see below
    max_model_len: PositiveInt | None = None  # tokens; None: what the model was made for
    kv_cache_memory: KVCacheMemory = 0.2  # fraction: of what is free once the weights are loaded
    prefix_caching: bool = True
    threads: PositiveInt | None = None  # math threads; None: num_cpus, or all cores when that is below 1

    @model_validator(mode="after")
    def _a_step_holds_the_batch(self) -> LLMConfig:
        if self.max_batch_tokens < self.max_batch_size:
            raise ValueError(
                f"max_batch_tokens {self.max_batch_tokens} is below max_batch_size {self.max_batch_size}"
            )
        if self.prefill_chunk is not None and self.prefill_chunk > self.max_batch_tokens:
            raise ValueError(
                f"prefill_chunk {self.prefill_chunk} is above max_batch_tokens {self.max_batch_tokens}"
            )
        return self

    def prefill_chunk_on(self, device: str) -> int:
        """A CPU takes tens of milliseconds for 96 tokens, and is hardly faster per token with more."""
        if self.prefill_chunk is not None:
            return self.prefill_chunk
        return min(96, self.max_batch_tokens) if device == "cpu" else self.max_batch_tokens


class QuantizationConfig(Settings):
    """Weights made smaller as they are loaded, by a library that has to be installed."""

    backend: Literal["bitsandbytes", "torchao", "quanto"]
    weights: Literal["int8", "int4", "float8"] = "int8"
    components: tuple[str, ...] = ()  # of the pipeline; none: the denoiser

    @model_validator(mode="after")
    def _the_backend_has_it(self) -> QuantizationConfig:
        lacks = {"bitsandbytes": "float8", "quanto": "int4"}  # quanto's int4 needs gradients to be on
        if self.weights == lacks.get(self.backend):
            raise ValueError(f"weights: {self.backend} has no {self.weights} that could be served")
        return self


AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]{0,63}$")]


class DiffusionConfig(Settings):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False  # the same bits whatever shares a step: steps are padded to a fixed size
    max_batch_size: PositiveInt = 8  # images in one step; also of one request
    max_steps: PositiveInt = 200
    max_pixels: PositiveInt = 2048 * 2048  # width x height of one image
    threads: PositiveInt | None = None
    loras: dict[AdapterName, str] = Field(default_factory=dict)  # name -> source
    safety_checker: bool = False  # the model's own, which is left out otherwise
    compile: bool = False  # torch.compile of the denoiser
    channels_last: bool = False
    attention_slicing: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    offload: Literal["none", "model", "sequential", "group"] = "none"  # of weights, to the CPU's memory
    layerwise_casting: Literal["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"] | None = None
    quantization: QuantizationConfig | None = None

    @model_validator(mode="after")
    def _options_agree(self) -> DiffusionConfig:
        """All contradictions at once: who mends one must not have to come back for the next."""
        wrong = [reason for holds, reason in self._contradictions() if holds]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _contradictions(self) -> tuple[tuple[bool, str], ...]:
        on_cpu, narrow = self.device == "cpu", ("bfloat16", "float16")
        casts, quantizes = self.layerwise_casting, self.quantization is not None
        by_bitsandbytes = self.quantization is not None and self.quantization.backend == "bitsandbytes"
        one_by_one = self.offload == "sequential"
        return (
            (
                on_cpu and self.offload in ("model", "sequential"),
                f"offload: {self.offload} moves weights to a GPU, and device is cpu",
            ),
            (on_cpu and by_bitsandbytes, "quantization: bitsandbytes needs a GPU, and device is cpu"),
            (
                self.compile and self.offload != "none",
                "compile: excludes offload, whose hooks break the graph",
            ),
            (self.compile and casts is not None, "compile: excludes layerwise_casting, whose hooks do too"),
            (self.compile and bool(self.loras), "compile: excludes loras, each scale of which compiles anew"),
            (
                quantizes and casts is not None,
                "quantization: excludes layerwise_casting; both store the weights",
            ),
            (quantizes and one_by_one, "quantization: excludes offload sequential, which takes layers apart"),
            (
                by_bitsandbytes and self.offload == "group",
                "quantization: bitsandbytes excludes offload group, which takes layers apart",
            ),
            (
                casts is not None and one_by_one,
                "layerwise_casting: excludes offload sequential; both replace the weights of a layer",
            ),
            (
                casts in narrow and self.dtype in narrow,
                f"layerwise_casting: {casts} saves nothing with dtype {self.dtype}",
            ),
        )


class SimulatorConfig(Settings):
    """An engine without a model: answers at a set pace, the same for the same seed."""

    ttft_ms: NonNegativeFloat = 20.0
    inter_token_ms: NonNegativeFloat = 5.0
    tokens: PositiveInt = 16  # of an answer; a smaller max_tokens of the request wins
    jitter: Fraction = 0.0  # each wait is multiplied by 1 + U(-jitter, jitter)
    slots: PositiveInt = 8  # requests served at once; the others queue
    slowdown: dict[int, PositiveFloat] = Field(default_factory=dict)  # replica rank -> factor on all waits
    fail_rate: dict[int, Fraction] = Field(
        default_factory=dict
    )  # replica rank -> share of requests that fail
    fail_for_s: dict[int, PositiveFloat] = Field(
        default_factory=dict
    )  # replica rank -> seconds from its first request on in which all fail
    hang: dict[int, Fraction] = Field(default_factory=dict)  # replica rank -> share that never answers
    fail_load: bool = False  # as a model does whose weights cannot be read
    seed: int = 0
