// The pixel kernels and what they are handed, shared by the pixel loss and the image loss.
#pragma once

#include "core/parallel.h"
#include "core/tensors.h"

namespace fastloss {

enum class Kind { l1, l2, l1_5, l3, l4, lp, charbonnier, huber };

template <typename T>
struct Stretch {
  const T *image, *image_pred;
  const float* weight;  // or null
  int64_t n;
};
struct PixelUpstream {
  const float* map;  // or null: scalar
  float scalar;
};
template <typename T>
struct Gradients {
  T *image, *image_pred;  // or null
  bool streamed;
};
template <typename T>
struct PixelKernels {
  double (*sum)(const Stretch<T>&, double p);
  void (*map)(const Stretch<T>&, double p, float* out);
  void (*grad)(const Stretch<T>&, double p, const PixelUpstream&, const Gradients<T>&);
};
// Of the CPU at hand; pixel.cpp has them for each type that for_dtype() knows.
template <typename T>
PixelKernels<T> pixel_kernels(Kind kind);

inline Kind kind_of(const std::string& name, double p) {
  if (name == "l1") return Kind::l1;
  if (name == "l2") return Kind::l2;
  if (name == "charbonnier") return Kind::charbonnier;
  if (name == "huber") return Kind::huber;
  STD_TORCH_CHECK(name == "lp", "pixel: unknown kind ", name);
  return p == 1.5 ? Kind::l1_5 : p == 3 ? Kind::l3 : p == 4 ? Kind::l4 : Kind::lp;
}

// A tensor like `like` (its memory format), and where the kernels write: into it, or into one laid out as they read.
struct Result {
  Tensor out, written;

  Result(const Tensor& like, ScalarType dtype, const Tensor& laid_out)
      : out(empty_like(like, dtype)), written(same_strides(out, laid_out) ? out : empty_like(laid_out, dtype)) {}

  Tensor take() {
    if (written.data_ptr() != out.data_ptr()) torch::stable::copy_(out, written);
    return out;
  }
};

}  // namespace fastloss
