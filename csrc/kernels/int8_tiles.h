// The int8 product for many rows of x, with rows of W in the lanes. Part of int8.h.
//
// Sixteen rows of W are transposed once (a word is 4 columns of a row) and meet all rows of x from the cache, as in
// linear.h: no sum crosses lanes, and x is read word by word into all lanes.

// sums[g][c][lane] = rows of W in vector g · row c of x.
template <int C>
static __attribute__((noinline)) void multiply_words(const uint8_t *const *codes, int64_t words, const uint32_t *x,
                                                    int32_t *const *to) {
  I sums[MOST_STRIP * C];
  const uint8_t *from[MOST_STRIP];
  UNROLL for (int g = 0; g < MOST_STRIP; g++) from[g] = codes[g];
  UNROLL for (int i = 0; i < MOST_STRIP * C; i++) sums[i] = set_int(0);
  for (int64_t k = 0; k < words; k++) {
    B w[MOST_STRIP];
    UNROLL for (int g = 0; g < MOST_STRIP; g++) w[g] = biased(load_bytes(from[g] + k * CHUNK_BYTES));
    UNROLL for (int c = 0; c < C; c++) {
      B v = repeat_bytes(x + k * C + c);
      UNROLL for (int g = 0; g < MOST_STRIP; g++) sums[g * C + c] = dot_bytes(sums[g * C + c], w[g], v);
    }
  }
  UNROLL for (int g = 0; g < MOST_STRIP; g++) {
    UNROLL for (int c = 0; c < C; c++) store_int(to[g] + c * TILE_ROWS, sums[g * C + c]);
  }
}

using MultiplyWords = void (*)(const uint8_t *const *codes, int64_t words, const uint32_t *x, int32_t *const *to);

static inline MultiplyWords multiply_words_for(int64_t rows) {
  static constexpr MultiplyWords FUNCTIONS[] = {
      multiply_words<1>, multiply_words<2>, multiply_words<3>, multiply_words<4>,
#if defined(__AVX512F__)
      multiply_words<5>, multiply_words<6>, multiply_words<7>, multiply_words<8>,
      multiply_words<9>, multiply_words<10>, multiply_words<11>, multiply_words<12>,
#endif
  };
  static_assert(sizeof FUNCTIONS / sizeof *FUNCTIONS == X_ROWS, "one function for each count of rows");
  return FUNCTIONS[rows - 1];
}

// The codes of rows [row, row + 16), transposed: [columns / 4][16][4]. What is not there is zero.
static void byte_tile(const fewbits_weight &w, int64_t row, uint8_t *to) {
  int64_t rows = smaller(TILE_ROWS, w.rows - row), words = ceil_div(w.columns, BYTE_COLUMNS), done = 0;
  const uint8_t *from = w.codes + row * w.columns;
  for (; rows == TILE_ROWS && (done + TILE_ROWS) * BYTE_COLUMNS <= w.columns; done += TILE_ROWS) {
    const uint8_t *at = from + done * BYTE_COLUMNS;
    transpose_words(at, w.columns, to + done * CHUNK_BYTES);
    // The same columns of the next 16 rows: the next tile finds its codes in the cache.
    for (int64_t r = TILE_ROWS; r < 2 * TILE_ROWS; r++) __builtin_prefetch(at + r * w.columns, 0, 2);
  }
  for (int64_t k = done; k < words; k++) {
    int64_t start = k * BYTE_COLUMNS, length = smaller(BYTE_COLUMNS, w.columns - start);
    for (int64_t r = 0; r < TILE_ROWS; r++) {
      uint32_t word = 0;
      if (r < rows) __builtin_memcpy(&word, from + r * w.columns + start, (size_t)length);
      __builtin_memcpy(to + k * CHUNK_BYTES + r * 4, &word, 4);
    }
  }
}

// Items: tiles.
static void multiply_byte_tiles(const Int8Task &t, const Piece &piece) {
  const fewbits_weight &w = *t.weight;
  constexpr int64_t TOGETHER = MOST_STRIP * LANES > TILE_ROWS ? MOST_STRIP * LANES / TILE_ROWS : 1;
  int64_t words = ceil_div(w.columns, BYTE_COLUMNS), m = t.product->m;
  uint8_t *memory = piece.scratch, *codes[TOGETHER];
  RowsOfW of[TOGETHER];
  int32_t *ints[TOGETHER];
  for (int64_t i = 0; i < TOGETHER; i++) {
    codes[i] = (uint8_t *)aligned_floats(memory, words * TILE_ROWS);
    ints[i] = (int32_t *)aligned_floats(memory, X_ROWS * TILE_ROWS);
    of[i].picked = aligned_floats(memory, t.outliers * TILE_ROWS);
  }
  for (int64_t tile = piece.begin; tile < piece.end; tile += TOGETHER) {
    int64_t tiles = smaller(TOGETHER, piece.end - tile);
    for (int64_t i = 0; i < tiles; i++) {
      byte_tile(w, (tile + i) * TILE_ROWS, codes[i]);
      rows_of_w(t, (tile + i) * TILE_ROWS, of[i]);
    }
    for (int64_t b = t.begin; b < t.end; b++) {
      Block block = x_block(m, X_ROWS, b);
      const uint32_t *x = (const uint32_t *)t.codes + block.first * words;
      for (int64_t row = 0; row < tiles * TILE_ROWS; row += MOST_STRIP * LANES) {
        const uint8_t *from[MOST_STRIP];
        int32_t *to[MOST_STRIP];
        for (int g = 0; g < MOST_STRIP; g++) {  // a last tile that is alone is multiplied twice
          int64_t at = smaller(row + g * LANES, tiles * TILE_ROWS - LANES), lane = at % TILE_ROWS;
          from[g] = codes[at / TILE_ROWS] + lane * 4;
          to[g] = ints[at / TILE_ROWS] + lane;
        }
        multiply_words_for(block.rows)(from, words, x, to);
      }
      for (int64_t i = 0; i < tiles; i++) write_int8(t, (tile + i) * TILE_ROWS, block.first, block.rows, ints[i], of[i]);
    }
  }
}
