// Tiles: sixteen rows of a weight side by side, so that rows lie in the lanes of a vector.
//
// A tile holds 16 rows of codes of 4 bits. Its words (4 bytes, 8 columns) follow each other column by column,
// and within a column row by row: word (row r, columns 8 c … 8 c + 7) is the (16 c + r)-th. One load brings the
// same 8 columns of 16 rows; no sum crosses lanes; one multiplication scales a group of 16 rows; and a thread
// reads one strictly sequential stream. Weights are brought into this form 16 rows at a time, in memory that
// stays in the cache; codes of 2 and 3 bits become nibbles then.

constexpr int TILE_ROWS = 16;
constexpr int CHUNK = 8;            // columns of a word
constexpr int CHUNK_BYTES = 64;     // of a chunk of 16 rows

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline float *aligned_floats(uint8_t *&memory, int64_t count) {
  float *floats = reinterpret_cast<float *>(memory);
  memory += ceil_div(count * 4, 64) * 64;
  return floats;
}

// Eight codes of 2 or 3 bits as nibbles, the first in the lowest.
static inline uint32_t nibbles_of(uint32_t codes, int32_t bits) {
#if defined(__BMI2__)
  return __builtin_ia32_pdep_si(codes, bits == 3 ? 0x77777777u : 0x33333333u);
#else
  uint32_t spread = 0, mask = (1u << bits) - 1;
  for (int i = 0; i < 8; i++) spread |= (codes >> (bits * i) & mask) << (4 * i);
  return spread;
#endif
}

// Chunks [first, first + count) of a row as words. `row` points to the first byte of the row, which has `bytes`.
static inline void row_words(const fewbits_weight &w, const uint8_t *row, int64_t bytes, int64_t first, int64_t count,
                             uint32_t *words, int64_t stride) {
  for (int64_t c = 0; c < count; c++) {
    int64_t place = (first + c) * w.bits, length = smaller(w.bits, bytes - place);
    uint32_t word = 0;
    if (length > 0) __builtin_memcpy(&word, row + place, (size_t)length);
    words[c * stride] = w.bits == 4 ? word : nibbles_of(word, w.bits);
  }
}

// The codes of rows [row, row + 16) and `count` chunks from `first`, as a tile. Rows past the end get zeros.
// `ahead`: fetch the same columns of the next 16 rows, so that the next tile finds its codes in the cache.
static const uint8_t *tile_codes(const fewbits_weight &w, int64_t row, int64_t first, int64_t count, bool ahead,
                                 uint8_t *to) {
  int64_t bytes = w.layout == FEWBITS_FLAT ? w.columns * w.bits / 8 : ceil_div(w.columns * w.bits, 8);
  const uint8_t *from = w.codes + row * bytes;
  int64_t rows = smaller(TILE_ROWS, w.rows - row), done = 0;
  if (w.bits == 4 && rows == TILE_ROWS) {
    int64_t whole = smaller(count, w.columns / CHUNK - first);
    for (; done + TILE_ROWS <= whole; done += TILE_ROWS) {
      const uint8_t *at = from + (first + done) * 4;
      transpose_words(at, bytes, to + done * CHUNK_BYTES);
      for (int64_t r = TILE_ROWS; ahead && r < 2 * TILE_ROWS; r++) __builtin_prefetch(at + r * bytes, 0, 2);
    }
  } else if (rows < TILE_ROWS) {
    __builtin_memset(to, 0, (size_t)(count * CHUNK_BYTES));
  }
  for (int64_t r = 0; r < rows && done < count; r++)
    row_words(w, from + r * bytes, bytes, first + done, count - done, (uint32_t *)(to + done * CHUNK_BYTES) + r, TILE_ROWS);
  return to;
}

// Where the scales of a row are: its first unit is the `phase`-th of its group, of `ratio` units each.
struct Groups {
  int64_t first;  // in row-major order of the grid
  int64_t phase;
};

// What does not change from row to row.
struct Grid {
  int64_t units, ratio, across;
  bool straddles;  // rows begin in the middle of a group
};

static inline Grid grid_of(const fewbits_weight &w, int64_t unit) {
  int64_t units = ceil_div(w.columns, unit);
  if (w.flat_groups && w.columns % w.group_columns) return {units, w.group_columns / unit, 0, true};
  if (w.group_columns >= w.columns) return {units, units + 1, 1, false};
  return {units, w.group_columns / unit, ceil_div(w.columns, w.group_columns), false};
}

static inline Groups groups_of(const fewbits_weight &w, const Grid &grid, int64_t row) {
  if (!grid.straddles) return {(w.group_rows == 1 ? row : row / w.group_rows) * grid.across, 0};
  int64_t place = row * grid.units;
  return {place / grid.ratio, place % grid.ratio};
}

// Values of groups (scales or zero points) of one row, one for each unit.
static inline void row_units(const fewbits_weight &w, const Grid &grid, int64_t row, bool zeros, float *line) {
  Groups g = groups_of(w, grid, row);
  int64_t groups = ceil_div(g.phase + grid.units, grid.ratio), grid_row = row / w.group_rows;
  if (zeros) {
    load_zeros(w, grid_row, 0, groups, line);
  } else {
    load_scales(w, g.first, groups, line);
  }
  if (grid.ratio == 1) return;
  // From the last on, so that nothing is overwritten before it is read.
  int64_t left = (g.phase + grid.units - 1) % grid.ratio;  // units of this group before this one
  for (int64_t u = grid.units - 1, group = groups - 1; u >= 0; u--) {
    line[u] = line[group];
    if (left == 0) group--;
    left = left == 0 ? grid.ratio - 1 : left - 1;
  }
}

// Scales or zero points of 16 rows, [units][16]. `room` holds 16 rows of units + 64 floats.
static void tile_units(const fewbits_weight &w, const Grid &grid, int64_t row, bool zeros, float *to, float *room) {
  int64_t rows = smaller(TILE_ROWS, w.rows - row), width = ceil_div(grid.units, 16) * 16 + 32;
  const float *from = room;
  if (rows == TILE_ROWS && !zeros && w.scale_type == FEWBITS_SCALE_F32 && w.group_rows == 1 && grid.across == grid.units) {
    from = (const float *)w.scale + row * grid.across;  // they lie there as they are wanted
    width = grid.across;
  } else {
    for (int64_t r = 0; r < rows; r++) row_units(w, grid, row + r, zeros, room + r * width);
    for (int64_t r = rows; r < TILE_ROWS; r++) __builtin_memset(room + r * width, 0, (size_t)width * 4);
  }
  int64_t u = 0;
  for (; u + 16 <= grid.units; u += 16) transpose_words((const uint8_t *)(from + u), width * 4, (uint8_t *)(to + u * 16));
  for (; u < grid.units; u++)
    for (int64_t r = 0; r < TILE_ROWS; r++) to[u * 16 + r] = from[r * width + u];
}
