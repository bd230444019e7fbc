// A table's value for each level of a row: what a pixel becomes after quantisation.
#pragma once

#include <array>
#include <cstdint>

#include "simd.h"

namespace fastembed::cpu {

#ifdef FASTEMBED_AVX512

// Where a level must lie so that its value's bytes come out in order: they are interleaved inside
// lanes of 16 bytes, and a lane spreads over as many vectors as a value has bytes.
template <int kBytes>
constexpr std::array<uint8_t, 64> interleaved_order() {
  constexpr int kRun = 16 / kBytes;
  std::array<uint8_t, 64> order{};
  for (int vector = 0; vector < kBytes; ++vector) {
    for (int lane = 0; lane < 4; ++lane) {
      for (int i = 0; i < kRun; ++i) {
        order[16 * lane + kRun * vector + i] = static_cast<uint8_t>((4 * vector + lane) * kRun + i);
      }
    }
  }
  return order;
}

template <int kBytes>
alignas(64) inline constexpr std::array<uint8_t, 64> kInterleaved = interleaved_order<kBytes>();

// Stores the vector-th part of 64 values, but only those that are there.
template <class Value>
FASTEMBED_AVX512 inline void store_part(int vector, uint64_t there, __m512i part, Value* out) {
  constexpr int kLanes = 64 / sizeof(Value);
  const uint64_t mine = there >> kLanes * vector;
  out += kLanes * vector;
  if constexpr (sizeof(Value) == 1) {
    _mm512_mask_storeu_epi8(out, mine, part);
  } else if constexpr (sizeof(Value) == 2) {
    _mm512_mask_storeu_epi16(out, static_cast<__mmask32>(mine), part);
  } else {
    _mm512_mask_storeu_epi32(out, static_cast<__mmask16>(mine), part);
  }
}

// `split` holds the first bytes of all 256 values, then the second bytes, and so on. 256 bytes are
// four registers, and one instruction looks 64 levels up in two of them.
template <class Value>
FASTEMBED_AVX512 void look_up_avx512(const uint8_t* split, const uint8_t* levels, int64_t count,
                                     Value* out) {
  constexpr int kBytes = sizeof(Value);
  __m512i table[kBytes][4];
  for (int i = 0; i < 4 * kBytes; ++i) table[i / 4][i % 4] = _mm512_load_si512(split + 64 * i);
  const __m512i order = _mm512_load_si512(kInterleaved<kBytes>.data());
  for (int64_t i = 0; i < count; i += 64) {
    const uint64_t there = count - i < 64 ? (uint64_t{1} << (count - i)) - 1 : ~uint64_t{0};
    const __m512i level =
        _mm512_permutexvar_epi8(order, _mm512_maskz_loadu_epi8(there, levels + i));
    const __mmask64 upper = _mm512_movepi8_mask(level);
    __m512i byte[kBytes];
    for (int b = 0; b < kBytes; ++b) {
      byte[b] =
          _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[b][0], level, table[b][1]),
                                 _mm512_permutex2var_epi8(table[b][2], level, table[b][3]));
    }
    if constexpr (kBytes == 1) {
      store_part(0, there, byte[0], out + i);
    } else if constexpr (kBytes == 2) {
      store_part(0, there, _mm512_unpacklo_epi8(byte[0], byte[1]), out + i);
      store_part(1, there, _mm512_unpackhi_epi8(byte[0], byte[1]), out + i);
    } else {
      const __m512i low[] = {_mm512_unpacklo_epi8(byte[0], byte[1]),
                             _mm512_unpackhi_epi8(byte[0], byte[1])};
      const __m512i high[] = {_mm512_unpacklo_epi8(byte[2], byte[3]),
                              _mm512_unpackhi_epi8(byte[2], byte[3])};
      for (int half = 0; half < 2; ++half) {
        store_part(2 * half, there, _mm512_unpacklo_epi16(low[half], high[half]), out + i);
        store_part(2 * half + 1, there, _mm512_unpackhi_epi16(low[half], high[half]), out + i);
      }
    }
  }
}

#endif  // FASTEMBED_AVX512

// A table of 256 values, by which many rows are looked up.
template <class Value>
class Lookup {
 public:
  explicit Lookup(const Value* table) {
    for (int64_t i = 0; i < 256; ++i) {
      table_[i] = table[i];
#ifdef FASTEMBED_AVX512
      for (int64_t b = 0; b < kBytes; ++b) {
        split_[256 * b + i] = static_cast<uint8_t>(table[i] >> 8 * b);
      }
#endif
    }
  }

  FASTEMBED_INLINE void operator()(const uint8_t* levels, int64_t count, Value* out) const {
#ifdef FASTEMBED_AVX512
    if (has_avx512()) return look_up_avx512(split_, levels, count, out);
#endif
    for (int64_t i = 0; i < count; ++i) out[i] = table_[levels[i]];
  }

 private:
  static constexpr int64_t kBytes = sizeof(Value);

  Value table_[256];
#ifdef FASTEMBED_AVX512
  alignas(64) uint8_t split_[256 * kBytes];
#endif
};

}  // namespace fastembed::cpu
