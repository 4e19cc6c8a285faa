// Steps of optimizers, one element at a time: the model for fewbits_update.
#pragma once

#include <math.h>

#include <string>
#include <vector>

#include "model.h"

namespace model {

// Tables of the shape that dynamic maps have: many values near 1, few near 0.
inline std::vector<float> moment_table(bool is_signed) {
  std::vector<float> table;
  int count = is_signed ? 128 : 255;
  for (int i = 0; i <= count; i++) table.push_back(powf((float)i / (float)count, 6));
  if (is_signed) {
    for (int i = 1; i < 128; i++) table.insert(table.begin(), -table[(size_t)(2 * i - 1)]);
  }
  return table;
}

// A parameter with all of its parts.
struct Moments {
  fewbits_moments m{};
  std::vector<uint8_t> param, grad, first, second;
  std::vector<float> first_scale, second_scale;

  Moments(int64_t count, int32_t param_dtype, int32_t grad_dtype, Random &random) {
    m.count = count, m.param_dtype = param_dtype, m.grad_dtype = grad_dtype;
    param.resize((size_t)(count * item_bytes(param_dtype)));
    grad.resize((size_t)(count * item_bytes(grad_dtype)));
    first.resize((size_t)count), second.resize((size_t)count);
    size_t blocks = (size_t)((count + 255) / 256);
    first_scale.resize(blocks), second_scale.resize(blocks);
    for (int64_t i = 0; i < count; i++) {
      write(param.data(), i, param_dtype, random.normal());
      float size = powf(10.0f, (float)(random.below(9) - 6));
      write(grad.data(), i, grad_dtype, random.below(8) ? random.normal() * size : 0.0f);
      first[(size_t)i] = (uint8_t)random.below(256), second[(size_t)i] = (uint8_t)random.below(256);
    }
    for (float &scale : first_scale) scale = random.below(5) ? fabsf(random.normal()) : 0;
    for (float &scale : second_scale) scale = random.below(5) ? fabsf(random.normal()) : 0;
    point();
  }
  Moments(const Moments &other)
      : m(other.m), param(other.param), grad(other.grad), first(other.first), second(other.second),
        first_scale(other.first_scale), second_scale(other.second_scale) {
    point();
  }
  Moments &operator=(const Moments &other) {
    m = other.m, param = other.param, grad = other.grad, first = other.first, second = other.second;
    first_scale = other.first_scale, second_scale = other.second_scale;
    point();
    return *this;
  }
  void point() {
    m.param = param.data(), m.grad = grad.data();
    m.first = first.data(), m.second = second.data();
    m.first_scale = first_scale.data(), m.second_scale = second_scale.data();
  }
  bool operator==(const Moments &other) const {
    return param == other.param && first == other.first && second == other.second &&
           first_scale == other.first_scale && second_scale == other.second_scale;
  }
};

inline uint8_t round_moment(float value, float scale, const float *table, float noise, bool second) {
  float x = value / (scale > 0 ? scale : 1.0f);
  int below = 0;
  while (below < 254 && table[below + 1] < x) below++;
  int code = below + (x - table[below] > (table[below + 1] - table[below]) * noise);
  return (uint8_t)(second && value > 0 && code == 0 ? 1 : code);
}

// One step, in place.
inline void step_model(Moments &t, const fewbits_step &s) {
  const bool adam = s.rule == FEWBITS_ADAM;
  for (int64_t start = 0; start < t.m.count; start += 256) {
    const int64_t end = start + 256 < t.m.count ? start + 256 : t.m.count;
    const size_t block = (size_t)(start / 256);
    std::vector<float> first, second;
    float first_top = 0, second_top = 0;
    for (int64_t i = start; i < end; i++) {
      float p = read(t.param.data(), i, t.m.param_dtype), g = read(t.grad.data(), i, t.m.grad_dtype);
      float m = s.first_table[t.first[(size_t)i]] * t.first_scale[block], v = 0;
      if (s.rule == FEWBITS_ADAM) {
        v = s.second_table[t.second[(size_t)i]] * t.second_scale[block];
        m = m * s.beta1 + g * s.take1;
        v = v * s.beta2 + g * s.take2 * g;
        float direction = m / (sqrtf(v) * s.root_factor + s.eps);
        direction = direction > s.limit ? s.limit : direction < -s.limit ? -s.limit : direction;
        p = p * s.shrink - direction * s.rate;
      } else if (s.rule == FEWBITS_LION) {
        float sum = m * s.beta1 + g * s.take1;
        p = p * s.shrink - (float)((sum > 0) - (sum < 0)) * s.rate;
        m = m * s.beta2 + g * s.take2;
      } else {
        m = m * s.beta1 + (g + p * s.decay);
        p = p - m * s.rate;
      }
      write(t.param.data(), i, t.m.param_dtype, p);
      first.push_back(m), second.push_back(v);
      first_top = fabsf(m) > first_top ? fabsf(m) : first_top;
      second_top = v > second_top ? v : second_top;
    }
    t.first_scale[block] = first_top;
    if (adam) t.second_scale[block] = second_top;
    for (int64_t i = start; i < end; i++) {
      uint32_t word = (uint32_t)i + s.seed;
      word = (word ^ word >> 16) * 0x7feb352du;
      word = (word ^ word >> 15) * 0x846ca68bu;
      word ^= word >> 16;
      float one = (float)(word >> 16) * 0x1p-16f + 0x1p-17f, other = (float)(word & 0xffff) * 0x1p-16f + 0x1p-17f;
      size_t at = (size_t)(i - start);
      t.first[(size_t)i] = round_moment(first[at], first_top, s.first_table, one, false);
      if (adam) t.second[(size_t)i] = round_moment(second[at], second_top, s.second_table, other, true);
    }
  }
}

inline fewbits_step some_step(int32_t rule, int32_t threads, Random &random) {
  static const std::vector<float> first = moment_table(true), second = moment_table(false);
  fewbits_step s{};
  s.first_table = first.data(), s.second_table = second.data();
  s.beta1 = 0.9f, s.take1 = 0.1f, s.beta2 = 0.99f, s.take2 = 0.01f;
  s.eps = 1e-8f, s.root_factor = 1.5f, s.limit = 3.0f, s.rate = 0.01f, s.shrink = 0.999f, s.decay = 0.1f;
  s.seed = (uint32_t)random.next(), s.rule = rule, s.threads = threads;
  return s;
}

}  // namespace model
