// The C ABI of fewbits' CPU kernels. It knows neither torch nor Python: pointers, sizes, numbers.
//
// Every function returns FEWBITS_OK or a code below; fewbits_error() then says what was wrong. No pointer is
// read before its length is checked, and nothing is kept after a call returns. Calls are independent of each
// other: any number of threads may be inside them.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define FEWBITS_API extern "C" __declspec(dllexport)
#else
#define FEWBITS_API extern "C" __attribute__((visibility("default")))
#endif

// Raised by one with every change of a struct or a signature; the caller refuses another number.
#define FEWBITS_ABI 3

enum fewbits_status {
  FEWBITS_OK = 0,
  FEWBITS_BAD_ARGUMENT = 1,  // a null pointer, a length, an enum: the caller's mistake
  FEWBITS_BAD_VALUES = 2,    // NaN, infinity, or a scale that does not fit: the data's
  FEWBITS_NO_MEMORY = 3,
  FEWBITS_UNSUPPORTED = 4,   // this library has no kernel for it; another backend may
};

// FEWBITS_F64 is for fewbits_mean alone.
enum fewbits_dtype { FEWBITS_F32 = 0, FEWBITS_F16 = 1, FEWBITS_BF16 = 2, FEWBITS_F64 = 3 };

enum fewbits_codes {
  FEWBITS_TABLE = 0,     // codes are places in a table of 2**bits values
  FEWBITS_UNSIGNED = 1,  // codes are integers; a zero point is subtracted
  FEWBITS_SIGNED = 2,    // codes are int8
};

// How codes lie in memory.
enum fewbits_layout {
  FEWBITS_ROWS = 0,   // every row starts on a byte; within a byte the first code has the lowest bits
  FEWBITS_FLAT = 1,   // one dense run over all rows; the first code has the highest bits of its byte
};

enum fewbits_scale {
  FEWBITS_SCALE_F32 = 0,
  FEWBITS_SCALE_F16 = 1,
  FEWBITS_SCALE_BF16 = 2,
  FEWBITS_SCALE_E8M0 = 3,    // a byte: 2**(byte - 127)
  FEWBITS_SCALE_NESTED = 4,  // stored as a quantized weight of its own
};

// A quantized matrix [rows, columns]: weight = (value(code) - zero) * scale * unit + offset.
struct fewbits_weight {
  const uint8_t *codes;
  int64_t codes_bytes;
  int64_t rows, columns;
  int64_t group_rows, group_columns;  // of the weights that share a scale; flat: 1 and the group size
  const float *table;                 // 2**bits values where kind is FEWBITS_TABLE
  const void *scale;                  // one per group, row-major; null when nested
  int64_t scale_bytes;
  const fewbits_weight *nested;       // the scales as a matrix [1, groups] or [row groups, column groups]
  const uint8_t *zero;                // zero points packed like ROWS codes, or null
  int64_t zero_bytes;
  const float *offset;                // one float, or null
  float unit;                         // 1, but for LLM.int8()'s 1/127
  int32_t middle;                     // zero point of unsigned codes where none are stored
  int32_t bits;                       // 2, 3, 4 or 8
  int32_t kind;                       // enum fewbits_codes
  int32_t layout;                     // enum fewbits_layout
  int32_t high_first;                 // nonzero: the first code of a byte has its highest bits (FLAT)
  int32_t flat_groups;                // nonzero: groups run over the flattened matrix and may straddle rows
  int32_t scale_type;                 // enum fewbits_scale
};

// How values become codes. Scale and codes follow src/fewbits/reference.py to the bit.
struct fewbits_encoding {
  int64_t rows, columns;
  int64_t group_rows, group_columns;
  const float *thresholds;    // ascending, `threshold_count` of them: a value goes up when strictly greater
  const uint8_t *order;       // code of each step, threshold_count + 1 of them, or null: the steps are the codes
  int64_t threshold_count;
  float peak;                 // what the largest magnitude of a group is mapped to
  float limit;                // magnitudes above are refused
  int32_t bits, kind;
  int32_t low, high, middle;  // of integer codes
  int32_t layout;             // FEWBITS_ROWS or FEWBITS_FLAT
  int32_t flat_groups;
  int32_t sign_bit;           // nonzero: the highest bit of a code is its sign
  int32_t reciprocal;         // nonzero: multiply with peak / scale instead of dividing by the scale
  int32_t stores_absmax;      // nonzero: the scale is the largest magnitude, not that divided by the peak
  int32_t scale_type;         // FEWBITS_SCALE_F32, F16, BF16 or E8M0: scales are rounded to it before use
  int32_t peak_exponent;      // of `peak` as frexp has it, for E8M0
  int32_t has_zero;
};

// x [m, columns of the weight] and y [m, rows of the weight]; strides in elements.
struct fewbits_product {
  const void *x;
  int64_t m, x_stride;
  void *y;
  int64_t y_stride;
  const void *bias;   // [rows of the weight], or null
  int32_t x_dtype, y_dtype, bias_dtype;
  int32_t threads;
};

enum fewbits_rule { FEWBITS_ADAM = 0, FEWBITS_LION = 1, FEWBITS_SGD = 2 };

// A parameter, its gradient and its moments in blocks of 256 codes; what they mean is in src/fewbits/moments.py.
struct fewbits_moments {
  void *param;                         // [count]
  const void *grad;                    // [count]
  uint8_t *first, *second;             // [count]; the second ones are Adam's alone
  float *first_scale, *second_scale;   // [count / 256, rounded up]
  int64_t count;
  int32_t param_dtype, grad_dtype;
};

// One step of a rule.
struct fewbits_step {
  const float *first_table;   // 256 ascending values, 0 among them
  const float *second_table;  // the same, 0 the first of them
  float beta1, take1;         // a moment is kept by beta, and takes so much of the gradient
  float beta2, take2;
  float eps, root_factor;     // the divisor is root_factor · sqrt(second moment) + eps
  float limit, rate;          // of the magnitude of a direction, and its factor
  float shrink, decay;        // what parameters are multiplied with; what of them is added to gradients (SGD)
  uint32_t seed;              // of the random numbers
  int32_t rule;               // enum fewbits_rule
  int32_t threads;
};

// Starts `threads` threads that each run function(argument) once, and waits for them: GOMP_parallel.
typedef void (*fewbits_parallel)(void (*function)(void *), void *argument, unsigned threads, unsigned flags);

FEWBITS_API int32_t fewbits_abi(void);
// What the last failed call of this thread was about.
FEWBITS_API const char *fewbits_error(void);
// The runtime whose threads are used; null: everything runs in the calling thread.
FEWBITS_API int32_t fewbits_set_parallel(fewbits_parallel parallel);
// Names of the instruction sets compiled in, best first, separated by commas.
FEWBITS_API const char *fewbits_isas(void);
// The best of them that this machine runs, or a reason why `name` cannot be used there (null: it can).
FEWBITS_API const char *fewbits_best_isa(void);
FEWBITS_API const char *fewbits_refuse_isa(const char *name);
FEWBITS_API int32_t fewbits_use_isa(const char *name);

// Rows [first_row, first_row + rows) (or the listed rows) and columns [first_column, …) of a weight, decoded.
FEWBITS_API int32_t fewbits_dequantize(const fewbits_weight *weight, const int64_t *row_list, int64_t first_row,
                                       int64_t rows, int64_t first_column, int64_t columns, void *out,
                                       int64_t out_elements, int64_t out_stride, int32_t dtype, int32_t threads);
// Scales and zero points of every group, and codes (null: none). `given_scale`: codes for these scales and the zero
// points in `zero`; nothing else.
FEWBITS_API int32_t fewbits_quantize(const fewbits_encoding *encoding, const void *values, int64_t value_count,
                                     int32_t dtype, const float *given_scale, int64_t given_scales, void *scale,
                                     int64_t scale_bytes, uint8_t *zero, int64_t zero_bytes, uint8_t *codes,
                                     int64_t codes_bytes, int32_t threads);
// The mean of float32 or float64 values, summed in the order of reference._mean.
FEWBITS_API int32_t fewbits_mean(const void *values, int64_t count, int32_t dtype, float *mean);
// y = x · decode(weight)ᵀ + bias.
FEWBITS_API int32_t fewbits_linear(const fewbits_weight *weight, const fewbits_product *product);
// The same with x quantized to int8 per group of `activation_group` columns (0: per row).
FEWBITS_API int32_t fewbits_linear_a8(const fewbits_weight *weight, const fewbits_product *product,
                                      int64_t activation_group);
// LLM.int8(): weight in int8, one scale a row; columns of x with a magnitude of `threshold` or more (0: none)
// are multiplied in x's dtype. FEWBITS_UNSUPPORTED with more columns than 32 bits can sum.
FEWBITS_API int32_t fewbits_linear_int8(const fewbits_weight *weight, const fewbits_product *product,
                                        float threshold);
// One step of `tensors` parameters, in place; they and their parts do not overlap.
FEWBITS_API int32_t fewbits_update(const fewbits_moments *list, int64_t tensors, const fewbits_step *step);
