// The products: arguments checked, work cut into pieces.

#include <string.h>

#include "table.h"

namespace fewbits {
namespace {

constexpr int64_t TILE = 16, WORD = 8;  // rows and columns of a tile's word
constexpr int64_t LONGEST_UNIT = 512;   // columns
constexpr int64_t MOST_INT8_COLUMNS = INT32_MAX / (127 * 128);  // whose products of int8 fit 32 bits together
constexpr int64_t CUT_BYTES = 256 << 10;  // of x that stay in the second cache while rows of W pass by

int64_t gcd(int64_t a, int64_t b) { return b ? gcd(b, a % b) : a; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Columns of a unit: they have one scale in every row, and are whole words. 0: there is no such unit.
int64_t unit_of(const fewbits_weight &w, int64_t activation_group) {
  int64_t group = w.group_columns;
  if (w.flat_groups) {
    group = gcd(w.columns, group);
  } else if (group >= w.columns) {
    group = LONGEST_UNIT;
  }
  if (activation_group) group = gcd(group, activation_group);
  if (group % WORD || (w.layout == FEWBITS_FLAT && w.columns % WORD)) return 0;
  int64_t unit = group < LONGEST_UNIT ? group : LONGEST_UNIT;
  while (group % unit) unit -= WORD;
  return unit;
}

float rounding_loss(const float *table, int entries, float factor, int32_t kind) {
  float loss = 0.0f;
  for (int i = 0; i < entries; i++) {
    float value = table[i] * factor, rounded;
    if (kind == PRODUCT_INT8) {
      rounded = (float)(int)(value + (value < 0 ? -0.5f : 0.5f));
    } else {
      uint32_t word;
      memcpy(&word, &value, 4);
      word = (word + 0x7fff + (word >> 16 & 1)) & 0xffff0000u;
      memcpy(&rounded, &word, 4);
    }
    loss += (value - rounded) * (value - rounded);
  }
  return loss / (factor * factor);
}

// The factor with which a table loses least when it is rounded to bfloat16 or int8 (kind).
float search_factor(const float *table, int entries, int32_t kind) {
  float most = 0.0f, best = 1.0f, least = 3e38f;
  for (int i = 0; i < entries; i++) {
    float size = table[i] < 0 ? -table[i] : table[i];
    if (size > most) most = size;
  }
  constexpr int STEPS = 512;
  for (int step = 1; step <= STEPS && most > 0; step++) {
    // bfloat16: one octave holds all cases. int8: up to where the largest value becomes 127.
    float part = (float)step / STEPS, factor = kind == PRODUCT_INT8 ? (0.5f + 0.5f * part) * 127.0f / most : 1.0f + part;
    float loss = rounding_loss(table, entries, factor, kind);
    if (loss < least) {
      least = loss;
      best = factor;
    }
  }
  return best;
}

// Whether a table is one that int8 can stand for: finite, and not all of it tiny.
bool has_int8_table(const fewbits_weight &w) {
  float most = 0.0f;
  for (int i = 0; w.kind == FEWBITS_TABLE && i < 1 << w.bits; i++) {
    float size = w.table[i] < 0 ? -w.table[i] : w.table[i];
    if (!(size <= 1e12f)) return false;
    most = size > most ? size : most;
  }
  return most == 0.0f || most >= 1e-12f;
}

// Remembered, since a model asks for the same few tables with every layer.
float best_factor(const fewbits_weight &w, int32_t kind) {
  struct Known {
    float table[16];
    int32_t kind = -1, entries = 0;
    float factor = 1.0f;
  };
  constexpr int PLACES = 8;
  static thread_local Known known[PLACES];
  static thread_local int oldest = 0;
  if (w.kind != FEWBITS_TABLE || kind == PRODUCT_F32) return 1.0f;
  int entries = 1 << w.bits;
  for (const Known &one : known) {
    if (one.kind == kind && one.entries == entries && memcmp(one.table, w.table, (size_t)entries * 4) == 0) return one.factor;
  }
  Known &place = known[oldest++ % PLACES];
  memcpy(place.table, w.table, (size_t)entries * 4);
  place.kind = kind;
  place.entries = entries;
  place.factor = search_factor(w.table, entries, kind);
  return place.factor;
}

bool is_power_of_two(int64_t value) { return (value & (value - 1)) == 0; }

// As many threads as there is work for: waking one up takes as long as a hundred thousand products.
int32_t useful_threads(const fewbits_weight &w, const fewbits_product &p) {
  int64_t work = w.rows * w.columns * (p.m < 4 ? 4 : p.m) >> 19;
  return work + 1 < p.threads ? (int32_t)(work + 1) : p.threads;
}

int64_t operand_bytes(int32_t kind) {  // of one row of x and one word of codes
  return kind == PRODUCT_F32 ? 32 : kind == PRODUCT_16BIT ? kernels()->pair_bytes : 8;
}

int32_t multiply(const fewbits_weight &w, const fewbits_product &p, int32_t kind, int64_t activation_group) {
  const KernelTable &table = *kernels();
  int64_t unit = unit_of(w, activation_group);
  if (w.bits > 4 || !unit || w.offset)
    return fail(FEWBITS_UNSUPPORTED, "no kernel multiplies %d-bit codes in groups of %lld with %lld columns", w.bits,
                (long long)w.group_columns, (long long)w.columns);
  if (!w.columns) return fail(FEWBITS_UNSUPPORTED, "a weight without columns has no scales to multiply with");
  if (kind == PRODUCT_INT8 && !has_int8_table(w))
    return fail(FEWBITS_UNSUPPORTED, "int8 cannot stand for a table with NaN, infinity or tiny values alone");
  if (!p.m || !w.rows) return FEWBITS_OK;
  int64_t units = ceil_div(w.columns, unit), chunks = ceil_div(w.columns, WORD), tiles = ceil_div(w.rows, TILE);
  bool byte = kind == PRODUCT_INT8, sums = w.zero;
  int64_t x_bytes = p.m * chunks * operand_bytes(kind), side = p.m * units * 4;
  bool lanes = p.m <= table.few_rows && w.bits == 4 && is_power_of_two(unit);
  if (lanes) {
    int64_t whole = ceil_div(chunks, table.lanes) * table.lanes;
    x_bytes = p.m * whole * operand_bytes(kind);
    if (p.m * whole * 4 > side) side = p.m * whole * 4;
  }
  Buffer packed(x_bytes + (sums ? side + 64 : 0) + (byte ? 3 * side + 192 : 0) + 256);
  if (packed.failed()) return fail(FEWBITS_NO_MEMORY, "no memory for %lld bytes of activations", (long long)x_bytes);
  int64_t x_rows = table.x_rows, blocks = ceil_div(p.m, x_rows);
  TileTask task;
  task.weight = &w;
  task.product = &p;
  task.unit = unit;
  task.units = units;
  task.factor = best_factor(w, kind);
  int64_t cut_units = blocks == 1 ? units : CUT_BYTES / (p.m * operand_bytes(kind) * (unit / WORD));
  task.cut = (cut_units < 1 ? 1 : cut_units < units ? cut_units : units) * unit;
  PackTask &pack = task.pack;
  pack = PackTask{p.x, p.m, w.columns, p.x_stride, p.x_dtype, ceil_div(p.m, blocks), unit, w.high_first, kind,
                  activation_group, packed.as<uint8_t>(), nullptr, nullptr, nullptr, lanes, nullptr};
  uint8_t *after = packed.as<uint8_t>() + (x_bytes + 63) / 64 * 64;
  if (sums) {
    pack.sums = reinterpret_cast<float *>(after);
    after += (side + 63) / 64 * 64;
  }
  if (byte) {
    int64_t step = (side + 63) / 64 * 64;
    pack.unit_scales = reinterpret_cast<float *>(after);
    pack.excess = reinterpret_cast<int32_t *>(after + step);
    if (lanes) pack.scales = reinterpret_cast<float *>(after + 2 * step);
  }
  int64_t row_bytes = (w.columns + 64) * 4;
  // Packing a few rows is over sooner than a second thread wakes up.
  int32_t packers = p.m * w.columns < 32768 ? 1 : p.threads;
  if (!run_pieces(table.pack_x, &pack, p.m, ceil_div(p.m, 4 * p.threads), row_bytes, packers))
    return fail(FEWBITS_NO_MEMORY, "no memory for a row of %lld activations", (long long)w.columns);
  // Small pieces near the end let the threads end together; large ones read x less often.
  int64_t most = blocks <= 2 ? 16 : 8, grain = tiles / (8 * p.threads) * 2;
  grain = grain < 1 ? 1 : grain > most ? most : grain;
  int64_t scratch = grain * (p.m + 2 * units) * TILE * 4 + TILE * (units + 64) * 4 + table.x_rows * 64 +
                    2 * (task.cut / WORD + TILE) * 64 + 1024;
  if (!run_pieces(table.multiply_tiles, &task, tiles, grain, scratch, useful_threads(w, p)))
    return fail(FEWBITS_NO_MEMORY, "no memory for %lld bytes of intermediate results", (long long)scratch);
  return FEWBITS_OK;
}

// Runs all phases of LLM.int8() once its memory is there.
int32_t multiply_in_int8(Int8Task &task, int64_t columns) {
  const fewbits_product &p = *task.product;
  const KernelTable &table = *kernels();
  int64_t grain = ceil_div(p.m, 4 * p.threads), row_bytes = (task.stride + 64) * 5;
  int32_t packers = p.m * columns < 32768 ? 1 : p.threads;
  task.searching = 1;
  bool done = run_pieces(table.quantize_x, &task, p.m, grain, row_bytes, packers);
  for (int64_t k = 0; k < columns; k++) {
    if (task.is_outlier[k]) task.columns[task.outliers++] = k;
  }
  Buffer picked(p.m * task.outliers * 4);
  task.outlier_x = picked.as<float>();
  task.searching = 0;
  done = done && !picked.failed() && run_pieces(table.quantize_x, &task, p.m, grain, row_bytes, packers);
  int64_t tiles = ceil_div(task.weight->rows, TILE), pieces = tiles / (8 * p.threads), most = task.tiles ? 8 : 4;
  pieces = pieces < 1 ? 1 : pieces > most ? most : pieces;
  int64_t scratch = 2 * (task.outliers + (task.tiles ? table.x_rows + columns / 4 + 1 : 0)) * TILE * 4 + 512;
  // With tiles, so many rows of x at a time as stay in the second cache.
  int64_t blocks = task.tiles ? ceil_div(p.m, table.x_rows) : 1, rounds = ceil_div(p.m * columns, 2 * CUT_BYTES);
  rounds = task.tiles && rounds > 1 ? (rounds < blocks ? rounds : blocks) : 1;
  for (int64_t round = 0; round < rounds; round++) {
    task.begin = blocks * round / rounds;
    task.end = blocks * (round + 1) / rounds;
    done = done && run_pieces(table.multiply_int8, &task, tiles, pieces, scratch, useful_threads(*task.weight, p));
  }
  return done ? FEWBITS_OK : fail(FEWBITS_NO_MEMORY, "no memory for int8 activations");
}

}  // namespace
}  // namespace fewbits

using namespace fewbits;

int32_t fewbits_linear(const fewbits_weight *weight, const fewbits_product *product) {
  if (int32_t status = check_weight(weight)) return status;
  if (int32_t status = check_product(product, weight->rows, weight->columns)) return status;
  bool pairs = product->x_dtype == FEWBITS_BF16 && kernels()->products >> PRODUCT_16BIT & 1;
  return multiply(*weight, *product, pairs ? PRODUCT_16BIT : PRODUCT_F32, 0);
}

int32_t fewbits_linear_a8(const fewbits_weight *weight, const fewbits_product *product, int64_t activation_group) {
  if (int32_t status = check_weight(weight)) return status;
  if (int32_t status = check_product(product, weight->rows, weight->columns)) return status;
  if (activation_group < 0) return fail(FEWBITS_BAD_ARGUMENT, "groups of %lld activations", (long long)activation_group);
  return multiply(*weight, *product, PRODUCT_INT8, activation_group);
}

int32_t fewbits_linear_int8(const fewbits_weight *weight, const fewbits_product *product, float threshold) {
  if (int32_t status = check_weight(weight)) return status;
  if (int32_t status = check_product(product, weight->rows, weight->columns)) return status;
  const fewbits_weight &w = *weight;
  if (w.kind != FEWBITS_SIGNED || w.layout != FEWBITS_ROWS || w.group_rows != 1 || w.flat_groups ||
      w.group_columns < w.columns || w.zero || w.offset)
    return fail(FEWBITS_BAD_ARGUMENT, "LLM.int8() takes int8 codes with one scale a row");
  if (!(threshold >= 0)) return fail(FEWBITS_BAD_ARGUMENT, "the outlier threshold is %f", (double)threshold);
  const fewbits_product &p = *product;
  if (!w.columns) return fail(FEWBITS_UNSUPPORTED, "a weight without columns has no scales to multiply with");
  if (w.columns > MOST_INT8_COLUMNS)
    return fail(FEWBITS_UNSUPPORTED, "products of %lld columns do not fit 32 bits", (long long)w.columns);
  if (!p.m || !w.rows) return FEWBITS_OK;
  // Rows of codes lie an odd number of lines apart: at a power of two they would fight for the same lines of
  // the cache.
  int64_t stride = ((w.columns + 63) / 64 | 1) * 64;
  Buffer codes(p.m * stride), numbers(p.m * 8 + w.columns * 9 + 64);
  if (codes.failed() || numbers.failed()) return fail(FEWBITS_NO_MEMORY, "no memory for int8 activations");
  Int8Task task{};
  task.weight = weight;
  task.product = product;
  task.threshold = threshold;
  task.tiles = p.m > INT8_LANES_ROWS;
  task.codes = codes.as<int8_t>();
  task.stride = stride;
  task.columns = numbers.as<int64_t>();
  task.absmax = reinterpret_cast<float *>(task.columns + w.columns);
  task.code_sums = reinterpret_cast<int32_t *>(task.absmax + p.m);
  task.is_outlier = reinterpret_cast<uint8_t *>(task.code_sums + p.m);
  memset(task.is_outlier, 0, (size_t)w.columns);
  return multiply_in_int8(task, w.columns);
}
