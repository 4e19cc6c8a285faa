// What an instruction set has to offer: one pointer per kernel. isa.cpp fills one table each; api.cpp picks.
#pragma once

#include "api.h"
#include "parallel.h"

namespace fewbits {

// Rows of a weight, decoded: item i of the job is row `row_list[i]`, or `first_row + i` without a list.
struct DecodeTask {
  const fewbits_weight *weight;
  const int64_t *row_list;
  int64_t first_row, first_column, columns;
  void *out;  // [items, out_stride] of dtype
  int64_t out_stride;
  int32_t dtype;
  int32_t streams;  // nonzero: `out` is too large to be read from the caches soon, and is written past them
};

// What is asked of `encode_groups`; all three in one pass where nothing speaks against it.
enum EncodeStep { ENCODE_RANGES = 1, ENCODE_SCALES = 2, ENCODE_CODES = 4 };

// Values become scales and codes. Items of the job: spans of bands.
//
// A band is some rows of one grid row: all of them when ranges are followed by scales. A span is some groups
// beside each other, beginning on a whole byte of codes and zero points. Flat groups lie in one row.
struct EncodeTask {
  const fewbits_encoding *encoding;
  const void *values;
  int32_t dtype;
  int32_t steps;
  int64_t rows, columns;
  int64_t group_rows, group_columns;
  int64_t band_rows;
  int64_t across, span, spans;  // groups of a grid row, those of an item, and items of a band
  const float *heap;            // thresholds in the order they are asked for: level l at heap + 2**l
  const float *order;           // 2**levels codes as 32-bit words, or null
  int32_t levels;               // 3, 4 or 8
  int32_t mantissa;             // bits of it, where thresholds are those of OCP's 8-bit floats (3, 2), or 0
  float *low, *high;            // [bands, across]: written by ranges alone, read by scales alone
  float *used_scale;            // [groups]: written by scales alone, read by codes alone
  void *scale;
  uint8_t *zero;                // written by scales, read by codes alone
  uint8_t *codes;
  int32_t *bad;                 // set where values cannot be represented
};

// Rows of x made ready for `multiply_tiles`, shared by all threads.
//
// Columns are cut into units, which have one scale a row of the weight, and units into chunks of 8 columns.
// Rows of x are cut into blocks of `block` rows (the last is shorter).
struct PackTask {
  const void *x;
  int64_t m, columns, x_stride;
  int32_t dtype;
  int64_t block;        // rows of x that are multiplied at once
  int64_t unit;         // columns of a unit, a multiple of 8
  int32_t high_first;   // order of the codes
  int32_t kind;         // enum ProductKind
  int64_t group;        // columns that share an activation scale (int8); 0: all
  void *packed;         // [blocks][chunks][operands][rows of the block]
  // [blocks][units][rows], or null:
  float *sums;          // of x over a unit, where the weight has zero points
  float *unit_scales;   // of int8 activations
  int32_t *excess;      // what int8 products begin with: they count the bias of the weights times x too much
  int32_t lanes;        // nonzero: packed for kernels/rows.h, where excess and scales are [blocks][rows][LANES]
  float *scales;
};

enum ProductKind { PRODUCT_F32 = 0, PRODUCT_16BIT = 1, PRODUCT_INT8 = 2 };

struct TileTask {
  const fewbits_weight *weight;
  const fewbits_product *product;
  PackTask pack;
  int64_t unit, units;
  int64_t cut;      // columns that are multiplied before the next rows are, a multiple of `unit`
  float factor;     // the table is multiplied with this before it is rounded to 16 bit or int8
};

// Rows of x up to which columns lie in the lanes (kernels/int8.h); more are multiplied in tiles.
constexpr int64_t INT8_LANES_ROWS = 6;

// LLM.int8(): x in int8, searched for outliers first, then quantized.
struct Int8Task {
  const fewbits_weight *weight;
  const fewbits_product *product;
  float threshold;
  int32_t searching;    // which of the two
  uint8_t *is_outlier;  // [columns]
  float *absmax;        // [m], of what is no outlier
  int64_t *columns;     // [outliers]: those with outliers
  int64_t outliers;
  float *outlier_x;     // [m, outliers]
  int32_t tiles;        // how codes lie and what multiplies them: int8_tiles.h, otherwise int8.h
  int8_t *codes;        // [m, stride], or with tiles [blocks][columns / 4][rows of the block][4]
  int64_t stride;       // a multiple of 64
  int32_t *code_sums;   // [m]
  int64_t begin, end;   // blocks of x that are multiplied, with tiles
};

// Steps of optimizers. Items of the job: blocks of all tensors.
struct UpdateTask {
  const fewbits_moments *list;
  int64_t tensors;
  const int64_t *first_block;  // [tensors + 1]: items before each tensor
  const fewbits_step *step;
  const float *first_heap, *second_heap;  // thresholds in the order they are asked for: level l at heap + 2**l
  int32_t first_zero, second_zero;        // the codes of 0
};

struct KernelTable {
  const char *name;
  int32_t products;  // bits 1 << ProductKind
  int32_t x_rows;    // rows of x that multiply_tiles multiplies at once
  int32_t few_rows;  // up to so many, columns go into the lanes (kernels/rows.h)
  int32_t lanes;     // words in a vector
  int32_t pair_bytes;  // of x in PRODUCT_16BIT, for one word of codes
  // Items: rows of the weight.
  void (*decode_rows)(const void *decode_task, const Piece &piece);
  // Items: bands of whole groups; see kernels/quantize.h.
  void (*encode_groups)(const void *encode_task, const Piece &piece);
  // Items: rows of x.
  void (*pack_x)(const void *pack_task, const Piece &piece);
  // Items: blocks of 16 rows of the weight.
  void (*multiply_tiles)(const void *tile_task, const Piece &piece);
  // Items: rows of x, and blocks of 16 rows of the weight; see kernels/int8.h.
  void (*quantize_x)(const void *int8_task, const Piece &piece);
  void (*multiply_int8)(const void *int8_task, const Piece &piece);
  // Items: blocks of moments; see kernels/moments.h.
  void (*update_moments)(const void *update_task, const Piece &piece);
};

// Sizes, and products of two of them, are below these, so that arithmetic with them fits 64 bits.
constexpr int64_t LARGEST_SIZE = (int64_t)1 << 40, LARGEST_COUNT = (int64_t)1 << 48;
static inline bool size_fits(int64_t size) { return size >= 0 && size < LARGEST_SIZE; }
static inline bool sizes_fit(int64_t a, int64_t b) {
  return size_fits(a) && size_fits(b) && (b == 0 || a < LARGEST_COUNT / b);
}

// The table in use, or null when this machine runs none of them.
const KernelTable *kernels();

// Remembers a message for fewbits_error() and returns `status`.
int32_t fail(int32_t status, const char *format, ...) __attribute__((format(printf, 2, 3)));

// FEWBITS_OK when every pointer and length in `weight` holds what its numbers say.
int32_t check_weight(const fewbits_weight *weight);
// The same for x, y and bias of a product with a weight [rows, columns].
int32_t check_product(const fewbits_product *product, int64_t rows, int64_t columns);

}  // namespace fewbits
