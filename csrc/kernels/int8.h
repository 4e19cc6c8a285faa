// LLM.int8() (arXiv 2208.07339): rows of x and rows of W in int8, an exact product, and columns of x with
// outliers multiplied in 16 bit.
//
//   y = (codes of x · codes of W) · absmax of x · scale of W / 127² + x[outliers] · decode(W)[outliers] + bias
//
// Here columns lie in the lanes, and both operands are read as they are stored; for many rows of x see
// int8_tiles.h.

// Rows of W and of x whose sums fit the registers.
constexpr int W_GROUP = LANES == 16 ? 4 : 2;
constexpr int X_GROUP = LANES == 16 ? 6 : 4;
constexpr int BYTE_COLUMNS = 4;  // of a word

// Finds outliers and the largest magnitude of what is none, row by row.
static void search_rows(const Int8Task &t, const Piece &piece) {
  const fewbits_product &p = *t.product;
  float *row = (float *)piece.scratch;
  int64_t columns = t.weight->columns;
  F threshold = set(t.threshold > 0 ? t.threshold : __builtin_inff());
  for (int64_t m = piece.begin; m < piece.end; m++) {
    row_floats(p.x, m * p.x_stride, columns, p.x_dtype, row);
    F most = set(0.0f), probe = set(0.0f);
    for (int64_t k = 0; k < columns; k += LANES) {
      F value = load(row + k), magnitude = abs(value), room = sub(threshold, magnitude);
      most = max(most, where_positive(room, magnitude, set(0.0f)));
      probe = add(probe, sub(value, value));  // NaN as soon as a value is not finite
      if (!any_positive(sub(set(0.0f), room)) && !any_zero(room)) continue;
      for (int64_t i = k; i < smaller(k + LANES, columns); i++) {
        float size = row[i] < 0 ? -row[i] : row[i];
        if (t.threshold > 0 && size >= t.threshold) __atomic_store_n(t.is_outlier + i, (uint8_t)1, __ATOMIC_RELAXED);
      }
    }
    float check = sum(probe);
    t.absmax[m] = check == 0.0f ? largest(most) : check;
  }
}

// Puts the words (4 codes) of a row where int8_tiles.h wants them: beside those of the other rows of its block.
static void spread_words(const Int8Task &t, int64_t m, const int8_t *codes) {
  Block block = x_block(t.product->m, X_ROWS, block_of(t.product->m, X_ROWS, m));
  int64_t words = ceil_div(t.weight->columns, BYTE_COLUMNS);
  uint32_t *to = (uint32_t *)t.codes + block.first * words + m - block.first;
  for (int64_t k = 0; k < words; k++) __builtin_memcpy(to + k * block.rows, codes + k * BYTE_COLUMNS, 4);
}

// Codes of x, with zeros in the columns of outliers; their sums; and the outliers themselves.
static void quantize_rows(const Int8Task &t, const Piece &piece) {
  const fewbits_product &p = *t.product;
  float *row = (float *)piece.scratch;
  int8_t *own = (int8_t *)(row + t.stride + 64);
  int64_t columns = t.weight->columns;
  for (int64_t m = piece.begin; m < piece.end; m++) {
    row_floats(p.x, m * p.x_stride, columns, p.x_dtype, row);
    for (int64_t i = 0; i < t.outliers; i++) {
      t.outlier_x[m * t.outliers + i] = row[t.columns[i]];
      row[t.columns[i]] = 0.0f;
    }
    constexpr float LEAST = 1e-38f * 127.0f;
    float absmax = t.absmax[m];
    F inverse = set(1.0f / (absmax > LEAST ? absmax : LEAST) * 127.0f);  // as torch divides a number by a tensor
    int8_t *codes = t.tiles ? own : t.codes + m * t.stride;
    I total = set_int(0);
    for (int64_t k = 0; k < t.stride; k += LANES) {
      I code = set_int(0);
      if (k < columns) {
        // Within ±127 already, but for rows with NaN or infinity, whose result is NaN whatever the codes are.
        F scaled = round(mul(load(row + k), inverse));
        code = to_int(max(min(scaled, set(127.0f)), set(-127.0f)));
      }
      total = add_int(total, code);
      store_u8((uint8_t *)codes + k, code);
    }
    t.code_sums[m] = sum_int(total);
    if (t.tiles) spread_words(t, m, codes);
  }
}

static void quantize_x(const void *int8_task, const Piece &piece) {
  const Int8Task &t = *(const Int8Task *)int8_task;
  if (t.searching) return search_rows(t, piece);
  quantize_rows(t, piece);
}

// ints[c][r] = row r of W · row c of x, for R rows of W and C of x.
template <int R, int C>
static __attribute__((noinline)) void multiply_bytes(const uint8_t *weights, int64_t w_stride, int64_t columns,
                                                    const int8_t *x, int64_t x_stride, int32_t *ints) {
  constexpr int CHAINS = R * C <= 2 ? 4 : 1;
  I sums[CHAINS * R * C];
  UNROLL for (int i = 0; i < CHAINS * R * C; i++) sums[i] = set_int(0);
  int64_t k = 0, ahead = fetched_ahead(R, w_stride);
  for (; k + CHAINS * BYTES <= columns; k += CHAINS * BYTES) {
    UNROLL for (int chain = 0; chain < CHAINS; chain++) {
      int64_t at = k + chain * BYTES;
      B w[R];
      UNROLL for (int r = 0; r < R; r++) {
        w[r] = biased(load_bytes(weights + r * w_stride + at));
        __builtin_prefetch(weights + r * w_stride + at + ahead, 0, 2);
      }
      UNROLL for (int c = 0; c < C; c++) {
        B v = load_bytes(x + c * x_stride + at);
        UNROLL for (int r = 0; r < R; r++)
          sums[(chain * R + r) * C + c] = dot_bytes(sums[(chain * R + r) * C + c], w[r], v);
      }
    }
  }
  for (; k < columns; k += BYTES) {
    for (int r = 0; r < R; r++) {
      uint8_t last[BYTES] = {0};
      __builtin_memcpy(last, weights + r * w_stride + k, (size_t)smaller(BYTES, columns - k));
      B w = biased(load_bytes(last));
      UNROLL for (int c = 0; c < C; c++) sums[r * C + c] = dot_bytes(sums[r * C + c], w, load_bytes(x + c * x_stride + k));
    }
  }
  UNROLL for (int r = 0; r < R; r++) {
    UNROLL for (int c = 0; c < C; c++) {
      I total = sums[r * C + c];
      UNROLL for (int chain = 1; chain < CHAINS; chain++) total = add_int(total, sums[(chain * R + r) * C + c]);
      ints[c * TILE_ROWS + r] = sum_int(total);
    }
  }
}

using MultiplyBytes = void (*)(const uint8_t *weights, int64_t w_stride, int64_t columns, const int8_t *x,
                               int64_t x_stride, int32_t *ints);

template <int R>
static inline MultiplyBytes multiply_bytes_for(int64_t rows) {
  static constexpr MultiplyBytes FUNCTIONS[] = {
      multiply_bytes<R, 1>, multiply_bytes<R, 2>, multiply_bytes<R, 3>, multiply_bytes<R, 4>,
#if defined(__AVX512F__)
      multiply_bytes<R, 5>, multiply_bytes<R, 6>,
#endif
  };
  static_assert(sizeof FUNCTIONS / sizeof *FUNCTIONS == X_GROUP, "one function for each count of rows");
  return FUNCTIONS[rows - 1];
}

static inline float rounded_to(float value, int32_t dtype) {
  float lanes[LANES];
  uint16_t halves[LANES];
  if (dtype == FEWBITS_F32) return value;
  if (dtype == FEWBITS_F16) {
    store_f16(halves, set(value));
  } else {
    store_bf16(halves, set(value));
  }
  store(lanes, dtype == FEWBITS_F16 ? load_f16(halves) : load_bf16(halves));
  return lanes[0];
}

// What the epilogue needs of 16 rows of W.
struct RowsOfW {
  float scale[2 * TILE_ROWS], bias[TILE_ROWS];
  float *picked;  // [outliers][16]: decoded columns
};

static void rows_of_w(const Int8Task &t, int64_t row, RowsOfW &of) {
  const fewbits_weight &w = *t.weight;
  const fewbits_product &p = *t.product;
  int64_t rows = smaller(TILE_ROWS, w.rows - row);
  for (int i = 0; i < TILE_ROWS; i++) of.scale[i] = of.bias[i] = 0.0f;
  load_scales(w, row, rows, of.scale);
  for (int64_t r = 0; p.bias && r < rows; r++) of.bias[r] = element(p.bias, row + r, p.bias_dtype);
  for (int64_t o = 0; o < t.outliers; o++) {
    for (int64_t r = 0; r < TILE_ROWS; r++) {
      float code = r < rows ? (float)(int8_t)w.codes[(row + r) * w.columns + t.columns[o]] : 0.0f;
      of.picked[o * TILE_ROWS + r] = rounded_to(code * of.scale[r] * w.unit, p.x_dtype);
    }
  }
}

// y of 16 rows of W and the rows [first, first + count) of x, from their int8 products.
static void write_int8(const Int8Task &t, int64_t row, int64_t first, int64_t count, const int32_t *ints,
                       const RowsOfW &of) {
  const fewbits_product &p = *t.product;
  int64_t rows = smaller(TILE_ROWS, t.weight->rows - row);
  constexpr float SHRINK = (float)(1.0 / (127.0 * 127.0));
  for (int64_t c = 0; c < count; c++) {
    int64_t m = first + c;
    uint8_t line[TILE_ROWS * 4];
    I excess = set_int(WEIGHT_BIAS * t.code_sums[m]);
    for (int64_t i = 0; i < TILE_ROWS; i += LANES) {
      F value = to_float(sub_int(load_int(ints + c * TILE_ROWS + i), excess));
      value = mul(mul(value, mul(set(t.absmax[m]), load(of.scale + i))), set(SHRINK));
      for (int64_t o = 0; o < t.outliers; o++)
        value = fma(set(t.outlier_x[m * t.outliers + o]), load(of.picked + o * TILE_ROWS + i), value);
      value = add(value, load(of.bias + i));
      if (p.y_dtype == FEWBITS_F32) store((float *)line + i, value);
      if (p.y_dtype == FEWBITS_F16) store_f16((uint16_t *)line + i, value);
      if (p.y_dtype == FEWBITS_BF16) store_bf16((uint16_t *)line + i, value);
    }
    int64_t item = p.y_dtype == FEWBITS_F32 ? 4 : 2;
    __builtin_memcpy((uint8_t *)p.y + (m * p.y_stride + row) * item, line, (size_t)(rows * item));
  }
}

// Up to INT8_LANES_ROWS rows of x. The decoded columns of outliers come last, when the rows of W are in the cache.
static void multiply_lanes_of_bytes(const Int8Task &t, const Piece &piece) {
  const fewbits_weight &w = *t.weight;
  const fewbits_product &p = *t.product;
  RowsOfW of;
  of.picked = (float *)piece.scratch;
  for (int64_t tile = piece.begin; tile < piece.end; tile++) {
    int64_t row = tile * TILE_ROWS, rows = smaller(TILE_ROWS, w.rows - row);
    int32_t ints[INT8_LANES_ROWS * TILE_ROWS] = {0};
    for (int64_t m = 0; m < p.m; m += X_GROUP) {
      int64_t count = smaller(X_GROUP, p.m - m), step = count <= 2 ? 1 : W_GROUP;
      const int8_t *x = t.codes + m * t.stride;
      for (int64_t r = 0; r < rows;) {
        bool whole = step == W_GROUP && r + W_GROUP <= rows;
        MultiplyBytes run = whole ? multiply_bytes_for<W_GROUP>(count) : multiply_bytes_for<1>(count);
        run(w.codes + (row + r) * w.columns, w.columns, w.columns, x, t.stride, ints + m * TILE_ROWS + r);
        r += whole ? W_GROUP : 1;
      }
    }
    rows_of_w(t, row, of);
    write_int8(t, row, 0, p.m, ints, of);
  }
}

#include "int8_tiles.h"

static void multiply_int8(const void *int8_task, const Piece &piece) {
  const Int8Task &t = *(const Int8Task *)int8_task;
  t.tiles ? multiply_byte_tiles(t, piece) : multiply_lanes_of_bytes(t, piece);
}
