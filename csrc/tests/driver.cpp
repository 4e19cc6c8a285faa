// The library, through api.h, against model.h: every format, odd shapes, one and three threads, on every
// instruction set this machine runs.
//
//   driver [--quick] [NAME…]   with names: exactly these have to run here, in this order, as under an
//   emulated
//                              processor; --quick: three threads alone
//   driver --list              the instruction sets that this machine runs

#include <stdio.h>

#include <signal.h>
#include <stdlib.h>

#include <algorithm>
#include <thread>

#include "check.h"
#include "encode.h"
#include "model.h"
#include "moments.h"

using namespace model;
using check::checks, check::expect, check::expect_ok, check::failures, check::place;

namespace {

// A sanitizer reports crashes better.
void name_crashes() {
#if !defined(__SANITIZE_ADDRESS__)
  for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) {
    signal(number, [](int caught) {
      fprintf(stderr, "%s: %s: signal %d\n", check::isa.c_str(), place.c_str(), caught);
      _Exit(1);
    });
  }
#endif
}

// In the place of the OpenMP runtime.
void in_parallel(void (*function)(void *), void *argument, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; i++) others.emplace_back(function, argument);
  function(argument);
  for (std::thread &other : others) other.join();
}

const char *const DTYPES[] = {"f32", "f16", "bf16"};
const int64_t SHAPES[][2] = {{1, 1},    {3, 5},   {16, 24}, {7, 130}, {33, 64}, {48, 200},
                             {2, 1031}, {6, 512}, {8, 284}, {0, 8},   {4, 0}};

std::string named(const char *what, const Kind &kind, int64_t rows, int64_t columns, int32_t dtype) {
  char text[200];
  snprintf(text, sizeof text, "%s %s [%lld, %lld] %s", what, kind.name, (long long)rows, (long long)columns,
           DTYPES[dtype]);
  return text;
}

// --- decoding ---------------------------------------------------------------------------------------

void expect_decoded(const Weight &weight, const std::vector<int64_t> &rows, int64_t first_column,
                    int64_t columns, int32_t dtype, const std::vector<uint8_t> &out, int64_t stride) {
  for (size_t i = 0; i < rows.size(); i++) {
    for (int64_t c = 0; c < columns; c++) {
      uint8_t wanted[4] = {};
      float value = weight.decode(rows[i], first_column + c);
      write(wanted, 0, dtype, value);
      const uint8_t *got = &out[(size_t)(((int64_t)i * stride + c) * item_bytes(dtype))];
      expect(memcmp(got, wanted, (size_t)item_bytes(dtype)) == 0, "decoded", read(got, 0, dtype), value);
    }
  }
}

void test_decode(const Kind &kind, int64_t rows, int64_t columns, int32_t dtype, int32_t threads,
                 Random &random) {
  Weight weight(kind, rows, columns, random);
  place = named("decode", kind, rows, columns, dtype);
  std::vector<int64_t> all(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; r++) all[(size_t)r] = r;
  int64_t bytes = item_bytes(dtype);
  std::vector<uint8_t> out((size_t)(rows * columns * bytes));
  expect_ok(fewbits_dequantize(&weight.w, nullptr, 0, rows, 0, columns, out.data(), rows * columns, columns,
                               dtype, threads),
            "all of it");
  expect_decoded(weight, all, 0, columns, dtype, out, columns);
  if (!rows || !columns) return;
  int64_t first = random.below(columns), count = 1 + random.below(columns - first),
          stride = count + random.below(3);
  std::vector<int64_t> list;
  for (int i = 0; i < 5; i++) list.push_back(random.below(rows));
  int64_t elements = 4 * stride + count;
  out.assign((size_t)(elements * bytes), 0);
  expect_ok(fewbits_dequantize(&weight.w, list.data(), 0, 5, first, count, out.data(), elements, stride,
                               dtype, threads),
            "some rows");
  expect_decoded(weight, list, first, count, dtype, out, stride);
}

// --- products ---------------------------------------------------------------------------------------

struct Product {
  fewbits_product p{};
  std::vector<uint8_t> x, y, bias;

  Product(int64_t m, int64_t rows, int64_t columns, int32_t dtype, int32_t threads, Random &random) {
    p.m = m, p.x_stride = columns + random.below(3), p.y_stride = rows + random.below(3);
    p.x_dtype = p.y_dtype = p.bias_dtype = dtype;
    p.threads = threads;
    x.resize((size_t)((m > 0 ? (m - 1) * p.x_stride + columns : 0) * item_bytes(dtype)));
    y.resize((size_t)((m > 0 ? (m - 1) * p.y_stride + rows : 0) * item_bytes(dtype)));
    bias.resize((size_t)(rows * item_bytes(dtype)));
    for (int64_t i = 0; i < m; i++) {
      for (int64_t k = 0; k < columns; k++) write(x.data(), i * p.x_stride + k, dtype, random.normal());
    }
    for (int64_t r = 0; r < rows; r++) write(bias.data(), r, dtype, random.normal());
    p.x = x.data(), p.y = y.data();
    if (random.below(2)) p.bias = bias.data();
  }
  float x_at(int64_t row, int64_t column) const {
    return read(x.data(), row * p.x_stride + column, p.x_dtype);
  }
  float y_at(int64_t row, int64_t column) const {
    return read(y.data(), row * p.y_stride + column, p.y_dtype);
  }
  float bias_at(int64_t column) const { return p.bias ? read(bias.data(), column, p.bias_dtype) : 0.0f; }
  // y may be rounded to its dtype, and be off by `error`.
  void expect_near(int64_t row, int64_t column, double wanted, double error, const char *what) const {
    double last = p.y_dtype == FEWBITS_F32 ? 1e-6 : p.y_dtype == FEWBITS_F16 ? 6e-4 : 4e-3;
    double got = y_at(row, column);
    expect(fabs(got - wanted) <= error + last * fabs(wanted) + 1e-6, what, got, wanted);
  }
};

// Largest magnitude that a product takes for a code, and all that of a weight: what rounding errors grow
// with.
double largest_value(const Weight &weight) {
  double most = 0;
  for (float value : weight.table) most = std::max(most, (double)fabsf(value));
  return weight.table.empty() ? 1 << weight.w.bits : most;
}

bool must_multiply(const Kind &kind, int64_t columns) {
  return kind.bits <= 4 && !kind.offset && kind.group_columns % 8 == 0 && (columns % 8 == 0 || !kind.flat) &&
         kind.group_rows <= 1 && columns;
}

void test_linear(const Kind &kind, int64_t m, int64_t rows, int64_t columns, int32_t dtype, int32_t threads,
                 Random &random) {
  Weight weight(kind, rows, columns, random);
  Product product(m, rows, columns, dtype, threads, random);
  place = named("linear", kind, rows, columns, dtype) + " times " + std::to_string(m) + " rows";
  int32_t status = fewbits_linear(&weight.w, &product.p);
  if (status == FEWBITS_UNSUPPORTED && !must_multiply(kind, columns)) return;
  expect_ok(status, "supported");
  // A table may be rounded to bfloat16 where x is.
  double part = dtype == FEWBITS_BF16 ? 4e-3 : 4e-6, most = largest_value(weight) * kind.unit;
  for (int64_t i = 0; i < m; i++) {
    for (int64_t r = 0; r < rows; r++) {
      double wanted = product.bias_at(r), size = fabs(wanted);
      for (int64_t k = 0; k < columns; k++) {
        wanted += (double)product.x_at(i, k) * weight.decode(r, k);
        size += fabs((double)product.x_at(i, k) * weight.scale(r, k)) * most;
      }
      product.expect_near(i, r, wanted, part * size, "y");
    }
  }
}

void test_linear_a8(const Kind &kind, int64_t m, int64_t rows, int64_t columns, int64_t group, int32_t dtype,
                    int32_t threads, Random &random) {
  Weight weight(kind, rows, columns, random);
  Product product(m, rows, columns, dtype, threads, random);
  place = named("linear in int8", kind, rows, columns, dtype) + " times " + std::to_string(m) + " rows";
  int32_t status = fewbits_linear_a8(&weight.w, &product.p, group);
  if (status == FEWBITS_UNSUPPORTED && !must_multiply(kind, columns)) return;
  expect_ok(status, "supported");
  double most = largest_value(weight) * kind.unit, table_error = kind.kind == FEWBITS_TABLE ? most / 126 : 0;
  int64_t width = group ? group : columns;
  for (int64_t i = 0; i < m; i++) {
    std::vector<double> absmax((size_t)columns);  // of x in the group of every column
    for (int64_t k = 0; k < columns; k++) {
      for (int64_t j = k / width * width; j < std::min(k / width * width + width, columns); j++)
        absmax[(size_t)k] = std::max(absmax[(size_t)k], fabs((double)product.x_at(i, j)));
    }
    for (int64_t r = 0; r < rows; r++) {
      double wanted = product.bias_at(r), error = 1e-5;
      for (int64_t k = 0; k < columns; k++) {
        double x = product.x_at(i, k), w = weight.decode(r, k), scale = fabs((double)weight.scale(r, k)),
               x_error = absmax[(size_t)k] / 253;
        wanted += x * w;
        error += (fabs(w) + table_error * scale) * x_error + fabs(x) * table_error * scale +
                 4e-6 * fabs(x) * most * scale;
      }
      product.expect_near(i, r, wanted, error, "y");
    }
  }
}

// LLM.int8() as its paper and src/fewbits/reference.py have it.
void test_linear_int8(int64_t m, int64_t rows, int64_t columns, float threshold, int32_t dtype,
                      int32_t threads, Random &random) {
  const Kind kind = {"int8:row",        8,     FEWBITS_SIGNED, FEWBITS_ROWS, false,     1, 0,
                     FEWBITS_SCALE_F32, false, false,          false,        1 / 127.0f};
  Weight weight(kind, rows, columns, random);
  Product product(m, rows, columns, dtype, threads, random);
  for (int64_t i = 0; i < m && columns; i += 2)  // outliers, in some rows only
    write(product.x.data(), i * product.p.x_stride + (i * 7 + 3) % columns, dtype, (i & 2 ? -8.0f : 6.0f));
  place = named("LLM.int8()", kind, rows, columns, dtype) + " times " + std::to_string(m) + " rows";
  int32_t status = fewbits_linear_int8(&weight.w, &product.p, threshold);
  if (!columns) {
    expect(status == FEWBITS_UNSUPPORTED, "refused without columns");
    return;
  }
  expect_ok(status, "supported");
  std::vector<bool> outlier((size_t)columns);
  for (int64_t i = 0; i < m; i++) {
    for (int64_t k = 0; k < columns; k++) {
      if (threshold > 0 && fabsf(product.x_at(i, k)) >= threshold) outlier[(size_t)k] = true;
    }
  }
  for (int64_t i = 0; i < m; i++) {
    float absmax = 0;
    for (int64_t k = 0; k < columns; k++) {
      float size = fabsf(product.x_at(i, k));
      if (!(threshold > 0 && size >= threshold)) absmax = std::max(absmax, size);
    }
    float inverse = 1.0f / std::max(absmax, 1e-38f * 127.0f) * 127.0f;
    for (int64_t r = 0; r < rows; r++) {
      int64_t sum = 0;
      double wanted = product.bias_at(r), size = fabs(wanted);
      float scale = read(weight.w.scale, r, FEWBITS_F32);
      for (int64_t k = 0; k < columns; k++) {
        int code = (int8_t)weight.code(r, k);
        float x = product.x_at(i, k);
        if (outlier[(size_t)k]) {
          uint8_t rounded[4] = {};
          write(rounded, 0, dtype, (float)code * scale * kind.unit);
          wanted += (double)x * read(rounded, 0, dtype);
          size += fabs((double)x * code * scale * kind.unit);
        } else {
          sum += (int64_t)nearbyintf(x * inverse) * code;
        }
      }
      double inner = (double)sum * absmax * scale / (127.0 * 127.0);
      product.expect_near(i, r, wanted + inner, 1e-6 * (size + fabs(inner)), "y");
    }
  }
}

// --- steps of optimizers ----------------------------------------------------------------------------

void test_update(int32_t rule, int32_t param_dtype, int32_t grad_dtype, int32_t threads, Random &random) {
  char text[100];
  snprintf(text, sizeof text, "update rule %d %s %s", rule, DTYPES[param_dtype], DTYPES[grad_dtype]);
  place = text;
  std::vector<Moments> tensors, wanted;
  for (int64_t count : {1, 255, 256, 257, 0, 17, 30000, 511})
    tensors.emplace_back(count, param_dtype, grad_dtype, random);
  wanted = tensors;
  for (int number = 0; number < 3; number++) {
    fewbits_step step = some_step(rule, threads, random);
    std::vector<fewbits_moments> list;
    for (Moments &tensor : tensors) list.push_back(tensor.m);
    expect_ok(fewbits_update(list.data(), (int64_t)list.size(), &step), "a step");
    for (size_t i = 0; i < tensors.size(); i++) {
      step_model(wanted[i], step);
      expect(tensors[i] == wanted[i], "elements", (double)tensors[i].m.count, number);
    }
  }
}

// --- all of it --------------------------------------------------------------------------------------

void test_isa(int32_t threads) {
  Random random(1);
  for (const Kind &kind : kinds()) {
    for (auto [rows, columns] : SHAPES) {
      for (int32_t dtype = 0; dtype < 3; dtype++) test_decode(kind, rows, columns, dtype, threads, random);
      int64_t m = 1 + random.below(4);
      for (int32_t dtype = 0; dtype < 3; dtype++) test_linear(kind, m, rows, columns, dtype, threads, random);
      test_linear_a8(kind, m, rows, columns, random.below(2) * 64, (int32_t)random.below(3), threads, random);
    }
  }
  for (const Coding &coding : codings()) {
    for (auto [rows, columns] : SHAPES) {
      for (int32_t dtype = 0; dtype < 3; dtype++) test_encode(coding, rows, columns, dtype, threads, random);
    }
  }
  for (int32_t rule = 0; rule < 3; rule++) {
    for (int32_t pair = 0; pair < 9; pair++) test_update(rule, pair / 3, pair % 3, threads, random);
  }
  for (int64_t m : {0, 1, 5, 8, 13, 30}) {  // few rows of x, and blocks of them
    for (int at : {0, 1, 2, 6, 8, 10, 12}) {
      const Kind &kind = kinds()[(size_t)at];
      test_linear(kind, m, 32, 264, (int32_t)random.below(3), threads, random);
      test_linear_a8(kind, m, 32, 264, 64 * random.below(2), (int32_t)random.below(3), threads, random);
    }
    for (auto [rows, columns] : {std::pair<int64_t, int64_t>{17, 70}, {3, 5}, {40, 256}, {1, 1}, {5, 0}}) {
      for (int32_t dtype = 0; dtype < 3; dtype++)
        test_linear_int8(m, rows, columns, random.below(2) ? 6.0f : 0.0f, dtype, threads, random);
    }
  }
}

}  // namespace

int main(int count, char **arguments) {
  name_crashes();
  fewbits_set_parallel(in_parallel);
  if (fewbits_abi() != FEWBITS_ABI) return fprintf(stderr, "another ABI\n"), 1;
  std::vector<std::string> wanted(arguments + 1, arguments + count), ran;
  auto option = [&](const char *name) {
    bool given = !wanted.empty() && wanted[0] == name;
    if (given) wanted.erase(wanted.begin());
    return given;
  };
  bool only_list = option("--list"), quick = option("--quick");
  std::string list = std::string(fewbits_isas()) + ",";
  for (size_t at = 0, end; (end = list.find(',', at)) != std::string::npos; at = end + 1) {
    std::string name = list.substr(at, end - at);
    const char *reason = fewbits_refuse_isa(name.c_str());
    if (only_list) {
      if (!reason) printf("%s\n", name.c_str());
      continue;
    }
    if (reason) {
      printf("%s: left out, %s\n", name.c_str(), reason);
      continue;
    }
    int before = checks;
    check::isa = name;
    expect_ok(fewbits_use_isa(name.c_str()), "use");
    for (int32_t threads : {3, 1}) {
      if (threads == 3 || !quick) test_isa(threads);
    }
    printf("%s: %d checks\n", name.c_str(), checks - before);
    ran.push_back(name);
  }
  if (only_list) return 0;
  if (ran.empty() || ran[0] != fewbits_best_isa()) return fprintf(stderr, "the best is not the first\n"), 1;
  if (!wanted.empty() && ran != wanted)
    return fprintf(stderr, "other instruction sets than the ones asked for ran\n"), 1;
  if (failures) return fprintf(stderr, "%d wrong\n", failures), 1;
  return 0;
}
