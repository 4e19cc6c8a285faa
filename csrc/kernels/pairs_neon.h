// The product in pairs of bfloat16 (BFDOT). Part of linear.h, for Arm processors that have it.
//
// The table is rounded to bfloat16 and split into its lower and its upper bytes. Byte shuffles look up 16 of each;
// taking every second byte of both by turns leaves two numbers in each lane.

struct PairProduct {
  using Sum = F;
  using Decoded = bfloat16x8_t;
  using Operand = uint32_t;  // two bfloat16
  using Raw = B;
  struct Tables {
    ByteTable lower, upper;
  };
  static constexpr int STRIP = 2, OPERANDS = 4, ELEMENTS = 2;
  // Operand 2 h + o: half h of the bytes o and o + 2 of a word.
  static constexpr int nibble(int operand, int element) { return (operand >> 1) + 2 * (operand & 1) + 4 * element; }
  static constexpr int place(int operand, int element, int lane) { return CHUNK * lane + nibble(operand, element); }
  static inline Tables tables(const float *values) {
    uint16_t rounded[16];
    uint8_t lower[16], upper[16];
    for (int i = 0; i < 16; i += LANES) store_bf16(rounded + i, load(values + i));
    for (int i = 0; i < 16; i++) {
      lower[i] = (uint8_t)rounded[i];
      upper[i] = (uint8_t)(rounded[i] >> 8);
    }
    return {make_byte_table(lower), make_byte_table(upper)};
  }
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
  static inline Operand convert(const float *values) {
    uint32_t low, high;
    __builtin_memcpy(&low, values, 4);
    __builtin_memcpy(&high, values + 1, 4);
    return low >> 16 | (high & 0xffff0000u);  // x was bfloat16: nothing is cut off
  }
};
