// Driver of optimizer steps: arguments are checked, and blocks of many tensors become one job.

#include <math.h>

#include "table.h"

namespace fewbits {

namespace {

constexpr int64_t BLOCK = 256;
constexpr int64_t PIECE = 64;  // blocks of a piece of work
constexpr int64_t CODES = 256;

int64_t item_of(int32_t dtype) { return dtype == FEWBITS_F32 ? 4 : 2; }
bool is_dtype(int32_t dtype) { return dtype >= FEWBITS_F32 && dtype <= FEWBITS_BF16; }
int64_t blocks_of(int64_t count) { return (count + BLOCK - 1) / BLOCK; }

int32_t check_table(const float *table, const char *which) {
  if (!table || (uintptr_t)table % alignof(float))
    return fail(FEWBITS_BAD_ARGUMENT, "the table of %s moments is null or on an odd address", which);
  bool zero = table[0] == 0;
  for (int64_t i = 1; i < CODES; i++) {
    if (!(table[i] > table[i - 1]) || !isfinite(table[i]))
      return fail(FEWBITS_BAD_ARGUMENT, "the table of %s moments does not ascend", which);
    zero = zero || table[i] == 0;
  }
  return zero ? FEWBITS_OK : fail(FEWBITS_BAD_ARGUMENT, "the table of %s moments has no 0", which);
}

int32_t check_step(const fewbits_step *step) {
  if (!step) return fail(FEWBITS_BAD_ARGUMENT, "the step is null");
  if (!kernels())
    return fail(FEWBITS_UNSUPPORTED, "this machine runs none of the instruction sets %s", fewbits_isas());
  if (step->rule < FEWBITS_ADAM || step->rule > FEWBITS_SGD)
    return fail(FEWBITS_BAD_ARGUMENT, "unknown rule: %d", step->rule);
  if (step->threads < 1 || step->threads > 4096)
    return fail(FEWBITS_BAD_ARGUMENT, "%d threads", step->threads);
  if (int32_t status = check_table(step->first_table, "first")) return status;
  if (step->rule != FEWBITS_ADAM) return FEWBITS_OK;
  if (int32_t status = check_table(step->second_table, "second")) return status;
  return step->second_table[0] == 0
             ? FEWBITS_OK
             : fail(FEWBITS_BAD_ARGUMENT, "the table of second moments does not begin with 0");
}

bool is_missing(const void *pointer, int64_t item) { return !pointer || (uintptr_t)pointer % (uintptr_t)item; }

int32_t check_tensor(const fewbits_moments &t, bool two, int64_t number) {
  if (!size_fits(t.count))
    return fail(FEWBITS_BAD_ARGUMENT, "tensor %lld has %lld elements", (long long)number, (long long)t.count);
  if (!is_dtype(t.param_dtype) || !is_dtype(t.grad_dtype))
    return fail(FEWBITS_BAD_ARGUMENT, "unknown dtypes of tensor %lld: %d, %d", (long long)number,
                t.param_dtype, t.grad_dtype);
  if (!t.count) return FEWBITS_OK;
  bool missing = is_missing(t.param, item_of(t.param_dtype)) || is_missing(t.grad, item_of(t.grad_dtype)) ||
                 !t.first || is_missing(t.first_scale, 4);
  if (two) missing = missing || !t.second || is_missing(t.second_scale, 4);
  return missing ? fail(FEWBITS_BAD_ARGUMENT, "a part of tensor %lld is null or on an odd address",
                        (long long)number)
                 : FEWBITS_OK;
}

// Thresholds as they are asked for, level after level: the values between the first and the last, which
// fills the place that is left.
void fill_heap(const float *table, float *heap) {
  for (int level = 0; level < 8; level++) {
    for (int64_t i = 0; i < 1 << level; i++)
      heap[(1 << level) + i] = table[(2 * i + 1) << (7 - level)];
  }
}

int32_t place_of_zero(const float *table) {
  int32_t place = 0;
  while (table[place] != 0) place++;
  return place;
}

}  // namespace

}  // namespace fewbits

using namespace fewbits;

int32_t fewbits_update(const fewbits_moments *list, int64_t tensors, const fewbits_step *step) {
  if (int32_t status = check_step(step)) return status;
  const bool two = step->rule == FEWBITS_ADAM;
  if (!size_fits(tensors) || (tensors && is_missing(list, alignof(fewbits_moments))))
    return fail(FEWBITS_BAD_ARGUMENT, "%lld tensors, or their list is null or on an odd address",
                (long long)tensors);
  for (int64_t i = 0; i < tensors; i++) {
    if (int32_t status = check_tensor(list[i], two, i)) return status;
  }
  Buffer memory((tensors + 1) * 8 + 2 * (CODES + 16) * 4);
  if (memory.failed()) return fail(FEWBITS_NO_MEMORY, "no memory for %lld tensors", (long long)tensors);
  float *first_heap = memory.as<float>(), *second_heap = first_heap + CODES + 16;
  int64_t *first_block = reinterpret_cast<int64_t *>(second_heap + CODES + 16);
  UpdateTask task = {list, tensors, first_block, step, first_heap, second_heap, 0, 0};
  fill_heap(step->first_table, first_heap);
  task.first_zero = place_of_zero(step->first_table);
  if (two) fill_heap(step->second_table, second_heap);
  first_block[0] = 0;
  for (int64_t i = 0; i < tensors; i++) {
    first_block[i + 1] = first_block[i] + blocks_of(list[i].count);
    if (first_block[i + 1] >= LARGEST_SIZE)
      return fail(FEWBITS_BAD_ARGUMENT, "the tensors have more than %lld blocks", (long long)LARGEST_SIZE);
  }
  return run_pieces(kernels()->update_moments, &task, first_block[tensors], PIECE, 0, step->threads)
             ? FEWBITS_OK
             : fail(FEWBITS_NO_MEMORY, "no memory");
}
