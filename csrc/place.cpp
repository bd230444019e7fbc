// Moves a block into a larger array, past the caches: what is read next is not what was written
// last, and a line that is written whole need not be read from memory first.
#include <cstdint>
#include <cstring>

#include "kernels.h"
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace fastembed::cpu {
namespace {

void place_row(const char* row, char* out, int64_t bytes) {
#if defined(__x86_64__)
  if (reinterpret_cast<uintptr_t>(out) % 16 == 0 && bytes % 16 == 0) {
    for (int64_t i = 0; i < bytes; i += 16) {
      const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i));
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), values);
    }
    return;
  }
#endif
  std::memcpy(out, row, bytes);
}

}  // namespace

void place_block(const PlaceBlock& op) {
  for (int64_t i = 0; i < op.sizes[0]; ++i) {
    for (int64_t j = 0; j < op.sizes[1]; ++j) {
      const char* row = op.block + i * op.block_pitch[0] + j * op.block_pitch[1];
      char* out = op.out + i * op.out_pitch[0] + j * op.out_pitch[1];
      for (int64_t k = 0; k < op.sizes[2]; ++k) {
        place_row(row, out, op.row_bytes);
        row += op.block_pitch[2];
        out += op.out_pitch[2];
      }
    }
  }
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace fastembed::cpu
