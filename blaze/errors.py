"""One error tree: every failure that a user can see has a code, an HTTP status and a retry rule.

The tree is made of ordinary exceptions inside a process. Between processes an error travels as
:class:`ErrorInfo`, a plain value, so that no side needs the other's exception classes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ErrorInfo:
    """What a client may know of a failure, in the terms of OpenAI's error object."""

    message: str
    type: str  # "invalid_request_error", "overloaded_error", "server_error", ...
    code: str | None
    param: str | None
    http_status: int
    retryable: bool  # another replica may succeed where this one failed
    is_failure: bool  # counts against the replica; client errors and overload do not
    replica_gone: bool = False  # the replica went away under the request, which can begin anew elsewhere
    retry_after_s: float | None = None


class BlazeError(Exception):
    """Root of the tree; never raised itself.

    ``retryable``: another replica may succeed. ``is_failure``: the replica is to blame.
    """

    http_status = 500
    type = "server_error"
    code: str | None = "internal_error"
    retryable = False
    is_failure = True
    replica_gone = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def info(self) -> ErrorInfo:
        return ErrorInfo(
            message=self.message,
            type=self.type,
            code=self.code,
            param=self.param,
            http_status=self.http_status,
            retryable=self.retryable,
            is_failure=self.is_failure,
            replica_gone=self.replica_gone,
            retry_after_s=self.retry_after_s,
        )


# --- The client's side: 4xx, never retried, never held against a replica ---------------------------


class InvalidRequest(BlazeError):
    """The request cannot be served as it was sent; ``param`` names the field."""

    http_status = 400
    type = "invalid_request_error"
    code: str | None = None
    is_failure = False


class ContextLengthExceeded(InvalidRequest):
    """Prompt and requested output do not fit the model's context."""

    code = "context_length_exceeded"

    def __init__(self, *, limit: int, prompt_tokens: int, requested_tokens: int | None, param: str) -> None:
        asked = "" if requested_tokens is None else f" and {requested_tokens} output tokens were requested"
        super().__init__(
            f"This model's context is {limit} tokens; the prompt has {prompt_tokens} tokens{asked}.",
            param=param,
        )


class NotFound(InvalidRequest):
    """No such path."""

    http_status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """The name is not on the allow-list of the config."""

    code = "model_not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"The model `{name[:80]}` does not exist.", param="model")


class MethodNotAllowed(InvalidRequest):
    http_status = 405
    code = "method_not_allowed"


class PayloadTooLarge(InvalidRequest):
    http_status = 413
    code = "payload_too_large"


class UnsupportedOperation(InvalidRequest):
    """The operation is known, but this model or this version of Blaze does not offer it."""

    http_status = 501
    code = "not_implemented"


class ContentFlagged(InvalidRequest):
    """The safety checker of the model's config found something in the image."""

    code = "content_policy_violation"


class Unauthorized(InvalidRequest):
    """No API key, or one that nobody has; the message never repeats it."""

    http_status = 401
    code = "invalid_api_key"


class Forbidden(InvalidRequest):
    """The key is good, but not for this."""

    http_status = 403
    code = "admin_key_required"


class RateLimited(BlazeError):
    """The key is over its requests per minute; ``retry_after_s`` says when it is not any more."""

    http_status = 429
    type = "requests"
    code = "rate_limit_exceeded"
    is_failure = False


class TokensLimited(RateLimited):
    """The key is over its tokens per minute."""

    type = "tokens"


# --- Load and time: neutral, the caller may come back ----------------------------------------------


class Overloaded(BlazeError):
    """Nobody can take the request now; ``retry_after_s`` says when to come back."""

    http_status = 503
    type = "overloaded_error"
    code = "overloaded"
    retryable = True
    is_failure = False


class Draining(Overloaded):
    """Nothing new is begun: the cluster is in maintenance, or about to stop."""

    code = "draining"
    retryable = False


class ModelUnavailable(Overloaded):
    """Replicas of the model cannot be started; it takes an operator to change that."""

    code = "model_unavailable"


class DeadlineExceeded(BlazeError):
    """The request's deadline passed before it was finished."""

    http_status = 504
    type = "timeout_error"
    code = "deadline_exceeded"
    is_failure = False


class Cancelled(BlazeError):
    """The caller left; nobody reads this."""

    http_status = 499
    code = "cancelled"
    is_failure = False


# --- The replica's side ----------------------------------------------------------------------------


class EngineFailure(BlazeError):
    """The engine raised while it worked on the request."""

    code = "engine_error"
    retryable = True


class ReplicaLost(BlazeError):
    """The replica died or left the pool."""

    http_status = 502
    code = "replica_lost"
    retryable = True
    replica_gone = True


class ReplicaUnreachable(ReplicaLost):
    """The call did not get through. The replica may be dead, or only out of reach for a moment."""

    code = "replica_unreachable"


class ReplicaStopping(BlazeError):
    """The replica is shutting down in good order: the request belongs to another one."""

    http_status = 503
    type = "overloaded_error"
    code = "replica_stopping"
    retryable = True
    replica_gone = True
    is_failure = False


class OtherVariant(BlazeError):
    """The answer was begun by an engine of another revision, type of numbers or quantization: on this one it
    would not go on as it began."""

    http_status = 503
    type = "overloaded_error"
    code = "other_variant"
    retryable = True
    is_failure = False


class ReplicaDrained(BlazeError):
    """The replica is being drained, and there is a place for the request on another one."""

    http_status = 503
    type = "overloaded_error"
    code = "replica_drained"
    retryable = True
    is_failure = False


class PoisonRequest(BlazeError):
    """Two replicas have died as they began to work on the request: no third one is tried."""

    code = "poison_request"
    is_failure = False


class NonFiniteOutput(BlazeError):
    """The model produced NaN or infinity; a black picture is never sent as an answer."""

    code = "non_finite_output"


# --- The operator's side ---------------------------------------------------------------------------


class ConfigError(BlazeError):
    """The configuration is refused; the message names every wrong field."""

    code = "invalid_config"


class ModelSourceError(ConfigError):
    """The model's files are missing, or of a kind that is never loaded (pickle)."""

    code = "invalid_model_source"


class EnvironmentProblem(BlazeError):
    """This machine cannot do what was asked: a port in use, no Ray, too little memory."""

    code = "environment"


class RemoteError(BlazeError):
    """An error that came from another process; it carries that process's :class:`ErrorInfo`."""

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info.message, param=info.param, retry_after_s=info.retry_after_s)
        self.http_status = info.http_status
        self.type = info.type
        self.code = info.code
        self.retryable = info.retryable
        self.is_failure = info.is_failure
        self.replica_gone = info.replica_gone
