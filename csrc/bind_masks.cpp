// Contract: fastembed/ops/masks.py.
#include "bindings.h"

namespace fastembed {
namespace {

// What both kinds read: per image an op with all the crops.
template <class Op>
std::vector<Op> crops_ops(const Tensors& images, const Tensors& ids, const Tensor& crops,
                          const Tensor& background, const Tensor& out) {
  check_layout("blend_crops", out, images);
  check_layout("blend_crops", out, ids);
  check_layout("blend_crops", out, {crops, background});
  STD_TORCH_CHECK(!images.empty() && ids.size() == images.size(),
                  "a batch must have an image, and ids for each");
  STD_TORCH_CHECK(out.dim() == 4 && out.size(1) == 3 && out.size(2) == out.size(3) &&
                      (out.size(2) >= 1 || out.size(0) == 0),
                  "out must be [S, 3, size, size] with size >= 1");
  STD_TORCH_CHECK(crops.scalar_type() == ScalarType::Int && crops.dim() == 2 &&
                      crops.size(0) == out.size(0) && crops.size(1) == 6,
                  "crops must be int32 [", out.size(0), ", 6]");
  STD_TORCH_CHECK(background.scalar_type() == ScalarType::Byte && background.numel() == 256,
                  "background must be uint8 [256]");
  std::vector<Op> ops;
  for (size_t i = 0; i < images.size(); ++i) {
    const Tensor& image = images[i];
    STD_TORCH_CHECK(
        image.scalar_type() == ScalarType::Byte && image.dim() == 3 && image.size(2) == 3,
        "images must be uint8 [H, W, 3]");
    STD_TORCH_CHECK(ids[i].scalar_type() == ScalarType::Int && ids[i].dim() == 2 &&
                        ids[i].size(0) == image.size(0) && ids[i].size(1) == image.size(1),
                    "ids must be int32 [", image.size(0), ", ", image.size(1), "]");
    Op op{};
    op.image = static_cast<const uint8_t*>(image.const_data_ptr());
    op.ids = static_cast<const int32_t*>(ids[i].const_data_ptr());
    op.crop = static_cast<const Crop*>(crops.const_data_ptr());
    op.background = static_cast<const uint8_t*>(background.const_data_ptr());
    op.out = out.mutable_data_ptr();
    op.height = image.size(0);
    op.width = image.size(1);
    op.crops = out.size(0);
    op.size = out.size(2);
    ops.push_back(op);
  }
  return ops;
}

std::vector<BlendCrops> blend_crops_ops(const Tensors& images, const Tensors& ids,
                                        const Tensor& crops, const Tensor& background,
                                        const Tensor& table, bool cubic, bool narrow,
                                        bool tall_first, const Tensor& out) {
  check_layout("blend_crops", out, {table});
  STD_TORCH_CHECK(table.scalar_type() == out.scalar_type() && table.dim() == 2 &&
                      table.size(0) == 3 && table.size(1) == 256,
                  "table must be [3, 256] of out's dtype");
  auto ops = crops_ops<BlendCrops>(images, ids, crops, background, out);
  for (BlendCrops& op : ops) {
    op.table = table.const_data_ptr();
    op.value_bytes = value_bytes_of(out);
    op.cubic = cubic;
    op.narrow = narrow;
    op.tall_first = tall_first;
  }
  return ops;
}

std::vector<BlendCropsFloat> blend_crops_float_ops(const Tensors& images, const Tensors& ids,
                                                   const Tensor& crops, const Tensor& background,
                                                   const Tensor& ramp, const Tensor& out) {
  check_layout("blend_crops_float", out, {ramp});
  STD_TORCH_CHECK(ramp.scalar_type() == ScalarType::Float && ramp.dim() == 2 && ramp.size(0) == 2 &&
                      ramp.size(1) == 3,
                  "ramp must be float32 [2, 3]");
  auto ops = crops_ops<BlendCropsFloat>(images, ids, crops, background, out);
  for (BlendCropsFloat& op : ops) {
    op.ramp = static_cast<const float*>(ramp.const_data_ptr());
    op.value = real_of(out);
  }
  return ops;
}

// On a CUDA device the indices stay there: reading them back would wait for the stream.
template <class Op>
void check_indices(const std::vector<Op>& ops) {
  for (int64_t s = 0; s < ops[0].crops; ++s) {
    const Crop& crop = ops[0].crop[s];
    STD_TORCH_CHECK(0 <= crop.image && crop.image < static_cast<int64_t>(ops.size()), "crop ", s,
                    " of image ", crop.image, " is not of one of ", ops.size(), " images");
    const int64_t top = crop.top, left = crop.left, height = crop.height, width = crop.width;
    STD_TORCH_CHECK(0 <= top && 0 <= left && 1 <= height && 1 <= width &&
                        top + height <= ops[crop.image].height &&
                        left + width <= ops[crop.image].width,
                    "crop ", s, " of ", height, "x", width, " at (", top, ", ", left,
                    ") is empty or leaves the image");
  }
}

// An op for every run of crops of one image.
template <class Op>
void run_on_cpu(void (*kernel)(const Op&), const std::vector<Op>& ops, const Tensor& out) {
  check_indices(ops);
  const Op& all = ops[0];
  const int64_t crop_bytes = 3 * all.size * all.size * static_cast<int64_t>(out.element_size());
  for (int64_t begin = 0, end; begin < all.crops; begin = end) {
    end = end_of_run(all.crop, begin, all.crops);
    Op op = ops[all.crop[begin].image];
    op.crop += begin;
    op.out = static_cast<char*>(op.out) + begin * crop_bytes;
    op.crops = end - begin;
    kernel(op);
  }
}

void blend_crops_cpu(const Tensors& images, const Tensors& ids, const Tensor& crops,
                     const Tensor& background, const Tensor& table, bool cubic, bool narrow,
                     bool tall_first, const Tensor& out) {
  run_on_cpu(cpu::blend_crops,
             blend_crops_ops(images, ids, crops, background, table, cubic, narrow, tall_first, out),
             out);
}

void blend_crops_float_cpu(const Tensors& images, const Tensors& ids, const Tensor& crops,
                           const Tensor& background, const Tensor& ramp, const Tensor& out) {
  run_on_cpu(cpu::blend_crops_float,
             blend_crops_float_ops(images, ids, crops, background, ramp, out), out);
}

#ifdef FASTEMBED_CUDA

void blend_crops_cuda(const Tensors& images, const Tensors& ids, const Tensor& crops,
                      const Tensor& background, const Tensor& table, bool cubic, bool narrow,
                      bool tall_first, const Tensor& out) {
  launch(cuda::blend_crops,
         blend_crops_ops(images, ids, crops, background, table, cubic, narrow, tall_first, out),
         out);
}

void blend_crops_float_cuda(const Tensors& images, const Tensors& ids, const Tensor& crops,
                            const Tensor& background, const Tensor& ramp, const Tensor& out) {
  launch(cuda::blend_crops_float, blend_crops_float_ops(images, ids, crops, background, ramp, out),
         out);
}

#endif  // FASTEMBED_CUDA

}  // namespace
}  // namespace fastembed

STABLE_TORCH_LIBRARY_FRAGMENT(fastembed, library) {
  library.def(
      "blend_crops(Tensor[] images, Tensor[] ids, Tensor crops, Tensor background, Tensor table, "
      "bool cubic, bool narrow, bool tall_first, Tensor(a!) out) -> ()");
  library.def(
      "blend_crops_float(Tensor[] images, Tensor[] ids, Tensor crops, Tensor background, "
      "Tensor ramp, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastembed, CPU, library) {
  library.impl("blend_crops", TORCH_BOX(&fastembed::blend_crops_cpu));
  library.impl("blend_crops_float", TORCH_BOX(&fastembed::blend_crops_float_cpu));
}

#ifdef FASTEMBED_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastembed, CUDA, library) {
  library.impl("blend_crops", TORCH_BOX(&fastembed::blend_crops_cuda));
  library.impl("blend_crops_float", TORCH_BOX(&fastembed::blend_crops_float_cuda));
}
#endif
