// Steps of optimizers whose moments are codes in blocks of 256: src/fewbits/moments.py to the bit.
//
// A block is decoded into the stack, updated and encoded again; parameters and gradients are read once. Each
// product and sum is rounded by itself, as the specification has it.

constexpr int64_t MOMENT_BLOCK = 256;
// Levels of the search whose thresholds lie in vectors; those of the others are gathered from memory.
constexpr int TABLE_LEVELS = LANES == 16 ? 7 : 5;
constexpr int LEVEL_TABLES = (1 << (TABLE_LEVELS > 4 ? TABLE_LEVELS - 4 : 0)) - 1 + 4;

// An entry of 16 · 2**DEPTH, that the lowest 4 + DEPTH bits of every lane point to.
template <int DEPTH> static inline F look_up_deep(const Table16 *tables, I index) {
  if constexpr (DEPTH == 0) {
    return look_up(*tables, index);
  } else {
    F low = look_up_deep<DEPTH - 1>(tables, index),
      high = look_up_deep<DEPTH - 1>(tables + (1 << (DEPTH - 1)), index);
    I bit = and_int(shift_left<27 - DEPTH>(index), set_int(1 << 30));  // 2.0 or 0.0, and never a subnormal
    return where_positive(as_float(bit), high, low);
  }
}

// What a value in the range of a table is rounded to: between neighbours, the upper one with a probability.
struct Rounding {
  const float *table, *heap;
  F lowest, highest;
  Table16 levels[LEVEL_TABLES];  // one each for the first four levels below the root, then 2, 4, …

  static inline Rounding make(const float *table, const float *heap) {
    Rounding r;
    r.table = table, r.heap = heap;
    r.lowest = set(table[0]), r.highest = set(table[255]);
    Table16 *to = r.levels;
    for (int level = 1; level < TABLE_LEVELS; level++)
      for (int64_t at = 0; at == 0 || at < 1 << level; at += 16) *to++ = make_table(heap + (1 << level) + at);
    return r;
  }

  template <int LEVEL> inline F threshold(I code) const {
    if constexpr (LEVEL == 0) return set(heap[1]);
    if constexpr (LEVEL > 0 && LEVEL <= 4) return look_up(levels[LEVEL - 1], code);
    if constexpr (LEVEL > 4 && LEVEL < TABLE_LEVELS)
      return look_up_deep<LEVEL - 4>(levels + 2 + (1 << (LEVEL - 4)), code);
    return gather(heap + (1 << LEVEL), code);
  }

  template <int LEVEL> inline void descend(F value, I &code, F &low, F &high) const {
    F asked = threshold<LEVEL>(code), above = sub(value, asked);
    code = count_greater(add_int(code, code), above, set(0.0f));
    low = where_positive(above, asked, low);
    high = where_positive(above, high, asked);
    if constexpr (LEVEL < 7) descend<LEVEL + 1>(value, code, low, high);
  }

  inline I operator()(F value, F noise) const {
    I code = set_int(0);
    F low = lowest, high = highest;
    descend<0>(value, code, low, high);
    return count_greater(code, sub(value, low), mul(sub(high, low), noise));
  }

  inline F decode(I code) const { return gather(table, code); }
};

// Two numbers in (0, 1) of 16 bits each, from a hash of a place and a seed.
struct Noise {
  F first, second;
};

static inline I xor_int(I a, I b) { return sub_int(or_int(a, b), and_int(a, b)); }

static inline Noise noise_at(I place, int32_t seed) {
  I word = add_int(place, set_int(seed));
  word = mul_int(xor_int(word, shift_right<16>(word)), set_int(0x7feb352d));
  word = mul_int(xor_int(word, shift_right<15>(word)), set_int((int32_t)0x846ca68bu));
  word = xor_int(word, shift_right<16>(word));
  const F scale = set(0x1p-16f), half = set(0x1p-17f);
  return {add(mul(to_float(shift_right<16>(word)), scale), half),
          add(mul(to_float(and_int(word, set_int(0xffff))), scale), half)};
}

// --- 16-bit and short blocks ------------------------------------------------------------------------

template <int DTYPE> static inline void widen_as(const void *values, int64_t count, float *to) {
  auto *from = (const typename Input<DTYPE>::Type *)values;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, Input<DTYPE>::get(from + i));
  if (i < count) store(to + i, get_few<DTYPE>(from + i, count - i)), i += LANES;
  for (; i < MOMENT_BLOCK; i += LANES) store(to + i, set(0.0f));
}

static inline void widen(const void *values, int32_t dtype, int64_t count, float *to) {
  if (dtype == FEWBITS_F32) return widen_as<FEWBITS_F32>(values, count, to);
  if (dtype == FEWBITS_F16) return widen_as<FEWBITS_F16>(values, count, to);
  widen_as<FEWBITS_BF16>(values, count, to);
}

template <int DTYPE> static inline void narrow_as(const float *from, int64_t count, void *values) {
  using Type = typename Output<DTYPE>::Type;
  Type *to = (Type *)values, last[LANES];
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) Output<DTYPE>::put(to + i, load(from + i));
  if (i == count) return;
  Output<DTYPE>::put(last, load(from + i));
  for (int64_t j = i; j < count; j++) to[j] = last[j - i];
}

static inline void narrow(const float *from, int32_t dtype, int64_t count, void *values) {
  if (dtype == FEWBITS_F32) return narrow_as<FEWBITS_F32>(from, count, values);
  if (dtype == FEWBITS_F16) return narrow_as<FEWBITS_F16>(from, count, values);
  narrow_as<FEWBITS_BF16>(from, count, values);
}

// --- blocks -----------------------------------------------------------------------------------------

struct Elements {
  float param[MOMENT_BLOCK], grad[MOMENT_BLOCK], first[MOMENT_BLOCK], second[MOMENT_BLOCK];
};

static inline void decode_moment(const Rounding &rounding, int32_t zero, const uint8_t *codes, int64_t count,
                                 float scale, float *to) {
  uint8_t padded[MOMENT_BLOCK];
  if (count < MOMENT_BLOCK) {
    __builtin_memset(padded, zero, MOMENT_BLOCK);
    for (int64_t i = 0; i < count; i++) padded[i] = codes[i];
    codes = padded;
  }
  F factor = set(scale);
  for (int64_t i = 0; i < MOMENT_BLOCK; i += LANES)
    store(to + i, mul(rounding.decode(load_u8(codes + i)), factor));
}

// `positive`: values above 0 never get the lowest code.
template <bool SECOND>
static inline void encode_moment(const Rounding &rounding, const float *values, int64_t count, int32_t place,
                                 int32_t seed, uint8_t *codes, float *scale) {
  I top = set_int(0);
  for (int64_t i = 0; i < MOMENT_BLOCK; i += LANES) top = max_int(top, bits(abs(load(values + i))));
  int32_t lanes[LANES], most = 0;
  store_int(lanes, top);
  for (int32_t lane : lanes) most = lane > most ? lane : most;
  float found;
  __builtin_memcpy(&found, &most, 4);
  *scale = found;
  F divisor = where_positive(set(found), set(found), set(1.0f));
  int32_t steps[LANES];
  for (int k = 0; k < LANES; k++) steps[k] = k;
  I places = add_int(load_int(steps), set_int(place));
  uint8_t made[MOMENT_BLOCK];
  for (int64_t i = 0; i < MOMENT_BLOCK; i += LANES) {
    F value = load(values + i);
    Noise noise = noise_at(add_int(places, set_int((int32_t)i)), seed);
    I code = rounding(div(value, divisor), SECOND ? noise.second : noise.first);
    if (SECOND) code = max_int(code, count_greater(set_int(0), value, set(0.0f)));
    store_u8(made + i, code);
  }
  if (count == MOMENT_BLOCK) {
    __builtin_memcpy(codes, made, MOMENT_BLOCK);
  } else {
    for (int64_t i = 0; i < count; i++) codes[i] = made[i];
  }
}

static inline void step_adam(const fewbits_step &s, Elements &b) {
  const F limit = set(s.limit), below = set(-s.limit);
  for (int64_t i = 0; i < MOMENT_BLOCK; i += LANES) {
    F grad = load(b.grad + i);
    F mean = add(mul(load(b.first + i), set(s.beta1)), mul(grad, set(s.take1)));
    F square = add(mul(load(b.second + i), set(s.beta2)), mul(mul(grad, set(s.take2)), grad));
    F root = add(mul(sqrt(square), set(s.root_factor)), set(s.eps));
    F direction = max(below, min(limit, div(mean, root)));  // in this order NaN passes
    store(b.first + i, mean), store(b.second + i, square);
    store(b.param + i, sub(mul(load(b.param + i), set(s.shrink)), mul(direction, set(s.rate))));
  }
}

static inline void step_lion(const fewbits_step &s, Elements &b) {
  for (int64_t i = 0; i < MOMENT_BLOCK; i += LANES) {
    F grad = load(b.grad + i), mean = load(b.first + i);
    F sum = add(mul(mean, set(s.beta1)), mul(grad, set(s.take1)));
    F sign = where_positive(sum, set(1.0f), where_positive(sub(set(0.0f), sum), set(-1.0f), set(0.0f)));
    store(b.param + i, sub(mul(load(b.param + i), set(s.shrink)), mul(sign, set(s.rate))));
    store(b.first + i, add(mul(mean, set(s.beta2)), mul(grad, set(s.take2))));
  }
}

static inline void step_sgd(const fewbits_step &s, Elements &b) {
  for (int64_t i = 0; i < MOMENT_BLOCK; i += LANES) {
    F param = load(b.param + i), grad = add(load(b.grad + i), mul(param, set(s.decay)));
    F momentum = add(mul(load(b.first + i), set(s.beta1)), grad);
    store(b.first + i, momentum);
    store(b.param + i, sub(param, mul(momentum, set(s.rate))));
  }
}

static inline void update_block(const UpdateTask &task, const Rounding &first, const Rounding &second,
                                const fewbits_moments &t, int64_t block) {
  const fewbits_step &step = *task.step;
  const int64_t at = block * MOMENT_BLOCK;
  const int64_t count = t.count - at < MOMENT_BLOCK ? t.count - at : MOMENT_BLOCK;
  const int64_t param_bytes = t.param_dtype == FEWBITS_F32 ? 4 : 2;
  uint8_t *param = (uint8_t *)t.param + at * param_bytes;
  Elements b;
  widen(param, t.param_dtype, count, b.param);
  widen((const uint8_t *)t.grad + at * (t.grad_dtype == FEWBITS_F32 ? 4 : 2), t.grad_dtype, count, b.grad);
  decode_moment(first, task.first_zero, t.first + at, count, t.first_scale[block], b.first);
  const bool adam = step.rule == FEWBITS_ADAM;
  if (adam) decode_moment(second, task.second_zero, t.second + at, count, t.second_scale[block], b.second);
  if (adam) step_adam(step, b);
  if (step.rule == FEWBITS_LION) step_lion(step, b);
  if (step.rule == FEWBITS_SGD) step_sgd(step, b);
  narrow(b.param, t.param_dtype, count, param);
  const int32_t place = (int32_t)(uint32_t)at, seed = (int32_t)step.seed;
  encode_moment<false>(first, b.first, count, place, seed, t.first + at, t.first_scale + block);
  if (adam) encode_moment<true>(second, b.second, count, place, seed, t.second + at, t.second_scale + block);
}

static void update_moments(const void *update_task, const Piece &piece) {
  const UpdateTask &task = *(const UpdateTask *)update_task;
  const Rounding first = Rounding::make(task.step->first_table, task.first_heap);
  const bool adam = task.step->rule == FEWBITS_ADAM;
  const Rounding second =
      Rounding::make(adam ? task.step->second_table : task.step->first_table, adam ? task.second_heap : task.first_heap);
  // The tensor that the first block is in.
  int64_t low = 0, high = task.tensors;
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    if (task.first_block[middle] <= piece.begin) low = middle;
    else high = middle;
  }
  for (int64_t item = piece.begin; item < piece.end; item++) {
    while (item >= task.first_block[low + 1]) low++;
    update_block(task, first, second, task.list[low], item - task.first_block[low]);
  }
}
