// blend_crops of either kind on random crops of random images, in buffers that end where the
// data ends: every instruction set that runs here against a plain resize. Arguments: seconds,
// first seed. Its own translation unit of the kernels, to call each instruction set by name.
//   cmake -B build/fuzz -DFASTEMBED_FUZZ=ON && cmake --build build/fuzz
//   build/fuzz/fuzz_masks 60
#include "../../csrc/masks.cpp"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

namespace fastembed {
namespace {

struct Scene {
  std::vector<uint8_t> image;
  std::vector<int32_t> ids;
  std::vector<Crop> crops;
  std::vector<uint8_t> background;
  int64_t height, width, size;
};

Scene scene_of(std::mt19937& random) {
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  const auto side = [&] { return 1 + below(below(8) == 0 ? 400 : below(2) ? 90 : 12); };
  Scene scene{{}, {}, {}, std::vector<uint8_t>(256), side(), side(), 0};
  scene.size = 1 + below(below(4) == 0 ? 150 : 40);
  scene.image.resize(3 * scene.height * scene.width);
  const auto kind = below(3);  // noise; black and white, which overshoots; one level
  for (uint8_t& level : scene.image) {
    level = static_cast<uint8_t>(kind == 0 ? random() : kind == 1 ? 255 * below(2) : 255);
  }
  scene.ids.resize(scene.height * scene.width);
  for (int32_t& id : scene.ids) id = static_cast<int32_t>(below(3) * 0x7fff8001);
  const bool linear = below(2) == 0;
  for (int64_t level = 0; level < 256; ++level) {
    scene.background[level] = static_cast<uint8_t>(linear ? level * 77 / 256 + 89 : random());
  }
  for (int64_t s = below(4); s >= 0; --s) {
    const int64_t top = below(scene.height), left = below(scene.width);
    const int64_t height = s == 0 ? scene.height - top : 1 + below(scene.height - top);
    const int64_t width = s == 0 ? scene.width - left : 1 + below(scene.width - left);
    scene.crops.push_back({0, static_cast<int32_t>(below(3) * 0x7fff8001),
                           static_cast<int32_t>(top), static_cast<int32_t>(left),
                           static_cast<int32_t>(height), static_cast<int32_t>(width)});
  }
  return scene;
}

// A crop's pixel at (y, x).
uint8_t level_at(const Scene& scene, const Crop& crop, int64_t y, int64_t x, int64_t c) {
  const int64_t at = (crop.top + y) * scene.width + crop.left + x;
  const uint8_t level = scene.image[3 * at + c];
  return scene.ids[at] == crop.id ? level : scene.background[level];
}

// [size, length]: what each pixel weighs in each output.
std::vector<double> weights_of(int64_t length, int64_t size, bool cubic) {
  const Axis axis = make_axis(length, size, cubic);
  std::vector<double> weights(size * length);
  for (int64_t i = 0; i < size; ++i) {
    const double center = center_of(axis, i);
    const int32_t first = first_of(axis, center), last = last_of(axis, center);
    double total = 0;
    for (int32_t j = first; j < last; ++j) {
      total += weights[i * length + j] = raw_weight(axis, cubic, center, j);
    }
    for (int32_t j = first; j < last; ++j) weights[i * length + j] /= total;
  }
  return weights;
}

// One pass over `lines` lines: [lines, length] to [lines, size], or transposed both.
std::vector<uint8_t> pass(const std::vector<uint8_t>& levels, int64_t lines, int64_t length,
                          int64_t size, bool transposed, bool cubic, bool narrow) {
  const std::vector<double> weights = weights_of(length, size, cubic);
  const int bits =
      narrow ? narrow_bits(*std::max_element(weights.begin(), weights.end())) : kWeightBits;
  std::vector<uint8_t> out(lines * size);
  for (int64_t y = 0; y < lines; ++y) {
    for (int64_t i = 0; i < size; ++i) {
      int64_t sum = int64_t{1} << bits >> 1;
      for (int64_t j = 0; j < length; ++j) {
        sum += int64_t{fixed_weight(weights[i * length + j], bits)} *
               levels[transposed ? j * lines + y : y * length + j];
      }
      const int64_t level = std::min<int64_t>(std::max<int64_t>(sum >> bits, 0), 255);
      out[transposed ? i * lines + y : y * size + i] = static_cast<uint8_t>(level);
    }
  }
  return out;
}

void fail(const char* what, unsigned seed, int64_t at) {
  fprintf(stderr, "%s differs at element %ld, seed %u\n", what, static_cast<long>(at), seed);
  exit(1);
}

template <class Value>
void check_levels(const Scene& scene, std::mt19937& random, unsigned seed) {
  std::vector<Value> table(3 * 256);
  for (Value& value : table) value = static_cast<Value>(random());
  BlendCrops op{};
  op.image = scene.image.data();
  op.ids = scene.ids.data();
  op.crop = scene.crops.data();
  op.background = scene.background.data();
  op.table = table.data();
  op.value_bytes = sizeof(Value);
  op.height = scene.height;
  op.width = scene.width;
  op.crops = static_cast<int64_t>(scene.crops.size());
  op.size = scene.size;
  op.cubic = random() % 4 != 0;
  op.narrow = random() % 2 == 0;
  op.tall_first = random() % 2 == 0;

  const int64_t size = scene.size;
  std::vector<Value> expected;
  for (const Crop& crop : scene.crops) {
    const int64_t height = crop.height, width = crop.width;
    for (int64_t c = 0; c < 3; ++c) {
      std::vector<uint8_t> levels;
      for (int64_t i = 0; i < height * width; ++i) {
        levels.push_back(level_at(scene, crop, i / width, i % width, c));
      }
      const bool down_first = op.tall_first && is_tall(height, width, size);
      if (down_first) levels = pass(levels, width, height, size, true, op.cubic, op.narrow);
      levels = pass(levels, down_first ? size : height, width, size, false, op.cubic, op.narrow);
      if (!down_first) levels = pass(levels, size, height, size, true, op.cubic, op.narrow);
      for (const uint8_t level : levels) expected.push_back(table[256 * c + level]);
    }
  }

  for (const cpu::Path& path : cpu::kPaths) {
    if (!path.runs_here()) continue;
    std::vector<Value> out(expected.size());
    op.out = out.data();
    path.blend(op);
    const auto [ours, theirs] = std::mismatch(out.begin(), out.end(), expected.begin());
    if (ours != out.end()) fail(path.name, seed, ours - out.begin());
  }
}

void check_floats(const Scene& scene, unsigned seed) {
  const float ramp[] = {0.485f, 0.456f, 0.406f, 0.229f, 0.224f, 0.225f};
  const auto crops = static_cast<int64_t>(scene.crops.size());
  const int64_t size = scene.size;
  std::vector<float> out(crops * 3 * size * size);
  BlendCropsFloat op{};
  op.image = scene.image.data();
  op.ids = scene.ids.data();
  op.crop = scene.crops.data();
  op.background = scene.background.data();
  op.ramp = ramp;
  op.value = Real::kFloat32;
  op.out = out.data();
  op.height = scene.height;
  op.width = scene.width;
  op.crops = crops;
  op.size = size;
  cpu::blend_crops_float(op);
  int64_t at = 0;
  for (const Crop& crop : scene.crops) {
    const int64_t height = crop.height, width = crop.width;
    const std::vector<double> rows = weights_of(height, size, false);
    const std::vector<double> columns = weights_of(width, size, false);
    for (int64_t c = 0; c < 3; ++c) {
      std::vector<double> between(size * width);
      for (int64_t i = 0; i < size; ++i) {
        for (int64_t y = 0; y < height; ++y) {
          const double weight = rows[i * height + y];
          if (weight == 0) continue;
          for (int64_t x = 0; x < width; ++x) {
            between[i * width + x] += weight * level_at(scene, crop, y, x, c);
          }
        }
      }
      for (int64_t i = 0; i < size * size; ++i, ++at) {
        double sum = 0;
        for (int64_t x = 0; x < width; ++x) {
          sum += columns[i % size * width + x] * between[i / size * width + x];
        }
        const double expected = (sum / 255 - ramp[c]) / ramp[3 + c];
        if (!(std::abs(out[at] - expected) <= 4e-6 / ramp[3 + c])) fail("float", seed, at);
      }
    }
  }
}

}  // namespace
}  // namespace fastembed

int main(int count, char** arguments) {
  const double seconds = count > 1 ? atof(arguments[1]) : 10;
  unsigned seed = count > 2 ? static_cast<unsigned>(atol(arguments[2])) : 0;
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  unsigned scenes = 0;
  for (; elapsed() < seconds; ++scenes, ++seed) {
    std::mt19937 random(seed);
    const fastembed::Scene scene = fastembed::scene_of(random);
    fastembed::check_levels<uint8_t>(scene, random, seed);
    fastembed::check_levels<uint16_t>(scene, random, seed);
    fastembed::check_levels<uint32_t>(scene, random, seed);
    fastembed::check_floats(scene, seed);
  }
  for (const fastembed::cpu::Path& path : fastembed::cpu::kPaths) {
    if (path.runs_here()) printf("%s ", path.name);
  }
  printf("on %u images\n", scenes);
}
