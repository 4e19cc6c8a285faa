// y = x · decode(W)ᵀ + bias for one to a few rows of x, with columns in the lanes.
//
// Codes are read just as they are stored, one row after the other: a strictly sequential stream, which is what
// counts when every code is used only once. A lane holds a word of a row, 8 columns, and its products with x;
// lanes of one unit are scaled together, and the lanes are added up at the end of the row. With more rows of x
// the scaling, once for each of them, costs more than the transposing of tiles does (linear.h).

constexpr int FEW_ROWS = 4;  // of x
// Bytes that codes are fetched ahead of their use, into the second cache: processors do not look far enough
// ahead by themselves, and the first cache would lose what is fetched so early. Rows that are multiplied
// together are one stream when what is fetched is the same place of the rows after them.
constexpr int64_t AHEAD = 4096, MOST_AHEAD = 16384;
static inline int64_t fetched_ahead(int64_t rows, int64_t row_bytes) {
  return rows > 1 && rows * row_bytes <= MOST_AHEAD ? rows * row_bytes : AHEAD;
}

// What a block of LANES words needs of x.
template <class P>
struct LanesOfX {
  const typename P::Operand *x;  // [blocks][OPERANDS][C][LANES]
  const float *scales;           // [blocks][C][LANES] of int8 activations, or null
  const int32_t *excess;         // the same, to begin with, or null
};

// How the scales of a block come from those of the units of a row.
struct Spread {
  int64_t units;   // in a block; 0: a block is a part of a unit
  int shift;       // blocks in a unit, as a power of two, where units == 0
  I index;         // lane → unit within the block
};

static inline Spread spread_of(int64_t unit) {
  int64_t words = unit / CHUNK;
  int32_t index[LANES];
  for (int i = 0; i < LANES; i++) index[i] = words < LANES ? (int32_t)(i / words) : 0;
  int64_t blocks = words < LANES ? 0 : words / LANES;
  return {words < LANES ? LANES / words : 0, blocks > 1 ? __builtin_ctzll((uint64_t)blocks) : 0, load_int(index)};
}

static inline F block_scales(const Spread &spread, const float *line, int64_t block) {
  return spread.units ? pick(line + block * spread.units, spread.index) : set(line[block >> spread.shift]);
}

// totals[r][c] += one block of R rows of W times C rows of x.
template <class P, int C, int R>
static inline __attribute__((always_inline)) void multiply_block(const uint8_t *const *codes, const F *scale,
                                                                const typename P::Tables &tables, const LanesOfX<P> &x,
                                                                int64_t block, F *totals) {
  // Few sums: two of each, so that a product need not wait for the one before.
  constexpr int CHAINS = R * C <= 2 ? 2 : 1;
  typename P::Raw raw[R];
  typename P::Sum sums[CHAINS * R * C];
  UNROLL for (int r = 0; r < R; r++) raw[r] = P::fetch(codes[r]);
  UNROLL for (int i = 0; i < CHAINS * R * C; i++)
    sums[i] = P::start_lanes(x.excess && i < R * C ? x.excess + (block * C + i % C) * LANES : nullptr);
  multiply_lanes<P, C, R, CHAINS, 0>(raw, tables, x.x + block * P::OPERANDS * C * LANES, sums);
  UNROLL for (int i = 0; CHAINS == 2 && i < R * C; i++) sums[i] = P::both(sums[i], sums[i + R * C]);
  UNROLL for (int r = 0; r < R; r++) {
    UNROLL for (int c = 0; c < C; c++) {
      F by = x.scales ? mul(scale[r], load(x.scales + (block * C + c) * LANES)) : scale[r];
      totals[r * C + c] = fma(P::total(sums[r * C + c]), by, totals[r * C + c]);
    }
  }
}

// Sums of `count` rows of W (a multiple of R, R at a time) times C rows of x: sums[row][c].
template <class P, int C, int R>
static __attribute__((noinline)) void multiply_lines(const uint8_t *codes, int64_t row_bytes, int64_t words, int64_t count,
                                                    const float *const *lines, const Spread &given,
                                                    const typename P::Tables &tables_given, const LanesOfX<P> &x_given,
                                                    float *sums) {
  const typename P::Tables tables = tables_given;
  const Spread spread = given;
  const LanesOfX<P> x = x_given;
  int64_t whole = row_bytes / (4 * LANES);  // the last word of a row may have fewer than 4 bytes
  int64_t ahead = fetched_ahead(R, row_bytes);
  for (int64_t row = 0; row < count; row += R, codes += R * row_bytes, sums += R * C) {
    F totals[R * C], scale[R];
    UNROLL for (int i = 0; i < R * C; i++) totals[i] = set(0.0f);
    const uint8_t *at[R];
    for (int64_t block = 0; block < whole; block++) {
      UNROLL for (int r = 0; r < R; r++) {
        at[r] = codes + r * row_bytes + block * (4 * LANES);
        __builtin_prefetch(at[r] + ahead, 0, 2);
        scale[r] = block_scales(spread, lines[row + r], block);
      }
      multiply_block<P, C, R>(at, scale, tables, x, block, totals);
    }
    if (words > whole * LANES) {
      uint8_t last[R][4 * LANES] = {{0}};
      UNROLL for (int r = 0; r < R; r++) {
        int64_t start = whole * (4 * LANES);
        __builtin_memcpy(last[r], codes + r * row_bytes + start, (size_t)(row_bytes - start));
        at[r] = last[r];
        scale[r] = block_scales(spread, lines[row + r], whole);
      }
      multiply_block<P, C, R>(at, scale, tables, x, whole, totals);
    }
    UNROLL for (int i = 0; i < R * C; i++) sums[i] = sum(totals[i]);
  }
}

template <class P>
using MultiplyLines = void (*)(const uint8_t *codes, int64_t row_bytes, int64_t words, int64_t count,
                               const float *const *lines, const Spread &spread, const typename P::Tables &tables,
                               const LanesOfX<P> &x, float *sums);

template <class P, int R>
static inline MultiplyLines<P> multiply_lines_for(int64_t rows) {
  static constexpr MultiplyLines<P> FUNCTIONS[FEW_ROWS] = {multiply_lines<P, 1, R>, multiply_lines<P, 2, R>,
                                                           multiply_lines<P, 3, R>, multiply_lines<P, 4, R>};
  return FUNCTIONS[rows - 1];
}

// Where the scales of the rows from `first` on are: in the weight, if they lie there as they are wanted, or
// decoded into `room`, [rows][width].
static inline void scale_lines(const fewbits_weight &w, const Grid &grid, int64_t first, int64_t rows, int64_t width,
                               float *room, const float **lines) {
  // One scale for each unit, and no block with lanes behind the row, whose scales would be those of the next.
  bool plain = w.group_rows == 1 && grid.across == grid.units && w.columns % (CHUNK * LANES) == 0;
  int64_t start = first * grid.across, count = rows * grid.across;
  const float *from = room;
  if (plain && w.scale_type == FEWBITS_SCALE_F32 && start + count + LANES <= w.scale_bytes / 4) {
    from = (const float *)w.scale + start;  // with the whole vector that `pick` reads at the end
  } else if (plain) {
    load_scales(w, start, count, room);
  }
  for (int64_t r = 0; r < rows; r++) {
    lines[r] = plain ? from + r * grid.across : room + r * width;
    if (plain) continue;
    float *line = room + r * width;
    row_units(w, grid, first + r, false, line);
    for (int64_t i = 0; i < LANES; i++) line[grid.units + i] = 0.0f;  // of lanes behind the row
  }
}

// What zero points take away: Σ over units of scale · zero · Σ x, for one row of W and each of x.
static inline void subtract_zeros(const TileTask &t, const Grid &grid, int64_t row, const float *line, float *zeros,
                                  float *sums) {
  row_units(*t.weight, grid, row, true, zeros);
  for (int64_t c = 0; c < t.pack.m; c++) {
    float total = 0.0f;
    for (int64_t u = 0; u < grid.units; u++) {
      int64_t at = u * t.pack.m + c;
      total += line[u] * zeros[u] * t.pack.sums[at] * (t.pack.unit_scales ? t.pack.unit_scales[at] : 1.0f);
    }
    sums[c] -= total;
  }
}

// Items: tiles, as in multiply_tiles.
template <class P>
static void multiply_few(const TileTask &t, const Piece &piece) {
  const fewbits_weight &w = *t.weight;
  const PackTask &pack = t.pack;
  int64_t bytes = ceil_div(w.columns * w.bits, 8), words = ceil_div(w.columns, CHUNK), width = t.units + 64;
  uint8_t *memory = piece.scratch;
  float *totals = aligned_floats(memory, pack.m * TILE_ROWS), *room = aligned_floats(memory, TILE_ROWS * width);
  float *zeros = aligned_floats(memory, width), values[16];
  table_values(w, t.factor, values);
  typename P::Tables tables = P::tables(values);
  Grid grid = grid_of(w, t.unit);
  Spread spread = spread_of(t.unit);
  LanesOfX<P> x{(const typename P::Operand *)pack.packed, pack.scales, pack.excess};
  for (int64_t tile = piece.begin; tile < piece.end; tile++) {
    int64_t first = tile * TILE_ROWS, rows = smaller(TILE_ROWS, w.rows - first);
    const float *lines[TILE_ROWS];
    float sums[TILE_ROWS * FEW_ROWS];
    scale_lines(w, grid, first, rows, width, room, lines);
    // With one row of x, a single stream is read faster than two.
    int64_t pairs = pack.m > 1 ? rows / 2 * 2 : 0;
    const uint8_t *codes = w.codes + first * bytes, *rest = codes + pairs * bytes;
    multiply_lines_for<P, 2>(pack.m)(codes, bytes, words, pairs, lines, spread, tables, x, sums);
    multiply_lines_for<P, 1>(pack.m)(rest, bytes, words, rows - pairs, lines + pairs, spread, tables, x, sums + pairs * pack.m);
    for (int64_t r = 0; r < rows; r++) {
      if (w.zero) subtract_zeros(t, grid, first + r, lines[r], zeros, sums + r * pack.m);
      for (int64_t c = 0; c < pack.m; c++)
        totals[(r / LANES * pack.m + c) * LANES + r % LANES] = sums[r * pack.m + c];
    }
    write_tile(t, first, Block{0, pack.m}, totals);
  }
}
