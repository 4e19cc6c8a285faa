// The product in pairs of bfloat16 (BFDOT). Part of linear.h, for Arm processors that have it.
//
// Byte shuffles look up the lower and the upper bytes of 16 numbers; taking every second byte of both by turns
// leaves two numbers in each lane.

struct PairProduct {
  using Sum = F;
  using Decoded = bfloat16x8_t;
  using Operand = uint32_t;  // two bfloat16
  using Raw = B;
  using Tables = BytePlanes;
  static constexpr int STRIP = 2, OPERANDS = 4, ELEMENTS = 2;
  // Operand 2 h + o: half h of the bytes o and o + 2 of a word.
  static constexpr int nibble(int operand, int element) { return (operand >> 1) + 2 * (operand & 1) + 4 * element; }
  static constexpr int place(int operand, int element, int lane) { return CHUNK * lane + nibble(operand, element); }
  static inline Tables tables(const float *values) { return byte_planes(values); }
  static inline Raw fetch(const uint8_t *codes) { return load_bytes(codes); }
  template <int OPERAND>
  static inline Decoded decode(Raw raw, const Tables &tables) {
    constexpr bool HIGH = OPERAND >> 1, ODD = OPERAND & 1;
    uint8x16_t lower = vreinterpretq_u8_s32(HIGH ? look_up_high(tables.lower, raw) : look_up_low(tables.lower, raw));
    uint8x16_t upper = vreinterpretq_u8_s32(HIGH ? look_up_high(tables.upper, raw) : look_up_low(tables.upper, raw));
    return vreinterpretq_bf16_u8(ODD ? vtrn2q_u8(lower, upper) : vtrn1q_u8(lower, upper));
  }
  static inline Sum start(const int32_t *) { return set(0.0f); }
  static inline Sum multiply(Sum sum, Decoded weights, const Operand *x) {
    return vbfdotq_f32(sum, weights, vreinterpretq_bf16_u32(vdupq_n_u32(*x)));
  }
  static inline Sum start_lanes(const int32_t *) { return set(0.0f); }
  static inline Sum multiply_lanes(Sum sum, Decoded weights, const Operand *x) {
    return vbfdotq_f32(sum, weights, vreinterpretq_bf16_u32(vld1q_u32(x)));
  }
  static inline Sum both(Sum a, Sum b) { return add(a, b); }
  static inline F total(Sum sum) { return sum; }
  static inline Operand convert(const float *values) { return pair_of(values); }
};
