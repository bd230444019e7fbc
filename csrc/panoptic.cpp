// Contract: fastembed/ops/panoptic.py.
#include "panoptic.h"

#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "runs.h"

namespace fastembed::cpu {
namespace {

class Table {
 public:
  FASTEMBED_INLINE Table(Segment* out, int64_t slots, int64_t void_id)
      : header_(*out), rows_(out + 1), slots_(slots), void_id_(void_id) {
    memset(out, 0, (1 + slots) * sizeof *out);
  }

  // A run of one id, x0 and x1 inside. False where there is no room for a new id.
  FASTEMBED_INLINE bool add(int32_t id, int64_t y, int64_t x0, int64_t x1) {
    if (id == void_id_) return true;
    for (Probe probe(id, slots_);; probe.next()) {
      Segment& row = rows_[probe.slot];
      if (row.area == 0) {
        if (++header_.id > slots_ / 2) return false;
        row = {id, y, x0, y, x1, x1 - x0 + 1};
        return true;
      }
      if (row.id == id) {  // rows come from the top, so y0 stands
        if (x0 < row.x0) row.x0 = x0;
        if (x1 > row.x1) row.x1 = x1;
        row.y1 = y;
        row.area += x1 - x0 + 1;
        return true;
      }
    }
  }

 private:
  Segment& header_;
  Segment* rows_;
  int64_t slots_, void_id_;
};

template <int kPixelBytes>
FASTEMBED_INLINE int32_t id_of(const uint8_t* pixel) {
  if (kPixelBytes == 4) return load<int32_t>(pixel);
  return pixel[0] | pixel[1] << 8 | pixel[2] << 16;
}

// Adds the runs of row y, of packed RGB or of int32 ids. False where an id finds no room.
template <int kPixelBytes>
FASTEMBED_INLINE bool add_row(const uint8_t* row, int64_t width, int64_t y, Table& table) {
  Breaks<kPixelBytes, Changes<kPixelBytes>> breaks({row}, 1, width);
  for (int64_t x = 0; x < width;) {
    const int64_t next = breaks.next();
    if (!table.add(id_of<kPixelBytes>(row + x * kPixelBytes), y, x, next - 1)) return false;
    x = next;
  }
  return true;
}

template <int kPixelBytes>
FASTEMBED_INLINE void segments(const void* pixels, const PanopticSegments& op) {
  Table table(op.out, op.slots, op.void_id);
  const uint8_t* row = static_cast<const uint8_t*>(pixels);
  for (int64_t y = 0; y < op.height; ++y, row += op.width * kPixelBytes) {
    if (!add_row<kPixelBytes>(row, op.width, y, table)) return;
  }
}

FASTEMBED_INLINE void decode(const uint8_t* rgb, int64_t pixels, int32_t* ids) {
  int64_t i = 0;
#if __has_builtin(__builtin_shufflevector)
  // Four pixels out of 16 bytes, of which the last four wait for the next turn. Left to the
  // compiler's own vectors, 640x427 pixels take 72 us instead of 30 (Xeon with AVX-512).
  for (; 3 * i + 16 <= 3 * pixels; i += 4) {
    const auto four = load<Bytes16>(rgb + 3 * i);
    const Bytes16 wide = __builtin_shufflevector(four, Bytes16{}, 0, 1, 2, 16, 3, 4, 5, 16, 6, 7, 8,
                                                 16, 9, 10, 11, 16);
    memcpy(ids + i, &wide, sizeof wide);
  }
#endif
  for (; i < pixels; ++i) ids[i] = id_of<3>(rgb + 3 * i);
}

// The two PNG filters that look left. Where a filter's signal is 0, so is the difference of
// the unfiltered row to its left neighbour.
struct Sub {
  const uint8_t* line;
  const uint8_t* row;

  template <class Word>
  FASTEMBED_INLINE Word at(int64_t i) const {
    return load<Word>(line + i);
  }
  FASTEMBED_INLINE int predict(int64_t i) const { return row[i - 3]; }
};

struct Paeth {
  const uint8_t* line;
  const uint8_t* row;
  const uint8_t* above;

  // Where the row above goes on, b is c, and a + b - c is a.
  template <class Word>
  FASTEMBED_INLINE Word at(int64_t i) const {
    return load<Word>(line + i) | (load<Word>(above + i) ^ load<Word>(above + i - 3));
  }
  FASTEMBED_INLINE int predict(int64_t i) const {
    const int a = row[i - 3], b = above[i], c = above[i - 3];
    const int pa = std::abs(b - c), pb = std::abs(a - c), pc = std::abs(a + b - 2 * c);
    return pa <= pb && pa <= pc ? a : pb <= pc ? b : c;
  }
};

// Repeats the pixel left of `to` up to `end`, and at most 23 bytes further.
FASTEMBED_INLINE void repeat_left(uint8_t* to, const uint8_t* end) {
  const uint64_t rgb = to[-3] | to[-2] << 8 | to[-1] << 16;
  const uint64_t words[3] = {rgb | rgb << 24 | rgb << 48,
                             rgb >> 16 | rgb << 8 | rgb << 32 | rgb << 56,
                             rgb >> 8 | rgb << 16 | rgb << 40};
  for (; to < end; to += sizeof words) memcpy(to, words, sizeof words);
}

template <class Filter>
FASTEMBED_INLINE void unfilter_left(const Filter& filter, int64_t width, uint8_t* row) {
  Breaks<3, Filter> breaks(filter, 0, width);
  for (int64_t x = 0; x < width; ++x) {
    const int64_t next = breaks.next();
    repeat_left(row + 3 * x, row + 3 * next);
    x = next;
    if (x == width) return;
    for (int64_t i = 3 * x; i < 3 * x + 3; ++i) {
      row[i] = static_cast<uint8_t>(filter.line[i] + filter.predict(i));
    }
  }
}

// One scanline. Left of `row` and `above` there are three zeros, right of `row` room for 23
// bytes that mean nothing.
FASTEMBED_INLINE void unfilter(int type, const uint8_t* line, int64_t width, const uint8_t* above,
                               uint8_t* row) {
  const int64_t end = 3 * width;
  switch (type) {
    case 1:
      return unfilter_left(Sub{line, row}, width, row);
    case 2:
      for (int64_t i = 0; i < end; ++i) row[i] = static_cast<uint8_t>(line[i] + above[i]);
      return;
    case 3:
      for (int64_t i = 0; i < end; ++i) {
        row[i] = static_cast<uint8_t>(line[i] + ((row[i - 3] + above[i]) >> 1));
      }
      return;
    case 4:
      return unfilter_left(Paeth{line, row, above}, width, row);
    default:
      memcpy(row, line, end);
  }
}

}  // namespace

FASTEMBED_SIMD void decode_panoptic(const DecodePanoptic& op) { decode(op.rgb, op.pixels, op.out); }

FASTEMBED_SIMD void panoptic_segments(const PanopticSegments& op) {
  if (op.rgb != nullptr) return segments<3>(op.rgb, op);
  return segments<4>(op.ids, op);
}

FASTEMBED_SIMD void scanline_segments(const ScanlineSegments& op) {
  Table table(op.out, op.slots, op.void_id);
  const int64_t bytes = 3 * op.width;
  std::vector<uint8_t> memory(2 * (bytes + 32));  // two rows, each with a margin on both sides
  uint8_t* row = memory.data() + 8;
  uint8_t* above = row + bytes + 32;
  const uint8_t* line = op.lines;
  for (int64_t y = 0; y < op.height; ++y, line += 1 + bytes, std::swap(row, above)) {
    unfilter(*line, line + 1, op.width, above, row);
    if (op.ids != nullptr) decode(row, op.width, op.ids + y * op.width);
    if (!add_row<3>(row, op.width, y, table)) return;
  }
}

}  // namespace fastembed::cpu
