// Rows of a weight in float32, float16 or bfloat16, run by run of codes that share a scale.
//
// Codes of up to 4 bits are places in a table of 16 floats that is scaled once per run: the same products as
// scaling each weight, and for 16-bit results they are rounded once per run as well.

constexpr int64_t MAX_SCALES = 128;     // of a row, loaded at once
constexpr int64_t MAX_UNPACKED = 2048;  // codes that are not read as they lie
// How far ahead codes are asked for where results are written past the caches: as soon as the memory is busy
// with those, the processor by itself reads too late.
constexpr int64_t DECODE_AHEAD = 4096;

template <int DTYPE> struct Output {
  using Type = uint16_t;
  static inline I rounded(F value) { return DTYPE == FEWBITS_F16 ? f16_bits(value) : bf16_bits(value); }
  static inline void put(uint16_t *to, F value) { store_u16(to, rounded(value)); }
};
template <> struct Output<FEWBITS_F32> {
  using Type = float;
  static inline void put(float *to, F value) { store(to, value); }
};

// What is known once for all rows.
struct Decoding {
  const fewbits_weight *weight;
  Scaling scaling;
  Table16 values;  // of codes of up to 4 bits
  bool streams;
  bool small_groups;  // of 2, 4, 8, … codes, fewer than 2 LANES
  I group_of_pair;    // in a block of 2 LANES codes, where groups are small
};

// Codes of one run: `count` of them from number `at` of `codes` on.
struct Codes {
  const uint8_t *codes;
  int64_t at, count;
};

static inline Table16 scaled_table(const Decoding &d, float scale, float zero) {
  Scaling scaling = d.scaling;
  scaling.scale = set(scale);
  Table16 table = d.values;
  for (F &part : table.parts) part = apply(scaling, sub(part, set(zero)));
  return table;
}

// --- codes of 4 bits --------------------------------------------------------------------------------

// Two codes of a byte are two results side by side. In 16 bit they are a word: `low` has values in the lower
// half of its entries, `high` in the upper one.
template <int DTYPE> struct Nibbles {
  Table16 low, high;
};

template <int DTYPE> static inline Nibbles<DTYPE> nibbles(const Table16 &table) {
  Nibbles<DTYPE> tables = {table, table};
  if constexpr (DTYPE != FEWBITS_F32) {
    for (int i = 0; i < 16 / LANES; i++) {
      I rounded = Output<DTYPE>::rounded(table.parts[i]);
      tables.low.parts[i] = as_float(rounded);
      tables.high.parts[i] = as_float(shift_left<16>(rounded));
    }
  }
  return tables;
}

// LANES bytes of codes.
template <int DTYPE, bool HIGH_FIRST, bool STREAM>
static inline void decode_block(const uint8_t *codes, const Nibbles<DTYPE> &tables,
                                typename Output<DTYPE>::Type *to) {
  I bytes = load_u8(codes), upper = shift_right<4>(bytes);
  I first = HIGH_FIRST ? upper : bytes, second = HIGH_FIRST ? bytes : upper;
  if constexpr (DTYPE == FEWBITS_F32) {
    float pairs[2 * LANES];
    store_pairs(STREAM ? pairs : to, look_up(tables.low, first), look_up(tables.low, second));
    if constexpr (STREAM) stream(to, load_int(pairs)), stream(to + LANES, load_int(pairs + LANES));
  } else {
    I words = or_int(bits(look_up(tables.low, first)), bits(look_up(tables.high, second)));
    if constexpr (STREAM) {
      stream(to, words);
    } else {
      store_int(to, words);
    }
  }
}

// `take` codes (fewer than a block) after the first `skip` of a byte.
template <int DTYPE, bool HIGH_FIRST>
static inline void decode_few(const uint8_t *codes, int64_t skip, int64_t take, const Nibbles<DTYPE> &tables,
                              typename Output<DTYPE>::Type *to) {
  uint8_t padded[LANES] = {};
  typename Output<DTYPE>::Type values[2 * LANES];
  for (int64_t i = 0; i < (skip + take + 1) / 2; i++) padded[i] = codes[i];
  decode_block<DTYPE, HIGH_FIRST, false>(padded, tables, values);
  for (int64_t i = 0; i < take; i++) to[i] = values[skip + i];
}

// Small groups: a block of 2 LANES codes has several scales (and zero points), spread over its lanes.
template <int DTYPE, bool HIGH_FIRST>
static inline void decode_spread(const Decoding &d, const uint8_t *codes, const float *scales,
                                 const float *zeros, typename Output<DTYPE>::Type *to) {
  I bytes = load_u8(codes), upper = shift_right<4>(bytes);
  F zero = look_up(make_table(zeros), d.group_of_pair);
  F first = sub(look_up(d.values, HIGH_FIRST ? upper : bytes), zero);
  F second = sub(look_up(d.values, HIGH_FIRST ? bytes : upper), zero);
  Scaling scaling = d.scaling;
  scaling.scale = look_up(make_table(scales), d.group_of_pair);
  first = apply(scaling, first), second = apply(scaling, second);
  if constexpr (DTYPE == FEWBITS_F32) {
    store_pairs(to, first, second);
  } else {
    store_int(to, or_int(Output<DTYPE>::rounded(first), shift_left<16>(Output<DTYPE>::rounded(second))));
  }
}

template <int DTYPE, bool HIGH_FIRST> struct NibbleRun {
  using Type = typename Output<DTYPE>::Type;
  static constexpr bool SPREADS = true;
  static inline void spread_block(const Decoding &d, Codes run, const float *scales, const float *zeros,
                                  Type *to) {
    decode_spread<DTYPE, HIGH_FIRST>(d, run.codes + run.at / 2, scales, zeros, to);
  }
  static inline void decode(const Decoding &d, Codes run, float scale, float zero, Type *to) {
    Nibbles<DTYPE> tables = nibbles<DTYPE>(scaled_table(d, scale, zero));
    const uint8_t *codes = run.codes + run.at / 2;
    int64_t left = run.count;
    if (run.at % 2) {
      decode_few<DTYPE, HIGH_FIRST>(codes++, 1, 1, tables, to++);
      left--;
    }
    if (d.streams && (uintptr_t)to % sizeof(I) == 0) {
      for (; left >= 128; left -= 128, codes += 64) {
        __builtin_prefetch(codes + DECODE_AHEAD);
        for (int i = 0; i < 64; i += LANES, to += 2 * LANES)
          decode_block<DTYPE, HIGH_FIRST, true>(codes + i, tables, to);
      }
      if (left > 0) __builtin_prefetch(codes + DECODE_AHEAD);
      for (; left >= 2 * LANES; left -= 2 * LANES, codes += LANES, to += 2 * LANES)
        decode_block<DTYPE, HIGH_FIRST, true>(codes, tables, to);
    }
    for (; left >= 2 * LANES; left -= 2 * LANES, codes += LANES, to += 2 * LANES)
      decode_block<DTYPE, HIGH_FIRST, false>(codes, tables, to);
    if (left > 0) decode_few<DTYPE, HIGH_FIRST>(codes, 0, left, tables, to);
  }
};

// --- codes in bytes ---------------------------------------------------------------------------------

template <int DTYPE, class Values>
static inline void decode_bytes(const uint8_t *codes, int64_t count, const Values &values,
                                typename Output<DTYPE>::Type *to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) Output<DTYPE>::put(to + i, values(codes + i));
  if (i == count) return;
  uint8_t padded[LANES] = {};
  typename Output<DTYPE>::Type last[LANES];
  for (int64_t j = i; j < count; j++) padded[j - i] = codes[j];
  Output<DTYPE>::put(last, values(padded));
  for (int64_t j = i; j < count; j++) to[j] = last[j - i];
}

struct ByteValues {
  const fewbits_weight &weight;
  Scaling scaling;
  F zero;
  inline F operator()(const uint8_t *codes) const { return apply(scaling, byte_values(weight, codes, zero)); }
};

struct TableValues {
  Table16 table;
  inline F operator()(const uint8_t *codes) const { return look_up(table, load_u8(codes)); }
};

template <int DTYPE> struct ByteRun {
  static constexpr bool SPREADS = false;
  static inline void decode(const Decoding &d, Codes run, float scale, float zero,
                            typename Output<DTYPE>::Type *to) {
    ByteValues values = {*d.weight, d.scaling, set(zero)};
    values.scaling.scale = set(scale);
    decode_bytes<DTYPE>(run.codes + run.at, run.count, values, to);
  }
};

template <int MANTISSA> struct Float8Values {
  Scaling scaling;
  inline F operator()(const uint8_t *codes) const {
    return apply(scaling, float8_values<MANTISSA>(load_u8(codes)));
  }
};

template <int DTYPE, int MANTISSA> struct Float8Run {
  static constexpr bool SPREADS = false;
  static inline void decode(const Decoding &d, Codes run, float scale, float,
                            typename Output<DTYPE>::Type *to) {
    Float8Values<MANTISSA> values = {d.scaling};
    values.scaling.scale = set(scale);
    decode_bytes<DTYPE>(run.codes + run.at, run.count, values, to);
  }
};

// Codes of 2 and 3 bits, already in bytes.
template <int DTYPE> struct SmallRun {
  static constexpr bool SPREADS = false;
  static inline void decode(const Decoding &d, Codes run, float scale, float zero,
                            typename Output<DTYPE>::Type *to) {
    TableValues values = {scaled_table(d, scale, zero)};
    decode_bytes<DTYPE>(run.codes + run.at, run.count, values, to);
  }
};

// --- rows -------------------------------------------------------------------------------------------

// Columns [first, first + count) of a row; `buffer` holds MAX_UNPACKED bytes and one vector.
static inline Codes codes_of(const fewbits_weight &w, int64_t row, int64_t first, int64_t count,
                             uint8_t *buffer) {
  if (w.layout == FEWBITS_FLAT) {
    int64_t place = row * w.columns + first;
    return {w.codes, place, count};
  }
  int64_t row_bytes = packed_bytes(w.columns, w.bits);
  const uint8_t *codes = w.codes + row * row_bytes;
  if (w.bits == 4 || w.bits == 8) return {codes, first, count};
  unpack_codes(codes, first, count, w.bits, w.high_first, buffer);
  return {buffer, 0, count};
}

template <int DTYPE, class RunKernel>
static inline void decode_columns(const Decoding &d, int64_t row, int64_t column, int64_t columns,
                                  typename Output<DTYPE>::Type *to) {
  const fewbits_weight &w = *d.weight;
  float scales[MAX_SCALES + 16], zeros[MAX_SCALES + 16];
  uint8_t buffer[MAX_UNPACKED + LANES];
  while (columns > 0) {
    Run run = run_at(w, row, column);
    int64_t piece = columns, reach = run.length + (MAX_SCALES - 1) * w.group_columns;
    if (piece > reach) piece = reach;
    if (w.bits < 4 && piece > MAX_UNPACKED - 8) piece = MAX_UNPACKED - 8;
    int64_t more = piece > run.length ? (piece - run.length + w.group_columns - 1) / w.group_columns : 0;
    load_scales(w, run.group, 1 + more, scales);
    load_zeros(w, run.grid_row, run.grid_column, 1 + more, zeros);
    Codes codes = codes_of(w, row, column, piece, buffer);
    column += piece, columns -= piece;
    int64_t length = run.length, i = 0;
    if constexpr (RunKernel::SPREADS) {
      if (d.small_groups && run.length == w.group_columns && codes.at % 2 == 0) {
        for (; piece >= 2 * LANES; piece -= 2 * LANES, codes.at += 2 * LANES, to += 2 * LANES) {
          RunKernel::spread_block(d, codes, scales + i, zeros + i, to);
          i += 2 * LANES / w.group_columns;
        }
      }
    }
    for (; piece > 0; i++) {
      codes.count = length < piece ? length : piece;
      RunKernel::decode(d, codes, scales[i], zeros[i], to);
      codes.at += codes.count, to += codes.count, piece -= codes.count;
      length = w.group_columns;
    }
  }
}

template <int DTYPE, class RunKernel>
static inline void decode_piece(const DecodeTask &task, const Decoding &d, const Piece &piece) {
  auto *out = (typename Output<DTYPE>::Type *)task.out;
  for (int64_t i = piece.begin; i < piece.end; i++) {
    int64_t row = task.row_list ? task.row_list[i] : task.first_row + i;
    decode_columns<DTYPE, RunKernel>(d, row, task.first_column, task.columns, out + i * task.out_stride);
  }
}

template <int DTYPE>
static inline void decode_as(const DecodeTask &task, const Decoding &d, const Piece &piece) {
  const fewbits_weight &w = *d.weight;
  if (w.bits == 8 && w.kind == FEWBITS_TABLE) {
    if (is_float8<3>(w.table)) return decode_piece<DTYPE, Float8Run<DTYPE, 3>>(task, d, piece);
    if (is_float8<2>(w.table)) return decode_piece<DTYPE, Float8Run<DTYPE, 2>>(task, d, piece);
  }
  if (w.bits == 8) return decode_piece<DTYPE, ByteRun<DTYPE>>(task, d, piece);
  if (w.bits < 4) return decode_piece<DTYPE, SmallRun<DTYPE>>(task, d, piece);
  if (w.high_first) return decode_piece<DTYPE, NibbleRun<DTYPE, true>>(task, d, piece);
  decode_piece<DTYPE, NibbleRun<DTYPE, false>>(task, d, piece);
}

static void decode_rows(const void *decode_task, const Piece &piece) {
  const DecodeTask &task = *(const DecodeTask *)decode_task;
  const fewbits_weight &w = *task.weight;
  Decoding d = {&w, scaling_of(w), {}, task.streams != 0, false, {}};
  if (w.bits <= 4) {
    float values[16];
    for (int i = 0; i < 16; i++)
      values[i] = w.kind != FEWBITS_TABLE ? (float)i : i < 1 << w.bits ? w.table[i] : 0;
    d.values = make_table(values);
    d.small_groups = w.group_columns < 2 * LANES && w.group_columns > 1 && 2 * LANES % w.group_columns == 0;
    int32_t groups[LANES];
    for (int i = 0; i < LANES; i++) groups[i] = (int32_t)(2 * i / w.group_columns);
    d.group_of_pair = load_int(groups);
  }
  if (task.dtype == FEWBITS_F32) decode_as<FEWBITS_F32>(task, d, piece);
  if (task.dtype == FEWBITS_F16) decode_as<FEWBITS_F16>(task, d, piece);
  if (task.dtype == FEWBITS_BF16) decode_as<FEWBITS_BF16>(task, d, piece);
  if (d.streams) stream_end();
}
