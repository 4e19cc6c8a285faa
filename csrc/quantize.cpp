// Drivers of quantize and dequantize: their arguments are checked, and the work is cut into pieces.

#include <math.h>

#include "table.h"

namespace fewbits {

namespace {

constexpr int64_t PIECE = 1 << 15;        // weights of a piece of work
constexpr int64_t STREAMED_PIECE = 1 << 17;  // where those before it do not lie in the caches
constexpr int64_t STREAMED = 16 << 20;    // bytes of a result that is written past the caches

int64_t above(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t packed(int64_t count, int32_t bits) { return (count * bits + 7) / 8; }
int64_t item_of(int32_t dtype) { return dtype == FEWBITS_F32 ? 4 : 2; }
bool is_dtype(int32_t dtype) { return dtype >= FEWBITS_F32 && dtype <= FEWBITS_BF16; }

int32_t check_threads(int32_t threads) {
  return threads < 1 || threads > 4096 ? fail(FEWBITS_BAD_ARGUMENT, "%d threads", threads) : FEWBITS_OK;
}

int32_t run(void (*work)(const void *, const Piece &), const void *task, int64_t items, int64_t grain,
            int32_t threads) {
  return run_pieces(work, task, items, grain, 0, threads) ? FEWBITS_OK : fail(FEWBITS_NO_MEMORY, "no memory");
}

// --- dequantize -------------------------------------------------------------------------------------

// Rows cut into parts of `width` columns, which are the items.
struct Cut {
  DecodeTask task;
  int64_t width, parts;
};

void decode_cut(const void *argument, const Piece &piece) {
  const Cut &cut = *static_cast<const Cut *>(argument);
  for (int64_t i = piece.begin; i < piece.end; i++) {
    int64_t row = i / cut.parts, column = i % cut.parts * cut.width;
    DecodeTask task = cut.task;
    task.row_list = task.row_list ? task.row_list + row : nullptr;
    task.first_row += row;
    task.first_column += column;
    task.columns = smaller(cut.width, cut.task.columns - column);
    task.out = (uint8_t *)task.out + (row * task.out_stride + column) * item_of(task.dtype);
    kernels()->decode_rows(&task, Piece{0, 1, piece.scratch});
  }
}

int32_t check_rows(const fewbits_weight &w, const int64_t *row_list, int64_t first_row, int64_t rows,
                   int64_t first_column, int64_t columns) {
  if (!size_fits(rows) || !size_fits(columns) || !size_fits(first_column) ||
      first_column + columns > w.columns)
    return fail(FEWBITS_BAD_ARGUMENT, "%lld rows, columns %lld + %lld of a weight [%lld, %lld]",
                (long long)rows, (long long)first_column, (long long)columns, (long long)w.rows,
                (long long)w.columns);
  if ((uintptr_t)row_list % alignof(int64_t))
    return fail(FEWBITS_BAD_ARGUMENT, "the list of rows does not lie on a multiple of its items' size");
  if (!row_list && (!size_fits(first_row) || first_row + rows > w.rows))
    return fail(FEWBITS_BAD_ARGUMENT, "rows %lld + %lld of a weight with %lld", (long long)first_row,
                (long long)rows, (long long)w.rows);
  for (int64_t i = 0; row_list && i < rows; i++) {
    if (row_list[i] < 0 || row_list[i] >= w.rows)
      return fail(FEWBITS_BAD_ARGUMENT, "row %lld of a weight with %lld", (long long)row_list[i],
                  (long long)w.rows);
  }
  return FEWBITS_OK;
}

int32_t check_out(const void *out, int64_t elements, int64_t stride, int64_t rows, int64_t columns,
                  int32_t dtype) {
  if (!is_dtype(dtype)) return fail(FEWBITS_BAD_ARGUMENT, "unknown dtype: %d", dtype);
  if (!sizes_fit(rows, stride) || stride < columns)
    return fail(FEWBITS_BAD_ARGUMENT, "a stride of %lld for %lld columns", (long long)stride,
                (long long)columns);
  if (rows && columns && (!out || elements < (rows - 1) * stride + columns))
    return fail(FEWBITS_BAD_ARGUMENT, "the result takes %lld elements, got %lld",
                (long long)((rows - 1) * stride + columns), (long long)(out ? elements : 0));
  if ((uintptr_t)out % (uintptr_t)item_of(dtype))
    return fail(FEWBITS_BAD_ARGUMENT, "the result does not lie on a multiple of its items' size");
  return FEWBITS_OK;
}

int32_t dequantize(const DecodeTask &task, int64_t rows, int32_t threads) {
  const fewbits_weight &w = *task.weight;
  DecodeTask whole = task;
  whole.streams = rows * task.columns * item_of(task.dtype) >= STREAMED;
  // A flat weight that is wanted whole is one row: groups that straddle rows need not be cut.
  if (w.layout == FEWBITS_FLAT && w.flat_groups && !task.row_list && task.columns == w.columns &&
      task.out_stride == w.columns) {
    whole.first_column = task.first_row * w.columns;
    whole.columns = rows * w.columns;
    whole.first_row = 0;
    rows = 1;
  }
  const int64_t piece = whole.streams ? STREAMED_PIECE : PIECE;
  if (whole.columns < 2 * piece) {
    int64_t grain = larger(1, piece / larger(1, whole.columns));
    return run(kernels()->decode_rows, &whole, rows, grain, threads);
  }
  int64_t width = w.group_columns < piece ? piece / w.group_columns * w.group_columns : piece;
  Cut cut = {whole, width, above(whole.columns, width)};
  return run(decode_cut, &cut, rows * cut.parts, 1, threads);
}

// --- quantize ---------------------------------------------------------------------------------------

int32_t check_steps(const fewbits_encoding &e) {
  if (e.kind != FEWBITS_TABLE) {
    int32_t lowest = e.kind == FEWBITS_SIGNED ? -128 : 0,
            highest = e.kind == FEWBITS_SIGNED ? 127 : (1 << e.bits) - 1;
    if (e.low < lowest || e.high > highest || e.low > e.high || e.middle < lowest || e.middle > highest)
      return fail(FEWBITS_BAD_ARGUMENT, "codes %d … %d around %d in %d bits", e.low, e.high, e.middle,
                  e.bits);
    return FEWBITS_OK;
  }
  int64_t codes = (int64_t)1 << (e.sign_bit ? e.bits - 1 : e.bits);
  if (e.threshold_count < 1 || e.threshold_count >= codes || !e.thresholds ||
      (uintptr_t)e.thresholds % alignof(float))
    return fail(FEWBITS_BAD_ARGUMENT, "%lld thresholds for %d bits", (long long)e.threshold_count, e.bits);
  for (int64_t i = 0; i < e.threshold_count; i++) {
    if (!(i ? e.thresholds[i] >= e.thresholds[i - 1] : e.thresholds[0] == e.thresholds[0]))
      return fail(FEWBITS_BAD_ARGUMENT, "the thresholds do not ascend");
  }
  for (int64_t i = 0; e.order && i <= e.threshold_count; i++) {
    if (e.order[i] >= codes) return fail(FEWBITS_BAD_ARGUMENT, "code %d in %d bits", e.order[i], e.bits);
  }
  return FEWBITS_OK;
}

int32_t check_encoding(const fewbits_encoding *encoding) {
  if (!encoding) return fail(FEWBITS_BAD_ARGUMENT, "the encoding is null");
  const fewbits_encoding &e = *encoding;
  if (!kernels())
    return fail(FEWBITS_UNSUPPORTED, "this machine runs none of the instruction sets %s", fewbits_isas());
  if (!sizes_fit(e.rows, e.columns))
    return fail(FEWBITS_BAD_ARGUMENT, "[%lld, %lld] values are too large", (long long)e.rows,
                (long long)e.columns);
  if (e.bits != 2 && e.bits != 3 && e.bits != 4 && e.bits != 8)
    return fail(FEWBITS_BAD_ARGUMENT, "codes have 2, 3, 4 or 8 bits, got %d", e.bits);
  if (e.kind < FEWBITS_TABLE || e.kind > FEWBITS_SIGNED || (e.kind == FEWBITS_SIGNED && e.bits != 8))
    return fail(FEWBITS_BAD_ARGUMENT, "unknown kind of codes: %d in %d bits", e.kind, e.bits);
  if ((e.layout != FEWBITS_ROWS && e.layout != FEWBITS_FLAT) ||
      (e.layout == FEWBITS_FLAT) != (e.flat_groups != 0))
    return fail(FEWBITS_BAD_ARGUMENT, "codes are flat where groups are, got layout %d", e.layout);
  if (e.group_rows < 1 || e.group_columns < 1 || !size_fits(e.group_rows) || !size_fits(e.group_columns) ||
      (e.flat_groups &&
       (e.group_rows != 1 || (e.bits != 4 && e.bits != 8) || (e.bits == 4 && e.group_columns % 2))))
    return fail(FEWBITS_BAD_ARGUMENT, "groups of %lld x %lld values in %d bits", (long long)e.group_rows,
                (long long)e.group_columns, e.bits);
  if (!(e.peak > 0 && e.peak <= 1e30f && e.limit > 0 && isfinite(e.limit)))
    return fail(FEWBITS_BAD_ARGUMENT, "a peak of %g, a limit of %g", (double)e.peak, (double)e.limit);
  if (e.scale_type < FEWBITS_SCALE_F32 || e.scale_type > FEWBITS_SCALE_E8M0)
    return fail(FEWBITS_BAD_ARGUMENT, "unknown type of scales: %d", e.scale_type);
  if (e.scale_type == FEWBITS_SCALE_E8M0 && (e.peak_exponent < 1 || e.peak_exponent > 127))
    return fail(FEWBITS_BAD_ARGUMENT, "a peak with the exponent %d", e.peak_exponent);
  if (e.has_zero && (e.kind != FEWBITS_UNSIGNED || e.flat_groups))
    return fail(FEWBITS_BAD_ARGUMENT, "only unsigned codes in groups of their own rows have zero points");
  return check_steps(e);
}

// The grid of scales: [rows, across].
struct Grid {
  int64_t rows, across;
};

Grid grid_of(const fewbits_encoding &e) {
  if (e.flat_groups) return {1, above(e.rows * e.columns, e.group_columns)};
  return {above(e.rows, e.group_rows), above(e.columns, e.group_columns)};
}

int32_t check_parts(const EncodeTask &task, int64_t value_count, int64_t given_scales, int64_t scale_bytes,
                    int64_t zero_bytes, int64_t codes_bytes) {
  const fewbits_encoding &e = *task.encoding;
  Grid grid = grid_of(e);
  int64_t groups = grid.rows * grid.across, count = e.rows * e.columns;
  int64_t bytes = e.flat_groups ? packed(count, e.bits) : e.rows * packed(e.columns, e.bits);
  if (!is_dtype(task.dtype)) return fail(FEWBITS_BAD_ARGUMENT, "unknown dtype: %d", task.dtype);
  if (value_count != count || (count && !task.values) ||
      (uintptr_t)task.values % (uintptr_t)item_of(task.dtype))
    return fail(FEWBITS_BAD_ARGUMENT, "%lld values for [%lld, %lld], null, or on an odd address",
                (long long)value_count, (long long)e.rows, (long long)e.columns);
  if (task.codes && codes_bytes != bytes)
    return fail(FEWBITS_BAD_ARGUMENT, "the codes take %lld bytes, got %lld", (long long)bytes,
                (long long)codes_bytes);
  if (task.used_scale && (given_scales != groups || !task.codes))
    return fail(FEWBITS_BAD_ARGUMENT, "%lld given scales for %lld groups, or no codes",
                (long long)given_scales, (long long)groups);
  int64_t item = e.scale_type == FEWBITS_SCALE_E8M0 ? 1 : e.scale_type == FEWBITS_SCALE_F32 ? 4 : 2;
  if (!task.used_scale && task.scale && scale_bytes != groups * item)
    return fail(FEWBITS_BAD_ARGUMENT, "the scales take %lld bytes, got %lld", (long long)(groups * item),
                (long long)scale_bytes);
  if (!task.used_scale && groups && !task.scale)
    return fail(FEWBITS_BAD_ARGUMENT, "there is no place for the scales");
  if ((uintptr_t)task.used_scale % 4 || (uintptr_t)task.scale % (uintptr_t)item)
    return fail(FEWBITS_BAD_ARGUMENT, "the scales do not lie on a multiple of their items' size");
  if (e.has_zero && (!task.zero || zero_bytes != grid.rows * packed(grid.across, e.bits)) && groups)
    return fail(FEWBITS_BAD_ARGUMENT, "the zero points take %lld bytes, got %lld",
                (long long)(grid.rows * packed(grid.across, e.bits)),
                (long long)(task.zero ? zero_bytes : 0));
  return FEWBITS_OK;
}

// Whether thresholds lie between the 8-bit floats with `mantissa` bits, ties going to even codes.
bool are_float8(const fewbits_encoding &e, int32_t mantissa) {
  int32_t bias = mantissa == 3 ? 7 : 15, largest = mantissa == 3 ? 0x7e : 0x7b;
  if (e.bits != 8 || !e.sign_bit || e.order || e.threshold_count != largest) return false;
  for (int32_t code = 0; code < largest; code++) {
    // Half a step above a float of the same exponent is that float with one bit more.
    uint32_t word = ((uint32_t)(127 - bias) << 23) + ((2u * (uint32_t)code + 1) << (22 - mantissa)), given;
    if (code >> mantissa == 0) {  // subnormal: a multiple of half the smallest
      float half, middle;
      uint32_t power = (uint32_t)(127 - bias - mantissa) << 23;
      __builtin_memcpy(&half, &power, 4);
      middle = half * (float)(2 * code + 1);
      __builtin_memcpy(&word, &middle, 4);
    }
    __builtin_memcpy(&given, &e.thresholds[code], 4);
    if (given != word - code % 2) return false;
  }
  return true;
}

// Thresholds and order as the kernels search in them, with room for whole vectors.
struct Steps {
  float heap[256 + 16], order[256];
  int32_t levels;
};

void fill_steps(const fewbits_encoding &e, Steps &steps) {
  steps.levels = e.threshold_count < 8 ? 3 : e.threshold_count < 16 ? 4 : 8;
  for (float &place : steps.heap) place = INFINITY;
  for (int level = 0; level < steps.levels; level++) {
    for (int64_t i = 0; i < 1 << level; i++) {
      int64_t middle = ((2 * i + 1) << (steps.levels - 1 - level)) - 1;
      if (middle < e.threshold_count) steps.heap[(1 << level) + i] = e.thresholds[middle];
    }
  }
  for (int64_t i = 0; i < 256; i++) {
    uint32_t code = e.order ? e.order[smaller(i, e.threshold_count)] : 0;
    __builtin_memcpy(&steps.order[i], &code, 4);
  }
}

// Row after row of 64 columns, and then column after column.
template <class T> double sum_by_columns(const T *values, int64_t count) {
  double columns[64] = {}, sum = 0;
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    for (int j = 0; j < 64; j++) columns[j] += (double)values[i + j];
  }
  for (int j = 0; i + j < count; j++) columns[j] += (double)values[i + j];
  for (double column : columns) sum += column;
  return sum;
}

int32_t run_encode(const EncodeTask &task, int32_t threads) {
  int64_t items = above(task.rows, task.band_rows) * task.spans;
  int64_t weights =
      smaller(task.span * task.group_columns, task.columns) * smaller(task.band_rows, task.rows);
  return run(kernels()->encode_groups, &task, items, larger(1, PIECE / larger(1, weights)), threads);
}

// Few and large groups: ranges of bands of their rows by all threads, then the scales, then the codes.
int32_t encode_large_groups(EncodeTask task, int32_t threads) {
  int64_t rows = larger(1, PIECE / larger(1, smaller(task.columns, task.span * task.group_columns)));
  int64_t bands = above(task.rows, rows), size = bands * task.across;
  Buffer memory((2 * size + task.across) * 4);
  if (memory.failed()) return fail(FEWBITS_NO_MEMORY, "no memory for %lld ranges", (long long)size);
  EncodeTask part = task;
  part.low = memory.as<float>();
  part.high = part.low + size;
  float *used = part.high + size;
  part.steps = ENCODE_RANGES;
  part.group_rows = part.band_rows = rows;
  int32_t status = run_encode(part, threads);
  if (status || *task.bad) return status;
  for (int64_t i = task.across; i < size; i++) {
    float *low = part.low + i % task.across, *high = part.high + i % task.across;
    *low = part.low[i] < *low ? part.low[i] : *low;
    *high = part.high[i] > *high ? part.high[i] : *high;
  }
  part.steps = ENCODE_SCALES;
  part.group_rows = part.band_rows = task.rows;
  part.used_scale = used;
  status = run_encode(part, 1);
  if (status || !task.codes) return status;
  part.steps = ENCODE_CODES;
  part.band_rows = rows;
  return run_encode(part, threads);
}

}  // namespace

}  // namespace fewbits

using namespace fewbits;

int32_t fewbits_dequantize(const fewbits_weight *weight, const int64_t *row_list, int64_t first_row,
                           int64_t rows, int64_t first_column, int64_t columns, void *out,
                           int64_t out_elements, int64_t out_stride, int32_t dtype, int32_t threads) {
  if (int32_t status = check_weight(weight)) return status;
  if (int32_t status = check_threads(threads)) return status;
  if (int32_t status = check_rows(*weight, row_list, first_row, rows, first_column, columns)) return status;
  if (int32_t status = check_out(out, out_elements, out_stride, rows, columns, dtype)) return status;
  DecodeTask task = {weight, row_list, row_list ? 0 : first_row, first_column, columns, out, out_stride,
                     dtype,  0};
  return rows && columns ? dequantize(task, rows, threads) : FEWBITS_OK;
}

int32_t fewbits_quantize(const fewbits_encoding *encoding, const void *values, int64_t value_count,
                         int32_t dtype, const float *given_scale, int64_t given_scales, void *scale,
                         int64_t scale_bytes, uint8_t *zero, int64_t zero_bytes, uint8_t *codes,
                         int64_t codes_bytes, int32_t threads) {
  if (int32_t status = check_encoding(encoding)) return status;
  if (int32_t status = check_threads(threads)) return status;
  const fewbits_encoding &e = *encoding;
  Grid grid = grid_of(e);
  int32_t bad = 0;
  Steps steps;
  EncodeTask task = {};
  task.encoding = encoding;
  task.values = values;
  task.dtype = dtype;
  task.rows = e.flat_groups ? 1 : e.rows;
  task.columns = e.flat_groups ? e.rows * e.columns : e.columns;
  task.group_rows = task.band_rows = e.group_rows;
  task.group_columns = e.group_columns;
  task.across = grid.across;
  int64_t group = smaller(task.group_rows, task.rows) * smaller(task.group_columns, task.columns);
  task.span = smaller(512, larger(8, PIECE / 4 / larger(group, 1) / 8 * 8));
  task.spans = above(grid.across, task.span);
  task.heap = steps.heap;
  task.order = e.order ? steps.order : nullptr;
  task.used_scale = const_cast<float *>(given_scale);
  task.scale = scale;
  task.zero = zero;
  task.codes = codes;
  task.bad = &bad;
  if (int32_t status = check_parts(task, value_count, given_scales, scale_bytes, zero_bytes, codes_bytes))
    return status;
  if (!value_count) return FEWBITS_OK;
  if (e.kind == FEWBITS_TABLE) fill_steps(e, steps);
  task.levels = steps.levels;
  task.mantissa = e.kind != FEWBITS_TABLE ? 0 : are_float8(e, 3) ? 3 : are_float8(e, 2) ? 2 : 0;
  task.steps = given_scale ? ENCODE_CODES : ENCODE_RANGES | ENCODE_SCALES | (codes ? ENCODE_CODES : 0);
  // Codes alone need not be cut along groups; no more than a few rows are.
  bool large = !given_scale && task.rows > 1 && task.group_rows >= task.rows && task.spans < 4 * threads;
  int32_t status = large ? encode_large_groups(task, threads) : run_encode(task, threads);
  if (status) return status;
  return bad ? fail(FEWBITS_BAD_VALUES, "NaN, infinity, or a scale that does not fit") : FEWBITS_OK;
}

int32_t fewbits_mean(const void *values, int64_t count, int32_t dtype, float *mean) {
  if (dtype != FEWBITS_F32 && dtype != FEWBITS_F64)
    return fail(FEWBITS_BAD_ARGUMENT, "means are taken of float32 and float64, got dtype %d", dtype);
  if (count < 1 || !values || !mean || (uintptr_t)values % (dtype == FEWBITS_F32 ? 4 : 8))
    return fail(FEWBITS_BAD_ARGUMENT, "%lld values to take the mean of, null, or on an odd address",
                (long long)count);
  double sum = dtype == FEWBITS_F32 ? sum_by_columns(static_cast<const float *>(values), count)
                                    : sum_by_columns(static_cast<const double *>(values), count);
  *mean = (float)(sum / (double)count);
  return FEWBITS_OK;
}
