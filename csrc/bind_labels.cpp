// Contract: fastembed/ops/labels.py.
#include "bindings.h"
#include "labels.h"

namespace fastembed {
namespace {

Label label_of(const Tensor& labels) {
  switch (labels.scalar_type()) {
    case ScalarType::Byte:
      return Label::kUInt8;
    case ScalarType::UInt16:
      return Label::kUInt16;
    case ScalarType::Int:
      return Label::kInt32;
    case ScalarType::UInt32:
      return Label::kUInt32;
    case ScalarType::Long:
      return Label::kInt64;
    default:
      STD_TORCH_CHECK(false, "labels must be uint8, uint16, int32, uint32 or int64");
  }
}

std::vector<LabelStatistics> label_statistics_ops(const Tensors& labels, const Tensors& images,
                                                  const Tensor& out) {
  check_layout("label_statistics", out, labels);
  check_layout("label_statistics", out, images);
  const int64_t channels = channels_of(images), columns = columns_of(channels);
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Long && out.dim() == 3 &&
                      labels.size() == images.size() &&
                      out.size(0) == static_cast<int64_t>(images.size()) && out.size(2) == columns,
                  "out must be int64 [", images.size(), ", 1 + slots, ", columns,
                  "], and labels as many as images");
  const int64_t slots = out.size(1) - 1;
  STD_TORCH_CHECK(slots >= 2 && slots <= int64_t{1} << 30 && (slots & (slots - 1)) == 0,
                  "slots must be a power of two in 2..2^30, not ", slots);
  auto* table = static_cast<int64_t*>(out.mutable_data_ptr());
  std::vector<LabelStatistics> ops;
  for (size_t i = 0; i < images.size(); ++i) {
    STD_TORCH_CHECK(labels[i].scalar_type() == labels[0].scalar_type() && labels[i].dim() == 2 &&
                        images[i].dim() == 3 && images[i].size(1) == labels[i].size(0) &&
                        images[i].size(2) == labels[i].size(1),
                    "labels must be [H, W] of one dtype, images [C, H, W]");
    LabelStatistics op{};
    op.label = label_of(labels[i]);
    op.pixel = pixel_of(images[i]);
    op.labels = labels[i].const_data_ptr();
    op.image = images[i].const_data_ptr();
    op.out = table;
    op.channels = channels;
    op.height = labels[i].size(0);
    op.width = labels[i].size(1);
    op.slots = slots;
    ops.push_back(op);
    table += (1 + slots) * columns;
  }
  return ops;
}

void label_statistics_cpu(const Tensors& labels, const Tensors& images, const Tensor& out) {
  for (const LabelStatistics& op : label_statistics_ops(labels, images, out)) {
    cpu::label_statistics(op);
  }
}

#ifdef FASTEMBED_CUDA

void label_statistics_cuda(const Tensors& labels, const Tensors& images, const Tensor& out) {
  launch(cuda::label_statistics, label_statistics_ops(labels, images, out), out);
}

#endif  // FASTEMBED_CUDA

}  // namespace
}  // namespace fastembed

STABLE_TORCH_LIBRARY_FRAGMENT(fastembed, library) {
  library.def("label_statistics(Tensor[] labels, Tensor[] images, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastembed, CPU, library) {
  library.impl("label_statistics", TORCH_BOX(&fastembed::label_statistics_cpu));
}

#ifdef FASTEMBED_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastembed, CUDA, library) {
  library.impl("label_statistics", TORCH_BOX(&fastembed::label_statistics_cuda));
}
#endif
