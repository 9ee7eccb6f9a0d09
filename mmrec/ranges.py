"""Ranges of a config's numbers: written in its fields' types, and checked in one place.

flip: Share = 0.5
"""

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

from mmrec.errors import UserError


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, either of which may itself be left out."""

    least: float | int
    most: float | int = math.inf
    above: bool = False
    """Only what is more than `least`."""
    below: bool = False
    """Only what is less than `most`."""

    def __contains__(self, number: float | int) -> bool:
        low = self.least < number if self.above else self.least <= number
        return low and (number < self.most if self.below else number <= self.most)

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"{'more than' if self.above else 'at least'} {self.least}"
        if self.above:
            return f"more than {self.least}, {'below' if self.below else 'at most'} {self.most}"
        return f"{self.least} to {'below ' if self.below else ''}{self.most}"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise `UserError` for a number of a config, or of its parts, that is out of range or not finite.

    `prefix` is the part's own place among the flags, such as "sampler.".
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value, flag = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if is_dataclass(value):
            check_ranges(value, f"{flag}.")
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float):
                continue
            if not math.isfinite(number):
                raise UserError(f"--{flag} {number}: expected a finite number")
            for allowed in _ranges_in(hints[field.name]):
                if number not in allowed:
                    raise UserError(f"--{flag} {number}: expected {allowed}")


def _ranges_in(hint: Any) -> list[Range]:
    """The ranges in a type, and in what it is made of: `Count | None`, `tuple[Positive, ...]`."""
    own = [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Range)]
    return own + [found for part in get_args(hint) for found in _ranges_in(part)]
