// The loops of blend_crops for one instruction set: masks.cpp includes this text once for each,
// inside a namespace and a target pragma. No include guard, no includes.
//
// Both passes add products of two 16-bit numbers in pairs, which one instruction does
// (pmaddwd). A weight of 22 bits is hi * 2^15 + lo, so two of them; sums wrap around, as does
// their recombination, and the result fits into 32 bits, so it is exact.
//
// Pairs of pixels must lie side by side. Across, a pair is two columns, and a vector holds the
// same pair of 16 rows, so no sum ever crosses its lanes; down, a pair is two rows.

constexpr int kLanes = FASTEMBED_LANES;  // of 32 bits: 16 is AVX-512, 8 is AVX2
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Shorts = int16_t __attribute__((vector_size(4 * kLanes)));
using Block = uint8_t __attribute__((vector_size(32)));
using Pairs = uint16_t __attribute__((vector_size(32)));

FASTEMBED_INLINE Ints madd(Shorts a, Shorts b) {
#if FASTEMBED_LANES == 16
  return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif FASTEMBED_LANES == 8
  return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  Ints sum;
  for (int i = 0; i < kLanes; ++i) sum[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
#endif
}

FASTEMBED_INLINE Shorts load_shorts(const int16_t* from) {
  Shorts value;
  memcpy(&value, from, sizeof value);
  return value;
}

FASTEMBED_INLINE Shorts widen_bytes(const uint8_t* from) {
#if FASTEMBED_LANES == 16
  return (Shorts)_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif FASTEMBED_LANES == 8
  return (Shorts)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Shorts value;
  for (int i = 0; i < 2 * kLanes; ++i) value[i] = from[i];
  return value;
#endif
}

FASTEMBED_INLINE Shorts splat(int32_t pair) { return (Shorts)(Ints{} + pair); }

// Sums to levels: kLanes bytes.
template <bool kWide>
FASTEMBED_INLINE void store_levels(Ints lo, Ints hi, int bits, uint8_t* to) {
  using Unsigned = uint32_t __attribute__((vector_size(4 * kLanes)));
  Unsigned sum = (Unsigned)lo + (1u << bits >> 1);
  if (kWide) sum += (Unsigned)hi << 15;
  const Ints level = (Ints)sum >> bits;
#if FASTEMBED_LANES == 16
  const __m512i positive = _mm512_maskz_max_epi32(0xffff, (__m512i)level, _mm512_setzero_si512());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtusepi32_epi8(0xffff, positive));
#elif FASTEMBED_LANES == 8
  const __m256i v = (__m256i)level;
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = std::min(std::max(level[i], 0), 255);
#endif
}

// A row of the crop, planar: three planes `stride` apart.
FASTEMBED_INLINE void blend_row(const Source& source, const Fade& fade, int64_t y, int64_t stride,
                                uint8_t* __restrict inside, uint8_t* __restrict row) {
  const int64_t width = source.width;
  const uint8_t* __restrict pixels = source.pixels + y * source.pitch * 3;
  const int32_t* __restrict ids = source.ids + y * source.pitch;
  const int32_t id = source.id;
  for (int64_t x = 0; x < width; ++x) inside[x] = ids[x] == id ? 255 : 0;
  for (int64_t x = 0; x < width; ++x) {
    row[x] = pixels[3 * x];
    row[stride + x] = pixels[3 * x + 1];
    row[2 * stride + x] = pixels[3 * x + 2];
  }
  const uint8_t* __restrict table = fade.table;
  const uint16_t factor = fade.factor, offset = fade.offset;
  for (int c = 0; c < 3; ++c, row += stride) {
    if (fade.linear) {
      for (int64_t x = 0; x < width; ++x) {
        const uint8_t faded = faded_level(row[x], factor, offset);
        row[x] = inside[x] ? row[x] : faded;
      }
    } else {
      for (int64_t x = 0; x < width; ++x) row[x] = inside[x] ? row[x] : table[row[x]];
    }
  }
}

// 16 bytes each from eight places `pitch` apart, and beside them 16 from the eight places after.
FASTEMBED_INLINE void load_blocks(const uint8_t* from, int64_t pitch, Block (&to)[8]) {
  using Half = uint8_t __attribute__((vector_size(16)));
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    Half low, high;
    memcpy(&low, from + i * pitch, 16);
    memcpy(&high, from + (i + 8) * pitch, 16);
    to[i] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                                    16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
  }
}

// In both 16-byte halves: the lower or the upper bytes of a and b in turn.
FASTEMBED_INLINE void interleave_bytes(const Block& a, const Block& b, Block& lower, Block& upper) {
  lower = __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 16,
                                  48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55);
  upper =
      __builtin_shufflevector(a, b, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                              24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
}

// The same in units of two bytes.
FASTEMBED_INLINE void interleave_pairs(const Block& a, const Block& b, Block& lower, Block& upper) {
  const Pairs p = (Pairs)a, q = (Pairs)b;
  lower = (Block)__builtin_shufflevector(p, q, 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11,
                                         27);
  upper = (Block)__builtin_shufflevector(p, q, 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30,
                                         15, 31);
}

// One of three steps of a transpose, in both halves. Written out: in a loop the compiler would
// keep the blocks in memory.
FASTEMBED_INLINE void step_bytes(const Block (&a)[8], Block (&b)[8]) {
  interleave_bytes(a[0], a[4], b[0], b[1]);
  interleave_bytes(a[1], a[5], b[2], b[3]);
  interleave_bytes(a[2], a[6], b[4], b[5]);
  interleave_bytes(a[3], a[7], b[6], b[7]);
}

FASTEMBED_INLINE void step_pairs(const Block (&a)[8], Block (&b)[8]) {
  interleave_pairs(a[0], a[4], b[0], b[1]);
  interleave_pairs(a[1], a[5], b[2], b[3]);
  interleave_pairs(a[2], a[6], b[4], b[5]);
  interleave_pairs(a[3], a[7], b[6], b[7]);
}

// The bytes of a block as shorts.
FASTEMBED_INLINE void store_wide(const Block& block, int16_t* to) {
#if FASTEMBED_LANES == 16
  _mm512_storeu_si512(to, _mm512_cvtepu8_epi16((__m256i)block));
#else
  uint8_t bytes[32];
  memcpy(bytes, &block, 32);
  for (int i = 0; i < 32; i += 2 * kLanes) {
    const Shorts wide = widen_bytes(bytes + i);
    memcpy(to + i, &wide, sizeof wide);
  }
#endif
}

// 16 rows of `columns` bytes, `pitch` apart, to pairs of columns: of each pair 16 rows of two
// shorts, and from one pair to the next `step` shorts.
FASTEMBED_INLINE void pair_columns(const uint8_t* rows, int64_t pitch, int64_t columns,
                                   int16_t* pairs, int64_t step) {
  for (int64_t x = 0; x < columns; x += 16, pairs += 8 * step) {
    Block a[8], b[8];
    load_blocks(rows + x, pitch, a);
    step_pairs(a, b);
    step_pairs(b, a);
    step_pairs(a, b);
#pragma GCC unroll 8
    for (int p = 0; p < 8; ++p) store_wide(b[p], pairs + p * step);
  }
}

// 16 bytes of each column, side by side, to 16 rows, `pitch` apart; `columns` is a multiple of
// 16.
FASTEMBED_INLINE void columns_to_rows(const uint8_t* from, int64_t columns, uint8_t* rows,
                                      int64_t pitch) {
  for (int64_t x = 0; x < columns; x += 16) {
    Block a[8], b[8];
    load_blocks(from + 16 * x, 16, a);
    step_bytes(a, b);
    step_bytes(b, a);
    step_bytes(a, b);
    // Now a block has two rows, and in its halves the lower and upper eight columns.
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      using Columns = uint64_t __attribute__((vector_size(32)));
      const Columns columns8 = (Columns)b[r];
      uint8_t* even = rows + 2 * r * pitch + x;
      uint8_t* odd = even + pitch;
      const uint64_t part[4] = {columns8[0], columns8[2], columns8[1], columns8[3]};
      memcpy(even, part, 16);
      memcpy(odd, part + 2, 16);
    }
  }
}

// The horizontal pass over 16 rows of three planes, `stride` apart, to rows of three planes,
// `out_stride` apart.
template <bool kWide>
FASTEMBED_INLINE void across(const Taps& taps, const Scratch& scratch, const uint8_t* rows,
                             int64_t stride, uint8_t* out, int64_t out_stride) {
  for (int c = 0; c < 3; ++c) {
    pair_columns(rows + c * stride, 3 * stride, stride, scratch.pairs + 32 * c, 96);
  }
  const int64_t pairs = taps.pairs, size = taps.size;
  const int bits = taps.bits;
  for (int64_t i = 0; i < size; ++i) {
    const int32_t* weights = taps.weights + 2 * pairs * i;
    for (int part = 0; part < 16; part += kLanes) {
      const int16_t* from = scratch.pairs + 96 * int64_t{taps.first[i]} + 2 * part;
      Ints lo[3] = {}, hi[3] = {};
      for (int64_t k = 0; k < pairs; ++k, from += 96) {
        const Shorts low = splat(weights[2 * k]), high = splat(weights[2 * k + 1]);
        for (int c = 0; c < 3; ++c) {
          const Shorts pixels = load_shorts(from + 32 * c);
          lo[c] += madd(pixels, low);
          if (kWide) hi[c] += madd(pixels, high);
        }
      }
      for (int c = 0; c < 3; ++c) {
        store_levels<kWide>(lo[c], hi[c], bits, scratch.columns + 16 * (c * out_stride + i) + part);
      }
    }
  }
  columns_to_rows(scratch.columns, 3 * out_stride, out, 3 * out_stride);
}

// Output row i of the vertical pass, `columns` wide (a multiple of 16), out of a ring of row
// pairs.
template <bool kWide>
FASTEMBED_INLINE void down(const Taps& taps, int64_t i, const Ring& ring, int64_t columns,
                           uint8_t* out) {
  const int32_t* weights = taps.weights + 2 * taps.pairs * i;
  const int64_t first = taps.first[i] % ring.pairs, pairs = taps.pairs;
  const int bits = taps.bits;
  for (int64_t x = 0; x < columns; x += kLanes) {
    Ints lo{}, hi{};
    int64_t slot = first;
    for (int64_t k = 0; k < pairs; ++k) {
      const Shorts pixels = widen_bytes(ring.bytes + 2 * (slot * columns + x));
      lo += madd(pixels, splat(weights[2 * k]));
      if (kWide) hi += madd(pixels, splat(weights[2 * k + 1]));
      if (++slot == ring.pairs) slot = 0;
    }
    store_levels<kWide>(lo, hi, bits, out + x);
  }
}

FASTEMBED_INLINE void pair_rows(const uint8_t* a, const uint8_t* b, int64_t columns, uint8_t* out) {
  for (int64_t x = 0; x < columns; ++x) {
    out[2 * x] = a[x];
    out[2 * x + 1] = b[x];
  }
}

template <class Value>
FASTEMBED_INLINE void look_up_as(const uint8_t* row, int64_t stride, const Target& target,
                                 int64_t y) {
  const Value* table = static_cast<const Value*>(target.table);
  Value* out = static_cast<Value*>(target.out) + y * target.size;
  const int64_t size = target.size;
  for (int c = 0; c < 3; ++c, table += 256, row += stride, out += size * size) {
    for (int64_t x = 0; x < size; ++x) out[x] = table[row[x]];
  }
}

FASTEMBED_INLINE void look_up(const uint8_t* row, int64_t stride, const Target& target, int64_t y) {
  switch (target.value_bytes) {
    case 1:
      return look_up_as<uint8_t>(row, stride, target, y);
    case 2:
      return look_up_as<uint16_t>(row, stride, target, y);
    case 4:
      return look_up_as<uint32_t>(row, stride, target, y);
  }
}

template <bool kWide>
FASTEMBED_INLINE void across_then_down(const Source& source, const Fade& fade, const Taps& columns,
                                       const Taps& rows, const Scratch& scratch,
                                       const Target& target) {
  const int64_t width = 3 * scratch.out_stride;
  int64_t done = 0;  // output rows
  for (int64_t y = 0; y < source.height; y += 16) {
    const int64_t end = std::min(y + 16, source.height);
    for (int64_t r = y; r < end; ++r) {
      blend_row(source, fade, r, scratch.stride, scratch.inside,
                scratch.block + (r - y) * 3 * scratch.stride);
    }
    across<kWide>(columns, scratch, scratch.block, scratch.stride, scratch.rows,
                  scratch.out_stride);
    for (int64_t r = y; r < y + 16; r += 2) {
      const uint8_t* from = scratch.rows + (r - y) * width;
      pair_rows(from, from + width, width,
                scratch.ring.bytes + r / 2 % scratch.ring.pairs * 2 * width);
    }
    for (; done < target.size && rows.last[done] <= end; ++done) {
      down<kWide>(rows, done, scratch.ring, width, scratch.levels);
      look_up(scratch.levels, scratch.out_stride, target, done);
    }
  }
}

template <bool kWide>
FASTEMBED_INLINE void down_then_across(const Source& source, const Fade& fade, const Taps& columns,
                                       const Taps& rows, const Scratch& scratch,
                                       const Target& target) {
  const int64_t width = 3 * scratch.stride;
  int64_t loaded = 0;  // source rows
  for (int64_t y = 0; y < target.size; y += 16) {
    const int64_t end = std::min(y + 16, target.size);
    for (int64_t i = y; i < end; ++i) {
      for (; loaded < rows.last[i]; loaded += 2) {
        blend_row(source, fade, loaded, scratch.stride, scratch.inside, scratch.rows);
        if (loaded + 1 < source.height) {
          blend_row(source, fade, loaded + 1, scratch.stride, scratch.inside, scratch.rows + width);
        }
        pair_rows(scratch.rows, scratch.rows + width, width,
                  scratch.ring.bytes + loaded / 2 % scratch.ring.pairs * 2 * width);
      }
      down<kWide>(rows, i, scratch.ring, width, scratch.block + (i - y) * width);
    }
    across<kWide>(columns, scratch, scratch.block, scratch.stride, scratch.rows,
                  scratch.out_stride);
    for (int64_t i = y; i < end; ++i) {
      look_up(scratch.rows + (i - y) * 3 * scratch.out_stride, scratch.out_stride, target, i);
    }
  }
}

template <bool kWide>
FASTEMBED_INLINE void resize_as(bool down_first, const Source& source, const Fade& fade,
                                const Taps& columns, const Taps& rows, const Scratch& scratch,
                                const Target& target) {
  if (down_first) return down_then_across<kWide>(source, fade, columns, rows, scratch, target);
  across_then_down<kWide>(source, fade, columns, rows, scratch, target);
}

void resize(bool narrow, bool down_first, const Source& source, const Fade& fade,
            const Taps& columns, const Taps& rows, const Scratch& scratch, const Target& target) {
  if (narrow) return resize_as<false>(down_first, source, fade, columns, rows, scratch, target);
  resize_as<true>(down_first, source, fade, columns, rows, scratch, target);
}
