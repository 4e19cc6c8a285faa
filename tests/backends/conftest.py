"""Formats, and the instruction sets that this machine runs."""

from collections.abc import Callable, Iterator

import pytest

from fewbits.backends.cpu import library
from fewbits.format import Format

# Every family, kind of group, type of scale, zero point and offset; groups that straddle rows and vectors.
FORMATS = (
    "nf4:g64", "nf4:g2", "nf4:g16", "nf4:g30", "nf4:g32:dq", "nf4:g64:f16", "nf4:g128:offset", "nf4:g4096",
    "fp4:g64", "fp4:g64:dq", "fp4:g8:bf16", "dynamic8:g256", "dynamic8:g7:offset", "udynamic8:g64",
    "int8:row", "int8:tensor", "int8:g32:f16", "int8:b4x16:zero", "int8:g5:zero", "int8:g2000",
    "int4:g128", "int4:g32:f16:zero", "int4:g16:dq", "int4:g64:dq:zero", "int4:g3", "int4:b16x16",
    "int4:g4:zero", "int3:g32", "int3:b2x5:zero", "int3:row:bf16:zero", "int2:row:bf16", "int2:tensor:zero",
    "int2:g64:f16", "fp8_e4m3:row", "fp8_e4m3:tensor", "fp8_e4m3:b128x128", "fp8_e5m2:g64", "mxfp4:g32",
    "nvfp4:g16",
)  # fmt: skip


def runnable() -> list[str]:
    """Names of the instruction sets that the library has and this machine runs, best first."""
    if library.unavailable():
        return ["none"]
    sets = library.instruction_sets()
    return [name for name in sets if library.library().fewbits_refuse_isa(name.encode()) is None]


RUNNABLE = runnable()


@pytest.fixture(scope="session")
def isas() -> list[str]:
    """What `use` takes, best first."""
    if RUNNABLE == ["none"]:
        pytest.fail(f"no CPU kernels to test: {library.unavailable()}")
    return RUNNABLE


@pytest.fixture
def each(isas: list[str]) -> Iterator[Callable[[], Iterator[str]]]:
    """Call it to go through the instruction sets; what is compared with is then computed once for all."""

    def walk() -> Iterator[str]:
        for name in isas:
            library.library().fewbits_use_isa(name.encode())
            yield name

    yield walk
    library.library().fewbits_use_isa(isas[0].encode())


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> Format:
    """Every format in turn."""
    return Format.parse(request.param)
