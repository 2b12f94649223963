"""Checks for the values of a config; each message says what was given and what is allowed.

Public names: `require`, `require_at_least`, `require_positive`, `require_between`, `multiples`,
`divisors`.
"""

import math

__all__ = [
    "divisors",
    "multiples",
    "require",
    "require_at_least",
    "require_between",
    "require_positive",
]


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


# Past these a value overflows as soon as it reaches a device.
_INT32_LIMIT = 2**31
_FLOAT32_LIMIT = 2.0**128


def require_at_least(name: str, value: int, low: int) -> None:
    """Raises ValueError unless `value` is `low` or more, and an int32."""
    require(value >= low, f"{name} is {value}; allowed: {low} or more.")
    require(value < _INT32_LIMIT, f"{name} is {value}; allowed: less than {_INT32_LIMIT}.")


def require_positive(name: str, value: float) -> None:
    """Raises ValueError unless `value` is positive and finite in float32; NaN is neither."""
    require(
        0 < value < _FLOAT32_LIMIT,
        f"{name} is {value}; allowed: a positive number below {_FLOAT32_LIMIT:.2g}.",
    )


def require_between(
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    closed_high: bool = False,
) -> None:
    """Raises ValueError unless `value` is in [low, high); NaN is in no interval.

    Args:
      name: what `value` is called in the message.
      value: what was given.
      low: lower end.
      high: upper end.
      open_low: the lower end itself is not allowed.
      closed_high: the upper end itself is allowed.
    """
    inside = (low < value if open_low else low <= value) and (
        value <= high if closed_high else value < high
    )
    left = f"more than {low}" if open_low else f"{low} or more"
    right = f"at most {high}" if closed_high else f"less than {high}"
    require(inside, f"{name} is {value}; allowed: {left} and {right}.")


def multiples(value: int, of: int) -> str:
    """Returns the multiples of `of` around `value`, such as ``"96 or 104"``."""
    below = value // of * of
    return f"{below} or {below + of}" if below else f"{of}"


def divisors(value: int) -> list[int]:
    """Returns every divisor of `value`, from 1 up."""
    low = [d for d in range(1, math.isqrt(value) + 1) if value % d == 0]
    return sorted({*low, *(value // d for d in low)})
