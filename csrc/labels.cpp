// Contract: fastembed/ops/labels.py.
#include "labels.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "runs.h"

namespace fastembed::cpu {
namespace {

// Of one object's pixels in a row, x1 inside.
struct Run {
  int64_t label, x0, x1;
};

// The runs of a row but the background's. Returns how many.
template <class T>
FASTEMBED_INLINE int64_t runs_of(const void* labels, int64_t y, int64_t width, Run* runs) {
  const T* line = static_cast<const T*>(labels) + y * width;
  const auto* bytes = reinterpret_cast<const uint8_t*>(line);
  Breaks<sizeof(T), Changes<sizeof(T)>> breaks({bytes}, 1, width);
  Run* run = runs;
  for (int64_t x = 0; x < width;) {
    const int64_t next = breaks.next();
    *run = {static_cast<int64_t>(line[x]), x, next - 1};
    run += line[x] != 0;
    x = next;
  }
  return run - runs;
}

FASTEMBED_INLINE int64_t row_runs(const LabelStatistics& op, int64_t y, Run* runs) {
  switch (op.label) {
    case Label::kUInt8:
      return runs_of<uint8_t>(op.labels, y, op.width, runs);
    case Label::kUInt16:
      return runs_of<uint16_t>(op.labels, y, op.width, runs);
    case Label::kInt32:
      return runs_of<int32_t>(op.labels, y, op.width, runs);
    case Label::kUInt32:
      return runs_of<uint32_t>(op.labels, y, op.width, runs);
    default:
      return runs_of<int64_t>(op.labels, y, op.width, runs);
  }
}

// Adds a run to its object's row; a new object takes one. Null where there is no room for it.
FASTEMBED_INLINE int64_t* add_run(const LabelStatistics& op, const Run& run, int64_t y) {
  const int64_t columns = columns_of(op.channels);
  for (LabelProbe probe(run.label, op.slots);; probe.next()) {
    int64_t* row = op.out + (1 + probe.slot) * columns;
    if (row[kArea] == 0) {
      if (++op.out[kId] > op.slots / 2) return nullptr;
      const int64_t first[] = {run.label, y, run.x0, y, run.x1, run.x1 - run.x0 + 1};
      std::copy_n(first, static_cast<int64_t>(kChannels), row);
      for (int64_t* channel = row + kChannels; channel < row + columns; channel += kPerChannel) {
        channel[kLow] = std::numeric_limits<int64_t>::max();
        channel[kHigh] = std::numeric_limits<int64_t>::min();
      }
      return row;
    }
    if (row[kId] == run.label) {  // rows come from the top, so y0 stands
      row[kX0] = std::min(row[kX0], run.x0);
      row[kX1] = std::max(row[kX1], run.x1);
      row[kY1] = y;
      row[kArea] += run.x1 - run.x0 + 1;
      return row;
    }
  }
}

template <class T>
FASTEMBED_INLINE void add_pixels(const T* pixels, int64_t count, int64_t* channel) {
  T low = pixels[0], high = pixels[0];
  // 32 bits are half the vector of 64 and hold the sum of 65536 pixels of 16 bits.
  constexpr int64_t kStretch = 65536;
  for (int64_t begin = 0; begin < count; begin += kStretch) {
    const int64_t end = std::min(begin + kStretch, count);
    uint32_t sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      sum += pixels[i];
      low = std::min(low, pixels[i]);
      high = std::max(high, pixels[i]);
    }
    channel[kSum] += sum;
  }
  channel[kLow] = std::min<int64_t>(channel[kLow], low);
  channel[kHigh] = std::max<int64_t>(channel[kHigh], high);
}

// Pixel after pixel, across the object's runs: the order of the sum is promised.
FASTEMBED_INLINE void add_pixels(const float* pixels, int64_t count, int64_t* channel) {
  double sum;
  memcpy(&sum, &channel[kSum], sizeof sum);
  int64_t low = channel[kLow], high = channel[kHigh];
  for (int64_t i = 0; i < count; ++i) {
    sum += static_cast<double>(pixels[i]);
    int32_t bits;
    memcpy(&bits, &pixels[i], sizeof bits);
    low = std::min(low, order_key(bits));
    high = std::max(high, order_key(bits));
  }
  memcpy(&channel[kSum], &sum, sizeof sum);
  channel[kLow] = low;
  channel[kHigh] = high;
}

template <class T>
FASTEMBED_INLINE void statistics(const LabelStatistics& op) {
  const int64_t columns = columns_of(op.channels), plane = op.height * op.width;
  memset(op.out, 0, (1 + op.slots) * columns * sizeof(int64_t));
  std::vector<Run> runs(op.width + 1);
  for (int64_t y = 0; y < op.height; ++y) {
    const int64_t count = row_runs(op, y, runs.data());
    const T* line = static_cast<const T*>(op.image) + y * op.width;
    for (int64_t i = 0; i < count; ++i) {
      const Run run = runs[i];
      int64_t* row = add_run(op, run, y);
      if (row == nullptr) return;
      for (int64_t c = 0; c < op.channels; ++c) {
        add_pixels(line + c * plane + run.x0, run.x1 - run.x0 + 1,
                   row + kChannels + kPerChannel * c);
      }
    }
  }
}

}  // namespace

FASTEMBED_SIMD void label_statistics(const LabelStatistics& op) {
  switch (op.pixel) {
    case Pixel::kUInt8:
      return statistics<uint8_t>(op);
    case Pixel::kUInt16:
      return statistics<uint16_t>(op);
    default:
      return statistics<float>(op);
  }
}

}  // namespace fastembed::cpu
