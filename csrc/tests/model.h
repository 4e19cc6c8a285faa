// Random weights of every kind that api.h knows, and what they decode to, one weight at a time: slow, plain,
// and written without a look at the kernels.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <memory>
#include <string>
#include <vector>

#include "../api.h"

namespace model {

struct Random {  // xorshift: the same values in every run
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
  }
  int64_t below(int64_t limit) { return (int64_t)((next() >> 16) % (uint64_t)limit); }
  float uniform() { return (float)(next() >> 40) / 8388608.0f - 1.0f; }  // -1 … 1
  float normal() { return uniform() + uniform() + uniform(); }
};

inline uint32_t word_of(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  return word;
}
inline float float_of(uint32_t word) {
  float value;
  memcpy(&value, &word, 4);
  return value;
}

inline float from_f16(uint16_t half) {
  int exponent = half >> 10 & 31, fraction = half & 1023;
  float magnitude = exponent == 31  ? (fraction ? (float)NAN : (float)INFINITY)
                    : exponent == 0 ? ldexpf((float)fraction, -24)
                                    : ldexpf((float)(1024 + fraction), exponent - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}
inline uint16_t to_f16(float value) {  // of finite values
  uint16_t sign = (uint16_t)(word_of(value) >> 16 & 0x8000);
  double magnitude = fabs((double)value);
  if (magnitude == 0) return sign;
  if (magnitude >= 65520) return sign | 0x7c00;
  int exponent = 0;
  frexp(magnitude, &exponent);
  int unit = exponent - 11 < -24 ? -24 : exponent - 11;
  return (uint16_t)(sign | ((unit + 24) * 1024 + (int)nearbyint(ldexp(magnitude, -unit))));
}
inline uint16_t to_bf16(float value) {
  uint32_t word = word_of(value);
  return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

inline int64_t item_bytes(int32_t dtype) { return dtype == FEWBITS_F32 ? 4 : 2; }
inline float read(const void *values, int64_t place, int32_t dtype) {
  if (dtype == FEWBITS_F32) return static_cast<const float *>(values)[place];
  uint16_t half = static_cast<const uint16_t *>(values)[place];
  return dtype == FEWBITS_F16 ? from_f16(half) : float_of((uint32_t)half << 16);
}
inline void write(void *values, int64_t place, int32_t dtype, float value) {
  if (dtype == FEWBITS_F32) {
    static_cast<float *>(values)[place] = value;
  } else {
    static_cast<uint16_t *>(values)[place] = dtype == FEWBITS_F16 ? to_f16(value) : to_bf16(value);
  }
}

// What a format is, but for its size.
struct Kind {
  const char *name;
  int32_t bits, kind, layout;
  bool flat;                          // groups
  int64_t group_rows, group_columns;  // 0: all of them
  int32_t scale_type;
  bool zero, offset, nested_flat;  // the last: nested scales form one run and not a grid
  float unit;
};

// Codes and scales as api.h lays them out, each in memory of exactly its size.
struct Weight {
  fewbits_weight w{};
  std::vector<uint8_t> codes, zero, scales;
  std::vector<float> table;
  float offset = 0;
  std::unique_ptr<Weight> nested;

  Weight(const Kind &kind, int64_t rows, int64_t columns, Random &random) {
    w.rows = rows, w.columns = columns, w.bits = kind.bits, w.kind = kind.kind, w.layout = kind.layout;
    w.group_rows = kind.group_rows ? kind.group_rows : rows > 0 ? rows : 1;
    w.group_columns = kind.group_columns ? kind.group_columns : columns > 0 ? columns : 1;
    w.flat_groups = kind.flat, w.scale_type = kind.scale_type;
    w.high_first = kind.layout == FEWBITS_FLAT;
    w.unit = kind.unit, w.middle = kind.kind == FEWBITS_UNSIGNED && !kind.zero ? 1 << (kind.bits - 1) : 0;
    codes.resize((size_t)(kind.layout == FEWBITS_FLAT ? packed(rows * columns) : rows * packed(columns)));
    for (uint8_t &byte : codes) byte = (uint8_t)random.next();
    w.codes = codes.data(), w.codes_bytes = (int64_t)codes.size();
    if (kind.kind == FEWBITS_TABLE) {
      for (int i = 0; i < 1 << kind.bits; i++) table.push_back(random.uniform());
      w.table = table.data();
    }
    if (kind.offset) offset = 0.25f * random.uniform(), w.offset = &offset;
    if (kind.zero) {
      zero.resize((size_t)(grid_rows() * packed(across())));
      for (uint8_t &byte : zero) byte = (uint8_t)random.next();
      w.zero = zero.data(), w.zero_bytes = (int64_t)zero.size();
    }
    make_scales(kind, random);
  }
  Weight(const Weight &) = delete;

  int64_t packed(int64_t count) const { return (count * w.bits + 7) / 8; }
  int64_t grid_rows() const { return (w.rows + w.group_rows - 1) / w.group_rows; }
  int64_t across() const { return (w.columns + w.group_columns - 1) / w.group_columns; }
  int64_t groups() const {
    return w.flat_groups ? (w.rows * w.columns + w.group_columns - 1) / w.group_columns
                         : grid_rows() * across();
  }

  void make_scales(const Kind &kind, Random &random) {
    if (kind.scale_type == FEWBITS_SCALE_NESTED) {
      Kind inner =
          kind.nested_flat
              ? Kind{"",    8, FEWBITS_TABLE, FEWBITS_FLAT, true, 1, 256, FEWBITS_SCALE_F32, false, true,
                     false, 1}
              : Kind{"",    8, FEWBITS_TABLE, FEWBITS_ROWS, false, 0, 0, FEWBITS_SCALE_F32, false, false,
                     false, 1};
      bool run = kind.flat || kind.nested_flat;
      nested = std::make_unique<Weight>(inner, run ? 1 : grid_rows(), run ? groups() : across(), random);
      w.nested = &nested->w;
      return;
    }
    int64_t item = kind.scale_type == FEWBITS_SCALE_F32 ? 4 : kind.scale_type == FEWBITS_SCALE_E8M0 ? 1 : 2;
    w.scale_bytes = groups() * item;
    scales.resize((size_t)w.scale_bytes);
    w.scale = scales.data();
    for (int64_t i = 0; i < groups(); i++) {
      if (kind.scale_type == FEWBITS_SCALE_E8M0) {
        scales[(size_t)i] = (uint8_t)(120 + random.below(10));
      } else {
        write(scales.data(), i, kind.scale_type, 0.01f + fabsf(random.uniform()));
      }
    }
  }

  static int bits_at(const uint8_t *bytes, int64_t bit, int bits) {  // the lowest bits of a byte come first
    int value = 0;
    for (int i = 0; i < bits; i++) value |= (bytes[(bit + i) / 8] >> ((bit + i) % 8) & 1) << i;
    return value;
  }

  int code(int64_t row, int64_t column) const {
    int64_t bytes = packed(w.columns);
    if (w.bits == 8) return codes[(size_t)(row * w.columns + column)];
    if (w.layout == FEWBITS_ROWS) return bits_at(codes.data() + row * bytes, column * w.bits, w.bits);
    int64_t place = row * w.columns + column;
    return place % 2 ? codes[(size_t)(place / 2)] & 15 : codes[(size_t)(place / 2)] >> 4;
  }

  float scale(int64_t row, int64_t column) const {
    int64_t group = w.flat_groups ? (row * w.columns + column) / w.group_columns
                                  : row / w.group_rows * across() + column / w.group_columns;
    if (nested) return nested->decode(group / nested->w.columns, group % nested->w.columns);
    if (w.scale_type == FEWBITS_SCALE_E8M0) return ldexpf(1.0f, scales[(size_t)group] - 127);
    return read(w.scale, group, w.scale_type);
  }

  // Each step rounds to float32.
  float decode(int64_t row, int64_t column) const {
    int c = code(row, column), z = w.middle;
    if (w.zero)
      z = bits_at(zero.data() + row / w.group_rows * packed(across()), column / w.group_columns * w.bits,
                  w.bits);
    float value = w.kind == FEWBITS_TABLE    ? table[(size_t)c]
                  : w.kind == FEWBITS_SIGNED ? (float)(int8_t)c
                                             : (float)(c - z);
    value = value * scale(row, column);
    if (w.unit != 1) value = value * w.unit;
    return w.offset ? value + offset : value;
  }
};

// The formats of src/fewbits/format.py, by what matters to a kernel; tables are random.
inline const std::vector<Kind> &kinds() {
  constexpr int32_t T = FEWBITS_TABLE, N = FEWBITS_UNSIGNED, S = FEWBITS_SIGNED, ROWS = FEWBITS_ROWS,
                    FLAT = FEWBITS_FLAT, F32 = FEWBITS_SCALE_F32,
                    F16 = FEWBITS_SCALE_F16, BF16 = FEWBITS_SCALE_BF16, E8M0 = FEWBITS_SCALE_E8M0,
                    NESTED = FEWBITS_SCALE_NESTED;
  static const std::vector<Kind> all = {
      {"nf4:g64", 4, T, FLAT, true, 1, 64, F32, false, false, false, 1},
      {"nf4:g64:dq", 4, T, FLAT, true, 1, 64, NESTED, false, false, true, 1},
      {"fp4:g7", 4, T, FLAT, true, 1, 7, BF16, false, true, false, 1},
      {"dynamic8:g256", 8, T, FLAT, true, 1, 256, F32, false, true, false, 1},
      {"int8:row", 8, S, ROWS, false, 1, 0, F32, false, false, false, 1 / 127.0f},
      {"int8:g32:f16:zero", 8, N, ROWS, false, 1, 32, F16, true, false, false, 1},
      {"int4:g128:f16:zero", 4, N, ROWS, false, 1, 128, F16, true, false, false, 1},
      {"int4:g32:zero", 4, N, ROWS, false, 1, 32, F32, true, false, false, 1},
      {"int4:g16", 4, N, ROWS, false, 1, 16, F16, false, false, false, 1},
      {"int4:b3x32:zero", 4, N, ROWS, false, 3, 32, F32, true, false, false, 1},
      {"mxfp4:tensor", 4, T, ROWS, false, 0, 0, F32, false, false, false, 1},
      {"int4:row", 4, N, ROWS, false, 1, 0, BF16, false, false, false, 1},
      {"int3:g32:zero", 3, N, ROWS, false, 1, 32, F16, true, false, false, 1},
      {"int3:g40", 3, N, ROWS, false, 1, 40, F32, false, false, false, 1},
      {"int2:g64:zero", 2, N, ROWS, false, 1, 64, F16, true, false, false, 1},
      {"int2:tensor", 2, N, ROWS, false, 0, 0, F32, false, false, false, 1},
      {"fp8:b128x128", 8, T, ROWS, false, 128, 128, F32, false, false, false, 1},
      {"fp8:b3x5", 8, T, ROWS, false, 3, 5, F32, false, false, false, 1},
      {"fp8:row", 8, T, ROWS, false, 1, 0, F16, false, false, false, 1},
      {"mxfp4:g32", 4, T, ROWS, false, 1, 32, E8M0, false, false, false, 1},
      {"nvfp4:g16", 4, T, ROWS, false, 1, 16, NESTED, false, false, false, 1},
  };
  return all;
}

}  // namespace model
