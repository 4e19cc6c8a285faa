"""What must hold before models are measured against each other, and the sequences that a text gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.cli.measure import file_digests
from fewbits.cli.measured import Subject

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def check_subjects(subjects: Sequence[Subject], *, tokens: int, sampled: bool) -> None:
    """Refuse what cannot be compared, before anything is loaded: from headers, configs and tokenizers.

    tokens: length of the sequences; sampled: whether the first model is to sample them. A folder without
    tokenizer, as save_pretrained of a model alone leaves it, is taken to have that of the first.

    Raises ValueError or OSError, naming the model, or both models that do not fit.
    """
    reference = subjects[0]
    for subject in subjects:
        with _naming(subject):
            file_digests(Path(subject.folder))
        config = _text_config(subject)
        longest = getattr(config, "max_position_embeddings", None) or tokens
        if tokens > longest:
            raise ValueError(
                f"{subject.label} takes at most {longest} tokens; got --tokens {tokens}. Give fewer"
            )
    begin = getattr(_text_config(reference), "bos_token_id", None)
    if sampled and not isinstance(begin, int):
        raise ValueError(
            f"{reference.label} has no begin token to sample from (bos_token_id is {begin!r} in its "
            "config.json); give a text to compare on: --text FILE"
        )
    for other in subjects[1:]:
        _check_vocabularies(reference, other)


def _check_vocabularies(reference: Subject, other: Subject) -> None:
    sizes = [_text_config(one).vocab_size for one in (reference, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{reference.label} has a vocabulary of {sizes[0]} tokens and {other.label} one of {sizes[1]}; "
            "only models of one vocabulary can be compared"
        )
    if not (has_tokenizer(reference) and has_tokenizer(other)):
        return
    ours, theirs = (_tokenizer(one).get_vocab() for one in (reference, other))
    if odd := sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)):
        raise ValueError(
            f"{reference.label} and {other.label} have different tokenizers: {len(odd)} tokens are not the "
            f"same, such as {odd[0]!r} ({ours.get(odd[0])} and {theirs.get(odd[0])}); only models of one "
            "vocabulary can be compared"
        )


def text_sequences(reference: Subject, path: Path, *, tokens: int, count: int | None) -> Tensor:
    """The UTF-8 text of a file as token sequences, int64 [n, tokens], on the tokenizer of `reference`.

    The text is tokenized whole, without special tokens, and cut from its start into pieces, one a sequence.
    Where the tokenizer puts a begin token before a text, each sequence starts with it, and its piece is one
    token shorter. The rest that fills no sequence is left out; at most `count` sequences are made.

    Raises ValueError for a text that fills fewer than two sequences, or is no UTF-8.
    """
    if not has_tokenizer(reference):
        raise ValueError(f"{reference.label} has no tokenizer, which --text needs; add its tokenizer files")
    tokenizer = _tokenizer(reference)
    found = tokenizer(_read_text(path), add_special_tokens=False).input_ids
    starts = tokenizer("").input_ids[:1]
    lead = starts if starts == [tokenizer.bos_token_id] else []
    piece = tokens - len(lead)
    full = len(found) // piece
    if full < 2:
        raise ValueError(
            f"{path} gives {len(found)} tokens, and two sequences of {tokens} need {2 * piece}; give a "
            f"longer text or a smaller --tokens"
        )
    full = full if count is None else min(full, count)
    cut = torch.tensor(found[: full * piece], dtype=torch.int64).view(full, piece)
    begin = torch.tensor(lead, dtype=torch.int64).expand(full, len(lead))
    return torch.cat([begin, cut], dim=1)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text: {error.reason} at byte {error.start}; convert it to UTF-8"
        ) from error


def has_tokenizer(subject: Subject) -> bool:
    """Whether the folder holds a tokenizer; that of a model saved alone does not."""
    return any((Path(subject.folder) / name).is_file() for name in TOKENIZER_FILES)


def _tokenizer(subject: Subject) -> Any:
    import transformers

    with _naming(subject):
        return transformers.AutoTokenizer.from_pretrained(subject.folder, trust_remote_code=False)


def _text_config(subject: Subject) -> Any:
    import transformers

    with _naming(subject):
        config = transformers.AutoConfig.from_pretrained(subject.folder, trust_remote_code=False)
        return config.get_text_config()


@contextmanager
def _naming(subject: Subject) -> Iterator[None]:
    """Name the model in what goes wrong. Its files are foreign, and a reader may fail on them in any way."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{subject.label}: {error}") from error
