"""The exception tree.

    HfPagedError
    ├── InvalidArgument (ValueError)        an argument is wrong; the message names it
    │   ├── UnsupportedOption               an option of `generate` or the engine that cannot be honoured here
    │   └── RequestTooLarge                 a request that could never fit, refused when it is added
    ├── UnsupportedModel (ValueError)       `patch` cannot promise this model's own tokens, and says why
    ├── VerificationFailed (RuntimeError)   `patch(verify=True)` found results that differ from the unpatched model's
    ├── KernelUnavailable (RuntimeError)    a kernel that was asked for by name cannot run here
    ├── QueueFull (RuntimeError)            the waiting queue is at its bound
    ├── CacheFull (RuntimeError)            the KV cache has no blocks left for rows that must go on together
    ├── EngineClosed (RuntimeError)         the engine was closed
    ├── ParallelError (RuntimeError)        one of the processes that hold a sharded model died, hung, failed or disagreed
    └── RequestFailed (RuntimeError)        one request ended with an error; its cause is `__cause__`
        └── DeadlineExceeded (TimeoutError) the request's deadline passed
"""


class HfPagedError(Exception):
    """Base of every error hf_paged raises on purpose."""


class InvalidArgument(HfPagedError, ValueError):
    """A caller's argument is wrong. The message starts with the argument's name."""


class UnsupportedOption(InvalidArgument):
    """An option that cannot be honoured here; it is refused rather than ignored."""


class RequestTooLarge(InvalidArgument):
    """The request could never be scheduled: it exceeds the model's length or the KV cache."""


class UnsupportedModel(HfPagedError, ValueError):
    """The model's class cannot be served with its own tokens; the message gives the reason."""


class VerificationFailed(HfPagedError, RuntimeError):
    """The self-check of `patch(verify=True)` failed; the message names the first layer that differs, and by how much."""


class KernelUnavailable(HfPagedError, RuntimeError):
    """A kernel or backend asked for by name cannot run on this machine."""


class QueueFull(HfPagedError, RuntimeError):
    """The engine's waiting queue is full; try again later."""


class CacheFull(HfPagedError, RuntimeError):
    """The KV cache has no blocks left for rows that must go on together, such as beams."""


class EngineClosed(HfPagedError, RuntimeError):
    """The engine has been closed."""


class ParallelError(HfPagedError, RuntimeError):
    """One of the processes that hold a sharded model died, hung, failed or disagreed with rank 0: none can go on."""


class RequestFailed(HfPagedError, RuntimeError):
    """One request failed. `request_id` tells which; `__cause__` holds the original exception.

    Raised by `Engine.generate`, it also carries `outputs`: what became of every prompt of the call, in order.
    """

    outputs: list | None = None

    def __init__(self, request_id: str, message: str):
        super().__init__(f"request {request_id}: {message}")
        self.request_id = request_id


class DeadlineExceeded(RequestFailed, TimeoutError):
    """The request's deadline passed before it finished."""
