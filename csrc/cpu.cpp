#include "cpu.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdint.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fewbits {

namespace {

struct Need {
  const char *isa;
  const char *(*missing)();
};

#if defined(__x86_64__)

struct Registers {
  uint32_t a, b, c, d;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r{};
  if ((uint32_t)__get_cpuid_max(leaf & 0x80000000, nullptr) >= leaf) __cpuid_count(leaf, subleaf, r.a, r.b, r.c, r.d);
  return r;
}

bool bit(uint32_t word, int place) { return word >> place & 1; }

// The registers that the operating system saves when it switches tasks (XCR0).
uint64_t saved_state() {
  if (!bit(cpuid(1, 0).c, 27)) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

const char *missing_avx2() {
  Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  if ((saved_state() & 6) != 6) return "the operating system does not save AVX registers";
  if (!bit(seven.b, 5)) return "the processor has no AVX2";
  if (!bit(one.c, 12)) return "the processor has no FMA";
  if (!bit(one.c, 29)) return "the processor has no F16C";
  if (!bit(seven.b, 3) || !bit(seven.b, 8)) return "the processor has no BMI1 and BMI2";
  return nullptr;
}

const char *missing_avx512() {
  if (const char *less = missing_avx2()) return less;
  Registers seven = cpuid(7, 0);
  if ((saved_state() & 0xe6) != 0xe6) return "the operating system does not save AVX-512 registers";
  if (!bit(seven.b, 16)) return "the processor has no AVX-512F";
  if (!bit(seven.b, 17) || !bit(seven.b, 30) || !bit(seven.b, 31))
    return "the processor has no AVX-512 DQ, BW and VL";
  return nullptr;
}

const char *missing_avx512_bf16() {
  if (const char *less = missing_avx512()) return less;
  if (!bit(cpuid(7, 0).c, 11)) return "the processor has no AVX-512 VNNI";
  if (!bit(cpuid(7, 1).a, 5)) return "the processor has no AVX-512 BF16";
  return nullptr;
}

constexpr Need NEEDS[] = {
    {"avx2", missing_avx2}, {"avx512", missing_avx512}, {"avx512_bf16", missing_avx512_bf16}};

#elif defined(__aarch64__)

const char *missing_neon() { return nullptr; }  // every Armv8-A core has it

const char *missing_neon_dot() {
#if defined(__linux__)
  if (!(getauxval(AT_HWCAP) & (1ul << 20))) return "the processor has no dot products (ASIMDDP)";
#endif
  return nullptr;
}

const char *missing_neon_bf16() {
  if (const char *less = missing_neon_dot()) return less;
#if defined(__linux__)
  if (!(getauxval(AT_HWCAP2) & (1ul << 14))) return "the processor has no bfloat16 products";
#else
  return "not asked of this operating system";
#endif
  return nullptr;
}

constexpr Need NEEDS[] = {{"neon", missing_neon}, {"neon_dot", missing_neon_dot}, {"neon_bf16", missing_neon_bf16}};

#else
constexpr Need NEEDS[] = {{"portable", nullptr}};
#endif

}  // namespace

const char *missing_for(const char *isa) {
  for (const Need &need : NEEDS) {
    if (strcmp(need.isa, isa) == 0 && need.missing) return need.missing();
  }
  return strcmp(isa, "portable") == 0 ? nullptr : "it is made for another processor architecture";
}

}  // namespace fewbits
