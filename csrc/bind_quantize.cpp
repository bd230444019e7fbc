// Contract: fastembed/ops/quantize.py.
#include <cmath>

#include "bindings.h"

namespace fastembed {
namespace {

std::vector<PercentileBounds> percentile_bounds_ops(const Tensors& images, const Tensor& positions,
                                                    const Tensor& out) {
  check_layout("percentile_bounds", out, images);
  const int64_t count = static_cast<int64_t>(images.size()), channels = channels_of(images);
  STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Double && positions.is_contiguous() &&
                      positions.device().is_cpu() && positions.dim() == 2 &&
                      positions.size(0) == count && positions.size(1) == 2,
                  "positions must be float64 [", count, ", 2] on the CPU");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float && out.dim() == 3 &&
                      out.size(0) == count && out.size(1) == channels && out.size(2) == 2,
                  "out must be float32 [", count, ", ", channels, ", 2]");
  const auto* position = static_cast<const double*>(positions.const_data_ptr());
  auto* bounds = static_cast<float*>(out.mutable_data_ptr());
  std::vector<PercentileBounds> ops;
  for (const Tensor& image : images) {
    STD_TORCH_CHECK(image.numel() > 0, "images must have pixels");
    PercentileBounds op{};
    op.pixel = pixel_of(image);
    op.image = image.const_data_ptr();
    op.out = bounds;
    op.channels = channels;
    op.pixels = image.numel() / channels;
    for (Rank* at : {&op.low, &op.high}) {
      STD_TORCH_CHECK(0 <= *position && *position < static_cast<double>(op.pixels), "position ",
                      *position, " is not in ", op.pixels, " pixels");
      const double below = std::floor(*position);
      *at = {static_cast<int64_t>(below), *position++ - below};
    }
    ops.push_back(op);
    bounds += 2 * channels;
  }
  return ops;
}

std::vector<Quantize> quantize_ops(const Tensors& images, const Tensor& ramp, const Tensors& out) {
  const int64_t channels = channels_of(images);
  STD_TORCH_CHECK(out.size() == images.size(), "out must have a tensor per image");
  const Ramp* ramps = ramps_of(ramp, images);
  std::vector<Quantize> ops;
  for (size_t i = 0; i < images.size(); ++i) {
    const Tensor& image = images[i];
    check_layout("quantize", out[i], {image, ramp});
    STD_TORCH_CHECK(out[i].scalar_type() == ScalarType::Byte && out[i].numel() == image.numel(),
                    "out must be uint8 with ", image.numel(), " elements");
    Quantize op{};
    op.pixel = pixel_of(image);
    op.image = image.const_data_ptr();
    op.ramp = ramps + i * channels;
    op.out = static_cast<uint8_t*>(out[i].mutable_data_ptr());
    op.channels = channels;
    op.pixels = channels == 0 ? 0 : image.numel() / channels;
    ops.push_back(op);
  }
  return ops;
}

void percentile_bounds_cpu(const Tensors& images, const Tensor& positions, const Tensor& out) {
  for (const PercentileBounds& op : percentile_bounds_ops(images, positions, out)) {
    cpu::percentile_bounds(op);
  }
}

void quantize_cpu(const Tensors& images, const Tensor& ramp, const Tensors& out) {
  for (const Quantize& op : quantize_ops(images, ramp, out)) cpu::quantize(op);
}

#ifdef FASTEMBED_CUDA

void percentile_bounds_cuda(const Tensors& images, const Tensor& positions, const Tensor& out) {
  std::vector<PercentileBounds> ops = percentile_bounds_ops(images, positions, out);
  const int64_t bytes = cuda::percentile_scratch(ops[0]);
  // From torch's allocator, which knows the stream: it gives the memory to others only behind
  // these kernels, so that nothing here waits for them.
  const Tensor scratch =
      torch::stable::new_empty(out, {bytes * static_cast<int64_t>(ops.size())}, ScalarType::Byte);
  auto* own = static_cast<char*>(scratch.mutable_data_ptr());
  for (PercentileBounds& op : ops) {
    op.scratch = own;
    own += bytes;
  }
  launch(cuda::percentile_bounds, ops, out);
}

void quantize_cuda(const Tensors& images, const Tensor& ramp, const Tensors& out) {
  launch(cuda::quantize, quantize_ops(images, ramp, out), out[0]);
}

#endif  // FASTEMBED_CUDA

}  // namespace
}  // namespace fastembed

STABLE_TORCH_LIBRARY_FRAGMENT(fastembed, library) {
  library.def("percentile_bounds(Tensor[] images, Tensor positions, Tensor(a!) out) -> ()");
  library.def("quantize(Tensor[] images, Tensor ramp, Tensor(a!)[] out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastembed, CPU, library) {
  library.impl("percentile_bounds", TORCH_BOX(&fastembed::percentile_bounds_cpu));
  library.impl("quantize", TORCH_BOX(&fastembed::quantize_cpu));
}

#ifdef FASTEMBED_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastembed, CUDA, library) {
  library.impl("percentile_bounds", TORCH_BOX(&fastembed::percentile_bounds_cuda));
  library.impl("quantize", TORCH_BOX(&fastembed::quantize_cuda));
}
#endif
