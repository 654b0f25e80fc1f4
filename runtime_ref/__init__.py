"""Run a bundle: generate text with a target and its drafter, on numpy and the backend's runtime.

An application imports these names and no others: `open_decoder` loads a bundle into a `Decoder`, whose `stream` and
`chat` return a `Stream` of `Token`s; `Stream.stats` is a `Stats`, `Stream.calls` are `ToolCall`s. A `Conversation` is
one of several with a decoder. `Sampling` has the options that choose tokens. Input that cannot be used raises
`InputError`; a check that does not hold raises `CheckError`.

Each name is loaded when it is first used. So importing a submodule such as `runtime_ref.errors` loads neither
tokenizers nor jinja2, and torch and ONNX Runtime are imported only when a bundle that needs them is opened.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime_ref.conversation import Conversation
    from runtime_ref.errors import CheckError, InputError
    from runtime_ref.sampling import Sampling
    from runtime_ref.stats import Stats
    from runtime_ref.streaming import Decoder, open_decoder
    from runtime_ref.token_stream import Stream, Token
    from runtime_ref.tool_calls import ToolCall

__all__ = [
    "CheckError",
    "Conversation",
    "Decoder",
    "InputError",
    "Sampling",
    "Stats",
    "Stream",
    "Token",
    "ToolCall",
    "open_decoder",
]

_MODULES = {
    "CheckError": "errors",
    "Conversation": "conversation",
    "Decoder": "streaming",
    "InputError": "errors",
    "Sampling": "sampling",
    "Stats": "stats",
    "Stream": "token_stream",
    "Token": "token_stream",
    "ToolCall": "tool_calls",
    "open_decoder": "streaming",
}


def __getattr__(name: str) -> Any:
    """Load one of the names above."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
