// float16 and bfloat16 in plain C++, for machines and places without an instruction for them. Included inside the namespace
// of its user, so that nothing of it is shared between instruction sets.

static inline float bf16_to_float(uint16_t half) {
  uint32_t word = (uint32_t)half << 16;
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}

static inline float f16_to_float(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fffu, word;
  float value;
  if (magnitude >= 0x7c00) {
    word = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;  // infinity, NaN
  } else if (magnitude >= 0x400) {
    word = sign | ((magnitude << 13) + 0x38000000);
  } else {  // subnormal: a multiple of 2**-24
    value = (float)magnitude * 5.9604644775390625e-8f;
    __builtin_memcpy(&word, &value, 4);
    word |= sign;
  }
  __builtin_memcpy(&value, &word, 4);
  return value;
}

static inline uint16_t float_to_f16(float value) {
  uint32_t word;
  __builtin_memcpy(&word, &value, 4);
  uint16_t sign = (uint16_t)(word >> 16 & 0x8000);
  word &= 0x7fffffff;
  if (word > 0x7f800000) return sign | 0x7e00 | (uint16_t)(word >> 13 & 0x1ff);  // NaN
  if (word >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (word < 0x38800000) {                       // subnormal: round to a multiple of 2**-24
    float magnitude;
    __builtin_memcpy(&magnitude, &word, 4);
    magnitude += 0.5f;  // its unit in the last place is 2**-24
    __builtin_memcpy(&word, &magnitude, 4);
    return sign | (uint16_t)(word - 0x3f000000);
  }
  uint32_t odd = word >> 13 & 1;
  return sign | (uint16_t)((word - 0x38000000 + 0xfff + odd) >> 13);
}
