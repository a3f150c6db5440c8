"""Checks shared by the configuration sections."""

from __future__ import annotations

from rlmed.core.spelling import closest

PRODUCT_USES = ("few_rows", "many_rows", "weight_gradients", "packed_weights")
"""Uses of float32 matrix products on a CPU: decoding, prompts and learning, weight gradients."""


class ConfigError(ValueError):
    """Invalid key or value; the message names it and says what to do."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    near = closest(value, allowed)
    meant = f"; did you mean {near}?" if near else ""
    require(value in allowed, f"Invalid {key}={value!r}; expected one of {', '.join(allowed)}{meant}")
