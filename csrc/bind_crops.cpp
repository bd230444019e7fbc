// Contract: fastembed/ops/crops.py.
#include "bindings.h"

namespace fastembed {
namespace {

// Per image an op with all the crops.
std::vector<GatherCrops> gather_crops_ops(const Tensors& images, const Tensor& origins,
                                          const Tensor& planes, const Tensor& ramp,
                                          const Tensor& table, const Tensor& out) {
  check_layout("gather_crops", out, images);
  check_layout("gather_crops", out, {origins, planes, ramp, table});
  STD_TORCH_CHECK(out.dim() == 4 && out.size(2) == out.size(3), "out must be [N, P, size, size]");
  STD_TORCH_CHECK(origins.scalar_type() == ScalarType::Int && origins.dim() == 2 &&
                      origins.size(0) == out.size(0) && origins.size(1) == 3,
                  "origins must be int32 [", out.size(0), ", 3]");
  STD_TORCH_CHECK(
      planes.scalar_type() == ScalarType::Int && planes.dim() == 1 && planes.size(0) == out.size(1),
      "planes must be int32 [", out.size(1), "]");
  STD_TORCH_CHECK(table.scalar_type() == out.scalar_type() && table.dim() == 2 &&
                      table.size(0) == out.size(1) && table.size(1) == 256,
                  "table must be [", out.size(1), ", 256] of out's dtype");
  const Ramp* ramps = ramps_of(ramp, images);
  std::vector<GatherCrops> ops;
  for (const Tensor& image : images) {
    STD_TORCH_CHECK(image.dim() == 3, "images must be [C, H, W]");
    GatherCrops op{};
    op.pixel = pixel_of(image);
    op.image = image.const_data_ptr();
    op.origins = static_cast<const Origin*>(origins.const_data_ptr());
    op.planes = static_cast<const int32_t*>(planes.const_data_ptr());
    op.ramp = ramps;
    op.table = table.const_data_ptr();
    op.out = out.mutable_data_ptr();
    op.value_bytes = value_bytes_of(out);
    op.channels = image.size(0);
    op.height = image.size(1);
    op.width = image.size(2);
    op.crops = out.size(0);
    op.count = out.size(1);
    op.size = out.size(2);
    ops.push_back(op);
    ramps += op.channels;
  }
  return ops;
}

// On a CUDA device the indices stay there: reading them back would wait for the stream.
void check_indices(const std::vector<GatherCrops>& ops) {
  const GatherCrops& all = ops[0];
  for (int64_t p = 0; p < all.count; ++p) {
    STD_TORCH_CHECK(0 <= all.planes[p] && all.planes[p] < all.channels, "plane ", all.planes[p],
                    " is not one of ", all.channels, " channels");
  }
  for (int64_t n = 0; n < all.crops; ++n) {
    const int64_t i = all.origins[n].image, y = all.origins[n].y, x = all.origins[n].x;
    STD_TORCH_CHECK(0 <= i && i < static_cast<int64_t>(ops.size()), "crop ", n, " of image ", i,
                    " is not of one of ", ops.size(), " images");
    STD_TORCH_CHECK(
        0 <= y && y + all.size <= ops[i].height && 0 <= x && x + all.size <= ops[i].width, "crop ",
        n, " at (", y, ", ", x, ") leaves the image");
  }
}

PoolCrops pool_crops_op(const Tensor& features, bool take_max, bool l2_normalize,
                        const Tensor& out) {
  check_layout("pool_crops", out, {features});
  STD_TORCH_CHECK(features.dim() == 3 && features.size(1) >= 1 && out.dim() == 2 &&
                      out.size(0) == features.size(0) && out.size(1) == features.size(2),
                  "features must be [S, N, D] with N >= 1 and out [S, D]");
  PoolCrops op{};
  op.feature = real_of(features);
  op.value = real_of(out);
  op.features = features.const_data_ptr();
  op.out = out.mutable_data_ptr();
  op.samples = features.size(0);
  op.crops = features.size(1);
  op.dim = features.size(2);
  op.take_max = take_max;
  op.l2_normalize = l2_normalize;
  return op;
}

void gather_crops_cpu(const Tensors& images, const Tensor& origins, const Tensor& planes,
                      const Tensor& ramp, const Tensor& table, const Tensor& out) {
  const std::vector<GatherCrops> ops = gather_crops_ops(images, origins, planes, ramp, table, out);
  check_indices(ops);
  const GatherCrops& all = ops[0];
  const int64_t crop_bytes = all.count * all.size * all.size * all.value_bytes;
  for (int64_t begin = 0, end; begin < all.crops; begin = end) {
    end = end_of_run(all.origins, begin, all.crops);
    GatherCrops op = ops[all.origins[begin].image];
    op.origins += begin;
    op.out = static_cast<char*>(op.out) + begin * crop_bytes;
    op.crops = end - begin;
    cpu::gather_crops(op);
  }
}

void pool_crops_cpu(const Tensor& features, bool take_max, bool l2_normalize, const Tensor& out) {
  cpu::pool_crops(pool_crops_op(features, take_max, l2_normalize, out));
}

#ifdef FASTEMBED_CUDA

void gather_crops_cuda(const Tensors& images, const Tensor& origins, const Tensor& planes,
                       const Tensor& ramp, const Tensor& table, const Tensor& out) {
  launch(cuda::gather_crops, gather_crops_ops(images, origins, planes, ramp, table, out), out);
}

void pool_crops_cuda(const Tensor& features, bool take_max, bool l2_normalize, const Tensor& out) {
  launch(cuda::pool_crops, pool_crops_op(features, take_max, l2_normalize, out), out);
}

#endif  // FASTEMBED_CUDA

}  // namespace
}  // namespace fastembed

STABLE_TORCH_LIBRARY_FRAGMENT(fastembed, library) {
  library.def(
      "gather_crops(Tensor[] images, Tensor origins, Tensor planes, Tensor ramp, Tensor table, "
      "Tensor(a!) out) -> ()");
  library.def(
      "pool_crops(Tensor features, bool take_max, bool l2_normalize, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastembed, CPU, library) {
  library.impl("gather_crops", TORCH_BOX(&fastembed::gather_crops_cpu));
  library.impl("pool_crops", TORCH_BOX(&fastembed::pool_crops_cpu));
}

#ifdef FASTEMBED_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastembed, CUDA, library) {
  library.impl("gather_crops", TORCH_BOX(&fastembed::gather_crops_cuda));
  library.impl("pool_crops", TORCH_BOX(&fastembed::pool_crops_cuda));
}
#endif
