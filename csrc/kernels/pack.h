// Rows of x made ready for the products: in the order in which their values meet the codes, as floats, pairs of
// bfloat16 or int8. Part of linear.h.

static inline float element(const void *values, int64_t place, int32_t dtype) {
  float lanes;
  if (dtype == FEWBITS_F32) return ((const float *)values)[place];
  uint16_t half = ((const uint16_t *)values)[place];
  if (dtype == FEWBITS_F16) return f16_to_float(half);
  uint32_t word = (uint32_t)half << 16;
  __builtin_memcpy(&lanes, &word, 4);
  return lanes;
}

// A row of x as floats, with zeros up to a multiple of LANES + 16.
static inline void row_floats(const void *x, int64_t start, int64_t count, int32_t dtype, float *out) {
  int64_t i = 0;
  if (dtype == FEWBITS_F32) {
    if (count) __builtin_memcpy(out, (const float *)x + start, (size_t)count * 4);
    i = count;
  } else {
    const uint16_t *from = (const uint16_t *)x + start;
    for (; i + LANES <= count; i += LANES) store(out + i, dtype == FEWBITS_BF16 ? load_bf16(from + i) : load_f16(from + i));
    for (; i < count; i++) out[i] = element(x, start + i, dtype);
  }
  for (int64_t end = ceil_div(count, 16) * 16 + 16; i < end; i++) out[i] = 0.0f;
}

// Rounds values to integers of at most 127 and returns what one of them stands for.
static inline float quantize_run(float *values, int64_t count) {
  F most = set(0.0f), probe = set(0.0f);  // the probe is NaN once a value is not finite
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    F value = load(values + i);
    most = max(most, abs(value));
    probe = add(probe, sub(value, value));
  }
  float absmax = largest(most), check = sum(probe);
  for (int64_t j = i; j < count; j++) {
    float magnitude = values[j] < 0 ? -values[j] : values[j];
    absmax = magnitude > absmax ? magnitude : absmax;
    check += values[j] - values[j];
  }
  float scale = absmax / 127.0f + check, inverse = absmax > 1e-36f ? 127.0f / absmax : 0.0f;
  F most_code = set(127.0f), least_code = set(-127.0f);
  for (i = 0; i < count; i += LANES) {  // past `count` lies room, or the next run before its turn
    float part[LANES];
    int64_t n = smaller(LANES, count - i);
    __builtin_memcpy(part, values + i, (size_t)n * 4);
    store(part, max(min(round(mul(load(part), set(inverse))), most_code), least_code));
    __builtin_memcpy(values + i, part, (size_t)n * 4);
  }
  return scale;
}

struct Block {
  int64_t first, rows;  // of x
};

static inline Block x_block(int64_t m, int64_t block, int64_t index) {
  int64_t blocks = ceil_div(m, block), first = m * index / blocks;
  return {first, m * (index + 1) / blocks - first};
}

static inline int64_t block_of(int64_t m, int64_t block, int64_t row) {
  int64_t index = row * ceil_div(m, block) / m;
  while (x_block(m, block, index).first + x_block(m, block, index).rows <= row) index++;
  return index;
}

// A row of x for rows.h: operands [blocks][OPERANDS][rows][LANES], with what int8 needs of every lane.
template <class P>
static void pack_lanes(const PackTask &t, int64_t m, const float *row) {
  int64_t blocks = ceil_div(ceil_div(t.columns, CHUNK), LANES), flip = t.high_first ? 1 : 0;
  typename P::Operand *out = (typename P::Operand *)t.packed;
  float last[CHUNK * LANES];
  for (int64_t block = 0; block < blocks; block++) {
    const float *from = row + block * CHUNK * LANES;
    int64_t rest = t.columns - block * CHUNK * LANES;
    if (rest < CHUNK * LANES) {
      for (int64_t i = 0; i < CHUNK * LANES; i++) last[i] = i < rest ? from[i] : 0.0f;
      from = last;
    }
    for (int j = 0; j < P::OPERANDS; j++) {
      typename P::Operand *to = out + ((block * P::OPERANDS + j) * t.m + m) * LANES;
      for (int lane = 0; lane < LANES; lane++) {
        float values[4] = {0};
        UNROLL for (int e = 0; e < P::ELEMENTS; e++) values[e] = from[P::place(j, e, lane) ^ flip];
        to[lane] = P::convert(values);
      }
    }
    for (int lane = 0; P::ELEMENTS == 4 && lane < LANES; lane++) {
      int64_t side = (block * t.m + m) * LANES + lane, word = block * LANES + lane;
      float total = 0.0f;
      for (int i = 0; i < CHUNK; i++) total += from[lane * CHUNK + i];
      t.excess[side] = -WEIGHT_BIAS * (int32_t)total;
      t.scales[side] = word * CHUNK < t.columns ? t.unit_scales[word * CHUNK / t.unit * t.m + m] : 0.0f;
    }
  }
}

// What a row needs beside its operands: scales of int8 activations, sums over units. Quantizes `row` for int8.
static void pack_side(const PackTask &t, int64_t first_row, int64_t rows, int64_t place, float *row) {
  int64_t units = ceil_div(t.columns, t.unit);
  bool byte = t.kind == PRODUCT_INT8;
  float scale = byte && !t.group ? quantize_run(row, t.columns) : 1.0f;
  for (int64_t u = 0; u < units && (byte || t.sums); u++) {
    int64_t start = u * t.unit, count = smaller(t.unit, t.columns - start), at = first_row * units + u * rows + place;
    if (byte && t.group && start % t.group == 0) scale = quantize_run(row + start, smaller(t.group, t.columns - start));
    float total = 0.0f;
    for (int64_t i = 0; i < count; i++) total += row[start + i];
    if (byte) t.unit_scales[at] = scale;
    if (t.sums) t.sums[at] = total;
    if (byte && !t.lanes) t.excess[at] = -WEIGHT_BIAS * (int32_t)total;
  }
}

template <class P>
static void pack_tiles(const PackTask &t, const Block &block, int64_t place, const float *row) {
  int64_t chunks = ceil_div(t.columns, CHUNK), flip = t.high_first ? 1 : 0;
  typename P::Operand *out = (typename P::Operand *)t.packed + block.first * chunks * P::OPERANDS + place;
  for (int64_t c = 0; c < chunks; c++) {
    const float *from = row + c * CHUNK;
    UNROLL for (int j = 0; j < P::OPERANDS; j++) {
      float values[4];
      UNROLL for (int e = 0; e < P::ELEMENTS; e++) values[e] = from[P::nibble(j, e) ^ flip];
      out[(c * P::OPERANDS + j) * block.rows] = P::convert(values);
    }
  }
}

template <class Tiles, class Lanes>
static void pack_rows(const PackTask &t, const Piece &piece) {
  float *row = (float *)piece.scratch;
  for (int64_t m = piece.begin; m < piece.end; m++) {
    Block block = x_block(t.m, t.block, block_of(t.m, t.block, m));
    row_floats(t.x, m * t.x_stride, t.columns, t.dtype, row);
    pack_side(t, block.first, block.rows, m - block.first, row);
    if (t.lanes) {
      pack_lanes<Lanes>(t, m, row);
    } else {
      pack_tiles<Tiles>(t, block, m - block.first, row);
    }
  }
}

// Whether pairs are multiplied as such: some products in lanes need units of several words.
static inline bool in_pairs(const PackTask &t) {
  return t.kind == PRODUCT_16BIT && (!t.lanes || t.unit >= LANE_PAIR_LEAST_UNIT);
}

static void pack_x(const void *pack_task, const Piece &piece) {
  const PackTask &t = *(const PackTask *)pack_task;
  if (t.kind == PRODUCT_INT8) return pack_rows<ByteProduct, ByteProduct>(t, piece);
  if (in_pairs(t)) return pack_rows<PairProduct, LanePairProduct>(t, piece);
  pack_rows<FloatProduct, FloatProduct>(t, piece);
}
