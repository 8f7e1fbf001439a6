"""How a request wants its tokens drawn."""

from __future__ import annotations

from dataclasses import dataclass

from blaze.checks import are_texts, check, check_seed, is_count, is_index, is_number

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn, with the meanings that transformers and OpenAI give to these names.

    ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 filter nothing. The repetition
    penalty looks at prompt and output, the frequency and presence penalties at the output alone.
    """

    max_tokens: int | None = None  # None: what is left of the context; 0: only with ``echo``
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None  # None: the dispatcher draws one before the first attempt
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # before that many, no end-of-sequence or stop token is drawn
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None  # None: none; k: of the chosen token and of the k likeliest
    echo: bool = False  # the prompt comes before the output, with its log probabilities if asked for

    def __post_init__(self) -> None:
        """Raises :class:`InvalidRequest`: calls over a handle pass through no other validation."""
        least = 0 if self.echo else 1
        check(
            self.max_tokens is None or is_index(self.max_tokens, least),
            "max_tokens",
            f"must be an integer, at least {least}",
        )
        check(
            is_number(self.temperature) and 0 <= self.temperature <= 2,
            "temperature",
            "must be between 0 and 2",
        )
        check(is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1")
        check(is_index(self.top_k), "top_k", "must be an integer, at least 0")
        check(is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "must be between 0 and 1")
        check(
            is_number(self.repetition_penalty) and 0 < self.repetition_penalty <= 10,
            "repetition_penalty",
            "must be above 0 and at most 10",
        )
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            check(is_number(value) and -2 <= value <= 2, name, "must be between -2 and 2")
        check(
            all(
                is_index(token) and is_number(bias) and -100 <= bias <= 100 for token, bias in self.logit_bias
            ),
            "logit_bias",
            "must map token ids to numbers between -100 and 100",
        )
        check(all(is_index(token) for token in self.stop_token_ids), "stop_token_ids", "must be token ids")
        check(is_index(self.min_tokens), "min_tokens", "must be an integer, at least 0")
        check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", "is above max_tokens"
        )
        check(
            self.logprobs is None or (is_index(self.logprobs) and self.logprobs <= MAX_LOGPROBS),
            "logprobs",
            f"must be an integer, 0 to {MAX_LOGPROBS}",
        )
        check(is_count(self.n), "n", "must be an integer, at least 1")
        check(are_texts(self.stop), "stop", "must be a tuple of non-empty strings")
        check_seed(self.seed)
