// Contract: fastembed/ops/volumes.py.
#include "bindings.h"

namespace fastembed {
namespace {

constexpr int kDepth = 1, kHeight = 2, kWidth = 3;  // axes of out
// Of xy, xz and yz the axes of out that slices, rows and columns lie along.
constexpr int kAxes[3][3] = {
    {kDepth, kHeight, kWidth}, {kHeight, kDepth, kWidth}, {kWidth, kDepth, kHeight}};

TriplaneAccumulate triplane_op(const Tensors& planes, const Tensor& at, const Tensor& weight,
                               const Tensor& out) {
  check_layout("triplane_accumulate", out, {at, weight});
  STD_TORCH_CHECK(out.dim() == 4 && out.numel() > 0, "out must be [C, D, H, W], none of them 0");
  STD_TORCH_CHECK(planes.size() == 3, "planes must be xy, xz and yz");
  const int64_t voxels = 2 * (out.size(kDepth) + out.size(kHeight) + out.size(kWidth));
  STD_TORCH_CHECK(at.scalar_type() == ScalarType::Int && at.dim() == 2 && at.size(0) == 2 &&
                      at.size(1) == voxels,
                  "at must be int32 [2, ", voxels, "]");
  STD_TORCH_CHECK(
      weight.scalar_type() == ScalarType::Float && weight.dim() == 1 && weight.size(0) == voxels,
      "weight must be float32 [", voxels, "]");
  TriplaneAccumulate op{};
  op.value = real_of(out);
  STD_TORCH_CHECK(op.value != Real::kBFloat16, "out must be float32 or float16");
  Taps taps{static_cast<const int32_t*>(at.const_data_ptr()), nullptr,
            static_cast<const float*>(weight.const_data_ptr())};
  taps.high = taps.low + voxels;
  const auto next = [&](int64_t length) {
    const Taps part = taps;
    taps.low += length;
    taps.high += length;
    taps.weight += length;
    return part;
  };
  int present = 0;
  for (int i = 0; i < 3; ++i) {
    TokenPlane& plane = op.planes[i];
    plane.row = next(out.size(kAxes[i][1]));
    plane.column = next(out.size(kAxes[i][2]));
    const Tensor& tokens = planes[i];
    if (tokens.numel() == 0) continue;
    STD_TORCH_CHECK(tokens.device() == out.device(), "planes must be on out's device");
    STD_TORCH_CHECK(tokens.dim() == 4 && tokens.size(0) == out.size(kAxes[i][0]) &&
                        tokens.size(1) == out.size(0),
                    "a plane must be [", out.size(kAxes[i][0]), ", ", out.size(0), ", h, w]");
    plane.rows = tokens.size(2);
    plane.columns = tokens.size(3);
    STD_TORCH_CHECK((plane.columns == 1 || tokens.stride(3) == 1) &&
                        (plane.rows == 1 || tokens.stride(2) == plane.columns),
                    "a plane's grids must be contiguous");
    STD_TORCH_CHECK(present == 0 || op.token == real_of(tokens), "planes must be of one dtype");
    op.token = real_of(tokens);
    plane.tokens = tokens.const_data_ptr();
    plane.slice_pitch = tokens.stride(0);
    plane.channel_pitch = tokens.stride(1);
    ++present;
  }
  STD_TORCH_CHECK(present > 0, "at least one plane must be there");
  op.scale = 1.0f / static_cast<float>(present);
  op.out = out.mutable_data_ptr();
  op.channels = out.size(0);
  op.depth = out.size(kDepth);
  op.height = out.size(kHeight);
  op.width = out.size(kWidth);
  return op;
}

void check_taps(const Taps& taps, int64_t length, int64_t tokens) {
  for (int64_t i = 0; i < length; ++i) {
    STD_TORCH_CHECK(0 <= taps.low[i] && taps.low[i] <= taps.high[i] && taps.high[i] < tokens,
                    "voxel ", i, " lies between tokens ", taps.low[i], " and ", taps.high[i],
                    " of ", tokens);
    STD_TORCH_CHECK(i == 0 || (taps.low[i - 1] <= taps.low[i] && taps.high[i - 1] <= taps.high[i]),
                    "voxel ", i, " lies before voxel ", i - 1);
  }
}

void triplane_accumulate_cpu(const Tensors& planes, const Tensor& at, const Tensor& weight,
                             const Tensor& out) {
  const TriplaneAccumulate op = triplane_op(planes, at, weight, out);
  // On a CUDA device they stay there: reading them back would wait for the stream.
  for (int i = 0; i < 3; ++i) {
    const TokenPlane& plane = op.planes[i];
    if (plane.tokens == nullptr) continue;
    check_taps(plane.row, out.size(kAxes[i][1]), plane.rows);
    check_taps(plane.column, out.size(kAxes[i][2]), plane.columns);
  }
  cpu::triplane_accumulate(op);
}

// Contract: fastembed/volumes/chunks.py.
void place_block_cpu(const Tensor& block, const Tensor& out) {
  const int64_t axes = block.dim();
  STD_TORCH_CHECK(1 <= axes && axes <= 4 && out.dim() == axes, "block and out must have 1..4 axes");
  STD_TORCH_CHECK(block.scalar_type() == out.scalar_type(), "block and out must be of one dtype");
  STD_TORCH_CHECK(block.stride(axes - 1) == 1 && out.stride(axes - 1) == 1,
                  "rows of block and out must be contiguous");
  const int64_t item = block.element_size();
  PlaceBlock op{static_cast<const char*>(block.const_data_ptr()),
                static_cast<char*>(out.mutable_data_ptr()),
                {1, 1, 1},
                {},
                {},
                block.size(axes - 1) * item};
  for (int64_t axis = 0; axis < axes; ++axis) {
    STD_TORCH_CHECK(block.size(axis) == out.size(axis), "block and out must be of one shape");
    if (axis == axes - 1) break;
    const int64_t slot = axis + 4 - axes;
    op.sizes[slot] = block.size(axis);
    op.block_pitch[slot] = block.stride(axis) * item;
    op.out_pitch[slot] = out.stride(axis) * item;
  }
  cpu::place_block(op);
}

#ifdef FASTEMBED_CUDA

void triplane_accumulate_cuda(const Tensors& planes, const Tensor& at, const Tensor& weight,
                              const Tensor& out) {
  launch(cuda::triplane_accumulate, triplane_op(planes, at, weight, out), out);
}

#endif  // FASTEMBED_CUDA

}  // namespace
}  // namespace fastembed

STABLE_TORCH_LIBRARY_FRAGMENT(fastembed, library) {
  library.def(
      "triplane_accumulate(Tensor[] planes, Tensor at, Tensor weight, Tensor(a!) out) -> ()");
  library.def("place_block(Tensor block, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastembed, CPU, library) {
  library.impl("triplane_accumulate", TORCH_BOX(&fastembed::triplane_accumulate_cpu));
  library.impl("place_block", TORCH_BOX(&fastembed::place_block_cpu));
}

#ifdef FASTEMBED_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastembed, CUDA, library) {
  library.impl("triplane_accumulate", TORCH_BOX(&fastembed::triplane_accumulate_cuda));
}
#endif
