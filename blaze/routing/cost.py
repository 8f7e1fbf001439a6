"""What a request costs a replica, in one unit for all requests of a model.

LLMs: 0.1 for each prompt token that is not at hand, 1 for each token of output that is expected. Diffusion:
denoising steps times pixels times images.
"""

from __future__ import annotations

from blaze.types import ChatPrompt, GenerateRequest, ImageRequest, Prompt, Request, TokenPrompt

PROMPT_TOKEN = 0.1
OUTPUT_TOKEN = 1.0
BYTES_PER_TOKEN = 4  # until the engine has said how many there are
_UNKNOWN_OUTPUT = 256.0  # tokens, before the model has answered anything
_EWMA = 0.1  # weight of a new sample
_STEPS, _SIDE = 50, 512  # where the request leaves them to the model


class CostModel:
    """Of one model. Learns how long its answers are, and what its requests cost."""

    def __init__(self) -> None:
        self._output = _UNKNOWN_OUTPUT
        self._learned_output = False
        self._typical: float | None = None

    @property
    def typical(self) -> float:
        """EWMA of the costs of requests."""
        return 1.0 if self._typical is None else self._typical

    def of(self, request: Request) -> float:
        """What the request is expected to cost, before anything is known but itself."""
        if isinstance(request, ImageRequest):
            steps, width = request.num_inference_steps or _STEPS, request.width or _SIDE
            return float(steps * width * (request.height or _SIDE) * request.n)
        return self.of_text(request, prompt_tokens(request.prompt), cached_tokens=0)

    def of_text(self, request: GenerateRequest, tokens: float, *, cached_tokens: int) -> float:
        """The same, with what the engine has said of the prompt."""
        sampling = request.sampling
        done = sum(map(len, request.generated))
        limit = sampling.max_tokens
        output = 2 * self._output if limit is None else min(float(limit), 2 * self._output)
        expected = max(0.0, output * sampling.n - done)
        return PROMPT_TOKEN * (tokens + done - cached_tokens) + OUTPUT_TOKEN * expected

    def started(self, cost: float) -> None:
        self._typical = cost if self._typical is None else self._typical + _EWMA * (cost - self._typical)

    def finished(self, output_tokens: float) -> None:
        """Output tokens of one choice."""
        if self._learned_output:
            self._output += _EWMA * (output_tokens - self._output)
        else:
            self._output, self._learned_output = output_tokens, True


def prompt_tokens(prompt: Prompt) -> float:
    """As far as can be told without a tokenizer."""
    if isinstance(prompt, TokenPrompt):
        return float(len(prompt.token_ids))
    if isinstance(prompt, ChatPrompt):
        size = sum(_bytes(message.content) + _bytes(message.tool_calls) for message in prompt.messages)
        size += _bytes(prompt.tools)
    else:
        size = _bytes(prompt.text)
    return size / BYTES_PER_TOKEN


def _bytes(text: str | None) -> int:
    return len((text or "").encode("utf-8", "surrogatepass"))  # over a handle, lone surrogates come too
