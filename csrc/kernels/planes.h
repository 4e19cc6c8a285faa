// The product for bfloat16 x on AVX2, with columns in the lanes (rows.h). Part of linear.h.
//
// Two byte shuffles look up the lower and the upper bytes of 32 values, where one of floats looks up 8 of half a
// table. Interleaved, and moved to the upper half of a lane, they are floats.

struct PlaneProduct {
  using Sum = F;
  using Raw = __m256i;
  using Decoded = F;
  using Operand = float;
  using Tables = BytePlanes;
  static constexpr int OPERANDS = 8, ELEMENTS = 1;
  // The low and the high half of a vector hold 4 words each.
  static constexpr int64_t LEAST_UNIT = 32;
  // Operand 4 h + 2 u + o: half h of the bytes 8 u + o, 8 u + o + 2, … of 16.
  static constexpr int place(int operand, int, int lane) {
    return 2 * (lane / 4 * 16 + (operand >> 1 & 1) * 8 + lane % 4 * 2 + (operand & 1)) + (operand >> 2);
  }
  static inline Tables tables(const float *values) { return byte_planes(values); }
  static inline Raw fetch(const uint8_t *codes) { return load_bytes(codes); }
  template <int OPERAND>
  static inline Decoded decode(Raw raw, const Tables &tables) {
    constexpr bool HIGH = OPERAND >> 2, UPPER = OPERAND >> 1 & 1;
    __m256i lower = HIGH ? look_up_high(tables.lower, raw) : look_up_low(tables.lower, raw);
    __m256i upper = HIGH ? look_up_high(tables.upper, raw) : look_up_low(tables.upper, raw);
    __m256i pairs = UPPER ? _mm256_unpackhi_epi8(lower, upper) : _mm256_unpacklo_epi8(lower, upper);
    return as_float(OPERAND & 1 ? and_int(pairs, set_int((int32_t)0xffff0000)) : _mm256_slli_epi32(pairs, 16));
  }
  static inline Sum start_lanes(const int32_t *) { return set(0.0f); }
  static inline Sum multiply_lanes(Sum sum, Decoded weights, const Operand *x) { return fma(weights, load(x), sum); }
  static inline Sum both(Sum a, Sum b) { return add(a, b); }
  static inline F total(Sum sum) { return sum; }
  static inline Operand convert(const float *values) { return values[0]; }
};
