"""The end of a job: what goes beside the weights, and the one rename that makes the result appear.

fewbits.json    every weight: stored as what, or kept and why; relative errors; versions; source
README.md       the model card
SHA256SUMS      hashes of all files, for `sha256sum --check` and `fewbits verify`
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbits.checkpoint.card import card_of
from fewbits.checkpoint.files import exchange, file_hash, is_temporary, sync_folder, write_atomically
from fewbits.checkpoint.folder import CONFIG, INDEX, checked_file
from fewbits.checkpoint.job import Advance, partial_folder
from fewbits.checkpoint.safetensors import CheckpointError, read_header, shown
from fewbits.checkpoint.session import read_description, read_record

SIDE_FILE = "fewbits.json"
HASHES = "SHA256SUMS"


_CARRIED = re.compile(
    r"[\w+-][\w .+-]{0,200}\.(json|txt|model|jinja|tiktoken|bpe|spm|vocab)"
    r"|(LICEN[CS]E|NOTICE|USE_POLICY|COPYING)([.-]\w{1,40})?(\.(txt|md))?",
    re.ASCII,
)
# Of no use in the result, or worse: one with an adapter_config.json is taken for an adapter.
_LEFT = re.compile(
    r"adapter_config\.json|.*\.index\.json|trainer_state\.json|training_args.*|.*\.(tmp|pkl|py)"
)
_MADE = (CONFIG, INDEX, SIDE_FILE, HASHES, "README.md")
_MAX_CARRIED = 2**30  # bytes of a file


def carried(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Files that go along with a checkpoint (tokenizer, generation config, licence): name → path; and the
    names of all else but weights, which stays behind: code, folders, other formats.

    CheckpointError for a link out of the folder.
    """
    found: dict[str, Path] = {}
    left = []
    for path in sorted(folder.iterdir()):
        name = path.name
        if name in _MADE or name.startswith(".") or name.endswith(".safetensors"):
            continue
        wanted = _CARRIED.fullmatch(name) and not _LEFT.fullmatch(name)
        if wanted and checked_file(folder, name).is_file() and path.stat().st_size <= _MAX_CARRIED:
            found[name] = path
        else:
            left.append(shown(name))
    return found, left


def finish(out: Path, *, overwrite: bool, advance: Advance = lambda _: None) -> None:
    """Check that all shards of the job for `out` are there and whole, write the rest, rename it to `out`.

    CheckpointError names what is missing or damaged; FileExistsError for an `out` that exists, unless
    `overwrite`, which replaces it. Interrupted, it can be run again.
    """
    partial = partial_folder(out)
    check_place(out)
    identity = read_description(partial)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; --overwrite replaces it")
    records = _checked_records(partial, identity, advance)
    for path in partial.iterdir():
        if is_temporary(path.name):  # of a worker that was killed
            path.unlink()
    expected = {*records, *identity["carried"], *_MADE, ".job"}
    if foreign := sorted(
        path.name for path in partial.iterdir() if path.name not in expected and path.name[0] != "."
    ):
        raise FileExistsError(f"{partial} holds {foreign[0]!r}, which is no part of the result; remove it")
    if len(records) > 1:
        write_atomically(partial / INDEX, _index(partial, identity, list(records)).encode())
    errors = {name: error for record in records.values() for name, error in record["errors"].items()}
    about = {**identity, "weights": [_entry(entry, errors) for entry in identity["weights"]]}
    del about["shards"]
    write_atomically(partial / SIDE_FILE, _json(about).encode())
    write_atomically(
        partial / "README.md", card_of(about, identity["card"]).encode(errors="backslashreplace")
    )
    hashes = {name: record["sha256"] for name, record in records.items()}
    for path in sorted(partial.iterdir()):
        if path.is_file() and path.name not in (*hashes, HASHES):
            hashes[path.name] = file_hash(path)
    lines = [f"{digest}  {name}\n" for name, digest in sorted(hashes.items())]
    write_atomically(partial / HASHES, "".join(lines).encode())
    _rename(partial, out)


def check_place(out: Path) -> None:
    """Refuse a result that would replace anything but a model: OSError or ValueError says what is there."""
    if not out.name or out.name in (".", ".."):
        raise ValueError(f"{out} names no folder that could be made")
    if out.is_symlink():
        raise ValueError(f"{out} is a link; name the folder itself")
    parent = next(place for place in (out.absolute().parent, *out.absolute().parents) if place.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{out} cannot be made: {parent} is a file")
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose another place")
    names = {entry.name for entry in out.iterdir()}
    folders = {entry.name for entry in out.iterdir() if entry.is_dir()} - {".job"}
    if names and (SIDE_FILE not in names or folders):
        raise FileExistsError(
            f"{out} is not what fewbits made ({SIDE_FILE} and no folders), so it is never "
            "replaced; choose another place, or remove it by hand"
        )


def check_out(out: Path, source: Path) -> None:
    """Refuse a result that would touch the source: in it or around it, also while it is being made."""
    for target in (out, partial_folder(out)):
        place = target.parent.resolve() / target.name
        if place == source or source in place.parents:
            raise ValueError(
                f"{target} lies in the source {source}, which is never written to; choose another place"
            )
        if place in source.parents:
            raise ValueError(f"the source {source} lies in {target}; choose another place")


def model_name(folder: Path) -> str:
    """What a model in a folder is called; in the hub's cache, its id."""
    model = folder.parent.parent.name
    if folder.parent.name == "snapshots" and model.startswith("models--"):
        return model.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def _checked_records(
    partial: Path, identity: Mapping[str, Any], advance: Advance
) -> dict[str, dict[str, Any]]:
    names = [name for name, _ in identity["shards"]]
    found = {name: read_record(partial, name) for name in names}
    if missing := [name for name, record in found.items() if record is None]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{len(missing)} of {len(names)} shards are not finished: {missing[0]}{more}; run their workers "
            "again, or the command that makes it with --resume"
        )
    records = {name: record for name, record in found.items() if record is not None}
    for name, record in records.items():
        if file_hash(partial / name, advance) != record["sha256"]:
            (partial / ".job" / f"{name}.json").unlink()
            raise CheckpointError(
                f"{partial / name} is not what was written any more; the disk may be failing. Make it again: "
                "the same command with --resume"
            )
    return records


def _index(partial: Path, identity: Mapping[str, Any], names: list[str]) -> str:
    headers = {name: read_header(partial / name) for name in names}
    places = {tensor: name for name, header in headers.items() for tensor in header.tensors}
    size = sum(info.nbytes for header in headers.values() for info in header.tensors.values())
    return _json(
        {"metadata": {"total_parameters": identity["parameters"], "total_size": size}, "weight_map": places}
    )


def _entry(entry: Mapping[str, Any], errors: Mapping[str, float]) -> dict[str, Any]:
    return {**entry, "relative_error": errors.get(entry["name"])}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _rename(partial: Path, out: Path) -> None:
    """`partial` becomes `out`; an `out` that is there goes, but never before the new one is in its place."""
    old = out.with_name(f"{out.name}.replaced-{secrets.token_hex(4)}") if out.exists() else None
    if old is not None and exchange(partial, out):
        partial.rename(old)
    elif old is not None:
        out.rename(old)
        try:
            partial.rename(out)
        except BaseException:
            old.rename(out)
            raise
    else:
        partial.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(out / ".job")
    if old is not None:
        shutil.rmtree(old)
