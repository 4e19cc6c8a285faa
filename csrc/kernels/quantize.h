// Values to codes: the range of every group, its scale and zero point, and the codes, for a span of groups
// that stays in the nearest cache from the first reading to the second.

constexpr int64_t MAX_SPAN = 512;       // groups
constexpr int64_t MAX_BYTES = 4096;     // codes that are packed at once
constexpr double TINY = 1e-38;          // stands in for a scale of 0 as the divisor

// Groups of one span. For symmetric formats `high` is the largest magnitude.
struct Span {
  int64_t first_row, rows, grid_row;
  int64_t first_group, groups;
  int64_t first_column, columns;
  float low[MAX_SPAN + LANES], high[MAX_SPAN + LANES];
  float factor[MAX_SPAN + LANES];  // what values are multiplied with, or divided by
  float zero[MAX_SPAN + LANES];
};

template <int DTYPE> struct Input;
template <> struct Input<FEWBITS_F32> {
  using Type = float;
  static inline F get(const float *from) { return load(from); }
};
template <> struct Input<FEWBITS_F16> {
  using Type = uint16_t;
  static inline F get(const uint16_t *from) { return load_f16(from); }
};
template <> struct Input<FEWBITS_BF16> {
  using Type = uint16_t;
  static inline F get(const uint16_t *from) { return load_bf16(from); }
};

// Fewer than a vector, zeros behind them.
template <int DTYPE> static inline F get_few(const typename Input<DTYPE>::Type *from, int64_t count) {
  typename Input<DTYPE>::Type padded[LANES] = {};
  for (int64_t i = 0; i < count; i++) padded[i] = from[i];
  return Input<DTYPE>::get(padded);
}

// --- ranges -----------------------------------------------------------------------------------------

// Compared as integers, magnitudes come in order with infinity and then NaN as the largest.
struct Magnitudes {
  I top;
  inline void take(F value) { top = max_int(top, bits(abs(value))); }
};

struct Extremes {
  F low, high;
  I top;
  inline void take(F value) {
    low = min(low, value), high = max(high, value);
    top = max_int(top, bits(abs(value)));
  }
};

template <int DTYPE, class Range>
static inline void take_group(const typename Input<DTYPE>::Type *values, int64_t count, Range &range) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) range.take(Input<DTYPE>::get(values + i));
  if (i < count) range.take(get_few<DTYPE>(values + i, count - i));
}

static inline bool any_above(I words, int32_t limit) {
  int32_t lanes[LANES], largest = 0;
  store_int(lanes, words);
  for (int32_t lane : lanes) largest = lane > largest ? lane : largest;
  return largest > limit;
}

// False: a value is NaN or beyond the limit.
template <int DTYPE> static inline bool find_ranges(const EncodeTask &task, Span &span) {
  const bool symmetric = !task.encoding->has_zero;
  for (int64_t g = 0; g < span.groups; g++) span.low[g] = span.high[g] = 0;
  I worst = set_int(0);
  for (int64_t row = span.first_row; row < span.first_row + span.rows; row++) {
    auto *values = (const typename Input<DTYPE>::Type *)task.values + row * task.columns + span.first_column;
    int64_t left = span.columns;
    for (int64_t g = 0; g < span.groups; g++) {
      int64_t count = left < task.group_columns ? left : task.group_columns;
      if (symmetric) {
        Magnitudes range = {set_int(0)};
        take_group<DTYPE>(values, count, range);
        float top = largest(as_float(range.top));
        span.high[g] = top > span.high[g] ? top : span.high[g];
        worst = max_int(worst, range.top);
      } else {
        Extremes range = {set(0), set(0), set_int(0)};
        take_group<DTYPE>(values, count, range);
        float top = largest(range.high), bottom = -largest(sub(set(0), range.low));
        span.high[g] = top > span.high[g] ? top : span.high[g];
        span.low[g] = bottom < span.low[g] ? bottom : span.low[g];
        worst = max_int(worst, range.top);
      }
      values += count, left -= count;
    }
  }
  int32_t limit;
  __builtin_memcpy(&limit, &task.encoding->limit, 4);
  return !any_above(worst, limit);
}

// --- scales -----------------------------------------------------------------------------------------

// LANES scales as they are stored; returns the values that these have.
static inline F store_scales(const fewbits_encoding &e, F scale, uint8_t *to) {
  switch (e.scale_type) {
    case FEWBITS_SCALE_F16: store_f16((uint16_t *)to, scale); return load_f16((const uint16_t *)to);
    case FEWBITS_SCALE_BF16: store_bf16((uint16_t *)to, scale); return load_bf16((const uint16_t *)to);
    case FEWBITS_SCALE_E8M0: {  // the power of two in the scale, less that in the peak
      I power = sub_int(shift_right<23>(bits(scale)), set_int(126 + e.peak_exponent));
      power = add_int(max_int(min_int(power, set_int(127)), set_int(-127)), set_int(127));
      store_u8(to, power);
      return as_float(max_int(shift_left<23>(power), set_int(0x00400000)));
    }
    default: store((float *)to, scale); return scale;
  }
}

static inline F factor_of(const fewbits_encoding &e, F scale) {
  if (e.reciprocal) return mul(div(set(1.0f), max(scale, set((float)(TINY * e.peak)))), set(e.peak));
  return where_positive(scale, scale, set(1.0f));
}

static inline void copy_floats(float *to, const float *from, int64_t count) {
  if (to) __builtin_memcpy(to, from, (size_t)count * 4);
}

// False: a scale does not fit what it is stored in.
static inline bool find_scales(const EncodeTask &task, Span &span) {
  const fewbits_encoding &e = *task.encoding;
  const int64_t first = span.grid_row * task.across + span.first_group, groups = span.groups;
  const int64_t item = e.scale_type == FEWBITS_SCALE_F32 ? 4 : e.scale_type == FEWBITS_SCALE_E8M0 ? 1 : 2;
  uint8_t zeros[MAX_SPAN + 16] = {};
  float stored[MAX_SPAN + LANES], used[MAX_SPAN + LANES];
  for (int64_t g = groups; g < groups + LANES; g++) span.low[g] = span.high[g] = 0;
  I worst = set_int(0);
  for (int64_t g = 0; g < groups; g += LANES) {
    F low = load(span.low + g), high = load(span.high + g), scale = high;
    if (e.has_zero) {
      scale = div(sub(high, low), set((float)e.high));
    } else if (!e.stores_absmax) {
      scale = div(high, set(e.peak));
    }
    F value = store_scales(e, scale, (uint8_t *)stored + g * item);
    store(used + g, value), store(span.factor + g, factor_of(e, value));
    worst = max_int(worst, bits(value));
    F zero = set((float)e.middle);
    if (e.has_zero) {
      zero = round(div(sub(set(0), low), max(value, set((float)TINY))));
      zero = min(max(zero, set(0)), set((float)e.high));
      store_u8(zeros + g, to_int(zero));
    }
    store(span.zero + g, zero);
  }
  if (e.scale_type != FEWBITS_SCALE_E8M0 && any_above(worst, 0x7f7fffff)) return false;
  if (task.scale) __builtin_memcpy((uint8_t *)task.scale + first * item, stored, (size_t)(groups * item));
  copy_floats(task.used_scale ? task.used_scale + first : nullptr, used, groups);
  if (e.has_zero) {
    uint8_t *row = task.zero + span.grid_row * packed_bytes(task.across, e.bits);
    for (int64_t g = groups; g < groups + 8; g++) zeros[g] = 0;
    pack_codes(zeros, groups, e.bits, false, row + span.first_group * e.bits / 8);
  }
  return true;
}

static inline void load_given(const EncodeTask &task, Span &span) {
  const fewbits_encoding &e = *task.encoding;
  const float *scales = task.used_scale + span.grid_row * task.across + span.first_group;
  const uint8_t *zeros = e.has_zero ? task.zero + span.grid_row * packed_bytes(task.across, e.bits) : nullptr;
  for (int64_t g = 0; g < span.groups; g++) {
    span.factor[g] = scales[g];
    span.zero[g] = e.has_zero ? (float)code_at(zeros, span.first_group + g, e.bits, false) : (float)e.middle;
  }
  for (int64_t g = 0; g < span.groups; g += LANES)
    store(span.factor + g, factor_of(e, load(span.factor + g)));
}

// --- codes ------------------------------------------------------------------------------------------

struct IntegerCodes {
  F low, high;
  inline I operator()(F scaled, F zero) const {
    return to_int(min(max(add(round(scaled), zero), low), high));
  }
};

// `sign`, where the value is negative.
static inline I sign_of(F value, int32_t sign) {
  return and_int(sub_int(set_int(0), count_greater(set_int(0), set(0), value)), set_int(sign));
}

// How many thresholds lie below a value, found by halving. Level l asks one of 2**l thresholds, which lie at
// `heap + 2**l`: the first levels in tables, those of more than 16 in memory.
template <int LEVELS, bool ORDER> struct SearchedCodes {
  static constexpr int TABLES = LEVELS < 5 ? LEVELS : 5;
  const float *heap, *order;
  int32_t sign;
  Table16 tables[TABLES], order_table;

  static inline SearchedCodes make(const EncodeTask &task, int32_t sign) {
    SearchedCodes codes;
    codes.heap = task.heap, codes.order = task.order, codes.sign = sign;
    for (int level = 0; level < TABLES; level++) codes.tables[level] = make_table(task.heap + (1 << level));
    if (ORDER) codes.order_table = make_table(task.order);
    return codes;
  }

  inline I operator()(F scaled, F) const {
    F value = sign ? abs(scaled) : scaled;
    I code = count_greater(set_int(0), value, set(heap[1]));
    for (int level = 1; level < LEVELS; level++) {
      F asked =
          level < 5 ? look_up(tables[level < TABLES ? level : 0], code) : gather(heap + (1 << level), code);
      code = count_greater(add_int(code, code), value, asked);
    }
    if (ORDER) code = bits(LEVELS <= 4 ? look_up(order_table, code) : gather(order, code));
    return sign ? or_int(code, sign_of(scaled, sign)) : code;
  }
};

// 8-bit floats are rounded as floats are, to nearest and even, and end at the largest finite one.
template <int MANTISSA> struct Float8Codes {
  inline I operator()(F scaled, F) const {
    constexpr int BIAS = MANTISSA == 3 ? 7 : 15, LARGEST = MANTISSA == 3 ? 0x7e : 0x7b;
    F value = abs(scaled);
    I word = bits(value), odd = and_int(shift_right<23 - MANTISSA>(word), set_int(1));
    I rounded = add_int(add_int(word, set_int((1 << (22 - MANTISSA)) - 1)), odd);
    I normal = sub_int(shift_right<23 - MANTISSA>(rounded), set_int((127 - BIAS) << MANTISSA));
    I subnormal = to_int(round(mul(value, as_float(set_int((126 + BIAS + MANTISSA) << 23)))));
    F above = sub(value, as_float(set_int((128 - BIAS) << 23)));
    I code = bits(where_positive(above, as_float(normal), as_float(subnormal)));
    return or_int(min_int(code, set_int(LARGEST)), sign_of(scaled, 0x80));
  }
};

template <int DTYPE, bool RECIPROCAL, class Coder>
static inline void encode_run(const typename Input<DTYPE>::Type *values, int64_t count, F factor, F zero,
                              const Coder &coder, uint8_t *to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    F value = Input<DTYPE>::get(values + i);
    store_u8(to + i, coder(RECIPROCAL ? mul(value, factor) : div(value, factor), zero));
  }
  if (i == count) return;
  uint8_t last[LANES];
  F value = get_few<DTYPE>(values + i, count - i);
  store_u8(last, coder(RECIPROCAL ? mul(value, factor) : div(value, factor), zero));
  for (int64_t j = i; j < count; j++) to[j] = last[j - i];
}

// One row of a span. Codes of less than a byte are packed MAX_BYTES at a time, which are whole bytes.
template <int DTYPE, bool RECIPROCAL, class Coder>
static inline void encode_row(const EncodeTask &task, const Span &span, int64_t row, const Coder &coder) {
  const fewbits_encoding &e = *task.encoding;
  auto *values = (const typename Input<DTYPE>::Type *)task.values + row * task.columns + span.first_column;
  uint8_t *out = task.codes + row * packed_bytes(task.columns, e.bits) + span.first_column * e.bits / 8;
  uint8_t bytes[MAX_BYTES + 8];
  int64_t group = 0, left_of_group = task.group_columns;
  for (int64_t left = span.columns; left > 0;) {
    int64_t piece = left < MAX_BYTES ? left : MAX_BYTES;
    uint8_t *to = e.bits == 8 ? out : bytes;
    for (int64_t done = 0; done < piece;) {
      int64_t count = left_of_group < piece - done ? left_of_group : piece - done;
      encode_run<DTYPE, RECIPROCAL>(values, count, set(span.factor[group]), set(span.zero[group]), coder,
                                    to + done);
      values += count, done += count, left_of_group -= count;
      if (left_of_group == 0) group++, left_of_group = task.group_columns;
    }
    if (e.bits < 8) {
      __builtin_memset(bytes + piece, 0, 8);
      pack_codes(bytes, piece, e.bits, e.layout == FEWBITS_FLAT, out);
    }
    out += packed_bytes(piece, e.bits), left -= piece;
  }
}

template <int DTYPE, class Coder>
static inline void encode_rows(const EncodeTask &task, const Span &span, const Coder &coder) {
  for (int64_t row = span.first_row; row < span.first_row + span.rows; row++) {
    if (task.encoding->reciprocal) {
      encode_row<DTYPE, true>(task, span, row, coder);
    } else {
      encode_row<DTYPE, false>(task, span, row, coder);
    }
  }
}

template <int DTYPE, int LEVELS>
static inline void encode_searched(const EncodeTask &task, const Span &span) {
  const fewbits_encoding &e = *task.encoding;
  int32_t sign = e.sign_bit ? 1 << (e.bits - 1) : 0;
  if (task.order) {
    encode_rows<DTYPE>(task, span, SearchedCodes<LEVELS, true>::make(task, sign));
  } else {
    encode_rows<DTYPE>(task, span, SearchedCodes<LEVELS, false>::make(task, sign));
  }
}

template <int DTYPE> static inline void encode_span(const EncodeTask &task, const Span &span) {
  const fewbits_encoding &e = *task.encoding;
  if (e.kind != FEWBITS_TABLE) {
    encode_rows<DTYPE>(task, span, IntegerCodes{set((float)e.low), set((float)e.high)});
  } else if (task.mantissa == 3) {
    encode_rows<DTYPE>(task, span, Float8Codes<3>{});
  } else if (task.mantissa == 2) {
    encode_rows<DTYPE>(task, span, Float8Codes<2>{});
  } else if (task.levels == 3) {
    encode_searched<DTYPE, 3>(task, span);
  } else if (task.levels == 4) {
    encode_searched<DTYPE, 4>(task, span);
  } else {
    encode_searched<DTYPE, 8>(task, span);
  }
}

template <int DTYPE> static inline bool encode_item(const EncodeTask &task, int64_t item) {
  Span span;
  int64_t band = item / task.spans;
  span.first_row = band * task.band_rows;
  span.rows = task.rows - span.first_row < task.band_rows ? task.rows - span.first_row : task.band_rows;
  span.grid_row = span.first_row / task.group_rows;
  span.first_group = item % task.spans * task.span;
  span.groups = task.across - span.first_group < task.span ? task.across - span.first_group : task.span;
  span.first_column = span.first_group * task.group_columns;
  span.columns = span.groups * task.group_columns;
  if (span.columns > task.columns - span.first_column) span.columns = task.columns - span.first_column;
  int64_t place = band * task.across + span.first_group;
  if (task.steps & ENCODE_RANGES) {
    if (!find_ranges<DTYPE>(task, span)) return false;
    if (task.steps == ENCODE_RANGES) {
      __builtin_memcpy(task.low + place, span.low, (size_t)span.groups * 4);
      __builtin_memcpy(task.high + place, span.high, (size_t)span.groups * 4);
    }
  } else if (task.steps & ENCODE_SCALES) {
    __builtin_memcpy(span.low, task.low + place, (size_t)span.groups * 4);
    __builtin_memcpy(span.high, task.high + place, (size_t)span.groups * 4);
  } else {
    load_given(task, span);
  }
  if (task.steps & ENCODE_SCALES && !find_scales(task, span)) return false;
  if (task.steps & ENCODE_CODES) encode_span<DTYPE>(task, span);
  return true;
}

static void encode_groups(const void *encode_task, const Piece &piece) {
  const EncodeTask &task = *(const EncodeTask *)encode_task;
  bool good = true;
  for (int64_t item = piece.begin; item < piece.end && good; item++) {
    if (task.dtype == FEWBITS_F32) good = encode_item<FEWBITS_F32>(task, item);
    if (task.dtype == FEWBITS_F16) good = encode_item<FEWBITS_F16>(task, item);
    if (task.dtype == FEWBITS_BF16) good = encode_item<FEWBITS_BF16>(task, item);
  }
  if (!good) __atomic_store_n(task.bad, 1, __ATOMIC_RELAXED);
}
