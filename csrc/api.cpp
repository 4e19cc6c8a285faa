// What every call of the API shares: errors, the choice of the instruction set, checks of its arguments.

#include "api.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <atomic>

#include "cpu.h"
#include "table.h"

namespace fewbits {

// Defined by CMakeLists.txt: X(name) for every instruction set compiled in, best first.
#define X(isa) extern const KernelTable table_##isa;
FEWBITS_ISAS(X)
#undef X

namespace {

const KernelTable *const TABLES[] = {
#define X(isa) &table_##isa,
    FEWBITS_ISAS(X)
#undef X
};

constexpr const char *NAMES = ""
#define X(isa) "," #isa
    FEWBITS_ISAS(X)
#undef X
    ;

std::atomic<const KernelTable *> chosen{nullptr};
thread_local char message[256];

const KernelTable *best() {
  for (const KernelTable *table : TABLES) {
    if (!missing_for(table->name)) return table;
  }
  return nullptr;
}

int64_t packed_bytes(int64_t count, int32_t bits) { return (count * bits + 7) / 8; }

int64_t scale_item(int32_t type) {
  switch (type) {
    case FEWBITS_SCALE_F32: return 4;
    case FEWBITS_SCALE_F16:
    case FEWBITS_SCALE_BF16: return 2;
    case FEWBITS_SCALE_E8M0: return 1;
    default: return 0;
  }
}

int32_t check_nested(const fewbits_weight &outer, int64_t groups, int depth);

int32_t check(const fewbits_weight *weight, int depth) {
  if (!weight) return fail(FEWBITS_BAD_ARGUMENT, "the weight is null");
  const fewbits_weight &w = *weight;
  if (!sizes_fit(w.rows, w.columns))
    return fail(FEWBITS_BAD_ARGUMENT, "a weight [%lld, %lld] is too large", (long long)w.rows, (long long)w.columns);
  if (w.bits != 2 && w.bits != 3 && w.bits != 4 && w.bits != 8)
    return fail(FEWBITS_BAD_ARGUMENT, "codes have 2, 3, 4 or 8 bits, got %d", w.bits);
  if (w.kind < FEWBITS_TABLE || w.kind > FEWBITS_SIGNED)
    return fail(FEWBITS_BAD_ARGUMENT, "unknown kind of codes: %d", w.kind);
  if (w.kind == FEWBITS_TABLE && (!w.table || (uintptr_t)w.table % 4))
    return fail(FEWBITS_BAD_ARGUMENT, "the table of values is null, or on an odd address");
  if ((uintptr_t)w.offset % 4) return fail(FEWBITS_BAD_ARGUMENT, "the offset does not lie on a multiple of 4 bytes");
  if (w.kind == FEWBITS_SIGNED && w.bits != 8)
    return fail(FEWBITS_BAD_ARGUMENT, "signed codes have 8 bits, got %d", w.bits);
  if (w.kind == FEWBITS_UNSIGNED && (w.middle < 0 || w.middle >= 1 << w.bits))
    return fail(FEWBITS_BAD_ARGUMENT, "a zero point of %d for codes of %d bits", w.middle, w.bits);
  if (w.layout < FEWBITS_ROWS || w.layout > FEWBITS_FLAT)
    return fail(FEWBITS_BAD_ARGUMENT, "unknown layout of codes: %d", w.layout);
  if (w.layout == FEWBITS_FLAT && w.bits != 4 && w.bits != 8)
    return fail(FEWBITS_BAD_ARGUMENT, "flat codes have 4 or 8 bits, got %d", w.bits);
  if (w.high_first != (w.layout == FEWBITS_FLAT))
    return fail(FEWBITS_BAD_ARGUMENT, "high_first does not fit the layout");
  int64_t bytes = w.layout == FEWBITS_FLAT ? packed_bytes(w.rows * w.columns, w.bits)
                                           : w.rows * packed_bytes(w.columns, w.bits);
  if (w.codes_bytes != bytes || (bytes && !w.codes))
    return fail(FEWBITS_BAD_ARGUMENT, "the codes of this weight take %lld bytes, got %lld", (long long)bytes,
                (long long)w.codes_bytes);
  if (w.group_rows < 1 || w.group_columns < 1 || !size_fits(w.group_rows) || !size_fits(w.group_columns) ||
      (w.flat_groups && w.group_rows != 1))
    return fail(FEWBITS_BAD_ARGUMENT, "groups of %lld x %lld weights", (long long)w.group_rows, (long long)w.group_columns);
  int64_t groups = w.flat_groups ? (w.rows * w.columns + w.group_columns - 1) / w.group_columns
                                 : ((w.rows + w.group_rows - 1) / w.group_rows) *
                                       ((w.columns + w.group_columns - 1) / w.group_columns);
  if (w.scale_type == FEWBITS_SCALE_NESTED) {
    if (int32_t status = check_nested(w, groups, depth)) return status;
  } else {
    int64_t item = scale_item(w.scale_type);
    if (!item) return fail(FEWBITS_BAD_ARGUMENT, "unknown type of scales: %d", w.scale_type);
    if (w.scale_bytes != groups * item || (groups && !w.scale))
      return fail(FEWBITS_BAD_ARGUMENT, "%lld scales take %lld bytes, got %lld", (long long)groups,
                  (long long)(groups * item), (long long)w.scale_bytes);
    if (item > 1 && (uintptr_t)w.scale % (uintptr_t)item)
      return fail(FEWBITS_BAD_ARGUMENT, "the scales do not lie on a multiple of %lld bytes", (long long)item);
  }
  if (w.zero) {
    int64_t rows = (w.rows + w.group_rows - 1) / w.group_rows;
    int64_t across = (w.columns + w.group_columns - 1) / w.group_columns;
    if (w.flat_groups || w.kind != FEWBITS_UNSIGNED)
      return fail(FEWBITS_BAD_ARGUMENT, "only unsigned codes in groups of their own rows have zero points");
    if (w.zero_bytes != rows * packed_bytes(across, w.bits))
      return fail(FEWBITS_BAD_ARGUMENT, "the zero points take %lld bytes, got %lld",
                  (long long)(rows * packed_bytes(across, w.bits)), (long long)w.zero_bytes);
  }
  return FEWBITS_OK;
}

int32_t check_nested(const fewbits_weight &outer, int64_t groups, int depth) {
  if (depth) return fail(FEWBITS_BAD_ARGUMENT, "scales of scales of scales are not supported");
  if (!outer.nested) return fail(FEWBITS_BAD_ARGUMENT, "the nested scales are null");
  if (int32_t status = check(outer.nested, depth + 1)) return status;
  const fewbits_weight &inner = *outer.nested;
  if (inner.rows * inner.columns != groups || inner.bits != 8)
    return fail(FEWBITS_BAD_ARGUMENT, "%lld scales are nested as [%lld, %lld] of %d bits", (long long)groups,
                (long long)inner.rows, (long long)inner.columns, inner.bits);
  return FEWBITS_OK;
}

}  // namespace

int32_t fail(int32_t status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return status;
}

const KernelTable *kernels() {
  const KernelTable *table = chosen.load(std::memory_order_relaxed);
  if (!table) chosen = table = best();
  return table;
}

int32_t check_weight(const fewbits_weight *weight) {
  if (!kernels()) return fail(FEWBITS_UNSUPPORTED, "this machine runs none of the instruction sets %s", fewbits_isas());
  return check(weight, 0);
}

int32_t check_product(const fewbits_product *product, int64_t rows, int64_t columns) {
  if (!product) return fail(FEWBITS_BAD_ARGUMENT, "the product is null");
  const fewbits_product &p = *product;
  const int32_t dtypes[] = {p.x_dtype, p.y_dtype, p.bias_dtype};
  for (int32_t dtype : dtypes) {
    if (dtype < FEWBITS_F32 || dtype > FEWBITS_BF16) return fail(FEWBITS_BAD_ARGUMENT, "unknown dtype: %d", dtype);
  }
  if (!size_fits(p.m)) return fail(FEWBITS_BAD_ARGUMENT, "%lld rows of x", (long long)p.m);
  if (!sizes_fit(p.m, p.x_stride) || !sizes_fit(p.m, p.y_stride) || p.x_stride < columns || p.y_stride < rows)
    return fail(FEWBITS_BAD_ARGUMENT, "strides %lld of x and %lld of y for a weight [%lld, %lld]", (long long)p.x_stride,
                (long long)p.y_stride, (long long)rows, (long long)columns);
  if (p.m && ((columns && !p.x) || (rows && !p.y))) return fail(FEWBITS_BAD_ARGUMENT, "x or y is null");
  if (p.threads < 1 || p.threads > 4096) return fail(FEWBITS_BAD_ARGUMENT, "%d threads", p.threads);
  uintptr_t align_x = p.x_dtype == FEWBITS_F32 ? 4 : 2, align_y = p.y_dtype == FEWBITS_F32 ? 4 : 2;
  uintptr_t align_bias = p.bias_dtype == FEWBITS_F32 ? 4 : 2;
  if ((uintptr_t)p.x % align_x || (uintptr_t)p.y % align_y || (uintptr_t)p.bias % align_bias)
    return fail(FEWBITS_BAD_ARGUMENT, "x, y or the bias do not lie on a multiple of their items' size");
  return FEWBITS_OK;
}

}  // namespace fewbits

using namespace fewbits;

int32_t fewbits_abi(void) { return FEWBITS_ABI; }
const char *fewbits_error(void) { return message; }
const char *fewbits_isas(void) { return NAMES + 1; }
const char *fewbits_best_isa(void) {
  const KernelTable *table = best();
  return table ? table->name : nullptr;
}

const char *fewbits_refuse_isa(const char *name) {
  if (!name) return "no name was given";
  for (const KernelTable *table : TABLES) {
    if (strcmp(table->name, name) == 0) return missing_for(name);
  }
  return "this library was built without it";
}

int32_t fewbits_use_isa(const char *name) {
  if (const char *reason = fewbits_refuse_isa(name)) return fail(FEWBITS_UNSUPPORTED, "%s", reason);
  for (const KernelTable *table : TABLES) {
    if (strcmp(table->name, name) == 0) chosen = table;
  }
  return FEWBITS_OK;
}
