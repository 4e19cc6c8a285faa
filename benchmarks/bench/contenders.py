"""Who takes part: one line per contender. Standard library only: every process reads this."""

from __future__ import annotations

from dataclasses import dataclass, field

# Arithmetic of a product, and the roof of machine.c that bounds it.
EXACT, EXACT32, INT8 = "bf16", "fp32", "int8"


@dataclass(frozen=True)
class Contender:
    """One way of doing a piece of work.

    label       how tables call it
    library     the file bench/libraries/with_<library>.py; contenders of one library share a process
    variant     what that file makes of it; products of fewbits and bitsandbytes are those of their layers,
                as in models, or with "function" those of the functions below them
    work        "linear", "dequantize" or "quantize"
    x           dtype of the activations: "bf16" or "f32"
    arithmetic  "bf16" and "fp32" leave the activations as they are, "int8" rounds them
    outliers    whether a few columns of x get large values (LLM.int8())
    environment variables of its process; contenders that differ here do not share one
    full        only with --full
    """

    label: str
    library: str
    variant: str
    work: str = "linear"
    x: str = "bf16"
    arithmetic: str = EXACT
    outliers: bool = False
    environment: dict[str, str] = field(default_factory=dict, hash=False)
    full: bool = False

    @property
    def process(self) -> str:
        """Contenders with the same answer share a worker process."""
        return " ".join([self.library, *(f"{k}={v}" for k, v in sorted(self.environment.items()))])


def _c(label: str, library: str, variant: str, **more: object) -> Contender:
    return Contender(label, library, variant, **more)  # type: ignore[arg-type]


AVX2 = {"FEWBITS_ISA": "avx2"}
# Names that goals refer to.
OURS = "fewbits NF4"
OURS_DQ = "fewbits NF4+dq"
OURS_AVX2 = "fewbits NF4, AVX2 forced"
OURS_INT8X = "fewbits NF4, int8 activations"
OURS_LLM = "fewbits LLM.int8()"
BNB = "bitsandbytes NF4"
BNB_LLM = "bitsandbytes LLM.int8()"
TORCH = "torch bf16"

CONTENDERS: tuple[Contender, ...] = (
    # --- exact: activations are left as they are
    _c(OURS, "fewbits", "nf4:g64"),
    _c(OURS_DQ, "fewbits", "nf4:g64:dq"),
    _c("fewbits NF4, float32 x", "fewbits", "nf4:g64", x="f32", arithmetic=EXACT32),
    _c(OURS_AVX2, "fewbits", "nf4:g64", environment=AVX2),
    _c("fewbits INT4 g128", "fewbits", "int4:g128:f16:zero", full=True),
    _c("fewbits INT8 weights", "fewbits", "int8:row", full=True),
    _c("fewbits FP8 weights", "fewbits", "fp8_e4m3:row", full=True),
    _c("fewbits NF4, function", "fewbits", "function nf4:g64", full=True),
    _c(BNB, "bitsandbytes", "nf4"),
    _c("bitsandbytes NF4+dq", "bitsandbytes", "nf4:dq"),
    _c("bitsandbytes NF4, function", "bitsandbytes", "function nf4", full=True),
    _c("bitsandbytes NF4, float32 x", "bitsandbytes", "nf4", x="f32", full=True),
    _c(TORCH, "torch", "bf16"),
    _c("torch float32", "torch", "f32", x="f32", arithmetic=EXACT32),
    _c("torch int4pack g128", "torch", "int4pack"),
    _c("torch int8pack", "torch", "int8pack"),
    _c("ONNX Runtime g64, level 1", "onnxruntime", "g64 level1", x="f32", arithmetic=EXACT32),
    _c("OpenVINO NF4 g64", "openvino", "nf4 exact"),
    # --- int8 activations
    _c(OURS_INT8X, "fewbits", "nf4:g64@int8:g64", arithmetic=INT8),
    _c(
        "fewbits NF4, int8 act., AVX2",
        "fewbits",
        "nf4:g64@int8:g64",
        arithmetic=INT8,
        environment=AVX2,
        full=True,
    ),
    _c("ONNX Runtime g64, level 4", "onnxruntime", "g64 level4", x="f32", arithmetic=INT8),
    _c("ONNX Runtime g128, level 4", "onnxruntime", "g128 level4", x="f32", arithmetic=INT8),
    _c("OpenVINO i4 g64, dynamic", "openvino", "i4 dynamic", arithmetic=INT8),
    _c("llama.cpp Q4_0", "llama_cpp", "q4_0", x="f32", arithmetic=INT8),
    _c("llama.cpp Q4_K", "llama_cpp", "q4_k", x="f32", arithmetic=INT8),
    _c("llama.cpp IQ4_NL", "llama_cpp", "iq4_nl", x="f32", arithmetic=INT8),
    _c("llama.cpp Q8_0", "llama_cpp", "q8_0", x="f32", arithmetic=INT8),
    _c("torch dynamic int8", "torch", "dynamic int8", x="f32", arithmetic=INT8),
    # --- LLM.int8(), six outlier columns
    _c(OURS_LLM, "fewbits", "int8:row@int8:t6", arithmetic=INT8, outliers=True),
    _c(
        "fewbits LLM.int8(), AVX2",
        "fewbits",
        "int8:row@int8:t6",
        arithmetic=INT8,
        outliers=True,
        environment=AVX2,
        full=True,
    ),
    _c(BNB_LLM, "bitsandbytes", "llm.int8", arithmetic=INT8, outliers=True),
    # --- codes to weights, weights to codes
    _c(OURS, "fewbits", "nf4:g64", work="dequantize"),
    _c(OURS_DQ, "fewbits", "nf4:g64:dq", work="dequantize"),
    _c(OURS_AVX2, "fewbits", "nf4:g64", work="dequantize", environment=AVX2),
    _c(BNB, "bitsandbytes", "nf4", work="dequantize"),
    _c("bitsandbytes NF4+dq", "bitsandbytes", "nf4:dq", work="dequantize"),
    _c(OURS_DQ, "fewbits", "nf4:g64:dq", work="quantize"),
    _c(OURS, "fewbits", "nf4:g64", work="quantize", full=True),
    _c("fewbits INT8 rows", "fewbits", "int8:row", work="quantize"),
    _c(OURS_AVX2, "fewbits", "nf4:g64:dq", work="quantize", environment=AVX2),
    _c("bitsandbytes NF4+dq", "bitsandbytes", "nf4:dq", work="quantize"),
    _c("bitsandbytes INT8 rows", "bitsandbytes", "int8", work="quantize"),
)

# What the machine can do at best, measured in the same rounds: name → unit.
ROOFS: dict[str, str] = {
    "read": "GB/s",
    "read, 2 MiB pages": "GB/s",
    "write, streaming": "GB/s",
    "fp32": "GFLOP/s",
    "bf16": "GFLOP/s",
    "int8": "GFLOP/s",
}
