"""`fewbits finalize`: what several workers made becomes one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits.checkpoint.finish import check_place, finish
from fewbits.checkpoint.job import partial_folder
from fewbits.checkpoint.session import FINALIZE, check_idle, hold, read_description
from fewbits.cli.common import AsJson, Quiet, byte_progress, format_bytes, print_json, results


def finalize(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder that the workers were given.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Join what the workers of `fewbits quantize --worker i/N` made.

    Checks that every shard is there and is what its worker wrote, adds index, model card and hashes, and
    gives the folder its name. The result is the same for every N.

    Example: fewbits finalize demo-nf4
    """
    check_place(out)
    partial = partial_folder(out)
    shards = read_description(partial)["shards"]
    check_idle(partial)
    with hold(partial, FINALIZE), byte_progress(quiet) as progress:
        task = progress.add_task("checking hashes", total=sum(size for _, size in shards))
        finish(out, overwrite=overwrite, advance=lambda count: progress.update(task, advance=count))
    files = sorted(path.name for path in out.iterdir())
    size = sum((out / name).stat().st_size for name in files)
    if as_json:
        print_json({"out": str(out), "files": files, "bytes": size})
    else:
        results().print(f"{out}: {format_bytes(size)} in {len(files)} files", markup=False)
