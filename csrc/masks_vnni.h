// blend_crops for processors that multiply bytes and look bytes up: AVX-512 with VNNI and VBMI
// (Intel from Ice Lake on, AMD from Zen 4 on). Included by masks.cpp, inside a namespace and a
// target pragma. No include guard, no includes.
//
// Both passes add products of a level and a signed byte in fours, which one instruction does
// (vpdpbusd). A weight is two or three such bytes, its digits to the base 256; sums wrap around,
// as does their recombination, and the result fits into 32 bits, so it is exact.
//
// Four pixels of one sum must lie side by side, in a lane of 32 bits. Across, a lane is four
// columns of a row and a vector is 16 rows of them; down, it is four rows of a column and a
// vector is 16 columns. The horizontal pass leaves its levels as the vertical one reads them.

struct Digits {
  const int32_t* first;    // [size], in fours of pixels
  const int32_t* last;     // [size], in pixels: one past the last that has a weight
  const int32_t* weights;  // [fours, digits, size], a digit of four weights each, lowest first
  int64_t size, fours;
  int digits, bits;
};

struct Ring {
  uint8_t* bytes;  // [slots, columns, 4 rows]
  int64_t slots, columns;
};

// The levels that 256 levels become.
struct Table {
  __m512i part[4];
};

struct Scratch {
  uint8_t* rows;    // [16, row_pitch], RGB as in the image
  uint8_t* pixels;  // [fours of columns, 3, 16 rows, 4]
  uint8_t* quads;   // [4, out_columns, 4 rows]
  uint8_t* levels;  // [16, out_columns], each three planes of out_stride
  Ring ring;
  int64_t row_pitch, out_stride, out_columns;
};

FASTEMBED_INLINE __m512i load(const uint8_t* from) { return _mm512_loadu_si512(from); }
FASTEMBED_INLINE void store(uint8_t* to, __m512i value) { _mm512_storeu_si512(to, value); }

// Not the intrinsic: with it GCC copies every sum before and after.
FASTEMBED_INLINE __m512i add_products(__m512i sum, __m512i levels, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(levels), "v"(weights));
  return sum;
}

FASTEMBED_INLINE Table load_table(const uint8_t* from) {
  return {{load(from), load(from + 64), load(from + 128), load(from + 192)}};
}

FASTEMBED_INLINE __m512i look_up(const Table& table, __m512i levels) {
  const __m512i dark = _mm512_permutex2var_epi8(table.part[0], levels, table.part[1]);
  const __m512i bright = _mm512_permutex2var_epi8(table.part[2], levels, table.part[3]);
  return _mm512_mask_mov_epi8(dark, _mm512_movepi8_mask(levels), bright);
}

// A vector as a 4 x 4 matrix of 32 bits, transposed: between 16 lanes in order and what
// instructions that stay within 16 bytes make of four vectors.
FASTEMBED_INLINE __m512i transpose_lanes(__m512i vector) {
  return _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), vector);
}

// Where the 64 flags of `outside` stand for each of 192 bytes of RGB.
struct Spread {
  uint8_t at[192];
};
constexpr Spread make_spread() {
  Spread spread{};
  for (int i = 0; i < 192; ++i) {
    const int pixel = i / 3;
    spread.at[i] = static_cast<uint8_t>(pixel % 16 / 4 * 16 + pixel / 16 * 4 + pixel % 4);
  }
  return spread;
}
constexpr Spread kSpread = make_spread();

FASTEMBED_INLINE uint64_t lowest(int64_t count) {
  return count <= 0 ? 0 : count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// 64 pixels of a row; kWhole: else only `count` of them are there.
template <bool kWhole>
FASTEMBED_INLINE void fade_pixels(const uint8_t* pixels, const int32_t* ids, __m512i id,
                                  const Table& fade, int64_t count, uint8_t* out) {
  __m512i differ[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto there = static_cast<__mmask16>(lowest(count - 16 * i));
    const __m512i ids16 =
        kWhole ? _mm512_loadu_si512(ids + 16 * i) : _mm512_maskz_loadu_epi32(there, ids + 16 * i);
    differ[i] = _mm512_xor_si512(ids16, id);
  }
  // Saturating: what is not 0 stays so.
  const __m512i any = _mm512_packs_epi16(_mm512_packs_epi32(differ[0], differ[1]),
                                         _mm512_packs_epi32(differ[2], differ[3]));
  const __m512i outside = _mm512_movm_epi8(_mm512_test_epi8_mask(any, any));
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const __m512i levels =
        kWhole ? load(pixels + 64 * i)
               : _mm512_maskz_loadu_epi8(lowest(3 * count - 64 * i), pixels + 64 * i);
    const __m512i mask = _mm512_permutexvar_epi8(load(kSpread.at + 64 * i), outside);
    // 0xca: the second where the first has a bit, else the third.
    store(out + 64 * i, _mm512_ternarylogic_epi64(mask, look_up(fade, levels), levels, 0xca));
  }
}

// A row of the crop. Writes whole vectors.
FASTEMBED_INLINE void fade_row(const Source& source, int64_t y, const Table& fade, uint8_t* row) {
  const uint8_t* pixels = source.pixels + y * source.pitch * 3;
  const int32_t* ids = source.ids + y * source.pitch;
  const __m512i id = _mm512_set1_epi32(source.id);
  int64_t x = 0;
  for (; x + 64 <= source.width; x += 64) {
    fade_pixels<true>(pixels + 3 * x, ids + x, id, fade, 64, row + 3 * x);
  }
  if (x < source.width) {
    fade_pixels<false>(pixels + 3 * x, ids + x, id, fade, source.width - x, row + 3 * x);
  }
}

// The 16 rows to come, fetched by and by while others are resized: reading the image waits for
// memory, resizing does not, so one hides behind the other.
struct Ahead {
  const Source* source;
  int64_t y, end, x;

  // A step is 16 pixels, which are a cache line of ids and not quite one of RGB.
  static int64_t steps(int64_t width) { return (width + 15) / 16 * 16; }

  FASTEMBED_INLINE void fetch(int64_t count) {
    for (; count > 0 && y < end; --count) {
      const int64_t pixel = y * source->pitch + x;
      _mm_prefetch(source->pixels + 3 * pixel, _MM_HINT_T1);
      _mm_prefetch(source->ids + pixel, _MM_HINT_T1);
      x += 16;
      if (x >= source->width) {
        x = 0;
        ++y;
      }
    }
  }
};

// 16 bytes of the rows `row`, row + 4, row + 8 and row + 12.
FASTEMBED_INLINE __m512i load_quarters(const uint8_t* row, int64_t pitch) {
  const auto at = [&](int64_t r) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + r * pitch));
  };
  __m512i quarters = _mm512_broadcast_i32x4(at(0));
  quarters = _mm512_mask_broadcast_i32x4(quarters, 0x00f0, at(4));
  quarters = _mm512_mask_broadcast_i32x4(quarters, 0x0f00, at(8));
  return _mm512_mask_broadcast_i32x4(quarters, 0xf000, at(12));
}

// 16 rows of RGB to `pixels`.
FASTEMBED_INLINE void split_planes(const Scratch& scratch, int64_t width) {
  const int64_t pitch = scratch.row_pitch;
  const uint8_t* row = scratch.rows;
  uint8_t* out = scratch.pixels;
  const __m512i planes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1));
  for (int64_t x = 0; x < width; x += 4, row += 12, out += 192) {
    __m512i rgb[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      rgb[j] = _mm512_shuffle_epi8(load_quarters(row + j * pitch, pitch), planes);
    }
    const __m512i rg01 = _mm512_unpacklo_epi32(rgb[0], rgb[1]);
    const __m512i rg23 = _mm512_unpacklo_epi32(rgb[2], rgb[3]);
    const __m512i b01 = _mm512_unpackhi_epi32(rgb[0], rgb[1]);
    const __m512i b23 = _mm512_unpackhi_epi32(rgb[2], rgb[3]);
    store(out, _mm512_unpacklo_epi64(rg01, rg23));
    store(out + 64, _mm512_unpackhi_epi64(rg01, rg23));
    store(out + 128, _mm512_unpacklo_epi64(b01, b23));
  }
}

// The sums of each digit to levels, still of 32 bits and not yet clipped.
template <int kDigits>
FASTEMBED_INLINE __m512i recombine(const __m512i (&sums)[kDigits], __m512i bits) {
  __m512i sum = _mm512_add_epi32(sums[0], _mm512_slli_epi32(sums[1], 8));
  if constexpr (kDigits == 3) sum = _mm512_add_epi32(sum, _mm512_slli_epi32(sums[2], 16));
  return _mm512_srav_epi32(sum, bits);
}

// Clips to bytes; of every four lanes of 128 bits those of a come first, then b's, c's, d's.
FASTEMBED_INLINE __m512i pack(__m512i a, __m512i b, __m512i c, __m512i d) {
  return _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
}

// The horizontal pass over 16 rows, to four quads of rows.
template <int kDigits>
FASTEMBED_INLINE void across(const Digits& taps, const Scratch& scratch, Ahead ahead,
                             uint8_t* const (&quad)[4]) {
  const int64_t fours = taps.fours, size = taps.size, stride = scratch.out_stride;
  const __m512i bits = _mm512_set1_epi32(taps.bits);
  const __m512i half = _mm512_set1_epi32(1 << taps.bits >> 1);
  const int64_t steps = Ahead::steps(ahead.source->width) / (stride / 4) + 1;
  for (int64_t i = 0; i < stride; i += 4) {
    ahead.fetch(steps);
    __m512i levels[3][4];
#pragma GCC unroll 4
    for (int e = 0; e < 4; ++e) {
      const uint8_t* pixels = scratch.pixels + 192 * int64_t{taps.first[i + e]};
      const int32_t* weights = taps.weights + i + e;
      __m512i sums[3][kDigits];
#pragma GCC unroll 3
      for (int c = 0; c < 3; ++c) {
        sums[c][0] = half;
#pragma GCC unroll 3
        for (int d = 1; d < kDigits; ++d) sums[c][d] = _mm512_setzero_si512();
      }
      int64_t k = fours;
      do {
        __m512i weight[kDigits];
#pragma GCC unroll 3
        for (int d = 0; d < kDigits; ++d) weight[d] = _mm512_set1_epi32(weights[d * size]);
#pragma GCC unroll 3
        for (int c = 0; c < 3; ++c) {
          const __m512i four = load(pixels + 64 * c);
#pragma GCC unroll 3
          for (int d = 0; d < kDigits; ++d) {
            sums[c][d] = add_products(sums[c][d], four, weight[d]);
          }
        }
        pixels += 192;
        weights += kDigits * size;
      } while (--k > 0);
#pragma GCC unroll 3
      for (int c = 0; c < 3; ++c) levels[c][e] = recombine<kDigits>(sums[c], bits);
    }
#pragma GCC unroll 3
    for (int c = 0; c < 3; ++c) {
      const __m512i bytes = pack(levels[c][0], levels[c][1], levels[c][2], levels[c][3]);
      const int64_t at = 4 * (c * stride + i);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(quad[0] + at), _mm512_castsi512_si128(bytes));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(quad[1] + at),
                       _mm512_extracti32x4_epi32(bytes, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(quad[2] + at),
                       _mm512_extracti32x4_epi32(bytes, 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(quad[3] + at),
                       _mm512_extracti32x4_epi32(bytes, 3));
    }
  }
}

FASTEMBED_INLINE void across(const Digits& taps, const Scratch& scratch, int64_t width, Ahead ahead,
                             uint8_t* const (&quad)[4]) {
  split_planes(scratch, width);
  if (taps.digits == 2) return across<2>(taps, scratch, ahead, quad);
  across<3>(taps, scratch, ahead, quad);
}

// Output row i of the vertical pass.
template <int kDigits>
FASTEMBED_INLINE void down(const Digits& taps, int64_t i, const Ring& ring, uint8_t* out) {
  const int64_t fours = taps.fours, size = taps.size, pitch = 4 * ring.columns;
  const int64_t first = taps.first[i] % ring.slots;
  const __m512i bits = _mm512_set1_epi32(taps.bits);
  const __m512i half = _mm512_set1_epi32(1 << taps.bits >> 1);
  for (int64_t x = 0; x < ring.columns; x += 64) {
    __m512i sums[4][kDigits];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      sums[v][0] = half;
#pragma GCC unroll 3
      for (int d = 1; d < kDigits; ++d) sums[v][d] = _mm512_setzero_si512();
    }
    const int32_t* weights = taps.weights + i;
    int64_t slot = first;
    int64_t k = fours;
    do {
      const uint8_t* from = ring.bytes + slot * pitch + 4 * x;
      __m512i weight[kDigits];
#pragma GCC unroll 3
      for (int d = 0; d < kDigits; ++d) weight[d] = _mm512_set1_epi32(weights[d * size]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const __m512i four = load(from + 64 * v);
#pragma GCC unroll 3
        for (int d = 0; d < kDigits; ++d) {
          sums[v][d] = add_products(sums[v][d], four, weight[d]);
        }
      }
      weights += kDigits * size;
      if (++slot == ring.slots) slot = 0;
    } while (--k > 0);
    store(out + x, transpose_lanes(
                       pack(recombine<kDigits>(sums[0], bits), recombine<kDigits>(sums[1], bits),
                            recombine<kDigits>(sums[2], bits), recombine<kDigits>(sums[3], bits))));
  }
}

FASTEMBED_INLINE void down(const Digits& taps, int64_t i, const Ring& ring, uint8_t* out) {
  if (taps.digits == 2) return down<2>(taps, i, ring, out);
  down<3>(taps, i, ring, out);
}

// Four rows of `columns` bytes to a quad of rows.
FASTEMBED_INLINE void join_rows(const uint8_t* rows, int64_t pitch, int64_t columns,
                                uint8_t* quad) {
  for (int64_t x = 0; x < columns; x += 64, quad += 256) {
    __m512i row[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) row[r] = transpose_lanes(load(rows + r * pitch + x));
    const __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]);
    const __m512i high01 = _mm512_unpackhi_epi8(row[0], row[1]);
    const __m512i high23 = _mm512_unpackhi_epi8(row[2], row[3]);
    store(quad, _mm512_unpacklo_epi16(low01, low23));
    store(quad + 64, _mm512_unpackhi_epi16(low01, low23));
    store(quad + 128, _mm512_unpacklo_epi16(high01, high23));
    store(quad + 192, _mm512_unpackhi_epi16(high01, high23));
  }
}

// And back.
FASTEMBED_INLINE void split_rows(const uint8_t* quad, int64_t columns, uint8_t* rows,
                                 int64_t pitch) {
  const __m512i by_row =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int64_t x = 0; x < columns; x += 64, quad += 256) {
    __m512i part[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) part[v] = _mm512_shuffle_epi8(load(quad + 64 * v), by_row);
    const __m512i low01 = _mm512_unpacklo_epi32(part[0], part[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(part[2], part[3]);
    const __m512i high01 = _mm512_unpackhi_epi32(part[0], part[1]);
    const __m512i high23 = _mm512_unpackhi_epi32(part[2], part[3]);
    store(rows + x, transpose_lanes(_mm512_unpacklo_epi64(low01, low23)));
    store(rows + pitch + x, transpose_lanes(_mm512_unpackhi_epi64(low01, low23)));
    store(rows + 2 * pitch + x, transpose_lanes(_mm512_unpacklo_epi64(high01, high23)));
    store(rows + 3 * pitch + x, transpose_lanes(_mm512_unpackhi_epi64(high01, high23)));
  }
}

// 64 levels to elements of kBytes bytes, of which `count` are written. `planes` has a table of
// 256 for each byte of an element.
template <int kBytes>
FASTEMBED_INLINE void store_elements(const Table (&planes)[kBytes], __m512i levels, int64_t count,
                                     uint8_t* out) {
  const auto store_part = [&](int part, __m512i value) {
    const int64_t bytes = count * kBytes - 64 * part;
    if (bytes >= 64) {
      store(out + 64 * part, value);
    } else if (bytes > 0) {
      _mm512_mask_storeu_epi8(out + 64 * part, lowest(bytes), value);
    }
  };
  // The bytes of an element are put together within 16 bytes: in such an order they go in.
  if constexpr (kBytes == 1) {
    store_part(0, look_up(planes[0], levels));
  } else if constexpr (kBytes == 2) {
    levels = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), levels);
    const __m512i low = look_up(planes[0], levels), high = look_up(planes[1], levels);
    store_part(0, _mm512_unpacklo_epi8(low, high));
    store_part(1, _mm512_unpackhi_epi8(low, high));
  } else {
    levels = transpose_lanes(levels);
    __m512i byte[4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) byte[b] = look_up(planes[b], levels);
    const __m512i low01 = _mm512_unpacklo_epi8(byte[0], byte[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(byte[2], byte[3]);
    const __m512i high01 = _mm512_unpackhi_epi8(byte[0], byte[1]);
    const __m512i high23 = _mm512_unpackhi_epi8(byte[2], byte[3]);
    store_part(0, _mm512_unpacklo_epi16(low01, low23));
    store_part(1, _mm512_unpackhi_epi16(low01, low23));
    store_part(2, _mm512_unpacklo_epi16(high01, high23));
    store_part(3, _mm512_unpackhi_epi16(high01, high23));
  }
}

// Output row y. The target's table is [3, kBytes, 256] here.
template <int kBytes>
FASTEMBED_INLINE void look_up_row(const uint8_t* levels, int64_t stride, const Target& target,
                                  int64_t y) {
  const auto* table = static_cast<const uint8_t*>(target.table);
  auto* out = static_cast<uint8_t*>(target.out) + y * target.size * kBytes;
  for (int c = 0; c < 3; ++c) {
    Table planes[kBytes];
#pragma GCC unroll 4
    for (int b = 0; b < kBytes; ++b) planes[b] = load_table(table + 256 * (c * kBytes + b));
    for (int64_t x = 0; x < target.size; x += 64) {
      store_elements<kBytes>(planes, load(levels + c * stride + x), target.size - x,
                             out + x * kBytes);
    }
    out += target.size * target.size * kBytes;
  }
}

FASTEMBED_INLINE void look_up_row(const uint8_t* levels, int64_t stride, const Target& target,
                                  int64_t y) {
  switch (target.value_bytes) {
    case 1:
      return look_up_row<1>(levels, stride, target, y);
    case 2:
      return look_up_row<2>(levels, stride, target, y);
    case 4:
      return look_up_row<4>(levels, stride, target, y);
  }
}

void across_then_down(const Source& source, const uint8_t* background, const Digits& columns,
                      const Digits& rows, const Scratch& scratch, const Target& target) {
  const Table fade = load_table(background);
  const Ring& ring = scratch.ring;
  int64_t done = 0;  // output rows
  for (int64_t y = 0; y < source.height; y += 16) {
    const int64_t end = std::min(y + 16, source.height);
    for (int64_t r = y; r < end; ++r) {
      fade_row(source, r, fade, scratch.rows + (r - y) * scratch.row_pitch);
    }
    uint8_t* quad[4];
    for (int q = 0; q < 4; ++q) quad[q] = ring.bytes + (y / 4 + q) % ring.slots * 4 * ring.columns;
    across(columns, scratch, source.width, {&source, end, std::min(end + 16, source.height), 0},
           quad);
    for (; done < target.size && rows.last[done] <= end; ++done) {
      down(rows, done, ring, scratch.levels);
      look_up_row(scratch.levels, scratch.out_stride, target, done);
    }
  }
}

void down_then_across(const Source& source, const uint8_t* background, const Digits& columns,
                      const Digits& rows, const Scratch& scratch, const Target& target) {
  const Table fade = load_table(background);
  const Ring& ring = scratch.ring;
  uint8_t* quad[4];
  for (int q = 0; q < 4; ++q) quad[q] = scratch.quads + q * 4 * scratch.out_columns;
  int64_t loaded = 0;  // source rows
  for (int64_t y = 0; y < target.size; y += 16) {
    const int64_t end = std::min(y + 16, target.size);
    for (int64_t i = y; i < end; ++i) {
      // Output rows of this block are not in `rows` yet: they follow the four that come in.
      for (; loaded < rows.last[i]; loaded += 4) {
        for (int64_t r = loaded; r < std::min(loaded + 4, source.height); ++r) {
          fade_row(source, r, fade, scratch.rows + (r - loaded + 16) * scratch.row_pitch);
        }
        join_rows(scratch.rows + 16 * scratch.row_pitch, scratch.row_pitch, ring.columns,
                  ring.bytes + loaded / 4 % ring.slots * 4 * ring.columns);
      }
      down(rows, i, ring, scratch.rows + (i - y) * scratch.row_pitch);
    }
    across(columns, scratch, source.width, {&source, 0, 0, 0}, quad);
    for (int q = 0; q < 4; ++q) {
      split_rows(quad[q], scratch.out_columns, scratch.levels + 4 * q * scratch.out_columns,
                 scratch.out_columns);
    }
    for (int64_t i = y; i < end; ++i) {
      look_up_row(scratch.levels + (i - y) * scratch.out_columns, scratch.out_stride, target, i);
    }
  }
}
