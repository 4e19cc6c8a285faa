// NEON as every Armv8-A core has it: four lanes. With FEWBITS_DOT (Armv8.2 dot products) also their products
// of int8. portable.h has the meaning of every word.

constexpr int LANES = 4;

using F = float32x4_t;
using I = int32x4_t;

static inline F set(float value) { return vdupq_n_f32(value); }
static inline I set_int(int32_t value) { return vdupq_n_s32(value); }
static inline F load(const float *from) { return vld1q_f32(from); }
static inline I load_int(const void *from) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t *)from)); }
static inline void store(float *to, F value) { vst1q_f32(to, value); }
static inline void store_int(void *to, I value) { vst1q_u8((uint8_t *)to, vreinterpretq_u8_s32(value)); }
static inline I bits(F value) { return vreinterpretq_s32_f32(value); }
static inline F as_float(I value) { return vreinterpretq_f32_s32(value); }

static inline F add(F a, F b) { return vaddq_f32(a, b); }
static inline F sub(F a, F b) { return vsubq_f32(a, b); }
static inline F mul(F a, F b) { return vmulq_f32(a, b); }
static inline F div(F a, F b) { return vdivq_f32(a, b); }
static inline F sqrt(F value) { return vsqrtq_f32(value); }
static inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
// FMIN and FMAX return NaN for NaN; the second operand is wanted.
static inline F min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
static inline F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline F abs(F value) { return vabsq_f32(value); }
static inline F round(F value) { return vrndnq_f32(value); }

static inline F to_float(I value) { return vcvtq_f32_s32(value); }
static inline I to_int(F whole) { return vcvtnq_s32_f32(whole); }
static inline I add_int(I a, I b) { return vaddq_s32(a, b); }
static inline I sub_int(I a, I b) { return vsubq_s32(a, b); }
static inline I mul_int(I a, I b) { return vmulq_s32(a, b); }
static inline I max_int(I a, I b) { return vmaxq_s32(a, b); }
static inline I min_int(I a, I b) { return vminq_s32(a, b); }
static inline I and_int(I a, I b) { return vandq_s32(a, b); }
static inline I or_int(I a, I b) { return vorrq_s32(a, b); }
template <int N> static inline I shift_left(I value) { return vshlq_n_s32(value, N); }
// USHR has no shift by 0.
template <int N> static inline I shift_right(I value) {
  return vreinterpretq_s32_u32(vreinterpretq_u32_s32(value) >> N);
}
static inline I shift_right_by(I value, I amount) {
  return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(value), vnegq_s32(amount)));
}
// A true comparison is -1.
static inline I count_greater(I counter, F a, F b) {
  return vsubq_s32(counter, vreinterpretq_s32_u32(vcgtq_f32(a, b)));
}
static inline F where_positive(F condition, F a, F b) {
  return vbslq_f32(vcgtzq_f32(condition), a, b);
}
static inline bool any_positive(F value) { return vmaxvq_u32(vcgtzq_f32(value)) != 0; }
static inline bool any_zero(F value) { return vmaxvq_u32(vceqzq_f32(value)) != 0; }

static inline I load_u8(const uint8_t *from) {
  uint32_t four;
  __builtin_memcpy(&four, from, 4);
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
}
static inline I load_i8(const uint8_t *from) {
  uint32_t four;
  __builtin_memcpy(&four, from, 4);
  return vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four))));
}
static inline void store_u8(uint8_t *to, I value) {
  uint16x4_t narrow = vmovn_u32(vreinterpretq_u32_s32(value));
  uint32_t four = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(narrow, narrow))), 0);
  __builtin_memcpy(to, &four, 4);
}

static inline void store_u16(void *to, I value) {
  vst1_u8((uint8_t *)to, vreinterpret_u8_u16(vmovn_u32(vreinterpretq_u32_s32(value))));
}

static inline F load_bf16(const uint16_t *from) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(from)), 16));
}
static inline I bf16_bits(F value) {
  uint32x4_t word = vreinterpretq_u32_f32(value);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(word, 16), vdupq_n_u32(1));
  uint32x4_t rounded = vaddq_u32(vaddq_u32(word, vdupq_n_u32(0x7fff)), odd);
  uint32x4_t quiet = vorrq_u32(word, vdupq_n_u32(0x400000));
  return vreinterpretq_s32_u32(vshrq_n_u32(vbslq_u32(vceqq_f32(value, value), rounded, quiet), 16));
}
static inline uint16x4_t narrow_f16(F value) { return vreinterpret_u16_f16(vcvt_f16_f32(value)); }
static inline I f16_bits(F value) { return vreinterpretq_s32_u32(vmovl_u16(narrow_f16(value))); }
static inline void store_bf16(uint16_t *to, F value) { store_u16(to, bf16_bits(value)); }
static inline F load_f16(const uint16_t *from) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
}
static inline void store_f16(uint16_t *to, F value) { vst1_u16(to, narrow_f16(value)); }
static inline void store_pairs(float *to, F even, F odd) { vst2q_f32(to, (float32x4x2_t{{even, odd}})); }
static inline void stream(void *to, I value) { store_int(to, value); }
static inline void stream_end() {}

static inline F gather(const float *table, I index) {
  F value = vdupq_n_f32(table[vgetq_lane_s32(index, 0)]);
  value = vld1q_lane_f32(table + vgetq_lane_s32(index, 1), value, 1);
  value = vld1q_lane_f32(table + vgetq_lane_s32(index, 2), value, 2);
  return vld1q_lane_f32(table + vgetq_lane_s32(index, 3), value, 3);
}
struct Table16 {
  F parts[4];
};
static inline Table16 make_table(const float *values) {
  return Table16{{load(values), load(values + 4), load(values + 8), load(values + 12)}};
}
// TBL picks bytes out of 64: those of float i are 4i … 4i + 3.
static inline F look_up(const Table16 &table, I index) {
  uint8x16x4_t bytes;
  for (int i = 0; i < 4; i++) bytes.val[i] = vreinterpretq_u8_f32(table.parts[i]);
  I low = vandq_s32(index, vdupq_n_s32(15));
  I places = vmlaq_s32(vdupq_n_s32(0x03020100), low, vdupq_n_s32(0x04040404));
  return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_s32(places)));
}

static inline float sum(F value) { return vaddvq_f32(value); }
static inline float largest(F value) { return vmaxvq_f32(value); }

static inline F pick(const float *values, I index) { return gather(values, index); }

// --- products of int8 -------------------------------------------------------------------------------

constexpr int BYTES = 16;
using B = int32x4_t;

static inline B load_bytes(const void *from) { return load_int(from); }
static inline B repeat_bytes(const void *from) {
  int32_t word;
  __builtin_memcpy(&word, from, 4);
  return vdupq_n_s32(word);
}
constexpr int WEIGHT_BIAS = 0;
static inline B biased(B weights) { return weights; }
static inline I dot_bytes(I sums, B weights, B x) {
  int8x16_t w = vreinterpretq_s8_s32(weights), v = vreinterpretq_s8_s32(x);
#ifdef FEWBITS_DOT
  return vdotq_s32(sums, w, v);
#else
  // Products fit 16 bits, sums of two of them 32.
  int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(v)));
  int32x4_t high = vpaddlq_s16(vmull_high_s8(w, v));
  return vaddq_s32(sums, vpaddq_s32(low, high));
#endif
}
static inline int32_t sum_int(I value) { return vaddvq_s32(value); }

// --- codes of 4 bits to bytes -----------------------------------------------------------------------

using ByteTable = uint8x16_t;
static inline ByteTable make_byte_table(const uint8_t *values) { return vld1q_u8(values); }
static inline B look_up_low(const ByteTable &table, B codes) {
  uint8x16_t index = vandq_u8(vreinterpretq_u8_s32(codes), vdupq_n_u8(15));
  return vreinterpretq_s32_u8(vqtbl1q_u8(table, index));
}
static inline B look_up_high(const ByteTable &table, B codes) {
  return vreinterpretq_s32_u8(vqtbl1q_u8(table, vshrq_n_u8(vreinterpretq_u8_s32(codes), 4)));
}

static inline void transpose_words(const uint8_t *from, int64_t stride, uint8_t *to) {
  for (int part = 0; part < 16; part++) {  // 4 words of 4 rows
    int word = part / 4 * 4, row = part % 4 * 4;
    const uint8_t *at = from + row * stride + 4 * word;
    I a = load_int(at), b = load_int(at + stride), c = load_int(at + 2 * stride), d = load_int(at + 3 * stride);
    I low_ac = vzip1q_s32(a, c), low_bd = vzip1q_s32(b, d);
    I high_ac = vzip2q_s32(a, c), high_bd = vzip2q_s32(b, d);
    uint8_t *out = to + 64 * word + 4 * row;
    store_int(out, vzip1q_s32(low_ac, low_bd));
    store_int(out + 64, vzip2q_s32(low_ac, low_bd));
    store_int(out + 128, vzip1q_s32(high_ac, high_bd));
    store_int(out + 192, vzip2q_s32(high_ac, high_bd));
  }
}
