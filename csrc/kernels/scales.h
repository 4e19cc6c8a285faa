// Scales and zero points as float32, whatever they are stored as.

static inline void load_stored_scales(const fewbits_weight &w, int64_t first, int64_t count, float *out) {
  const float *f32 = (const float *)w.scale + first;
  const uint16_t *half = (const uint16_t *)w.scale + first;
  const uint8_t *bytes = (const uint8_t *)w.scale + first;
  int64_t i = 0, whole = count - count % LANES;
  switch (w.scale_type) {
    case FEWBITS_SCALE_F32:
      for (; i < whole; i += LANES) store(out + i, load(f32 + i));
      for (; i < count; i++) out[i] = f32[i];
      break;
    case FEWBITS_SCALE_F16:
      for (; i < whole; i += LANES) store(out + i, load_f16(half + i));
      for (; i < count; i++) out[i] = f16_to_float(half[i]);
      break;
    case FEWBITS_SCALE_BF16:
      for (; i < whole; i += LANES) store(out + i, load_bf16(half + i));
      for (; i < count; i++) out[i] = bf16_to_float(half[i]);
      break;
    default:  // E8M0, where a byte of 0 is a subnormal
      for (; i < whole; i += LANES)
        store(out + i, as_float(max_int(shift_left<23>(load_u8(bytes + i)), set_int(0x00400000))));
      for (; i < count; i++) {
        uint32_t word = bytes[i] ? (uint32_t)bytes[i] << 23 : 0x00400000;
        __builtin_memcpy(out + i, &word, 4);
      }
  }
}

static inline void load_zeros(const fewbits_weight &w, int64_t grid_row, int64_t first, int64_t count,
                              float *out) {
  if (!w.zero) {
    float zero = w.kind == FEWBITS_UNSIGNED ? (float)w.middle : 0.0f;
    for (int64_t i = 0; i < count; i++) out[i] = zero;
    return;
  }
  const uint8_t *row = w.zero + grid_row * packed_bytes(groups_across(w), w.bits);
  int64_t i = 0;
  if (w.bits == 8) {
    for (; i + LANES <= count; i += LANES) store(out + i, to_float(load_u8(row + first + i)));
  }
  for (; i < count; i++) out[i] = (float)code_at(row, first + i, w.bits, false);
}

// Values of LANES codes of 8 bits, before their scale.
static inline F byte_values(const fewbits_weight &w, const uint8_t *codes, F zero) {
  if (w.kind == FEWBITS_TABLE) return gather(w.table, load_u8(codes));
  if (w.kind == FEWBITS_SIGNED) return to_float(load_i8(codes));
  return sub(to_float(load_u8(codes)), zero);
}

// Values of 8-bit floats (sign, exponent, MANTISSA bits; OCP E4M3 and E5M2) whose table has NaN above the
// largest finite one. A few additions are several times as fast as looking up 256 values in memory.
template <int MANTISSA> static inline F float8_values(I codes) {
  constexpr int BIAS = MANTISSA == 3 ? 7 : 15, LARGEST = MANTISSA == 3 ? 0x7e : 0x7b;
  I magnitude = and_int(codes, set_int(0x7f));
  F normal = as_float(add_int(shift_left<23 - MANTISSA>(magnitude), set_int((127 - BIAS) << 23)));
  F number = to_float(magnitude), subnormal = mul(number, as_float(set_int((128 - BIAS - MANTISSA) << 23)));
  F value = where_positive(sub(number, set((1 << MANTISSA) - 1)), normal, subnormal);
  value = where_positive(sub(number, set(LARGEST)), as_float(set_int(0x7fc00000)), value);
  return as_float(or_int(bits(value), shift_left<24>(and_int(codes, set_int(0x80)))));
}

template <int MANTISSA> static inline bool is_float8(const float *table) {
  bool same = true;
  for (int code = 0; code < 256; code += LANES) {
    uint8_t codes[LANES];
    int32_t words[LANES], given[LANES];
    for (int i = 0; i < LANES; i++) codes[i] = (uint8_t)(code + i);
    store_int(words, bits(float8_values<MANTISSA>(load_u8(codes))));
    __builtin_memcpy(given, table + code, sizeof given);
    for (int i = 0; i < LANES; i++) {
      bool both_nan = (words[i] & 0x7fffffff) > 0x7f800000 && (given[i] & 0x7fffffff) > 0x7f800000;
      same = same && (words[i] == given[i] || both_nan);
    }
  }
  return same;
}

// Each multiplication and addition rounds by itself, as in the reference.
struct Scaling {
  F scale, unit, offset;
  bool has_unit, has_offset;
};

static inline Scaling scaling_of(const fewbits_weight &w) {
  bool has_offset = w.offset != nullptr;
  return {set(1.0f), set(w.unit), set(has_offset ? *w.offset : 0.0f), w.unit != 1.0f, has_offset};
}

static inline F apply(const Scaling &s, F value) {
  value = mul(value, s.scale);
  if (s.has_unit) value = mul(value, s.unit);
  return s.has_offset ? add(value, s.offset) : value;
}

// out[i] = table[codes[i]], one load after the other: instructions that gather are slower on most processors.
static inline void look_up_each(const float *table, const uint8_t *codes, int64_t count, float *out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t eight;
    __builtin_memcpy(&eight, codes + i, 8);
    float a = table[eight & 255], b = table[eight >> 8 & 255], c = table[eight >> 16 & 255], d = table[eight >> 24 & 255];
    float e = table[eight >> 32 & 255], f = table[eight >> 40 & 255], g = table[eight >> 48 & 255], h = table[eight >> 56];
    out[i] = a, out[i + 1] = b, out[i + 2] = c, out[i + 3] = d;
    out[i + 4] = e, out[i + 5] = f, out[i + 6] = g, out[i + 7] = h;
  }
  for (; i < count; i++) out[i] = table[codes[i]];
}

static inline void load_nested_scales(const fewbits_weight &inner, int64_t first, int64_t count, float *out) {
  Scaling scaling = scaling_of(inner);
  float scale[LANES], zero[LANES];
  bool is_table = inner.kind == FEWBITS_TABLE;
  while (count > 0) {
    bool flat = inner.flat_groups;
    Run run = run_at(inner, flat ? 0 : first / inner.columns, flat ? first : first % inner.columns);
    int64_t length = run.length < count ? run.length : count;
    load_stored_scales(inner, run.group, 1, scale);
    load_zeros(inner, run.grid_row, run.grid_column, 1, zero);
    scaling.scale = set(scale[0]);
    const uint8_t *codes = inner.codes + first;
    if (is_table) look_up_each(inner.table, codes, length, out);
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES)
      store(out + i, apply(scaling, is_table ? load(out + i) : byte_values(inner, codes + i, set(zero[0]))));
    if (i < length) {
      uint8_t last[LANES] = {};
      float values[LANES] = {};
      for (int64_t j = i; j < length; j++) last[j - i] = codes[j], values[j - i] = out[j];
      store(values, apply(scaling, is_table ? load(values) : byte_values(inner, last, set(zero[0]))));
      for (int64_t j = i; j < length; j++) out[j] = values[j - i];
    }
    first += length, out += length, count -= length;
  }
}

// Scales [first, first + count) in row-major order of the grid (flat groups: along the run).
static inline void load_scales(const fewbits_weight &w, int64_t first, int64_t count, float *out) {
  if (w.scale_type == FEWBITS_SCALE_NESTED) return load_nested_scales(*w.nested, first, count, out);
  load_stored_scales(w, first, count, out);
}
