"""Which weight gets which Scheme: ordered rules over module names, each with a reason.

A pattern matches a module name as transformers matches skipped modules: from its start up to a module
boundary ("model.layers.1" covers all of layer 1, not layer 11), as a regular expression with the same
boundary ("model.layers.*.mlp"), or as the end of the name ("q_proj").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fewbits.format import Scheme

_EVERYTHING = ".*"


@dataclass(frozen=True)
class Rule:
    """Modules that match `pattern` get `scheme`, or are kept as they are (None), because of `reason`."""

    pattern: str
    scheme: Scheme | None
    reason: str

    def matches(self, name: str) -> bool:
        """Whether the rule covers the module called `name`."""
        return _compiled(self.pattern).match(name) is not None or name.endswith(self.pattern)

    @property
    def is_default(self) -> bool:
        """Covers everything; weights that are kept unless named need a rule of their own."""
        return self.pattern == _EVERYTHING


@dataclass(frozen=True)
class Recipe:
    """Rules in order; the first that matches a module decides."""

    rules: tuple[Rule, ...]

    def match(self, name: str) -> Rule:
        """The rule for the module called `name`; modules that no rule covers are kept."""
        unnamed = Rule(_EVERYTHING, None, "not named by the recipe")
        return next((rule for rule in self.rules if rule.matches(name)), unnamed)

    def named(self, name: str) -> Rule | None:
        """The rule that covers `name` by more than covering everything, or None."""
        rule = self.match(name)
        return None if rule.is_default else rule

    def with_skips(self, skips: Mapping[str, str]) -> Recipe:
        """The same with patterns to keep (and why), which yield to named rules but not to the default."""
        kept = [Rule(pattern, None, reason) for pattern, reason in skips.items()]
        named = [rule for rule in self.rules if not rule.is_default]
        return Recipe((*named, *kept, *(rule for rule in self.rules if rule.is_default)))

    def to_json(self) -> list[dict[str, Any]]:
        """The rules as JSON values; `from_json` reads them back."""
        return [
            {"pattern": rule.pattern, "scheme": _scheme_json(rule.scheme), "reason": rule.reason}
            for rule in self.rules
        ]

    @staticmethod
    def from_json(rules: Iterable[Mapping[str, Any]]) -> Recipe:
        """Inverse of `to_json`."""
        return Recipe(tuple(Rule(rule["pattern"], _scheme(rule["scheme"]), rule["reason"]) for rule in rules))


def _scheme_json(scheme: Scheme | None) -> dict[str, str | bool | None] | None:
    if scheme is None:
        return None
    return {
        "format": str(scheme),
        "compute_dtype": scheme.compute_dtype,
        "storage_dtype": scheme.storage_dtype,
        **({"trainable": True} if scheme.trainable else {}),
    }


def _scheme(value: Mapping[str, Any] | None) -> Scheme | None:
    if value is None:
        return None
    parsed = Scheme.parse(value["format"])
    return Scheme(
        parsed.weight,
        parsed.activation,
        value["compute_dtype"],
        value["storage_dtype"],
        value.get("trainable", False),
    )


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))")
