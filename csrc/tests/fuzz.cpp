// Calls of the API with arguments that are right but for some: every pointer leads to a block of exactly the
// bytes that are claimed for it, so that a sanitizer sees whatever is read or written beside it.
//
// With libFuzzer (clang, -fsanitize=fuzzer) or with its own main: fuzz [seconds] [seed].

#include <stdlib.h>

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "encode.h"
#include "model.h"
#include "moments.h"

using namespace model;

namespace {

int64_t accepted = 0;  // calls that were not refused

constexpr int64_t MOST = 1 << 20;  // bytes of a block; a larger one is passed as null

// Choices, taken from the input; zeros when it is used up.
struct Input {
  const uint8_t *data;
  size_t size;
  uint8_t byte() { return size ? (size--, *data++) : 0; }
  int64_t below(int64_t limit) {
    uint64_t value = byte();
    if (limit > 256) value = value << 8 | byte();
    return (int64_t)(value % (uint64_t)limit);
  }
  bool once_in(int64_t times) { return below(times) == times - 1; }
};

// Sizes where mistakes are likely.
int64_t strange(Input &in) {
  const int64_t sizes[] = {-1,
                           0,
                           1,
                           2,
                           3,
                           7,
                           8,
                           9,
                           15,
                           16,
                           17,
                           63,
                           64,
                           65,
                           128,
                           255,
                           256,
                           4096,
                           65536,
                           65537,
                           (1ll << 31) - 1,
                           1ll << 31,
                           (1ll << 31) + 1,
                           1ll << 32,
                           (1ll << 48) + 1,
                           (1ll << 62) + 1,
                           INT64_MAX,
                           INT64_MIN};
  int64_t count = (int64_t)(sizeof sizes / sizeof *sizes);
  return in.once_in(4) ? in.below(300) : sizes[in.below(count)];
}

void change(Input &in, int64_t &value) {
  value = in.once_in(2) || value > MOST || value < -MOST ? strange(in) : value + in.below(5) - 2;
}
void change(Input &in, int32_t &value) {
  value = in.once_in(4) ? (int32_t)strange(in) : (int32_t)in.below(10) - 1;
}
void change(Input &in, float &value) {
  const float values[] = {0.0f, -1.0f, 1e-40f, 1e30f, 3e38f, (float)INFINITY, (float)NAN};
  value = values[in.below(7)];
}

// Memory of one call.
struct Blocks {
  std::vector<std::unique_ptr<uint8_t[]>> all;
  Random random{1};

  // Null for sizes that nobody has; sometimes on an odd address. With random contents, mostly small floats.
  void *of(Input &in, int64_t bytes) {
    if (bytes < 0 || bytes > MOST) return nullptr;
    int64_t shift = in.once_in(32) ? 1 + in.below(3) : 0;
    all.emplace_back(new uint8_t[(size_t)(bytes + shift)]);
    uint8_t *block = all.back().get() + shift;
    bool wild = in.once_in(4);
    for (int64_t i = 0; i < bytes; i++) block[i] = (uint8_t)random.next();
    for (int64_t i = 0; i + 4 <= bytes && !wild; i += 4) {
      float value = random.uniform();
      memcpy(block + i, &value, 4);
    }
    return block;
  }
  template <class T> T *array(Input &in, int64_t count) {
    return count < 0 || count > MOST ? nullptr : static_cast<T *>(of(in, count * (int64_t)sizeof(T)));
  }
};

int64_t product_of(int64_t a, int64_t b) {  // MOST + 1 where it is larger, or makes no sense
  if (a < 0 || b < 0) return MOST + 1;
  return a && b > MOST / a ? MOST + 1 : a * b;
}

// Elements of a matrix whose rows begin `stride` apart.
int64_t spread(int64_t rows, int64_t stride, int64_t columns) {
  if (rows <= 0 || columns <= 0) return 0;
  int64_t before = product_of(rows - 1, stride);
  return before > MOST || columns > MOST ? MOST + 1 : before + columns;
}

// --- weights ----------------------------------------------------------------------------------------

void change_weight(Input &in, fewbits_weight &w, Blocks &blocks) {
  switch (in.below(24)) {
    case 0:
      return change(in, w.rows);
    case 1:
      return change(in, w.columns);
    case 2:
      return change(in, w.group_rows);
    case 3:
      return change(in, w.group_columns);
    case 4:
      return change(in, w.kind);
    case 5:
      return change(in, w.layout);
    case 6:
      return change(in, w.high_first);
    case 7:
      return change(in, w.flat_groups);
    case 8:
      return change(in, w.scale_type);
    case 9:
      return change(in, w.middle);
    case 10:
      return change(in, w.unit);
    case 11:
      w.codes = nullptr;
      return;
    case 12:
      w.table = nullptr;
      return;
    case 13:
      w.scale = nullptr;
      return;
    case 14:
      w.zero = nullptr;
      return;
    case 15:
      w.offset = w.offset ? nullptr : static_cast<float *>(blocks.of(in, 4));
      return;
    case 16:
      change(in, w.bits);
      if (w.table) w.table = blocks.array<float>(in, w.bits > 0 && w.bits < 9 ? 1 << w.bits : 1);
      return;
    case 17:
      change(in, w.codes_bytes);
      w.codes = blocks.array<uint8_t>(in, w.codes_bytes);
      return;
    case 18:
      change(in, w.scale_bytes);
      w.scale = blocks.of(in, w.scale_bytes);
      return;
    case 19:
      change(in, w.zero_bytes);
      w.zero = blocks.array<uint8_t>(in, w.zero_bytes);
      return;
    case 20:
      w.kind = FEWBITS_TABLE;
      w.table = blocks.array<float>(in, 256);
      return;
    case 21:
      if (w.nested && in.once_in(2))
        return change_weight(in, const_cast<fewbits_weight &>(*w.nested), blocks);
      w.nested = in.once_in(2) ? &w : nullptr;  // its own scales
      return;
    default:
      return;
  }
}

struct FuzzedWeight {
  Random random;
  Weight weight;
  FuzzedWeight(Input &in, Blocks &blocks, const Kind &kind)
      : random((uint64_t)in.below(65536)), weight(kind, in.below(40), in.below(300), random) {
    for (int64_t i = in.below(4); i > 0 && !in.once_in(3); i--) change_weight(in, weight.w, blocks);
  }
};

const Kind &any_kind(Input &in) { return kinds()[(size_t)in.below((int64_t)kinds().size())]; }

int32_t call_dequantize(Input &in, Blocks &blocks) {
  FuzzedWeight fuzzed(in, blocks, any_kind(in));
  const fewbits_weight &w = fuzzed.weight.w;
  int64_t first_row = 0, rows = w.rows, first_column = 0, columns = w.columns;
  if (in.once_in(2) && rows > 0) first_row = in.below(256) % rows, rows -= first_row;
  if (in.once_in(2) && columns > 0) first_column = in.below(256) % columns, columns -= first_column;
  if (in.once_in(8)) change(in, in.once_in(2) ? first_row : rows);
  if (in.once_in(8)) change(in, in.once_in(2) ? first_column : columns);
  int32_t dtype = (int32_t)in.below(3), threads = 1 + (int32_t)in.below(3);
  if (in.once_in(16)) change(in, dtype);
  if (in.once_in(16)) change(in, threads);
  const int64_t *list = nullptr;
  if (in.once_in(4)) {
    int64_t *made = blocks.array<int64_t>(in, rows);
    for (int64_t i = 0; made && i < rows; i++) {
      int64_t row = w.rows > 0 ? in.below(256) % w.rows : 0;
      if (in.once_in(64)) row = strange(in);
      memcpy(made + i, &row, 8);
    }
    list = made;
  }
  int64_t stride = columns, elements = product_of(rows, columns);
  if (in.once_in(4)) change(in, stride);
  if (stride > 0) elements = spread(rows, stride, columns);
  if (in.once_in(8)) change(in, elements);
  void *out = blocks.of(in, product_of(elements, item_bytes(dtype)));
  return fewbits_dequantize(&w, list, first_row, rows, first_column, columns, out, elements, stride, dtype,
                            threads);
}

// --- products ---------------------------------------------------------------------------------------

int32_t call_linear(Input &in, Blocks &blocks) {
  static const Kind int8 = {"int8:row",        8,     FEWBITS_SIGNED, FEWBITS_ROWS, false,     1, 0,
                            FEWBITS_SCALE_F32, false, false,          false,        1 / 127.0f};
  int64_t which = in.below(3);
  FuzzedWeight fuzzed(in, blocks, which == 2 ? int8 : any_kind(in));
  const fewbits_weight &w = fuzzed.weight.w;
  fewbits_product p{};
  p.m = in.below(20), p.x_stride = w.columns, p.y_stride = w.rows, p.threads = 1 + (int32_t)in.below(3);
  p.x_dtype = (int32_t)in.below(3), p.y_dtype = (int32_t)in.below(3), p.bias_dtype = (int32_t)in.below(3);
  int64_t changes = in.once_in(2) ? in.below(3) : 0;
  for (int64_t i = 0; i < changes; i++) {
    switch (in.below(7)) {
      case 0:
        change(in, p.m);
        break;
      case 1:
        change(in, p.x_stride);
        break;
      case 2:
        change(in, p.y_stride);
        break;
      case 3:
        change(in, p.threads);
        break;
      case 4:
        change(in, p.x_dtype);
        break;
      case 5:
        change(in, p.y_dtype);
        break;
      default:
        change(in, p.bias_dtype);
        break;
    }
  }
  auto matrix = [&](int64_t stride, int64_t columns, int32_t dtype) {
    return blocks.of(in, product_of(spread(p.m, stride, columns), item_bytes(dtype)));
  };
  p.x = matrix(p.x_stride, w.columns, p.x_dtype);
  p.y = matrix(p.y_stride, w.rows, p.y_dtype);
  if (in.once_in(2)) p.bias = blocks.of(in, product_of(w.rows, item_bytes(p.bias_dtype)));
  if (which == 0) return fewbits_linear(&w, &p);
  if (which == 1) return fewbits_linear_a8(&w, &p, in.once_in(4) ? strange(in) : 32 * in.below(5));
  float threshold = in.once_in(2) ? 0.0f : 0.75f;
  if (in.once_in(16)) change(in, threshold);
  return fewbits_linear_int8(&w, &p, threshold);
}

// --- quantization -----------------------------------------------------------------------------------

void change_encoding(Input &in, Encoding &encoding, Blocks &blocks) {
  fewbits_encoding &e = encoding.e;
  int32_t *const numbers[] = {&e.bits,       &e.kind,          &e.low,      &e.high,       &e.middle,
                              &e.layout,     &e.flat_groups,   &e.sign_bit, &e.reciprocal, &e.stores_absmax,
                              &e.scale_type, &e.peak_exponent, &e.has_zero};
  int64_t *const sizes[] = {&e.rows, &e.columns, &e.group_rows, &e.group_columns};
  int64_t what = in.below(22);
  if (what < 13) return change(in, *numbers[what]);
  if (what < 17) return change(in, *sizes[what - 13]);
  if (what == 17) return change(in, e.peak);
  if (what == 18) return change(in, e.limit);
  if (what == 19) {
    change(in, e.threshold_count);
    e.thresholds = blocks.array<float>(in, e.threshold_count);
    e.order = nullptr;
  } else if (what == 20) {
    e.order = blocks.array<uint8_t>(
        in, e.threshold_count < 0 || e.threshold_count > MOST ? 0 : e.threshold_count + 1);
  } else {
    e.thresholds = nullptr;
  }
}

// The length that api.h gives a part, or about that.
int64_t claimed(Input &in, size_t bytes) {
  int64_t value = (int64_t)bytes;
  if (in.once_in(16)) change(in, value);
  return value;
}

int32_t call_quantize(Input &in, Blocks &blocks) {
  Random random((uint64_t)in.below(65536));
  const Coding &coding = codings()[(size_t)in.below((int64_t)codings().size())];
  Encoding encoding(coding, in.below(40), in.below(300), random);
  for (int64_t i = in.below(4); i > 0 && !in.once_in(3); i--) change_encoding(in, encoding, blocks);
  const fewbits_encoding &e = encoding.e;
  int64_t count = product_of(e.rows, e.columns);
  // Groups that the rules of api.h speak of, as far as these sizes make sense.
  bool sane = count <= MOST && e.group_rows > 0 && e.group_columns > 0 && e.bits > 0 && e.bits < 9 &&
              e.rows < MOST && e.columns < MOST;
  sane = sane && e.group_rows < 1ll << 40 && e.group_columns < 1ll << 40;
  static Random none(1);
  static const Encoding small(codings()[0], 1, 1, none);
  Coded sizes(sane ? encoding : small);
  int32_t dtype = (int32_t)in.below(3), threads = 1 + (int32_t)in.below(3);
  if (in.once_in(16)) change(in, dtype);
  int64_t values = in.once_in(16) ? strange(in) : count;
  const void *from = blocks.of(in, product_of(values, item_bytes(dtype)));
  bool given = in.once_in(4);
  int64_t scales = given ? claimed(in, sizes.used.size()) : 0,
          scale_bytes = given ? 0 : claimed(in, sizes.scale.size());
  int64_t zero_bytes = claimed(in, sizes.zero.size()), codes_bytes = claimed(in, sizes.codes.size());
  const float *given_scale = given ? blocks.array<float>(in, scales) : nullptr;
  void *scale = given ? nullptr : blocks.of(in, scale_bytes);
  uint8_t *zero = zero_bytes || in.once_in(2) ? blocks.array<uint8_t>(in, zero_bytes) : nullptr;
  uint8_t *codes = in.once_in(8) ? nullptr : blocks.array<uint8_t>(in, codes_bytes);
  return fewbits_quantize(&e, from, values, dtype, given_scale, scales, scale, scale_bytes, zero, zero_bytes,
                          codes, codes_bytes, threads);
}

int32_t call_mean(Input &in, Blocks &blocks) {
  int32_t dtype = in.once_in(2) ? 0 : (int32_t)in.below(5);
  int64_t count = in.once_in(8) ? strange(in) : in.below(400);
  const void *values = blocks.of(in, product_of(count, dtype == 0 ? 4 : dtype == 3 ? 8 : 2));
  float mean = 0;
  return fewbits_mean(values, count, dtype, in.once_in(16) ? nullptr : &mean);
}

int32_t call_update(Input &in, Blocks &blocks) {
  Random random((uint64_t)in.below(65536));
  fewbits_step step = some_step((int32_t)in.below(3), 1 + (int32_t)in.below(3), random);
  if (in.once_in(16)) change(in, step.rule);
  if (in.once_in(16)) change(in, step.threads);
  if (in.once_in(8)) step.first_table = blocks.array<float>(in, 256);
  if (in.once_in(8)) step.second_table = blocks.array<float>(in, 256);
  std::vector<fewbits_moments> list((size_t)in.below(4));
  for (fewbits_moments &m : list) {
    m.count = in.once_in(8) ? strange(in) : in.below(700);
    m.param_dtype = (int32_t)in.below(3), m.grad_dtype = (int32_t)in.below(3);
    if (in.once_in(16)) change(in, m.param_dtype);
    if (in.once_in(16)) change(in, m.grad_dtype);
    int64_t scales = m.count > 0 && m.count < MOST ? (m.count + 255) / 256 : 0;
    m.param = blocks.of(in, product_of(m.count, item_bytes(m.param_dtype)));
    m.grad = blocks.of(in, product_of(m.count, item_bytes(m.grad_dtype)));
    m.first = blocks.array<uint8_t>(in, m.count), m.second = blocks.array<uint8_t>(in, m.count);
    m.first_scale = blocks.array<float>(in, scales), m.second_scale = blocks.array<float>(in, scales);
    // A length that is claimed for less memory than it takes would be the caller's mistake.
    if (m.count > MOST / 4) m.param = nullptr;
  }
  return fewbits_update(list.empty() ? nullptr : list.data(), (int64_t)list.size(), &step);
}

void use_some_isa(Input &in) {
  static const std::vector<std::string> usable = [] {
    std::vector<std::string> names;
    std::string list = std::string(fewbits_isas()) + ",";
    for (size_t at = 0, end; (end = list.find(',', at)) != std::string::npos; at = end + 1) {
      std::string name = list.substr(at, end - at);
      if (!fewbits_refuse_isa(name.c_str())) names.push_back(name);
    }
    return names;
  }();
  fewbits_use_isa(usable[(size_t)in.below((int64_t)usable.size())].c_str());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  Input in{data, size};
  Blocks blocks;
  blocks.random = Random((uint64_t)in.below(65536));
  use_some_isa(in);
  int32_t (*const calls[])(Input &, Blocks &) = {call_dequantize, call_linear, call_quantize, call_mean,
                                                  call_update};
  int64_t which = in.below(16);
  int32_t status = calls[which < 4 ? 0 : which < 8 ? 1 : which < 12 ? 2 : which < 13 ? 3 : 4](in, blocks);
  accepted += status == FEWBITS_OK;
  // An answer that api.h knows, with a reason where it is not "done".
  if (status < FEWBITS_OK || status > FEWBITS_UNSUPPORTED || (status != FEWBITS_OK && !*fewbits_error()))
    abort();
  return 0;
}

#ifdef FEWBITS_FUZZ_MAIN
int main(int count, char **arguments) {
  double seconds = count > 1 ? atof(arguments[1]) : 10;
  uint64_t seed = count > 2 ? strtoull(arguments[2], nullptr, 10) : 1;
  auto start = std::chrono::steady_clock::now();
  auto passed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  int64_t calls = 0;
  for (Random random(seed); passed() < seconds; calls++) {
    std::vector<uint8_t> bytes((size_t)random.below(600));
    for (uint8_t &byte : bytes) byte = (uint8_t)random.next();
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  printf("%lld calls, %lld of them accepted\n", (long long)calls, (long long)accepted);
  return 0;
}
#endif
