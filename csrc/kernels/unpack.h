// Codes of 2, 3, 4 or 8 bits to bytes, and back. The vectors of these kernels take codes of 4 and 8 bits as
// they lie; this is for the other ones, for zero points, and for what does not fill a vector.

// Codes of a run that shares one scale, from some weight on.
struct Run {
  int64_t group;                   // its number in row-major order of the grid, or along the flattened matrix
  int64_t grid_row, grid_column;   // 0 where groups are flat
  int64_t length;
};

static inline int64_t groups_across(const fewbits_weight &w) {
  return (w.columns + w.group_columns - 1) / w.group_columns;
}

static inline Run run_at(const fewbits_weight &w, int64_t row, int64_t column) {
  if (w.flat_groups) {
    int64_t place = row * w.columns + column, group = place / w.group_columns;
    return {group, 0, 0, (group + 1) * w.group_columns - place};
  }
  int64_t grid_row = row / w.group_rows, grid_column = column / w.group_columns;
  int64_t end = (grid_column + 1) * w.group_columns;
  return {grid_row * groups_across(w) + grid_column, grid_row, grid_column,
          (end < w.columns ? end : w.columns) - column};
}

static inline int64_t packed_bytes(int64_t count, int64_t bits) { return (count * bits + 7) / 8; }

static inline uint8_t code_at(const uint8_t *codes, int64_t at, int32_t bits, bool high_first) {
  if (bits == 8) return codes[at];
  if (bits == 4) return (at & 1) == (high_first ? 1 : 0) ? codes[at / 2] & 15 : codes[at / 2] >> 4;
  int64_t bit = at * bits, shift = bit % 8;
  uint32_t word = codes[bit / 8];
  if (shift + bits > 8) word |= (uint32_t)codes[bit / 8 + 1] << 8;
  return (uint8_t)(word >> shift & ((1u << bits) - 1));
}

// Eight codes in their lowest bits → one in every byte: halves are moved apart three times.
template <int BITS> static inline uint64_t spread(uint64_t word) {
  constexpr uint64_t FOUR = ((uint64_t)1 << 4 * BITS) - 1, TWO = ((uint64_t)1 << 2 * BITS) - 1;
  constexpr uint64_t ONE = ((uint64_t)1 << BITS) - 1, PAIRS = TWO | TWO << 32;
  constexpr uint64_t EACH = ONE | ONE << 16 | ONE << 32 | ONE << 48;
  word = (word & FOUR) | (word >> 4 * BITS & FOUR) << 32;
  word = (word & PAIRS) | (word >> 2 * BITS & PAIRS) << 16;
  return (word & EACH) | (word >> BITS & EACH) << 8;
}

// The inverse.
template <int BITS> static inline uint64_t gathered(uint64_t bytes) {
  constexpr uint64_t FOUR = ((uint64_t)1 << 4 * BITS) - 1, TWO = ((uint64_t)1 << 2 * BITS) - 1;
  constexpr uint64_t ONE = ((uint64_t)1 << BITS) - 1, PAIRS = TWO | TWO << 32;
  constexpr uint64_t EACH = ONE | ONE << 16 | ONE << 32 | ONE << 48;
  bytes = (bytes & EACH) | (bytes >> 8 & EACH) << BITS;
  bytes = (bytes & PAIRS) | (bytes >> 16 & PAIRS) << 2 * BITS;
  return (bytes & FOUR) | (bytes >> 32 & FOUR) << 4 * BITS;
}

static inline uint64_t swapped_pairs(uint64_t bytes) {
  constexpr uint64_t LOW = 0x00ff00ff00ff00ff;
  return (bytes & LOW) << 8 | (bytes >> 8 & LOW);
}

// The bytes of eight codes. Not by copying into a wider word, which a processor stumbles over.
template <int BITS> static inline uint64_t load_eight(const uint8_t *from) {
  uint16_t low, high = 0;
  __builtin_memcpy(&low, from, 2);
  if (BITS == 3) high = from[2];
  if (BITS == 4) __builtin_memcpy(&high, from + 2, 2);
  return low | (uint64_t)high << 16;
}

template <int BITS>
static inline int64_t unpack_eights(const uint8_t *from, int64_t count, bool high_first, uint8_t *to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t word = spread<BITS>(load_eight<BITS>(from + i / 8 * BITS));
    if (high_first) word = swapped_pairs(word);
    __builtin_memcpy(to + i, &word, 8);
  }
  return i;
}

// Codes [first, first + count) of a run of 2-, 3- or 4-bit codes.
static inline void unpack_codes(const uint8_t *codes, int64_t first, int64_t count, int32_t bits,
                                bool high_first, uint8_t *to) {
  int64_t end = first + count, at = first;
  while (at < end && at % 8) *to++ = code_at(codes, at++, bits, high_first);
  const uint8_t *from = codes + at / 8 * bits;
  int64_t done = bits == 2   ? unpack_eights<2>(from, end - at, high_first, to)
                 : bits == 3 ? unpack_eights<3>(from, end - at, high_first, to)
                             : unpack_eights<4>(from, end - at, high_first, to);
  for (at += done, to += done; at < end; at++) *to++ = code_at(codes, at, bits, high_first);
}

// Pairs of bytes below 16 → bytes, 2 LANES of them at a time. Returns how many codes are done.
static inline int64_t pack_nibbles(const uint8_t *from, int64_t count, bool high_first, uint8_t *to) {
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES) {
    I four = load_int(from + i);
    I pairs =
        high_first ? or_int(shift_left<4>(four), shift_right<8>(four)) : or_int(four, shift_right<4>(four));
    pairs = and_int(pairs, set_int(0x00ff00ff));
    store_u16(to + i / 2, or_int(pairs, shift_right<8>(pairs)));
  }
  return i;
}

// The same for bytes below 4.
static inline int64_t pack_fours(const uint8_t *from, int64_t count, uint8_t *to) {
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES) {
    I four = load_int(from + i);
    store_u8(to + i / 4, or_int(or_int(four, shift_right<6>(four)),
                                or_int(shift_right<12>(four), shift_right<18>(four))));
  }
  return i;
}

// Bytes → codes, from a whole byte on. `from` has zeros up to the next multiple of 8 codes; of the last byte
// of codes, what lies behind `count` is zero.
template <int BITS>
static inline void pack_eights(const uint8_t *from, int64_t count, bool high_first, uint8_t *to) {
  int64_t i = 0;
  if (BITS == 4) i = pack_nibbles(from, count, high_first, to);
  if (BITS == 2 && !high_first) i = pack_fours(from, count, to);
  for (to += i / 8 * BITS; i < count; i += 8) {
    uint64_t word;
    __builtin_memcpy(&word, from + i, 8);
    word = gathered<BITS>(high_first ? swapped_pairs(word) : word);
    if (count - i >= 8) {
      __builtin_memcpy(to, &word, BITS);
      to += BITS;
    } else {
      for (int64_t byte = 0; byte < packed_bytes(count - i, BITS); byte++)
        *to++ = (uint8_t)(word >> 8 * byte);
    }
  }
}

static inline void pack_codes(const uint8_t *from, int64_t count, int32_t bits, bool high_first,
                              uint8_t *to) {
  if (bits == 8) __builtin_memcpy(to, from, (size_t)count);
  if (bits == 4) pack_eights<4>(from, count, high_first, to);
  if (bits == 3) pack_eights<3>(from, count, high_first, to);
  if (bits == 2) pack_eights<2>(from, count, high_first, to);
}
