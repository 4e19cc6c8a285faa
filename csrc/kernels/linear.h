// y = x · decode(W)ᵀ + bias for codes of up to 4 bits, on tiles (tile.h).
//
// A unit is a run of columns of a row with one scale. Within it codes are looked up in a table and multiplied
// with x; the sum is multiplied with the scale once, in float32:
//
//   y[row] = Σ over units of scale · (Σ table[code] · x - zero · Σ x)
//
// A Product says in which numbers the inner sum is taken: float32 (any x), 16 bit (bfloat16 x, table rounded
// to bfloat16), int8 (x quantized). A strip of one or two vectors of rows of W is multiplied with up to X_ROWS
// rows of x at a time: as many as there are registers for sums, so that every value that is loaded serves several
// products.
constexpr int MOST_STRIP = 2;
constexpr int X_ROWS = LANES == 16 ? 12 : 4;

#define UNROLL _Pragma("GCC unroll 16")

// What a product does. An operand is what one step multiplies a vector of weights with, ELEMENTS values of x;
// `nibble` says which codes of a word (counted from the lowest bits) they belong to, and `place` which codes of
// LANES words, where columns lie in the lanes (rows.h).
struct FloatProduct {
  using Sum = F;
  using Raw = I;
  using Decoded = F;
  using Operand = float;
  using Tables = Table16;
  static constexpr int STRIP = 2, OPERANDS = 8, ELEMENTS = 1;
  static constexpr int nibble(int operand, int) { return operand; }
  static constexpr int place(int operand, int, int lane) { return CHUNK * lane + operand; }
  static inline Tables tables(const float *values) { return make_table(values); }
  static inline Raw fetch(const uint8_t *codes) { return load_int(codes); }
  template <int OPERAND>
  static inline Decoded decode(Raw raw, const Tables &tables) {
    return look_up(tables, shift_right<4 * OPERAND>(raw));
  }
  static inline Sum start(const int32_t *) { return set(0.0f); }
  static inline Sum start_lanes(const int32_t *) { return set(0.0f); }
  static inline Sum multiply(Sum sum, Decoded weights, const Operand *x) { return fma(weights, set(*x), sum); }
  static inline Sum multiply_lanes(Sum sum, Decoded weights, const Operand *x) { return fma(weights, load(x), sum); }
  static inline Sum both(Sum a, Sum b) { return add(a, b); }
  static inline F total(Sum sum) { return sum; }
  static inline Operand convert(const float *values) { return values[0]; }
};

struct ByteProduct {
  using Sum = I;
  using Raw = B;
  using Decoded = B;
  using Operand = uint32_t;  // four int8
  using Tables = ByteTable;
  static constexpr int OPERANDS = 2, ELEMENTS = 4;
  // Sums of int8 products become floats at the end of each unit: half as many stay in registers until then.
  static constexpr int STRIP = LANES == 16 ? 1 : 2;
  static constexpr int nibble(int operand, int element) { return 2 * element + operand; }
  static constexpr int place(int operand, int element, int lane) { return CHUNK * lane + nibble(operand, element); }
  static inline Tables tables(const float *values) {
    uint8_t bytes[16];
    for (int i = 0; i < 16; i++) bytes[i] = (uint8_t)((int)(values[i] + (values[i] < 0 ? -0.5f : 0.5f)) + WEIGHT_BIAS);
    return make_byte_table(bytes);
  }
  static inline Raw fetch(const uint8_t *codes) { return load_bytes(codes); }
  template <int OPERAND>
  static inline Decoded decode(Raw raw, const Tables &tables) {
    return OPERAND ? look_up_high(tables, raw) : look_up_low(tables, raw);
  }
  static inline Sum start(const int32_t *excess) { return set_int(*excess); }
  static inline Sum start_lanes(const int32_t *excess) { return excess ? load_int(excess) : set_int(0); }
  static inline Sum multiply(Sum sum, Decoded weights, const Operand *x) {
    return dot_bytes(sum, weights, repeat_bytes(x));
  }
  static inline Sum multiply_lanes(Sum sum, Decoded weights, const Operand *x) {
    return dot_bytes(sum, weights, load_bytes(x));
  }
  static inline Sum both(Sum a, Sum b) { return add_int(a, b); }
  static inline F total(Sum sum) { return to_float(sum); }
  static inline Operand convert(const float *values) {
    uint32_t word = 0;
    for (int i = 0; i < 4; i++) word |= (uint32_t)(uint8_t)(int8_t)(int)values[i] << (8 * i);
    return word;
  }
};

// A table rounded to bfloat16, its lower and its upper bytes: for instruction sets that look up bytes only.
struct BytePlanes {
  ByteTable lower, upper;
};

static inline BytePlanes byte_planes(const float *values) {
  uint16_t rounded[16];
  uint8_t lower[16], upper[16];
  for (int i = 0; i < 16; i += LANES) store_bf16(rounded + i, load(values + i));
  for (int i = 0; i < 16; i++) {
    lower[i] = (uint8_t)rounded[i];
    upper[i] = (uint8_t)(rounded[i] >> 8);
  }
  return {make_byte_table(lower), make_byte_table(upper)};
}

// Two values of bfloat16 x as one operand; nothing is cut off.
static inline uint32_t pair_of(const float *values) {
  uint32_t low, high;
  __builtin_memcpy(&low, values, 4);
  __builtin_memcpy(&high, values + 1, 4);
  return low >> 16 | (high & 0xffff0000u);
}

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#if defined(__AVX512BF16__)
#include "pairs.h"
#else
#include "pairs_neon.h"
#endif
using LanePairProduct = PairProduct;
constexpr int64_t LANE_PAIR_LEAST_UNIT = CHUNK;
constexpr int32_t PRODUCTS = 1 << PRODUCT_F32 | 1 << PRODUCT_16BIT | 1 << PRODUCT_INT8;
#elif defined(__AVX2__) && !defined(__AVX512F__)
#include "planes.h"
using PairProduct = FloatProduct;
using LanePairProduct = PlaneProduct;
constexpr int64_t LANE_PAIR_LEAST_UNIT = PlaneProduct::LEAST_UNIT;
constexpr int32_t PRODUCTS = 1 << PRODUCT_F32 | 1 << PRODUCT_16BIT | 1 << PRODUCT_INT8;
#else
using PairProduct = FloatProduct;
using LanePairProduct = FloatProduct;
constexpr int64_t LANE_PAIR_LEAST_UNIT = CHUNK;
constexpr int32_t PRODUCTS = 1 << PRODUCT_F32 | 1 << PRODUCT_INT8;
#endif

// Bytes of x for one word of codes, for the driver.
constexpr int32_t PAIR_BYTES = PairProduct::OPERANDS * (int32_t)sizeof(PairProduct::Operand);
static_assert(PAIR_BYTES == LanePairProduct::OPERANDS * (int32_t)sizeof(LanePairProduct::Operand), "one size for both");

#include "pack.h"

// --- W · x ------------------------------------------------------------------------------------------

// STRIP (or fewer) vectors of rows against one block of x, over some units.
struct Strip {
  const uint8_t *codes[MOST_STRIP];                   // from the first unit on
  const float *scale[MOST_STRIP], *zero[MOST_STRIP];  // [units][16]; zero: or null
  float *totals[MOST_STRIP];                          // [C][LANES] each: sums of the units before, and after
  const uint8_t *x;                                   // of the block, from the first unit on
  const float *sums, *scales;                         // [units][C] of x, or null
  const int32_t *excess;                              // what sums of int8 products start with
  const uint8_t *next;                                // codes of the next tiles, where they are fetched meanwhile
  int64_t units, unit, columns;
};

// One step: the weights of operand J of a chunk, times that operand of every row of x.
template <class P, int C, int CHAINS, int J>
static inline __attribute__((always_inline)) void multiply_operand(const typename P::Raw *raw, const typename P::Tables &tables,
                                                                  const typename P::Operand *x, typename P::Sum *sums) {
  typename P::Decoded weights[P::STRIP];
  UNROLL for (int g = 0; g < P::STRIP; g++) weights[g] = P::template decode<J>(raw[g], tables);
  UNROLL for (int c = 0; c < C; c++) {
    UNROLL for (int g = 0; g < P::STRIP; g++) {
      typename P::Sum &sum = sums[((J % CHAINS) * C + c) * P::STRIP + g];
      sum = P::multiply(sum, weights[g], x + J * C + c);
    }
  }
  if constexpr (J + 1 < P::OPERANDS) multiply_operand<P, C, CHAINS, J + 1>(raw, tables, x, sums);
}

// The same with columns in the lanes (rows.h): operand J of a block is a vector of x for each of its rows.
template <class P, int C, int R, int CHAINS, int J>
static inline __attribute__((always_inline)) void multiply_lanes(const typename P::Raw *raw, const typename P::Tables &tables,
                                                                const typename P::Operand *x, typename P::Sum *sums) {
  typename P::Decoded weights[R];
  UNROLL for (int r = 0; r < R; r++) weights[r] = P::template decode<J>(raw[r], tables);
  UNROLL for (int c = 0; c < C; c++) {
    UNROLL for (int r = 0; r < R; r++) {
      typename P::Sum &sum = sums[((J % CHAINS) * R + r) * C + c];
      sum = P::multiply_lanes(sum, weights[r], x + (J * C + c) * LANES);
    }
  }
  if constexpr (J + 1 < P::OPERANDS) multiply_lanes<P, C, R, CHAINS, J + 1>(raw, tables, x, sums);
}

// totals[c][g] += scale · (Σ table[code] · x[c] - zero · Σ x[c]) over unit `u`.
template <class P, int C, bool FETCH>
static inline __attribute__((always_inline)) void multiply_unit(const Strip &strip, int64_t u, int64_t chunks,
                                                               const typename P::Tables &tables, F *totals) {
  // Few sums: several of each, so that a product need not wait for the one before.
  constexpr int CHAINS = C * P::STRIP <= 2 ? 2 : 1;
  int64_t start = u * (strip.unit / CHUNK);
  const typename P::Operand *x = (const typename P::Operand *)strip.x + start * P::OPERANDS * C;
  const uint8_t *codes[P::STRIP];
  typename P::Sum sums[CHAINS * C * P::STRIP];
  UNROLL for (int g = 0; g < P::STRIP; g++) codes[g] = strip.codes[g] + start * CHUNK_BYTES;
  UNROLL for (int i = 0; i < CHAINS * C * P::STRIP; i++) {
    static const int32_t NOTHING = 0;
    sums[i] = P::start(i < C * P::STRIP && strip.excess ? strip.excess + u * C + i / P::STRIP : &NOTHING);
  }
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    typename P::Raw raw[P::STRIP];
    UNROLL for (int g = 0; g < P::STRIP; g++) {
      raw[g] = P::fetch(codes[g] + chunk * CHUNK_BYTES);
      if (FETCH) __builtin_prefetch(strip.next + ((start + chunk) * P::STRIP + g) * CHUNK_BYTES, 0, 2);
    }
    multiply_operand<P, C, CHAINS, 0>(raw, tables, x + chunk * P::OPERANDS * C, sums);
  }
  UNROLL for (int g = 0; g < P::STRIP; g++) {
    F scale = load(strip.scale[g] + u * TILE_ROWS);
    UNROLL for (int c = 0; c < C; c++) {
      typename P::Sum sum = sums[c * P::STRIP + g];
      if (CHAINS == 2) sum = P::both(sum, sums[((CHAINS - 1) * C + c) * P::STRIP + g]);
      F total = P::total(sum);
      if (strip.zero[g]) total = sub(total, mul(load(strip.zero[g] + u * TILE_ROWS), set(strip.sums[u * C + c])));
      totals[c * P::STRIP + g] = fma(total, strip.scales ? mul(scale, set(strip.scales[u * C + c])) : scale, totals[c * P::STRIP + g]);
    }
  }
}

template <class P, int C, bool FETCH>
static __attribute__((noinline)) void multiply_strip(const Strip &strip, const typename P::Tables &given) {
  const typename P::Tables tables = given;
  F totals[C * P::STRIP];
  UNROLL for (int i = 0; i < C * P::STRIP; i++) totals[i] = load(strip.totals[i % P::STRIP] + i / P::STRIP * LANES);
  for (int64_t u = 0; u < strip.units; u++) {
    int64_t columns = smaller(strip.unit, strip.columns - u * strip.unit);
    multiply_unit<P, C, FETCH>(strip, u, (columns + CHUNK - 1) / CHUNK, tables, totals);
  }
  UNROLL for (int i = 0; i < C * P::STRIP; i++) store(strip.totals[i % P::STRIP] + i / P::STRIP * LANES, totals[i]);
}

template <class P>
using MultiplyStrip = void (*)(const Strip &strip, const typename P::Tables &tables);

template <class P, bool FETCH>
static inline MultiplyStrip<P> multiply_strip_for(int64_t rows) {
  static constexpr MultiplyStrip<P> FUNCTIONS[] = {
      multiply_strip<P, 1, FETCH>, multiply_strip<P, 2, FETCH>, multiply_strip<P, 3, FETCH>, multiply_strip<P, 4, FETCH>,
#if defined(__AVX512F__)
      multiply_strip<P, 5, FETCH>, multiply_strip<P, 6, FETCH>, multiply_strip<P, 7, FETCH>, multiply_strip<P, 8, FETCH>,
      multiply_strip<P, 9, FETCH>, multiply_strip<P, 10, FETCH>, multiply_strip<P, 11, FETCH>, multiply_strip<P, 12, FETCH>,
#endif
  };
  static_assert(sizeof FUNCTIONS / sizeof *FUNCTIONS == X_ROWS, "one function for each count of rows");
  return FUNCTIONS[rows - 1];
}

// The table as the product takes it: integers count from their middle, unless zero points are stored.
static inline void table_values(const fewbits_weight &w, float factor, float *values) {
  int32_t middle = w.zero ? 0 : w.middle, entries = 1 << w.bits;
  for (int i = 0; i < 16; i++)
    values[i] = (w.kind == FEWBITS_TABLE ? w.table[i % entries] : (float)(i % entries - middle)) * factor;
}

// y of 16 rows of the weight from totals [16 / LANES][C][LANES].
static void write_tile(const TileTask &t, int64_t row, const Block &block, const float *totals) {
  const fewbits_product &p = *t.product;
  int64_t rows = smaller(TILE_ROWS, t.weight->rows - row);
  float bias[TILE_ROWS] = {0}, line[TILE_ROWS];
  F shrink = set(t.weight->unit / t.factor);
  for (int64_t r = 0; p.bias && r < rows; r++) bias[r] = element(p.bias, row + r, p.bias_dtype);
  for (int64_t c = 0; c < block.rows; c++) {
    int64_t at = (block.first + c) * p.y_stride + row;
    uint16_t halves[TILE_ROWS];
    float *floats = p.y_dtype == FEWBITS_F32 && rows == TILE_ROWS ? (float *)p.y + at : line;
    uint16_t *half = rows == TILE_ROWS ? (uint16_t *)p.y + at : halves;
    for (int sub = 0; sub < TILE_ROWS / LANES; sub++) {
      F total = mul(load(totals + (sub * block.rows + c) * LANES), shrink);
      F value = add(total, load(bias + sub * LANES));
      if (p.y_dtype == FEWBITS_F32) store(floats + sub * LANES, value);
      if (p.y_dtype == FEWBITS_F16) store_f16(half + sub * LANES, value);
      if (p.y_dtype == FEWBITS_BF16) store_bf16(half + sub * LANES, value);
    }
    if (rows == TILE_ROWS) continue;
    if (p.y_dtype == FEWBITS_F32) {
      __builtin_memcpy((float *)p.y + at, line, (size_t)rows * 4);
    } else {
      __builtin_memcpy((uint16_t *)p.y + at, halves, (size_t)rows * 2);
    }
  }
}

// Memory of a piece of multiply_tiles; linear.cpp counts it.
struct TileRoom {
  float *totals;        // [tiles][m][16]
  float *scale, *zero;  // [tiles][units][16]
  float *lines;         // [16][units + 64]
  float *spare;         // [X_ROWS][LANES]
  uint8_t *codes;       // a cut of each tile of a strip
  int64_t code_bytes;   // of one of them
};

static inline TileRoom tile_room(const TileTask &t, const Piece &piece) {
  uint8_t *memory = piece.scratch;
  int64_t tiles = piece.end - piece.begin;
  TileRoom room;
  room.totals = aligned_floats(memory, tiles * t.pack.m * TILE_ROWS);
  room.scale = aligned_floats(memory, tiles * t.units * TILE_ROWS);
  room.zero = aligned_floats(memory, tiles * t.units * TILE_ROWS);
  room.lines = aligned_floats(memory, TILE_ROWS * (t.units + 64));
  room.spare = aligned_floats(memory, X_ROWS * LANES);
  room.codes = memory;
  room.code_bytes = (ceil_div(t.cut, CHUNK) + TILE_ROWS) * CHUNK_BYTES;
  __builtin_memset(room.totals, 0, (size_t)(tiles * t.pack.m * TILE_ROWS) * 4);
  return room;
}

// Multiplies units [first, first + strip.units) of the vectors of rows from `row` on with all of x. Where the
// piece ends within the strip, its last vector of rows is multiplied again, to no effect.
template <class P>
static void multiply_rows(const TileTask &t, const TileRoom &room, const Piece &piece, int64_t row, int64_t first,
                          Strip &strip, const uint8_t *const *codes, const typename P::Tables &tables) {
  const PackTask &pack = t.pack;
  int64_t chunks = ceil_div(pack.columns, CHUNK), start = first * (t.unit / CHUNK);
  int64_t blocks = ceil_div(pack.m, pack.block), last = piece.end * TILE_ROWS - LANES, at[P::STRIP];
  for (int g = 0; g < P::STRIP; g++) {
    at[g] = smaller(row + g * LANES, last);
    int64_t tile = at[g] / TILE_ROWS, sub = at[g] % TILE_ROWS;
    int64_t place = ((tile - piece.begin) * t.units + first) * TILE_ROWS + sub;
    strip.codes[g] = codes[tile - row / TILE_ROWS] + sub * 4;
    strip.scale[g] = room.scale + place;
    strip.zero[g] = t.weight->zero ? room.zero + place : nullptr;
  }
  for (int64_t b = 0; b < blocks; b++) {
    Block block = x_block(pack.m, pack.block, b);
    int64_t side = block.first * t.units + first * block.rows;
    strip.x = (const uint8_t *)pack.packed +
              (block.first * chunks + start * block.rows) * P::OPERANDS * (int64_t)sizeof(typename P::Operand);
    strip.sums = pack.sums ? pack.sums + side : nullptr;
    strip.scales = pack.unit_scales ? pack.unit_scales + side : nullptr;
    strip.excess = pack.excess ? pack.excess + side : nullptr;
    for (int g = 0; g < P::STRIP; g++) {
      int64_t tile = at[g] / TILE_ROWS - piece.begin;
      strip.totals[g] = room.totals + (tile * pack.m + block.first) * TILE_ROWS + at[g] % TILE_ROWS * block.rows;
      if (g && at[g] == at[g - 1]) strip.totals[g] = room.spare;
    }
    (strip.next && b == 0 ? multiply_strip_for<P, true> : multiply_strip_for<P, false>)(block.rows)(strip, tables);
  }
}

// The units of a cut, for one tile, or two where a strip is as long.
template <class P>
static void multiply_cut(const TileTask &t, const TileRoom &room, const Piece &piece, int64_t tile, int64_t tiles,
                         int64_t first, const typename P::Tables &tables) {
  const fewbits_weight &w = *t.weight;
  Strip strip;
  strip.unit = t.unit;
  strip.units = smaller(t.cut / t.unit, t.units - first);
  strip.columns = smaller(strip.units * t.unit, w.columns - first * t.unit);
  const uint8_t *codes[P::STRIP];
  int64_t end = (tile + tiles) * TILE_ROWS, blocks = ceil_div(t.pack.m, t.pack.block);
  // What the next tiles need is fetched while these are multiplied, if that does not take long: codes that
  // come too early are gone again.
  bool soon = blocks <= 2 && strip.units == t.units && end + tiles * TILE_ROWS <= w.rows && w.bits == 4;
  for (int64_t i = 0; i < tiles; i++)
    codes[i] = tile_codes(w, (tile + i) * TILE_ROWS, first * (t.unit / CHUNK), ceil_div(strip.columns, CHUNK), !soon,
                          room.codes + i * room.code_bytes);
  strip.next = soon ? w.codes + end * ceil_div(w.columns, 2) : nullptr;
  for (int64_t row = tile * TILE_ROWS; row < end; row += P::STRIP * LANES)
    multiply_rows<P>(t, room, piece, row, first, strip, codes, tables);
}

template <class P>
static void multiply(const TileTask &t, const Piece &piece) {
  const fewbits_weight &w = *t.weight;
  TileRoom room = tile_room(t, piece);
  float values[16];
  table_values(w, t.factor, values);
  typename P::Tables tables = P::tables(values);
  Grid grid = grid_of(w, t.unit);
  constexpr int64_t TOGETHER = P::STRIP * LANES > TILE_ROWS ? P::STRIP * LANES / TILE_ROWS : 1;
  for (int64_t first = 0; first < t.units; first += t.cut / t.unit) {
    for (int64_t tile = piece.begin; tile < piece.end; tile += TOGETHER) {
      int64_t tiles = smaller(TOGETHER, piece.end - tile);
      for (int64_t i = tile; first == 0 && i < tile + tiles; i++) {
        int64_t place = (i - piece.begin) * t.units * TILE_ROWS;
        tile_units(w, grid, i * TILE_ROWS, false, room.scale + place, room.lines);
        if (w.zero) tile_units(w, grid, i * TILE_ROWS, true, room.zero + place, room.lines);
      }
      multiply_cut<P>(t, room, piece, tile, tiles, first, tables);
    }
  }
  int64_t blocks = ceil_div(t.pack.m, t.pack.block);
  for (int64_t tile = piece.begin; tile < piece.end; tile++) {
    for (int64_t b = 0; b < blocks; b++) {
      Block block = x_block(t.pack.m, t.pack.block, b);
      write_tile(t, tile * TILE_ROWS, block, room.totals + ((tile - piece.begin) * t.pack.m + block.first) * TILE_ROWS);
    }
  }
}

#include "rows.h"

static void multiply_tiles(const void *tile_task, const Piece &piece) {
  const TileTask &t = *(const TileTask *)tile_task;
  bool few = t.pack.lanes != 0;
  if (t.pack.kind == PRODUCT_INT8) return few ? multiply_few<ByteProduct>(t, piece) : multiply<ByteProduct>(t, piece);
  if (in_pairs(t.pack)) return few ? multiply_few<LanePairProduct>(t, piece) : multiply<PairProduct>(t, piece);
  few ? multiply_few<FloatProduct>(t, piece) : multiply<FloatProduct>(t, piece);
}
