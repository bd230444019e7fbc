// Where the runs of equal pixels of a label map's rows end: panoptic and labels look alike.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "simd.h"

namespace fastembed::cpu {

template <class Word>
FASTEMBED_INLINE Word load(const uint8_t* bytes) {
  Word word;
  memcpy(&word, bytes, sizeof word);
  return word;
}

using Bytes16 = uint8_t __attribute__((vector_size(16)));

// Bit i says whether byte i is not 0.
FASTEMBED_INLINE uint64_t nonzero_bits(Bytes16 bytes) {
#ifdef __SSE2__
  const auto zeros = reinterpret_cast<__m128i>(bytes == 0);
  return static_cast<uint64_t>(_mm_movemask_epi8(zeros)) ^ 0xffff;
#else
  uint64_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint64_t>(bytes[i] != 0) << i;
  return bits;
#endif
}

// The pixels of a row where a signal has a byte that is not 0, one after the other. Label maps
// are runs, so most of a row is nothing; it goes by in blocks of 64 bytes, and what else there
// is costs few branches that a processor cannot foresee.
template <int kPixelBytes, class Signal>
class Breaks {
 public:
  // Looks at pixels first and later.
  FASTEMBED_INLINE Breaks(const Signal& signal, int64_t first, int64_t width)
      : signal_(signal), begin_(first * kPixelBytes), end_(width * kPixelBytes), width_(width) {
    next_block_ = seen_ = begin_;
  }

  // The next pixel, or the row's width after the last.
  FASTEMBED_INLINE int64_t next() {
    while (bits_ == 0) {
      if (next_block_ >= end_) return width_;
      block_ = next_block_;
      next_block_ += 64;
      bits_ = block_bits() >> (seen_ - block_) << (seen_ - block_);
      seen_ = next_block_;
    }
    const int64_t pixel = (block_ + __builtin_ctzll(bits_)) / kPixelBytes;
    const int64_t after = (pixel + 1) * kPixelBytes;  // its other bytes do not count again
    bits_ = after < next_block_ ? bits_ >> (after - block_) << (after - block_) : 0;
    if (after > seen_) seen_ = after;
    return pixel;
  }

 private:
  // Of the 64 bytes at block_, but none at end_ or later.
  FASTEMBED_INLINE uint64_t block_bits() const {
    if (next_block_ <= end_) return bits_at(block_);
    if (end_ - begin_ >= 64) return bits_at(end_ - 64) >> (next_block_ - end_);
    uint64_t bits = 0;
    for (int64_t i = block_; i < end_; ++i) {
      bits |= static_cast<uint64_t>(signal_.template at<uint8_t>(i) != 0) << (i - block_);
    }
    return bits;
  }

  FASTEMBED_INLINE uint64_t bits_at(int64_t i) const {
    uint64_t bits = 0;
    for (int k = 0; k < 64; k += 16) {
      bits |= nonzero_bits(signal_.template at<Bytes16>(i + k)) << k;
    }
    return bits;
  }

  const Signal signal_;
  int64_t begin_, end_, width_;
  int64_t block_ = 0, next_block_, seen_;
  uint64_t bits_ = 0;
};

// Where a row's bytes differ from those of the pixel to the left.
template <int kPixelBytes>
struct Changes {
  const uint8_t* row;

  template <class Word>
  FASTEMBED_INLINE Word at(int64_t i) const {
    return load<Word>(row + i) ^ load<Word>(row + i - kPixelBytes);
  }
};

}  // namespace fastembed::cpu
