// AVX2, FMA, F16C, BMI2: eight lanes. portable.h has the meaning of every word.

constexpr int LANES = 8;

using F = __m256;
using I = __m256i;

static inline F set(float value) { return _mm256_set1_ps(value); }
static inline I set_int(int32_t value) { return _mm256_set1_epi32(value); }
static inline F load(const float *from) { return _mm256_loadu_ps(from); }
static inline I load_int(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
static inline void store(float *to, F value) { _mm256_storeu_ps(to, value); }
static inline void store_int(void *to, I value) { _mm256_storeu_si256((__m256i *)to, value); }
static inline I bits(F value) { return _mm256_castps_si256(value); }
static inline F as_float(I value) { return _mm256_castsi256_ps(value); }

static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
static inline F div(F a, F b) { return _mm256_div_ps(a, b); }
static inline F sqrt(F value) { return _mm256_sqrt_ps(value); }
static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
static inline F min(F a, F b) { return _mm256_min_ps(a, b); }
static inline F max(F a, F b) { return _mm256_max_ps(a, b); }
static inline F abs(F value) { return _mm256_and_ps(value, as_float(set_int(0x7fffffff))); }
static inline F round(F value) {
  return _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline F to_float(I value) { return _mm256_cvtepi32_ps(value); }
static inline I to_int(F whole) { return _mm256_cvtps_epi32(whole); }
static inline I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
static inline I sub_int(I a, I b) { return _mm256_sub_epi32(a, b); }
static inline I mul_int(I a, I b) { return _mm256_mullo_epi32(a, b); }
static inline I max_int(I a, I b) { return _mm256_max_epi32(a, b); }
static inline I min_int(I a, I b) { return _mm256_min_epi32(a, b); }
static inline I and_int(I a, I b) { return _mm256_and_si256(a, b); }
static inline I or_int(I a, I b) { return _mm256_or_si256(a, b); }
template <int N> static inline I shift_left(I value) { return _mm256_slli_epi32(value, N); }
template <int N> static inline I shift_right(I value) { return _mm256_srli_epi32(value, N); }
static inline I shift_right_by(I value, I amount) { return _mm256_srlv_epi32(value, amount); }
// A true comparison is -1.
static inline I count_greater(I counter, F a, F b) {
  return _mm256_sub_epi32(counter, bits(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
static inline F where_positive(F condition, F a, F b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(condition, _mm256_setzero_ps(), _CMP_GT_OQ));
}

static inline bool any_positive(F value) {
  return _mm256_movemask_ps(_mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_GT_OQ)) != 0;
}
static inline bool any_zero(F value) {
  return _mm256_movemask_ps(_mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_EQ_OQ)) != 0;
}

static inline I load_u8(const uint8_t *from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
}
static inline I load_i8(const uint8_t *from) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
}
static inline void store_u8(uint8_t *to, I value) {
  I first = _mm256_shuffle_epi8(value, _mm256_set1_epi32(0x0c080400));  // of each half, four times
  __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(first), _mm256_extracti128_si256(first, 1));
  _mm_storel_epi64((__m128i *)to, both);
}

static inline void store_u16(void *to, I value) {
  I first = _mm256_shuffle_epi8(value, _mm256_setr_epi64x(0x0d0c090805040100, 0, 0x0d0c090805040100, 0));
  __m128i low = _mm256_castsi256_si128(first), high = _mm256_extracti128_si256(first, 1);
  _mm_storeu_si128((__m128i *)to, _mm_unpacklo_epi64(low, high));
}

static inline F load_bf16(const uint16_t *from) {
  __m128i half = _mm_loadu_si128((const __m128i *)from);
  return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline I bf16_bits(F value) {
  I word = bits(value);
  I odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
  I rounded = _mm256_add_epi32(_mm256_add_epi32(word, _mm256_set1_epi32(0x7fff)), odd);
  I quiet = _mm256_or_si256(word, _mm256_set1_epi32(0x400000));
  F is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  return _mm256_srli_epi32(bits(_mm256_blendv_ps(as_float(rounded), as_float(quiet), is_nan)), 16);
}
static inline I f16_bits(F value) {
  return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store_bf16(uint16_t *to, F value) {
  I rounded = bf16_bits(value);
  __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
  _mm_storeu_si128((__m128i *)to, _mm_packus_epi32(low, high));
}
static inline F load_f16(const uint16_t *from) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
}
static inline void store_f16(uint16_t *to, F value) {
  _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store_pairs(float *to, F even, F odd) {
  F low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);  // 0 1 | 4 5, 2 3 | 6 7
  store(to, _mm256_permute2f128_ps(low, high, 0x20));
  store(to + 8, _mm256_permute2f128_ps(low, high, 0x31));
}
static inline void stream(void *to, I value) { _mm256_stream_si256((__m256i *)to, value); }
static inline void stream_end() { _mm_sfence(); }

static inline F gather(const float *table, I index) { return _mm256_i32gather_ps(table, index, 4); }
struct Table16 {
  F parts[2];
};
static inline Table16 make_table(const float *values) { return Table16{{load(values), load(values + 8)}}; }
// VPERMPS reads three bits of an index; the fourth, moved to the sign, chooses between the halves.
static inline F look_up(const Table16 &table, I index) {
  F low = _mm256_permutevar8x32_ps(table.parts[0], index), high = _mm256_permutevar8x32_ps(table.parts[1], index);
  return _mm256_blendv_ps(low, high, as_float(_mm256_slli_epi32(index, 28)));
}

static inline float sum(F value) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline float largest(F value) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

static inline F pick(const float *values, I index) { return _mm256_permutevar8x32_ps(load(values), index); }

// --- products of int8 -------------------------------------------------------------------------------

constexpr int BYTES = 32;
using B = __m256i;

static inline B load_bytes(const void *from) { return load_int(from); }
static inline B repeat_bytes(const void *from) {
  int32_t word;
  __builtin_memcpy(&word, from, 4);
  return _mm256_set1_epi32(word);
}
constexpr int WEIGHT_BIAS = 0;
static inline B biased(B weights) { return weights; }
// VPMADDUBSW takes unsigned bytes times signed ones and saturates sums of two. |weight| <= 128 and |x| <= 127
// keep them below 2 * 128 * 127 < 2**15, and x, which is never -128, can change its sign.
static inline I dot_bytes(I sums, B weights, B x) {
  I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline int32_t sum_int(I value) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
  __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

// --- codes of 4 bits to bytes -----------------------------------------------------------------------

using ByteTable = __m256i;
static inline ByteTable make_byte_table(const uint8_t *values) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values));
}
static inline B look_up_low(const ByteTable &table, B codes) {
  return _mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
}
static inline B look_up_high(const ByteTable &table, B codes) {
  return look_up_low(table, _mm256_srli_epi16(codes, 4));
}

static inline void transpose_words(const uint8_t *from, int64_t stride, uint8_t *to) {
  for (int part = 0; part < 8; part++) {  // 4 words of 8 rows
    int word = part / 2 * 4, row = part % 2 * 8;
    const uint8_t *at = from + row * stride + 4 * word;
    I rows[4];  // [i]: rows i, 4 + i
    for (int i = 0; i < 4; i++) {
      __m128i low = _mm_loadu_si128((const __m128i *)(at + i * stride));
      __m128i high = _mm_loadu_si128((const __m128i *)(at + (4 + i) * stride));
      rows[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    I low01 = _mm256_unpacklo_epi32(rows[0], rows[1]), high01 = _mm256_unpackhi_epi32(rows[0], rows[1]);
    I low23 = _mm256_unpacklo_epi32(rows[2], rows[3]), high23 = _mm256_unpackhi_epi32(rows[2], rows[3]);
    uint8_t *out = to + 64 * word + 4 * row;
    store_int(out, _mm256_unpacklo_epi64(low01, low23));
    store_int(out + 64, _mm256_unpackhi_epi64(low01, low23));
    store_int(out + 128, _mm256_unpacklo_epi64(high01, high23));
    store_int(out + 192, _mm256_unpackhi_epi64(high01, high23));
  }
}
