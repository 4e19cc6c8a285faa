// Quantization against its rules, as src/fewbits/reference.py has them, one value at a time.
#pragma once

#include <algorithm>

#include "check.h"
#include "model.h"

namespace model {

struct Coding {
  const char *name;
  int32_t bits, kind;
  bool flat;
  int64_t group_rows, group_columns;  // 0: all of them
  int32_t scale_type;
  bool zero, sign_bit, reciprocal, stores_absmax,
      ordered;  // the last: codes come in another order than values
  float peak;
};

inline const std::vector<Coding> &codings() {
  constexpr int32_t T = FEWBITS_TABLE, N = FEWBITS_UNSIGNED, S = FEWBITS_SIGNED;
  static const std::vector<Coding> all = {
      {"nf4:g64", 4, T, true, 1, 64, FEWBITS_SCALE_F32, false, false, true, false, false, 1},
      {"fp4:g32", 4, T, true, 1, 32, FEWBITS_SCALE_F32, false, true, true, false, true, 1},
      {"dynamic8:g256", 8, T, true, 1, 256, FEWBITS_SCALE_F32, false, false, true, false, false, 1},
      {"fp8:b3x5", 8, T, false, 3, 5, FEWBITS_SCALE_F32, false, true, false, false, false, 448},
      {"fp8:tensor", 8, T, false, 0, 0, FEWBITS_SCALE_F32, false, true, false, false, false, 448},
      {"mxfp4:g32", 4, T, false, 1, 32, FEWBITS_SCALE_E8M0, false, true, false, true, false, 6},
      {"int8:row", 8, S, false, 1, 0, FEWBITS_SCALE_F32, false, false, true, true, false, 127},
      {"int8:g32:f16:zero", 8, N, false, 1, 32, FEWBITS_SCALE_F16, true, false, false, false, false, 127},
      {"int4:g32:zero", 4, N, false, 1, 32, FEWBITS_SCALE_F32, true, false, false, false, false, 7},
      {"int4:row:bf16", 4, N, false, 1, 0, FEWBITS_SCALE_BF16, false, false, false, false, false, 7},
      {"int3:g40:f16:zero", 3, N, false, 1, 40, FEWBITS_SCALE_F16, true, false, false, false, false, 3},
      {"int2:tensor", 2, N, false, 0, 0, FEWBITS_SCALE_F32, false, false, false, false, false, 1},
  };
  return all;
}

// An encoding, its thresholds, and what it makes of a value.
struct Encoding {
  fewbits_encoding e{};
  std::vector<float> thresholds;
  std::vector<uint8_t> order;

  Encoding(const Coding &coding, int64_t rows, int64_t columns, Random &random) {
    e.rows = rows, e.columns = columns, e.bits = coding.bits, e.kind = coding.kind;
    e.group_rows = coding.group_rows ? coding.group_rows : rows > 0 ? rows : 1;
    e.group_columns = coding.group_columns ? coding.group_columns : columns > 0 ? columns : 1;
    e.peak = coding.peak, e.limit = 1e30f, e.peak_exponent = ilogbf(coding.peak) + 1;
    e.layout = coding.flat ? FEWBITS_FLAT : FEWBITS_ROWS, e.flat_groups = coding.flat,
    e.scale_type = coding.scale_type;
    e.sign_bit = coding.sign_bit, e.reciprocal = coding.reciprocal, e.stores_absmax = coding.stores_absmax;
    e.has_zero = coding.zero;
    if (coding.kind == FEWBITS_SIGNED) e.low = -127, e.high = 127;
    if (coding.kind == FEWBITS_UNSIGNED) e.high = (1 << coding.bits) - 1, e.middle = 1 << (coding.bits - 1);
    if (coding.kind == FEWBITS_TABLE) {
      int64_t steps = (int64_t)1 << (coding.sign_bit ? coding.bits - 1 : coding.bits);
      for (int64_t i = 1; i < steps; i++) {
        float share = ((float)i - 0.5f + 0.3f * random.uniform()) / (float)steps;
        thresholds.push_back(coding.peak * (coding.sign_bit ? share : 2 * share - 1));
      }
      e.thresholds = thresholds.data(), e.threshold_count = (int64_t)thresholds.size();
      for (int64_t i = 0; coding.ordered && i < steps; i++) order.push_back((uint8_t)(i ^ 5));
      if (coding.ordered) e.order = order.data();
    }
  }
  Encoding(const Encoding &) = delete;

  int64_t grid_rows() const { return e.flat_groups ? 1 : (e.rows + e.group_rows - 1) / e.group_rows; }
  int64_t across() const {
    return ((e.flat_groups ? e.rows * e.columns : e.columns) + e.group_columns - 1) / e.group_columns;
  }
  int64_t group(int64_t row, int64_t column) const {
    if (e.flat_groups) return (row * e.columns + column) / e.group_columns;
    return row / e.group_rows * across() + column / e.group_columns;
  }
  int64_t packed(int64_t count) const { return (count * e.bits + 7) / 8; }

  struct Group {
    float low = 0, high = 0;  // of values and of 0
    float exact, used;        // scales: before they are stored, and as decoding sees them
    uint8_t stored[4] = {};
    float zero;
  };

  void finish(Group &g) const {
    constexpr float TINY = 1e-38f;
    float absmax = std::max(g.high, -g.low);
    g.exact = e.has_zero ? (g.high - g.low) / (float)e.high : e.stores_absmax ? absmax : absmax / e.peak;
    if (e.scale_type == FEWBITS_SCALE_E8M0) {
      int power = 0;
      frexpf(g.exact, &power);
      g.stored[0] = g.exact > 0 ? (uint8_t)(std::min(std::max(power - e.peak_exponent, -127), 127) + 127) : 0;
      g.used = ldexpf(1.0f, g.stored[0] - 127);
    } else {
      write(g.stored, 0, e.scale_type, g.exact);
      g.used = read(g.stored, 0, e.scale_type);
    }
    g.zero = (float)e.middle;
    if (e.has_zero)
      g.zero = std::min(std::max(nearbyintf(-g.low / std::max(g.used, TINY)), 0.0f), (float)e.high);
  }

  int code(float value, const Group &g) const {
    float tiny = (float)(1e-38 * (double)e.peak);
    float scaled = e.reciprocal ? value * (1.0f / std::max(g.used, tiny) * e.peak)
                                : value / (g.used > 0 ? g.used : 1.0f);
    if (e.kind != FEWBITS_TABLE)
      return (int)std::min(std::max(nearbyintf(scaled) + g.zero, (float)e.low), (float)e.high) & 255;
    float size = e.sign_bit ? fabsf(scaled) : scaled;
    int step = 0;
    for (float threshold : thresholds) step += size > threshold;
    int found = order.empty() ? step : order[(size_t)step];
    return found | (e.sign_bit && scaled < 0 ? 1 << (e.bits - 1) : 0);
  }
};

inline void put_bits(std::vector<uint8_t> &bytes, int64_t bit, int bits, int code) {
  for (int i = 0; i < bits; i++)
    bytes[(size_t)((bit + i) / 8)] |= (uint8_t)((code >> i & 1) << ((bit + i) % 8));
}

struct Coded {
  std::vector<uint8_t> scale, zero, codes;
  std::vector<float> exact, used;

  // The size that all parts have.
  explicit Coded(const Encoding &encoding) {
    const fewbits_encoding &e = encoding.e;
    int64_t groups = encoding.grid_rows() * encoding.across();
    int64_t item = e.scale_type == FEWBITS_SCALE_F32 ? 4 : e.scale_type == FEWBITS_SCALE_E8M0 ? 1 : 2;
    scale.resize((size_t)(groups * item));
    exact.resize((size_t)groups), used.resize((size_t)groups);
    if (e.has_zero) zero.resize((size_t)(encoding.grid_rows() * encoding.packed(encoding.across())));
    codes.resize(
        (size_t)(e.flat_groups ? encoding.packed(e.rows * e.columns) : e.rows * encoding.packed(e.columns)));
  }
};

inline Coded coded(const Encoding &encoding, const std::vector<float> &values) {
  const fewbits_encoding &e = encoding.e;
  Coded result(encoding);
  std::vector<Encoding::Group> groups(result.exact.size());
  for (int64_t r = 0; r < e.rows; r++) {
    for (int64_t c = 0; c < e.columns; c++) {
      Encoding::Group &g = groups[(size_t)encoding.group(r, c)];
      float value = values[(size_t)(r * e.columns + c)];
      g.low = std::min(g.low, value), g.high = std::max(g.high, value);
    }
  }
  int64_t item = groups.empty() ? 0 : (int64_t)(result.scale.size() / groups.size()),
          across = encoding.across();
  for (size_t i = 0; i < groups.size(); i++) {
    encoding.finish(groups[i]);
    memcpy(&result.scale[i * (size_t)item], groups[i].stored, (size_t)item);
    result.exact[i] = groups[i].exact, result.used[i] = groups[i].used;
    int64_t row = (int64_t)i / across, column = (int64_t)i % across;
    if (e.has_zero)
      put_bits(result.zero, row * encoding.packed(across) * 8 + column * e.bits, e.bits, (int)groups[i].zero);
  }
  for (int64_t r = 0; r < e.rows; r++) {
    for (int64_t c = 0; c < e.columns; c++) {
      int64_t place = r * e.columns + c;
      int code = encoding.code(values[(size_t)place], groups[(size_t)encoding.group(r, c)]);
      if (!e.flat_groups) {
        put_bits(result.codes, r * encoding.packed(e.columns) * 8 + c * e.bits, e.bits, code);
      } else {  // the first of two codes lies in the high half of its byte
        put_bits(result.codes, e.bits == 8 ? place * 8 : (place ^ 1) * 4, e.bits, code);
      }
    }
  }
  return result;
}

inline int32_t quantize(const Encoding &encoding, const std::vector<uint8_t> &values, int32_t dtype,
                        const std::vector<float> *given, Coded &out, int32_t threads) {
  const fewbits_encoding &e = encoding.e;
  return fewbits_quantize(&e, values.data(), e.rows * e.columns, dtype, given ? given->data() : nullptr,
                          given ? (int64_t)given->size() : 0, given ? nullptr : out.scale.data(),
                          given ? 0 : (int64_t)out.scale.size(), out.zero.data(), (int64_t)out.zero.size(), out.codes.data(),
                          (int64_t)out.codes.size(), threads);
}

inline void test_encode(const Coding &coding, int64_t rows, int64_t columns, int32_t dtype, int32_t threads,
                        Random &random) {
  using check::expect;
  Encoding encoding(coding, rows, columns, random);
  check::place = std::string("encode ") + coding.name + " [" + std::to_string(rows) + ", " +
                 std::to_string(columns) + "] dtype " + std::to_string(dtype);
  std::vector<uint8_t> values((size_t)(rows * columns * item_bytes(dtype)));
  std::vector<float> floats;
  for (int64_t i = 0; i < rows * columns; i++) {
    float value = random.below(50) ? random.normal() : random.below(2) ? 0.0f : 20.0f * random.normal();
    if (i / 64 % 7 == 3) value = 0.0f;  // whole groups of zeros
    write(values.data(), i, dtype, value);
    floats.push_back(read(values.data(), i, dtype));
  }
  Coded wanted = coded(encoding, floats), got(encoding), again(encoding);
  if (!check::expect_ok(quantize(encoding, values, dtype, nullptr, got, threads), "accepted")) return;
  expect(got.scale == wanted.scale, "scales");
  expect(got.zero == wanted.zero, "zero points");
  expect(got.codes == wanted.codes, "codes");
  again.zero = wanted.zero;
  check::expect_ok(quantize(encoding, values, dtype, &wanted.used, again, threads),
                   "accepted with given scales");
  expect(again.codes == wanted.codes, "codes for given scales");
  if (!rows || !columns) return;
  write(values.data(), random.below(rows * columns), dtype, dtype == FEWBITS_F32 ? NAN : INFINITY);
  expect(quantize(encoding, values, dtype, nullptr, got, threads) == FEWBITS_BAD_VALUES,
         "NaN and infinity refused");
}

}  // namespace model
