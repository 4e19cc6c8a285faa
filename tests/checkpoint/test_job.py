"""What a job is: units in shards."""

from __future__ import annotations

from fewbits.checkpoint import job
from fewbits.checkpoint.job import Unit

from .conftest import halved


class TestSplit:
    def test_a_unit_is_never_divided(self) -> None:
        big = Unit(("a",), {"a": ("F32", (100,)), "a_scale": ("F32", (1,))}, halved, 1)
        shards = job.split([big, big, big], 1)
        assert [len(shard.units) for shard in shards] == [1, 1, 1]

    def test_one_shard_has_the_plain_name(self) -> None:
        (shard,) = job.split([Unit(("a",), {"a": ("U8", (3,))}, halved, 1)], 10)
        assert shard.name == "model.safetensors"
