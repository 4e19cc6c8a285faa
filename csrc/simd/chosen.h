// The vocabulary of the instruction set that the compiler was told to use. Included inside a namespace, after
// the compiler's header of intrinsics.

#if defined(__AVX512F__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#elif defined(FEWBITS_NEON)
#include "neon.h"
#else
#include "portable.h"
#endif
