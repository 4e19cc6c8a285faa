// The product in pairs of bfloat16 (VDPBF16PS). Part of linear.h, for instruction sets that have it.

struct PairProduct {
  using Sum = F;
  using Decoded = __m512i;
  using Operand = uint32_t;  // two bfloat16
  using Raw = __m512i;
  using Tables = __m512i;  // the table twice, so that the fifth bit of an index does not matter
  static constexpr int STRIP = 2, OPERANDS = 4, ELEMENTS = 2;
  static constexpr int nibble(int operand, int element) { return operand + 4 * element; }
  static constexpr int place(int operand, int element, int lane) { return CHUNK * lane + nibble(operand, element); }
  static inline Tables tables(const float *values) {
    uint16_t rounded[32];
    store_bf16(rounded, load(values));
    store_bf16(rounded + 16, load(values));
    return _mm512_loadu_si512(rounded);
  }
  static inline Raw fetch(const uint8_t *codes) { return _mm512_loadu_si512(codes); }
  template <int OPERAND>
  static inline Decoded decode(Raw raw, const Tables &tables) {
    return _mm512_permutexvar_epi16(OPERAND ? _mm512_srli_epi16(raw, 4 * OPERAND) : raw, tables);
  }
  static inline Sum start(const int32_t *) { return _mm512_setzero_ps(); }
  static inline Sum multiply(Sum sum, Decoded weights, const Operand *x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32((int)*x));
  }
  static inline Sum start_lanes(const int32_t *) { return _mm512_setzero_ps(); }
  static inline Sum multiply_lanes(Sum sum, Decoded weights, const Operand *x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_loadu_si512(x));
  }
  static inline Sum both(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static inline F total(Sum sum) { return sum; }
  static inline Operand convert(const float *values) { return pair_of(values); }
};
