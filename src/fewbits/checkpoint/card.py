"""The model card of a quantized checkpoint: what it was made from, how, and what that cost in accuracy."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

# What a card of the original says that holds for the quantized model as well.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
_MAX_CARD = 60_000  # characters that are looked at
_MAX_FACT, _MAX_FACTS = 200, 50  # characters of a fact, facts in a list


def inherited(card: Path) -> dict[str, Any]:
    """The facts of a card that its quantized model inherits, such as the licence; {} where there are none.

    The card is foreign text: only short strings and short lists of them are taken, no aliases are followed,
    and a card that cannot be read is passed over.
    """
    try:
        with card.open(encoding="utf-8") as file:
            found = _FRONT_MATTER.match(file.read(_MAX_CARD))
        if found is None or any(isinstance(token, yaml.AliasToken) for token in yaml.scan(found[1])):
            return {}
        facts = yaml.load(found[1], yaml.BaseLoader)  # strings and lists of them; `no` stays a language
    except Exception:  # what a foreign text makes of a YAML reader; a card decides nothing
        return {}
    given = facts if isinstance(facts, dict) else {}
    return {key: given[key] for key in _INHERITED if _is_fact(given.get(key))}


def _is_fact(value: object) -> bool:
    if isinstance(value, list):
        return len(value) <= _MAX_FACTS and all(isinstance(item, str) and _is_fact(item) for item in value)
    return isinstance(value, str) and len(value) <= _MAX_FACT and value.isprintable()


def model_card(about: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The card as Markdown. `about` is the content of fewbits.json, `facts` what `inherited` found."""
    front = {
        "base_model": about["base_model"],
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["fewbits", about["method"]],
        **facts,
    }
    weights = about["weights"]
    original, stored = about["source_bytes"], sum(w["nbytes"] for w in weights)
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}
---

# {_text(about["name"])}

{_text(about["base_model"])}, quantized by fewbits {about["versions"]["fewbits"]}:
{_size(original)} became {_size(stored)}, {8 * stored / max(about["parameters"], 1):.2f} bits per weight.

| stored as | weights | MB | bits per weight | relative error, mean | largest |
|---|---:|---:|---:|---:|---:|
{_table(weights)}

The relative error of a weight W is ‖W − decode(W)‖ / ‖W‖. `fewbits.json` has it for every tensor, and the
reason for those that were kept.

## Use

```python
{_snippet(about)}
```

{_how(about)}"""


def merged_card(about: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The card of a base with an adapter merged into it, as Markdown; arguments as of `model_card`."""
    front = {
        "base_model": about["base_model"],
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["fewbits"],
        **facts,
    }
    changed = [weight for weight in about["weights"] if weight["reason"]]
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}
---

# {_text(about["name"])}

The adapter {_text(about["adapter"]["name"])} merged by fewbits {about["versions"]["fewbits"]} into
{_text(about["adapter"]["into"])}. {len(changed)} of {len(about["weights"])} tensors are changed,
{_size(sum(w["nbytes"] for w in about["weights"]))} in all; `fewbits.json` names them.
SHA-256 of the adapter's weights: `{about["adapter"]["sha256"]}`.

## Use

```python
{_snippet(about)}
```

{_how(about)}"""


def _how(about: Mapping[str, Any]) -> str:
    return f"""## How it was made

```bash
{about["command"]}
```

with {", ".join(f"{name} {version}" for name, version in sorted(about["versions"].items()))}.
`SHA256SUMS` lists the hashes of all files: `sha256sum --check SHA256SUMS`.
"""


def card_of(about: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The card of what a job made: merged, or else quantized."""
    return merged_card(about, facts) if "adapter" in about else model_card(about, facts)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def _text(name: str) -> str:
    """A foreign name on one line, without what Markdown takes for more than text."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(name.split()))


def _table(weights: Sequence[Mapping[str, Any]]) -> str:
    kinds = sorted({w["stored"] for w in weights})
    lines = []
    for kind in kinds:
        these = [w for w in weights if w["stored"] == kind]
        count, nbytes = sum(w["count"] for w in these), sum(w["nbytes"] for w in these)
        errors = [w["relative_error"] for w in these if w["relative_error"] is not None]
        mean = f"{sum(errors) / len(errors):.4f}" if errors else "–"
        largest = f"{max(errors):.4f}" if errors else "–"
        bits = 8 * nbytes / max(count, 1)
        lines.append(f"| {kind} | {len(these)} | {nbytes / 1e6:.2f} | {bits:.3f} | {mean} | {largest} |")
    return "\n".join(lines)


def _snippet(about: Mapping[str, Any]) -> str:
    method = about["method"]
    first = "import fewbits\n" if method == "fewbits" else ""
    note = (
        ""
        if method != "bitsandbytes"
        else "\n# bitsandbytes loads it, and so does `import fewbits` where that package is not installed"
    )
    name = json.dumps(about["name"])
    return (
        f"{first}from transformers import AutoTokenizer, {about['architecture']}\n{note}\n"
        f"model = {about['architecture']}.from_pretrained({name})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name})"
    )
