// Pixel loss: distances of two images, their sum, and its gradients, in one pass over memory each.

#include "image/pixel.h"
#include "core/isa.h"
#include "core/op.h"

#define FASTLOSS_KERNELS "image/pixel_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {
namespace {

// The two images and the weight as the kernels read them: in the images' own memory order where they share one.
struct Inputs {
  Tensor image, image_pred;
  std::vector<int64_t> order;
  std::optional<Operand> weight;

  Inputs(const Tensor& a, const Tensor& b, const std::optional<Tensor>& w) : image(a), image_pred(b) {
    STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "pixel: image and image_pred differ in dtype");
    check_shape("image_pred", b);
    if (w.has_value()) check_shape("weight", *w);
    auto shared = same_strides(a, b) ? memory_order(a) : std::nullopt;
    if (!shared) {
      image = torch::stable::contiguous(a);
      image_pred = torch::stable::contiguous(b);
      shared = memory_order(image);
    }
    order = *shared;
    if (w.has_value()) weight.emplace(*w, order);
  }

  void check_shape(const char* name, const Tensor& t) const {
    bool same = t.dim() == image.dim();
    for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == image.size(d);
    STD_TORCH_CHECK(same, "pixel: ", name, " has another shape than image");
  }

  // body(stretch, position) for every chunk of elements begin .. end.
  template <typename T, typename Body>
  void chunks(int64_t begin, int64_t end, const Body& body) const {
    float buffer[kChunk];
    for (int64_t i = begin; i < end; i += kChunk) {
      const int64_t n = std::min(kChunk, end - i);
      body(Stretch<T>{input<T>(image) + i, input<T>(image_pred) + i, weight ? weight->read(i, n, buffer) : nullptr, n},
           i);
    }
  }
};

Tensor pixel_fwd(const Tensor& image, const Tensor& image_pred, std::optional<Tensor> weight, std::string kind,
                 double p, bool reduce) {
  const Inputs in(image, image_pred, weight);
  const int64_t count = image.numel();
  std::optional<Result> map;
  if (!reduce) map.emplace(image, ScalarType::Float, in.image);
  Tensor out = reduce ? torch::stable::new_empty(image, {}, ScalarType::Float) : map->written;
  float* to = output<float>(out);
  for_dtype(image.scalar_type(), "pixel", [&](auto element) {
    using T = decltype(element);
    const auto kernels = FASTLOSS_PICK(pixel_kernels<T>(kind_of(kind, p)));
    if (reduce) {
      *to = static_cast<float>(sum_blocks(count, [&](int64_t begin, int64_t end) {
        double total = 0;
        in.chunks<T>(begin, end, [&](const Stretch<T>& s, int64_t) { total += kernels.sum(s, p); });
        return total;
      }));
    } else {
      for_blocks(count, [&](int64_t begin, int64_t end) {
        in.chunks<T>(begin, end, [&](const Stretch<T>& s, int64_t i) { kernels.map(s, p, to + i); });
      });
    }
  });
  return reduce ? out : map->take();
}

std::tuple<Tensor, Tensor> pixel_bwd(const Tensor& grad, const Tensor& image, const Tensor& image_pred,
                                     std::optional<Tensor> weight, std::string kind, double p, bool reduce,
                                     bool needs_image, bool needs_image_pred) {
  const Inputs in(image, image_pred, weight);
  const int64_t count = image.numel();
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float, "pixel: grad is not float32");
  if (!reduce) in.check_shape("grad", grad);
  const std::optional<Operand> map = reduce ? std::nullopt : std::make_optional<Operand>(grad, in.order);
  const float scalar = reduce ? *input<float>(grad) : 0;
  std::optional<Result> to_image, to_pred;
  if (needs_image) to_image.emplace(image, image.scalar_type(), in.image);
  if (needs_image_pred) to_pred.emplace(image_pred, image.scalar_type(), in.image_pred);
  for_dtype(image.scalar_type(), "pixel", [&](auto element) {
    using T = decltype(element);
    const auto kernels = FASTLOSS_PICK(pixel_kernels<T>(kind_of(kind, p)));
    T* first = to_image ? output<T>(to_image->written) : nullptr;
    T* second = to_pred ? output<T>(to_pred->written) : nullptr;
    const bool aligned = (reinterpret_cast<uintptr_t>(first) | reinterpret_cast<uintptr_t>(second)) % 64 == 0;
    const bool streamed = aligned && count * static_cast<int64_t>(sizeof(T)) >= kStreamed;
    for_blocks(count, [&](int64_t begin, int64_t end) {
      float buffer[kChunk];
      in.chunks<T>(begin, end, [&](const Stretch<T>& s, int64_t i) {
        const Gradients<T> to{first ? first + i : nullptr, second ? second + i : nullptr, streamed};
        kernels.grad(s, p, {map ? map->read(i, s.n, buffer) : nullptr, scalar}, to);
      });
    });
  });
  const auto none = [&] { return torch::stable::new_empty(image, {0}); };
  return {to_image ? to_image->take() : none(), to_pred ? to_pred->take() : none()};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("pixel_fwd", FASTLOSS_BOX(&fastloss::pixel_fwd));
  m.impl("pixel_bwd", FASTLOSS_BOX(&fastloss::pixel_bwd));
}
