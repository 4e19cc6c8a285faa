// The vocabulary that kernels are written in, in plain C++ on four lanes: the meaning that the other files of
// this folder keep, and what runs where they do not.
//
//   F  LANES floats          I  LANES 32-bit integers
//
// Rounding is to nearest, ties to even, everywhere. `fma` may round once or twice; everything else is IEEE.
// This file is included inside the namespace of an instruction set (isa.cpp), after <stdint.h>.

constexpr int LANES = 4;

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));

static inline F set(float value) { return F{value, value, value, value}; }
static inline I set_int(int32_t value) { return I{value, value, value, value}; }

static inline F load(const float *from) {
  F value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
static inline I load_int(const void *from) {
  I value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
static inline void store(float *to, F value) { __builtin_memcpy(to, &value, sizeof value); }
static inline void store_int(void *to, I value) { __builtin_memcpy(to, &value, sizeof value); }

static inline I bits(F value) { return (I)value; }
static inline F as_float(I value) { return (F)value; }

static inline F add(F a, F b) { return a + b; }
static inline F sub(F a, F b) { return a - b; }
static inline F mul(F a, F b) { return a * b; }
static inline F div(F a, F b) { return a / b; }
static inline F sqrt(F value) {
  return F{__builtin_sqrtf(value[0]), __builtin_sqrtf(value[1]), __builtin_sqrtf(value[2]),
           __builtin_sqrtf(value[3])};
}
static inline F fma(F a, F b, F c) { return a * b + c; }
static inline F min(F a, F b) { return a < b ? a : b; }
static inline F max(F a, F b) { return a > b ? a : b; }
static inline F abs(F value) { return as_float(bits(value) & 0x7fffffff); }
// Adding and taking away 2**23 leaves an integer; larger magnitudes are integers already.
static inline F round(F value) {
  F magnitude = abs(value), whole = (magnitude + 8388608.0f) - 8388608.0f;
  I small = magnitude < 8388608.0f, sign = bits(value) & (int32_t)0x80000000;
  return as_float((bits(whole) & small) | (bits(magnitude) & ~small) | sign);
}

static inline F to_float(I value) { return __builtin_convertvector(value, F); }
static inline I to_int(F whole) { return __builtin_convertvector(whole, I); }
static inline I add_int(I a, I b) { return (I)((U)a + (U)b); }  // these three wrap around
static inline I sub_int(I a, I b) { return (I)((U)a - (U)b); }
static inline I mul_int(I a, I b) { return (I)((U)a * (U)b); }
static inline I max_int(I a, I b) { return a > b ? a : b; }
static inline I min_int(I a, I b) { return a < b ? a : b; }
static inline I and_int(I a, I b) { return a & b; }
static inline I or_int(I a, I b) { return a | b; }
template <int N> static inline I shift_left(I value) { return (I)((U)value << N); }
template <int N> static inline I shift_right(I value) { return (I)((U)value >> N); }  // zeros come in
// `amount` bits to the right, lane by lane.
static inline I shift_right_by(I value, I amount) { return (I)((U)value >> (U)amount); }
// counter + 1 in the lanes where a > b.
static inline I count_greater(I counter, F a, F b) { return counter - (a > b); }
// a where condition > 0 … b elsewhere; condition is compared as float.
static inline F where_positive(F condition, F a, F b) { return condition > set(0.0f) ? a : b; }
// Whether a lane is above 0, and whether one is 0.
static inline bool any_positive(F value) {
  return value[0] > 0 || value[1] > 0 || value[2] > 0 || value[3] > 0;
}
static inline bool any_zero(F value) {
  return value[0] == 0 || value[1] == 0 || value[2] == 0 || value[3] == 0;
}

static inline I load_u8(const uint8_t *from) { return I{from[0], from[1], from[2], from[3]}; }
static inline I load_i8(const uint8_t *from) {
  return I{(int8_t)from[0], (int8_t)from[1], (int8_t)from[2], (int8_t)from[3]};
}
// The lowest byte of every lane; the lowest two.
static inline void store_u8(uint8_t *to, I value) {
  for (int i = 0; i < 4; i++) to[i] = (uint8_t)value[i];
}
static inline void store_u16(void *to, I value) {
  uint16_t halves[4] = {(uint16_t)value[0], (uint16_t)value[1], (uint16_t)value[2], (uint16_t)value[3]};
  __builtin_memcpy(to, halves, sizeof halves);
}

static inline F load_bf16(const uint16_t *from) {
  return as_float(I{from[0] << 16, from[1] << 16, from[2] << 16, from[3] << 16});
}
// Rounded to 16 bits, which are the low ones of every lane; zeros above them.
static inline I bf16_bits(F value) {
  U word = (U)value;
  I is_nan = (I)(word & 0x7fffffff) > 0x7f800000;
  U rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16, quiet = word >> 16 | 0x40;
  return (I)((quiet & (U)is_nan) | (rounded & ~(U)is_nan));
}
static inline I f16_bits(F value) {
  return I{float_to_f16(value[0]), float_to_f16(value[1]), float_to_f16(value[2]), float_to_f16(value[3])};
}
static inline void store_bf16(uint16_t *to, F value) { store_u16(to, bf16_bits(value)); }
static inline F load_f16(const uint16_t *from) {
  F value;
  for (int i = 0; i < 4; i++) value[i] = f16_to_float(from[i]);
  return value;
}
static inline void store_f16(uint16_t *to, F value) { store_u16(to, f16_bits(value)); }
// even[0], odd[0], even[1], odd[1], …
static inline void store_pairs(float *to, F even, F odd) {
  store(to, F{even[0], odd[0], even[1], odd[1]});
  store(to + 4, F{even[2], odd[2], even[3], odd[3]});
}
// A store past the caches, to a multiple of the vector's size; and what ends a number of them.
static inline void stream(void *to, I value) { store_int(to, value); }
static inline void stream_end() {}

static inline F gather(const float *table, I index) {
  return F{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}
// Sixteen floats (or other 32-bit words), and the ones that the lowest four bits of every lane point to.
struct Table16 {
  F parts[16 / LANES];
};
static inline Table16 make_table(const float *values) {
  return Table16{{load(values), load(values + 4), load(values + 8), load(values + 12)}};
}
static inline F look_up(const Table16 &table, I index) {
  float values[16];
  __builtin_memcpy(values, table.parts, sizeof values);
  return gather(values, index & 15);
}

static inline float sum(F value) { return (value[0] + value[1]) + (value[2] + value[3]); }
static inline float largest(F value) {
  float a = value[0] > value[1] ? value[0] : value[1], b = value[2] > value[3] ? value[2] : value[3];
  return a > b ? a : b;
}

// The values that the lanes point to, each below LANES; LANES values may be read.
static inline F pick(const float *values, I index) { return gather(values, index); }

// --- products of int8 -------------------------------------------------------------------------------
// BYTES codes at a time, in vectors of 32-bit sums: a lane sums the products of its four bytes.

constexpr int BYTES = 4 * LANES;
// What weights are moved by before a product, so that they suit the instruction: added to every weight.
constexpr int WEIGHT_BIAS = 0;
using B = I;  // BYTES bytes

static inline B load_bytes(const void *from) { return load_int(from); }
// Four bytes, repeated in every lane.
static inline B repeat_bytes(const void *from) {
  int32_t word;
  __builtin_memcpy(&word, from, 4);
  return set_int(word);
}
// int8 weights as the first operand of `dot_bytes`.
static inline B biased(B weights) { return weights; }
// sums + weights · x over the four bytes of every lane; weights biased, x int8 but never -128.
static inline I dot_bytes(I sums, B weights, B x) {
  for (int byte = 0; byte < 4; byte++) {
    I w = ((I)((U)weights << (24 - 8 * byte))) >> 24, v = ((I)((U)x << (24 - 8 * byte))) >> 24;
    sums += w * v;
  }
  return sums;
}
static inline int32_t sum_int(I value) { return value[0] + value[1] + value[2] + value[3]; }

// --- codes of 4 bits to bytes -----------------------------------------------------------------------

// Sixteen bytes, and those that the low (or high) half of every byte points to.
struct ByteTable {
  uint8_t values[16];
};
static inline ByteTable make_byte_table(const uint8_t *values) {
  ByteTable table;
  __builtin_memcpy(table.values, values, 16);
  return table;
}
static inline B look_up_low(const ByteTable &table, B codes) {
  uint8_t bytes[BYTES];
  __builtin_memcpy(bytes, &codes, BYTES);
  for (int i = 0; i < BYTES; i++) bytes[i] = table.values[bytes[i] & 15];
  return load_bytes(bytes);
}
static inline B look_up_high(const ByteTable &table, B codes) {
  return look_up_low(table, (B)((U)codes >> 4));  // what comes from the next byte is masked away
}

// A square of 16 rows of 16 words, mirrored: to[16 j + i] = word j of row i; `stride` in bytes.
static inline void transpose_words(const uint8_t *from, int64_t stride, uint8_t *to) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) __builtin_memcpy(to + 64 * j + 4 * i, from + i * stride + 4 * j, 4);
}
