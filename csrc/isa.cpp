// Compiled once per instruction set, with FEWBITS_ISA as its name and with the flags of CMakeLists.txt.
//
// Everything in here has internal linkage: a function that two instruction sets share would be kept once, from
// either, and could run where its instructions do not exist. For the same reason nothing of the C++ library is
// included, and the build checks the symbols of the object.

#include <stddef.h>

#include "table.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fewbits {
namespace {

#include "half.h"

#include "simd/chosen.h"

#include "kernels/unpack.h"
#include "kernels/scales.h"
#include "kernels/decode.h"
#include "kernels/quantize.h"
#include "kernels/tile.h"
#include "kernels/linear.h"
#include "kernels/int8.h"
#include "kernels/moments.h"

#define FEWBITS_TEXT(name) #name
#define FEWBITS_NAME(name) FEWBITS_TEXT(name)

}  // namespace

#define FEWBITS_JOIN(a, b) a##b
#define FEWBITS_SYMBOL(name) FEWBITS_JOIN(table_, name)

extern const KernelTable FEWBITS_SYMBOL(FEWBITS_ISA);
const KernelTable FEWBITS_SYMBOL(FEWBITS_ISA) = {
    FEWBITS_NAME(FEWBITS_ISA),
    PRODUCTS,
    X_ROWS,
    FEW_ROWS,
    LANES,
    PAIR_BYTES,
    decode_rows,
    encode_groups,
    pack_x,
    multiply_tiles,
    quantize_x,
    multiply_int8,
    update_moments,
};

}  // namespace fewbits
