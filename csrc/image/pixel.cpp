// Pixel loss: distances of two images, their sum, and its gradients, in one pass over memory each.

#include "image/pixel.h"
#include "core/constants.h"
#include "core/isa.h"
#include "core/op.h"
#include "image/per_image.h"

#define FASTLOSS_KERNELS "image/pixel_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {

template <typename T>
PixelKernels<T> pixel_kernels(Kind kind) {
  return FASTLOSS_PICK(pixel_kernels<T>(kind));
}
template PixelKernels<float> pixel_kernels(Kind);
template PixelKernels<BFloat16> pixel_kernels(Kind);
template PixelKernels<Half> pixel_kernels(Kind);

namespace {

struct Inputs {
  Tensor image, image_pred;
  std::optional<Tensor> weight;
  std::string kind;
  double parameter;
  bool reduce;
  FASTLOSS_FIELDS(image, image_pred, weight, kind, parameter, reduce)
};
using Grads = PerImage<Tensor>;
using Needs = PerImage<bool>;

// The two images and the weight as the kernels read them: in the images' own memory order where they share one.
struct Operands {
  Tensor image, image_pred;
  std::vector<int64_t> order;
  std::optional<Operand> weight;

  explicit Operands(const Inputs& x) : image(x.image), image_pred(x.image_pred) {
    STD_TORCH_CHECK(image.scalar_type() == image_pred.scalar_type(), "pixel: image and image_pred differ in dtype");
    check_shape("image_pred", image_pred);
    if (x.weight.has_value()) check_shape("weight", *x.weight);
    auto shared = same_strides(image, image_pred) ? memory_order(image) : std::nullopt;
    if (!shared) {
      image = torch::stable::contiguous(x.image);
      image_pred = torch::stable::contiguous(x.image_pred);
      shared = memory_order(image);
    }
    order = *shared;
    if (x.weight.has_value()) weight.emplace(*x.weight, order);
  }

  void check_shape(const char* name, const Tensor& t) const {
    bool same = t.dim() == image.dim();
    for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == image.size(d);
    STD_TORCH_CHECK(same, "pixel: ", name, " has another shape than image");
  }

  // body(stretch, position) for every chunk of elements begin .. end.
  template <typename T, typename Body>
  void chunks(int64_t begin, int64_t end, const Body& body) const {
    float buffer[kChunkElements];
    for (int64_t i = begin; i < end; i += kChunkElements) {
      const int64_t n = std::min(kChunkElements, end - i);
      body(Stretch<T>{input<T>(image) + i, input<T>(image_pred) + i, weight ? weight->read(i, n, buffer) : nullptr, n},
           i);
    }
  }
};

Tensor pixel_fwd(const Inputs& x) {
  const Operands in(x);
  const int64_t count = x.image.numel();
  std::optional<Result> map;
  if (!x.reduce) map.emplace(x.image, ScalarType::Float, in.image);
  Tensor out = x.reduce ? torch::stable::new_empty(x.image, {}, ScalarType::Float) : map->written;
  float* to = output<float>(out);
  for_dtype(x.image.scalar_type(), "pixel", [&](auto element) {
    using T = decltype(element);
    const auto kernels = pixel_kernels<T>(kind_of(x.kind, x.parameter));
    if (x.reduce) {
      *to = static_cast<float>(sum_blocks(count, [&](int64_t begin, int64_t end) {
        double total = 0;
        in.chunks<T>(begin, end, [&](const Stretch<T>& s, int64_t) { total += kernels.sum(s, x.parameter); });
        return total;
      }));
    } else {
      for_blocks(count, [&](int64_t begin, int64_t end) {
        in.chunks<T>(begin, end, [&](const Stretch<T>& s, int64_t i) { kernels.map(s, x.parameter, to + i); });
      });
    }
  });
  return x.reduce ? out : map->take();
}

Grads pixel_bwd(const Tensor& grad, const Inputs& x, const Needs& needs) {
  const Operands in(x);
  const int64_t count = x.image.numel();
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float, "pixel: grad is not float32");
  if (!x.reduce) in.check_shape("grad", grad);
  const std::optional<Operand> map = x.reduce ? std::nullopt : std::make_optional<Operand>(grad, in.order);
  const float scalar = x.reduce ? *input<float>(grad) : 0;
  std::optional<Result> image_grad, pred_grad;
  if (needs.image) image_grad.emplace(x.image, x.image.scalar_type(), in.image);
  if (needs.image_pred) pred_grad.emplace(x.image_pred, x.image.scalar_type(), in.image_pred);
  for_dtype(x.image.scalar_type(), "pixel", [&](auto element) {
    using T = decltype(element);
    const auto kernels = pixel_kernels<T>(kind_of(x.kind, x.parameter));
    T* first = image_grad ? output<T>(image_grad->written) : nullptr;
    T* second = pred_grad ? output<T>(pred_grad->written) : nullptr;
    const bool aligned = (reinterpret_cast<uintptr_t>(first) | reinterpret_cast<uintptr_t>(second)) % 64 == 0;
    const bool streamed = aligned && count * static_cast<int64_t>(sizeof(T)) >= kStreamedGradientBytes;
    for_blocks(count, [&](int64_t begin, int64_t end) {
      float buffer[kChunkElements];
      in.chunks<T>(begin, end, [&](const Stretch<T>& s, int64_t i) {
        const Gradients<T> to{first ? first + i : nullptr, second ? second + i : nullptr, streamed};
        kernels.grad(s, x.parameter, {map ? map->read(i, s.n, buffer) : nullptr, scalar}, to);
      });
    });
  });
  const auto none = [&] { return torch::stable::new_empty(x.image, {0}); };
  return {image_grad ? image_grad->take() : none(), pred_grad ? pred_grad->take() : none()};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("pixel_fwd", FASTLOSS_BOX(&fastloss::pixel_fwd));
  m.impl("pixel_bwd", FASTLOSS_BOX(&fastloss::pixel_bwd));
}
