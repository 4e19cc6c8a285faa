// Every word of an instruction set's header (csrc/simd) against its meaning, spelled out for one lane.
//
// Compiled once per instruction set with the flags of its kernels; runs on a machine that has it.

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#include "../half.h"
#include "../simd/chosen.h"

int failures = 0;

uint32_t word_of(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  return word;
}

float float_of(uint32_t word) {
  float value;
  memcpy(&value, &word, 4);
  return value;
}

uint32_t random_word() {  // xorshift: the same values in every run
  static uint32_t state = 2463534242u;
  state ^= state << 13;
  state ^= state >> 17;
  return state ^= state << 5;
}

void report(const char *word, uint32_t a, uint32_t b, uint32_t got, uint32_t wanted) {
  if (failures++ < 20) fprintf(stderr, "%s: of %08x and %08x %08x, not %08x\n", word, a, b, got, wanted);
}

// Bits of a float; all NaN count as one.
uint32_t same_nan(float value) { return value != value ? 0x7fc00000u : word_of(value); }

std::vector<float> floats() {
  std::vector<float> values = {0.0f,          0.25f,         0.5f,
                               0.75f,         1.0f,          1.5f,
                               2.5f,          3.5f,          126.5f,
                               127.5f,        255.5f,        4194303.5f,
                               4194304.5f,    8388607.5f,    8388608.0f,
                               16777217.0f,   2147483520.0f, 3e9f,
                               65504.0f,      65519.996f,    65520.0f,
                               1e38f,         3.4e38f,       1e-38f,
                               1e-40f,        1.4e-45f,      5.9604645e-8f,
                               2.9802322e-8f, 2.9802326e-8f, 6.1035156e-5f,
                               INFINITY,      NAN,           float_of(0x7f800001)};
  for (size_t i = 0, n = values.size(); i < n; i++) values.push_back(-values[i]);
  for (int i = 0; i < 20000; i++) values.push_back(float_of(random_word()));
  for (int i = 0; i < 4000; i++) values.push_back((float)(int32_t)random_word() * 1e-7f);
  while (values.size() % 16) values.push_back(1.0f);
  return values;
}

// got(F a, F b) and wanted(float a, float b) give the same for all pairs in steps of some primes.
template <class Got, class Wanted> void pairs(const char *word, Got got, Wanted wanted) {
  static const std::vector<float> values = floats();
  for (size_t shift : {(size_t)0, (size_t)1, (size_t)33, (size_t)1009}) {
    for (size_t i = 0; i < values.size(); i += LANES) {
      float a[LANES], b[LANES], result[LANES];
      for (int k = 0; k < LANES; k++) a[k] = values[i + k], b[k] = values[(i + k + shift) % values.size()];
      store(result, got(load(a), load(b)));
      for (int k = 0; k < LANES; k++) {
        uint32_t one = same_nan(result[k]), other = same_nan(wanted(a[k], b[k]));
        if (one != other) report(word, word_of(a[k]), word_of(b[k]), one, other);
      }
    }
  }
}

template <class Got, class Wanted> void ints(const char *word, Got got, Wanted wanted) {
  for (int i = 0; i < 5000; i++) {
    int32_t a[LANES], b[LANES], result[LANES];
    for (int k = 0; k < LANES; k++) a[k] = (int32_t)random_word(), b[k] = (int32_t)random_word() >> (i % 31);
    store_int(result, got(load_int(a), load_int(b)));
    for (int k = 0; k < LANES; k++) {
      if (result[k] != (int32_t)wanted(a[k], b[k]))
        report(word, (uint32_t)a[k], (uint32_t)b[k], (uint32_t)result[k], (uint32_t)wanted(a[k], b[k]));
    }
  }
}

uint16_t model_bf16(float value) {
  uint32_t word = word_of(value);
  if (value != value) return (uint16_t)(word >> 16 | 0x40);
  return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

double model_from_f16(uint16_t half) {
  int exponent = half >> 10 & 31, fraction = half & 1023;
  double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? ldexp(fraction, -24)
                                     : ldexp(1024 + fraction, exponent - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

uint16_t model_f16(float value) {
  uint16_t sign = (uint16_t)(word_of(value) >> 16 & 0x8000);
  if (value != value) return (uint16_t)(sign | 0x7e00 | (word_of(value) >> 13 & 0x3ff));
  double magnitude = fabs((double)value);
  if (magnitude == 0) return sign;
  if (magnitude >= 65520) return sign | 0x7c00;
  int exponent = 0;
  frexp(magnitude, &exponent);
  int unit = exponent - 11 < -24 ? -24 : exponent - 11;  // the last place is 2**unit
  double whole = nearbyint(ldexp(magnitude, -unit));
  // A whole of 2048 carries into the exponent by itself.
  return (uint16_t)(sign | ((unit + 24) * 1024 + (int)whole));
}

void test_arithmetic() {
  pairs(
      "set", [](F, F) { return set(2.5f); }, [](float, float) { return 2.5f; });
  pairs("add", add, [](float a, float b) { return a + b; });
  pairs("sub", sub, [](float a, float b) { return a - b; });
  pairs("mul", mul, [](float a, float b) { return a * b; });
  pairs("div", div, [](float a, float b) { return a / b; });
  pairs(
      "sqrt", [](F a, F) { return sqrt(a); }, [](float a, float) { return sqrtf(a); });
  pairs("min", min, [](float a, float b) { return a < b ? a : b; });
  pairs("max", max, [](float a, float b) { return a > b ? a : b; });
  pairs(
      "abs", [](F a, F) { return abs(a); }, [](float a, float) { return fabsf(a); });
  pairs(
      "round", [](F a, F) { return round(a); }, [](float a, float) { return nearbyintf(a); });
  pairs(
      "where_positive", [](F a, F b) { return where_positive(b, a, set(7.0f)); },
      [](float a, float b) { return b > 0 ? a : 7.0f; });
  pairs(
      "bits, as_float", [](F a, F) { return as_float(bits(a)); }, [](float a, float) { return a; });
  pairs(
      "to_int", [](F a, F) { return to_float(to_int(round(max(min(a, set(1e9f)), set(-1e9f))))); },
      [](float a, float) {
        a = a < 1e9f ? a : 1e9f;
        return nearbyintf(a > -1e9f ? a : -1e9f) + 0.0f;  // integers have no -0
      });
  pairs(
      "count_greater",
      [](F a, F b) { return to_float(count_greater(count_greater(set_int(5), a, b), b, set(1.0f))); },
      [](float a, float b) { return (float)(5 + (a > b) + (b > 1.0f)); });
  // Once or twice rounded; the same everywhere but in the last place.
  const float a[] = {1.1f, -3.3f, 1e20f, 1e-30f}, b[] = {2.7f, 1e10f, -1e18f, 1e-9f},
              c[] = {-2.97f, 3.3e10f, 1e38f, 0};
  for (int i = 0; i < 4; i++) {
    float result[LANES], once = ::fmaf(a[i], b[i], c[i]), twice = a[i] * b[i] + c[i];
    store(result, fma(set(a[i]), set(b[i]), set(c[i])));
    for (float value : result) {
      if (value != once && value != twice)
        report("fma", word_of(a[i]), word_of(b[i]), word_of(value), word_of(once));
    }
  }
}

void test_any() {
  for (int place = 0; place < LANES; place++) {
    for (float value : {1.0f, -1.0f, 0.0f, -0.0f, 1e-45f, (float)NAN, (float)INFINITY, (float)-INFINITY}) {
      float values[LANES];
      for (int k = 0; k < LANES; k++) values[k] = k == place ? value : -2.0f;
      if (any_positive(load(values)) != (value > 0))
        report("any_positive", word_of(value), 0, value <= 0, value > 0);
      if (any_zero(load(values)) != (value == 0))
        report("any_zero", word_of(value), 0, value != 0, value == 0);
    }
  }
}

void test_integers() {
  ints(
      "set_int", [](I, I) { return set_int(-9); }, [](int32_t, int32_t) { return -9; });
  ints("add_int", add_int, [](int32_t a, int32_t b) { return (uint32_t)a + (uint32_t)b; });
  ints("sub_int", sub_int, [](int32_t a, int32_t b) { return (uint32_t)a - (uint32_t)b; });
  ints("mul_int", mul_int, [](int32_t a, int32_t b) { return (uint32_t)a * (uint32_t)b; });
  ints("max_int", max_int, [](int32_t a, int32_t b) { return a > b ? a : b; });
  ints("min_int", min_int, [](int32_t a, int32_t b) { return a < b ? a : b; });
  ints("and_int", and_int, [](int32_t a, int32_t b) { return a & b; });
  ints("or_int", or_int, [](int32_t a, int32_t b) { return a | b; });
  ints(
      "shift_left", [](I a, I) { return shift_left<5>(a); },
      [](int32_t a, int32_t) { return (uint32_t)a << 5; });
  ints(
      "shift_left 0", [](I a, I) { return shift_left<0>(a); }, [](int32_t a, int32_t) { return a; });
  ints(
      "shift_right", [](I a, I) { return shift_right<28>(a); },
      [](int32_t a, int32_t) { return (uint32_t)a >> 28; });
  ints(
      "shift_right 0", [](I a, I) { return shift_right<0>(a); }, [](int32_t a, int32_t) { return a; });
  ints(
      "shift_right_by", [](I a, I b) { return shift_right_by(a, and_int(b, set_int(31))); },
      [](int32_t a, int32_t b) { return (uint32_t)a >> (b & 31); });
  ints(
      "to_float", [](I a, I) { return bits(to_float(a)); },
      [](int32_t a, int32_t) { return word_of((float)a); });
}

void test_bytes_and_halves() {
  for (uint32_t start = 0; start < 0x10000; start += LANES) {
    uint16_t halves[LANES + 1], stored[LANES + 1];
    uint8_t bytes[LANES + 1], low[LANES + 1];
    float bf16[LANES], f16[LANES];
    int32_t wide[LANES], narrow[LANES];
    for (int k = 0; k < LANES; k++) halves[k] = (uint16_t)(start + k), bytes[k] = (uint8_t)(start + k * 37);
    store(bf16, load_bf16(halves));
    store(f16, load_f16(halves));
    store_int(wide, load_u8(bytes));
    store_int(narrow, load_i8(bytes));
    low[LANES] = 99;
    store_u8(low, add_int(load_u8(bytes), set_int((int32_t)(start << 8))));
    for (int k = 0; k < LANES; k++) {
      float expected = (float)model_from_f16(halves[k]);
      if (word_of(bf16[k]) != (uint32_t)halves[k] << 16)
        report("load_bf16", halves[k], 0, word_of(bf16[k]), 0);
      if (same_nan(f16[k]) != same_nan(expected))
        report("load_f16", halves[k], 0, word_of(f16[k]), word_of(expected));
      if (wide[k] != bytes[k]) report("load_u8", bytes[k], 0, (uint32_t)wide[k], bytes[k]);
      if (narrow[k] != (int8_t)bytes[k]) report("load_i8", bytes[k], 0, (uint32_t)narrow[k], bytes[k]);
      if (low[k] != bytes[k]) report("store_u8", bytes[k], 0, low[k], bytes[k]);
    }
    if (low[LANES] != 99) report("store_u8 past its end", 0, 0, low[LANES], 99);
    uint16_t parts[LANES];
    uint8_t room[2 * LANES + 2];  // on an odd address
    room[2 * LANES + 1] = 99;
    store_u16(room + 1, add_int(load_u8(bytes), set_int((int32_t)(start << 8))));
    memcpy(parts, room + 1, sizeof parts);
    for (int k = 0; k < LANES; k++) {
      if (parts[k] != (uint16_t)(bytes[k] + (start << 8))) report("store_u16", bytes[k], start, parts[k], 0);
    }
    if (room[2 * LANES + 1] != 99) report("store_u16 past its end", 0, 0, room[2 * LANES + 1], 99);
    // Half way to the next float16 and bfloat16, and a bit to either side: where rounding decides.
    for (int tie = -1; tie <= 1; tie++) {
      float of_bf16[LANES], of_f16[LANES];
      for (int k = 0; k < LANES; k++) {
        of_bf16[k] = float_of(((uint32_t)halves[k] << 16 | 0x8000u) + (uint32_t)tie);
        of_f16[k] = float_of(word_of((float)model_from_f16(halves[k])) + 0x1000u + (uint32_t)tie);
      }
      int32_t bf16_words[LANES], f16_words[LANES];
      store_int(bf16_words, bf16_bits(load(of_bf16)));
      store_int(f16_words, f16_bits(load(of_f16)));
      for (int k = 0; k < LANES; k++) {
        if (bf16_words[k] != model_bf16(of_bf16[k]))
          report("bf16_bits", word_of(of_bf16[k]), 0, (uint32_t)bf16_words[k], model_bf16(of_bf16[k]));
        if (f16_words[k] != model_f16(of_f16[k]))
          report("f16_bits", word_of(of_f16[k]), 0, (uint32_t)f16_words[k], model_f16(of_f16[k]));
      }
      stored[LANES] = 99;
      store_bf16(stored, load(of_bf16));
      for (int k = 0; k < LANES; k++) {
        if (stored[k] != model_bf16(of_bf16[k]))
          report("store_bf16", word_of(of_bf16[k]), 0, stored[k], model_bf16(of_bf16[k]));
      }
      store_f16(stored, load(of_f16));
      for (int k = 0; k < LANES; k++) {
        if (stored[k] != model_f16(of_f16[k]))
          report("store_f16", word_of(of_f16[k]), 0, stored[k], model_f16(of_f16[k]));
      }
      if (stored[LANES] != 99) report("store_f16 past its end", 0, 0, stored[LANES], 99);
    }
  }
  const std::vector<float> values = floats();
  for (size_t i = 0; i < values.size(); i += LANES) {
    uint16_t stored[LANES];
    store_bf16(stored, load(&values[i]));
    for (int k = 0; k < LANES; k++) {
      if (stored[k] != model_bf16(values[i + k]))
        report("store_bf16", word_of(values[i + k]), 0, stored[k], model_bf16(values[i + k]));
    }
    store_f16(stored, load(&values[i]));
    for (int k = 0; k < LANES; k++) {
      if (stored[k] != model_f16(values[i + k]))
        report("store_f16", word_of(values[i + k]), 0, stored[k], model_f16(values[i + k]));
    }
  }
}

void test_tables() {
  float table[256];
  for (int i = 0; i < 256; i++) table[i] = (float)i * 1.5f - 100.0f;
  Table16 sixteen = make_table(table + 3);
  for (int i = 0; i < 5000; i++) {
    int32_t index[LANES];
    float result[LANES];
    for (int k = 0; k < LANES; k++) index[k] = (int32_t)(random_word() & 255);
    store(result, gather(table, load_int(index)));
    for (int k = 0; k < LANES; k++) {
      if (result[k] != table[index[k]])
        report("gather", (uint32_t)index[k], 0, word_of(result[k]), word_of(table[index[k]]));
      index[k] = (int32_t)random_word();  // bits above the fourth do not count
    }
    int32_t lanes[LANES];
    for (int k = 0; k < LANES; k++) lanes[k] = index[k] & (LANES - 1);
    store(result, pick(table + 7, load_int(lanes)));
    for (int k = 0; k < LANES; k++) {
      if (result[k] != table[7 + lanes[k]])
        report("pick", (uint32_t)lanes[k], 0, word_of(result[k]), word_of(table[7 + lanes[k]]));
    }
    store(result, look_up(sixteen, load_int(index)));
    for (int k = 0; k < LANES; k++) {
      float wanted = table[3 + (index[k] & 15)];
      if (result[k] != wanted) report("look_up", (uint32_t)index[k], 0, word_of(result[k]), word_of(wanted));
    }
  }
}

void test_stores() {
  alignas(64) int32_t whole[LANES], streamed[LANES];
  float even[LANES], odd[LANES], both[2 * LANES];
  for (int k = 0; k < LANES; k++)
    whole[k] = (int32_t)random_word(), even[k] = (float)k, odd[k] = (float)k + 0.5f;
  store_pairs(both, load(even), load(odd));
  stream(streamed, load_int(whole));
  stream_end();
  for (int k = 0; k < LANES; k++) {
    if (both[2 * k] != even[k] || both[2 * k + 1] != odd[k]) report("store_pairs", (uint32_t)k, 0, 0, 0);
    if (streamed[k] != whole[k]) report("stream", (uint32_t)k, 0, (uint32_t)streamed[k], (uint32_t)whole[k]);
  }
}

void test_totals() {
  for (int i = 0; i < 2000; i++) {
    float values[LANES], total = 0, most = -INFINITY;
    int32_t whole[LANES], whole_total = 0;
    for (int k = 0; k < LANES; k++) {
      whole[k] = (int32_t)random_word() >> 14;  // sums are exact in any order
      values[k] = (float)whole[k];
      total += values[k], whole_total += whole[k], most = values[k] > most ? values[k] : most;
    }
    if (sum(load(values)) != total) report("sum", 0, 0, word_of(sum(load(values))), word_of(total));
    if (largest(load(values)) != most) report("largest", 0, 0, word_of(largest(load(values))), word_of(most));
    if (sum_int(load_int(whole)) != whole_total)
      report("sum_int", 0, 0, (uint32_t)sum_int(load_int(whole)), (uint32_t)whole_total);
  }
}

void test_products() {
  for (int i = 0; i < 20000; i++) {
    int8_t weights[BYTES], x[BYTES];
    int32_t start[LANES], result[LANES];
    for (int k = 0; k < BYTES; k++) {
      weights[k] = (int8_t)random_word();
      x[k] = (int8_t)((int)(random_word() % 255) - 127);
      if (i % 4 == 0)
        weights[k] = (int8_t)(random_word() & 1 ? -128 : 127), x[k] = (int8_t)(i & 4 ? -127 : 127);
    }
    for (int32_t &value : start) value = (int32_t)random_word() >> 4;
    bool repeat = i % 2;
    B right = repeat ? repeat_bytes(x) : load_bytes(x);
    store_int(result, dot_bytes(load_int(start), biased(load_bytes(weights)), right));
    for (int k = 0; k < LANES; k++) {
      int32_t wanted = start[k];
      for (int j = 0; j < 4; j++) wanted += (weights[4 * k + j] + WEIGHT_BIAS) * x[repeat ? j : 4 * k + j];
      if (result[k] != wanted)
        report("dot_bytes", (uint32_t)i, (uint32_t)k, (uint32_t)result[k], (uint32_t)wanted);
    }
  }
}

void test_byte_tables() {
  uint8_t values[16], codes[BYTES], low[BYTES], high[BYTES];
  for (int i = 0; i < 1000; i++) {
    for (uint8_t &value : values) value = (uint8_t)random_word();
    for (uint8_t &code : codes) code = (uint8_t)random_word();
    ByteTable table = make_byte_table(values);
    store_int(low, look_up_low(table, load_bytes(codes)));
    store_int(high, look_up_high(table, load_bytes(codes)));
    for (int k = 0; k < BYTES; k++) {
      if (low[k] != values[codes[k] & 15]) report("look_up_low", codes[k], 0, low[k], values[codes[k] & 15]);
      if (high[k] != values[codes[k] >> 4])
        report("look_up_high", codes[k], 0, high[k], values[codes[k] >> 4]);
    }
  }
  for (int64_t stride : {64, 65, 100}) {
    std::vector<uint8_t> from((size_t)(15 * stride + 64)), to(1024);
    for (uint8_t &byte : from) byte = (uint8_t)random_word();
    transpose_words(from.data(), stride, to.data());
    for (int i = 0; i < 16; i++) {
      for (int j = 0; j < 16; j++) {
        if (memcmp(&to[(size_t)(64 * j + 4 * i)], &from[(size_t)(i * stride + 4 * j)], 4))
          report("transpose_words", (uint32_t)i, (uint32_t)j, 0, 0);
      }
    }
  }
}

}  // namespace

int main() {
  test_arithmetic();
  test_any();
  test_integers();
  test_bytes_and_halves();
  test_tables();
  test_stores();
  test_totals();
  test_products();
  test_byte_tables();
  if (failures) {
    fprintf(stderr, "%d wrong\n", failures);
    return 1;
  }
  printf("the vocabulary keeps its meaning on %d lanes\n", LANES);
  return 0;
}
