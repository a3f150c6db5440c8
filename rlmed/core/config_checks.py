"""What the sections of the configuration check their values with."""

from __future__ import annotations

PRODUCT_USES = ("few_rows", "many_rows", "weight_gradients", "packed_weights")
"""What float32 products on a CPU are made for: decoding, prompts and learning, and the gradients of weights."""


class ConfigError(ValueError):
    """A key or value that cannot be; the message names the key and the cure."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless the value of `key` is among those allowed."""
    require(value in allowed, f"{key}={value!r} is not possible: choose one of {', '.join(allowed)}")
