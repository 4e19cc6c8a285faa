// AVX-512 F, BW, DQ, VL: sixteen lanes. With FEWBITS_WITH_BF16 (VNNI and BF16: Cooper Lake, Zen 4 and later) also
// their products. portable.h has the meaning of every word.

constexpr int LANES = 16;

using F = __m512;
using I = __m512i;

static inline F set(float value) { return _mm512_set1_ps(value); }
static inline I set_int(int32_t value) { return _mm512_set1_epi32(value); }
static inline F load(const float *from) { return _mm512_loadu_ps(from); }
static inline I load_int(const void *from) { return _mm512_loadu_si512(from); }
static inline void store(float *to, F value) { _mm512_storeu_ps(to, value); }
static inline void store_int(void *to, I value) { _mm512_storeu_si512(to, value); }
static inline I bits(F value) { return _mm512_castps_si512(value); }
static inline F as_float(I value) { return _mm512_castsi512_ps(value); }

static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
static inline F sqrt(F value) { return _mm512_sqrt_ps(value); }
static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
static inline F min(F a, F b) { return _mm512_min_ps(a, b); }
static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
static inline F abs(F value) { return _mm512_abs_ps(value); }
static inline F round(F value) {
  return _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline F to_float(I value) { return _mm512_cvtepi32_ps(value); }
static inline I to_int(F whole) { return _mm512_cvtps_epi32(whole); }
static inline I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
static inline I sub_int(I a, I b) { return _mm512_sub_epi32(a, b); }
static inline I mul_int(I a, I b) { return _mm512_mullo_epi32(a, b); }
static inline I max_int(I a, I b) { return _mm512_max_epi32(a, b); }
static inline I min_int(I a, I b) { return _mm512_min_epi32(a, b); }
static inline I and_int(I a, I b) { return _mm512_and_si512(a, b); }
static inline I or_int(I a, I b) { return _mm512_or_si512(a, b); }
template <int N> static inline I shift_left(I value) { return _mm512_slli_epi32(value, N); }
template <int N> static inline I shift_right(I value) { return _mm512_srli_epi32(value, N); }
static inline I shift_right_by(I value, I amount) { return _mm512_srlv_epi32(value, amount); }
static inline I count_greater(I counter, F a, F b) {
  __mmask16 greater = _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
  return _mm512_mask_sub_epi32(counter, greater, counter, _mm512_set1_epi32(-1));
}
static inline F where_positive(F condition, F a, F b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(condition, _mm512_setzero_ps(), _CMP_GT_OQ), b, a);
}
static inline bool any_positive(F value) {
  return _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_GT_OQ) != 0;
}
static inline bool any_zero(F value) {
  return _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_EQ_OQ) != 0;
}

static inline I load_u8(const uint8_t *from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
}
static inline I load_i8(const uint8_t *from) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
}
static inline void store_u8(uint8_t *to, I value) {
  _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(value));
}

static inline void store_u16(void *to, I value) {
  _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(value));
}

static inline F load_bf16(const uint16_t *from) {
  __m256i half = _mm256_loadu_si256((const __m256i *)from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
// By integers and not by VCVTNEPS2BF16, which turns subnormal results into zeros.
static inline I bf16_bits(F value) {
  I word = bits(value);
  I odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
  I rounded = _mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7fff)), odd);
  __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, is_nan, word, _mm512_set1_epi32(0x400000));
  return _mm512_srli_epi32(rounded, 16);
}
static inline I f16_bits(F value) {
  return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store_bf16(uint16_t *to, F value) { store_u16(to, bf16_bits(value)); }
static inline F load_f16(const uint16_t *from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}
static inline void store_f16(uint16_t *to, F value) {
  _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store_pairs(float *to, F even, F odd) {
  const I first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const I second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  store(to, _mm512_permutex2var_ps(even, first, odd));
  store(to + 16, _mm512_permutex2var_ps(even, second, odd));
}
static inline void stream(void *to, I value) { _mm512_stream_si512((__m512i *)to, value); }
static inline void stream_end() { _mm_sfence(); }

static inline F gather(const float *table, I index) { return _mm512_i32gather_ps(index, table, 4); }
struct Table16 {
  F parts[1];
};
static inline Table16 make_table(const float *values) { return Table16{{load(values)}}; }
// VPERMPS reads four bits of an index: no mask is needed.
static inline F look_up(const Table16 &table, I index) { return _mm512_permutexvar_ps(index, table.parts[0]); }

static inline float sum(F value) { return _mm512_reduce_add_ps(value); }
static inline float largest(F value) { return _mm512_reduce_max_ps(value); }

static inline F pick(const float *values, I index) { return _mm512_permutexvar_ps(index, load(values)); }

// --- products of int8 -------------------------------------------------------------------------------

constexpr int BYTES = 64;
using B = __m512i;

static inline B load_bytes(const void *from) { return _mm512_loadu_si512(from); }
static inline B repeat_bytes(const void *from) {
  int32_t word;
  __builtin_memcpy(&word, from, 4);
  return _mm512_set1_epi32(word);
}
#ifdef FEWBITS_WITH_BF16
// VPDPBUSD takes unsigned bytes times signed ones.
constexpr int WEIGHT_BIAS = 128;
static inline B biased(B weights) { return _mm512_xor_si512(weights, _mm512_set1_epi8((char)0x80)); }
static inline I dot_bytes(I sums, B weights, B x) { return _mm512_dpbusd_epi32(sums, weights, x); }
#else
// Widened to 16 bits, where the sum of two products cannot overflow 32.
constexpr int WEIGHT_BIAS = 0;
static inline B biased(B weights) { return weights; }
static inline I dot_bytes(I sums, B weights, B x) {
  I w_even = _mm512_srai_epi16(_mm512_slli_epi16(weights, 8), 8), w_odd = _mm512_srai_epi16(weights, 8);
  I x_even = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), x_odd = _mm512_srai_epi16(x, 8);
  return _mm512_add_epi32(sums, _mm512_add_epi32(_mm512_madd_epi16(w_even, x_even),
                                                 _mm512_madd_epi16(w_odd, x_odd)));
}
#endif
static inline int32_t sum_int(I value) { return _mm512_reduce_add_epi32(value); }

// --- codes of 4 bits to bytes -----------------------------------------------------------------------

using ByteTable = __m512i;
static inline ByteTable make_byte_table(const uint8_t *values) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)values));
}
static inline B look_up_low(const ByteTable &table, B codes) {
  return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
}
static inline B look_up_high(const ByteTable &table, B codes) {
  return look_up_low(table, _mm512_srli_epi16(codes, 4));
}

static inline void transpose_words(const uint8_t *from, int64_t stride, uint8_t *to) {
  for (int quarter = 0; quarter < 4; quarter++) {  // 4 words of all rows
    const uint8_t *at = from + quarter * 16;
    I rows[4];  // [i]: rows i, 4 + i, 8 + i, 12 + i
    for (int i = 0; i < 4; i++) {
      I v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(at + i * stride)));
      v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(at + (4 + i) * stride)), 1);
      v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(at + (8 + i) * stride)), 2);
      rows[i] = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(at + (12 + i) * stride)), 3);
    }
    I low01 = _mm512_unpacklo_epi32(rows[0], rows[1]), high01 = _mm512_unpackhi_epi32(rows[0], rows[1]);
    I low23 = _mm512_unpacklo_epi32(rows[2], rows[3]), high23 = _mm512_unpackhi_epi32(rows[2], rows[3]);
    uint8_t *out = to + quarter * 256;
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(low01, low23));
    _mm512_storeu_si512(out + 64, _mm512_unpackhi_epi64(low01, low23));
    _mm512_storeu_si512(out + 128, _mm512_unpacklo_epi64(high01, high23));
    _mm512_storeu_si512(out + 192, _mm512_unpackhi_epi64(high01, high23));
  }
}
