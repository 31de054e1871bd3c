// Smoothness loss: sums of the differences of neighbouring pixels, and their gradient, in one pass over memory each.

#include "common.h"

namespace fastloss {
namespace {

enum class Step { l1, l2, isotropic };

// One plane (an image's channel) of a contiguous tensor; rows begin .. end of it are a kernel's share.
template <typename T>
struct Rows {
  const T* plane;
  int64_t height, width, begin, end;
};
struct Sums {
  double down, right;  // isotropic: all in `down`
};
template <typename T>
struct PlaneGradient {
  T* plane;
  float down, right;  // upstream gradients of the two sums
  bool streamed;
  float* scratch;  // 3 x scratch_row(width) floats, for isotropic only
};
template <typename T>
struct SmoothnessKernels {
  Sums (*sum)(const Rows<T>&);
  void (*grad)(const Rows<T>&, const PlaneGradient<T>&);
};

constexpr int64_t kPad = 16;  // vectors may run over the end of a row of scratch, and begin one element before it
constexpr int64_t scratch_row(int64_t width) { return width + 2 * kPad; }

}  // namespace
}  // namespace fastloss

#define FASTLOSS_KERNELS "smoothness_simd.h"
#include "each_isa.h"

namespace fastloss {
namespace {

constexpr int64_t kStreamedGradient = int64_t{8} << 20;  // as in pixel.cpp: what will not stay in the caches

Step step_of(const std::string& name) {
  if (name == "l1") return Step::l1;
  if (name == "l2") return Step::l2;
  STD_TORCH_CHECK(name == "isotropic", "smoothness: unknown kind ", name);
  return Step::isotropic;
}

// The planes of an image cut into bands of whole rows, the same whatever the number of threads.
struct Bands {
  Tensor image;  // contiguous
  int64_t planes, height, width, rows, per_plane;

  Bands(const Tensor& given, const std::optional<Tensor>& guide, const std::optional<Tensor>& weight, int64_t order)
      : image(torch::stable::contiguous(given)) {
    STD_TORCH_CHECK(given.dim() == 4 && order == 1 && !guide.has_value() && !weight.has_value(),
                    "smoothness: the kernel takes 4-D images, first differences, no guide and no weight");
    planes = image.size(0) * image.size(1);
    height = image.size(2);
    width = image.size(3);
    rows = std::max<int64_t>(1, kBlock / std::max<int64_t>(1, width));
    per_plane = image.numel() == 0 ? 0 : (height + rows - 1) / rows;
  }

  int64_t count() const { return planes * per_plane; }

  // body(band, plane, rows) over torch's threads. It must not throw.
  template <typename T, typename Body>
  void each(const Body& body) const {
    const int64_t size = std::min(rows, height) * width;
    const int64_t grain = size == 0 ? 1 : std::max<int64_t>(1, 2 * kBlock / size);
    torch::stable::parallel_for(0, count(), grain, [&](int64_t first, int64_t last) {
      for (int64_t band = first; band < last; ++band) {
        const int64_t plane = band / per_plane, begin = band % per_plane * rows;
        const T* data = input<T>(image) + plane * height * width;
        body(band, plane, Rows<T>{data, height, width, begin, std::min(height, begin + rows)});
      }
    });
  }
};

Tensor smoothness_fwd(const Tensor& image_pred, std::optional<Tensor> guide, std::optional<Tensor> weight,
                      std::string kind, int64_t order) {
  const Bands bands(image_pred, guide, weight, order);
  const Step step = step_of(kind);
  const int64_t directions = step == Step::isotropic ? 1 : 2;
  Tensor out = torch::stable::new_empty(bands.image, {bands.image.size(0), bands.image.size(1), directions},
                                        ScalarType::Float);
  std::vector<Sums> partial(bands.count());
  for_dtype(bands.image.scalar_type(), "smoothness", [&](auto element) {
    using T = decltype(element);
    const auto kernels = FASTLOSS_PICK(smoothness_kernels<T>(step));
    bands.each<T>([&](int64_t band, int64_t, const Rows<T>& rows) { partial[band] = kernels.sum(rows); });
  });
  float* to = output<float>(out);
  for (int64_t plane = 0; plane < bands.planes; ++plane) {
    Sums total{0, 0};
    for (int64_t b = plane * bands.per_plane; b < (plane + 1) * bands.per_plane; ++b) {
      total.down += partial[b].down;
      total.right += partial[b].right;
    }
    to[plane * directions] = static_cast<float>(total.down);
    if (directions == 2) to[plane * directions + 1] = static_cast<float>(total.right);
  }
  return out;
}

Tensor smoothness_bwd(const Tensor& grad, const Tensor& image_pred, std::optional<Tensor> guide,
                      std::optional<Tensor> weight, std::string kind, int64_t order) {
  const Bands bands(image_pred, guide, weight, order);
  const Step step = step_of(kind);
  const int64_t directions = step == Step::isotropic ? 1 : 2;
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.numel() == bands.planes * directions,
                  "smoothness: expected a float32 gradient of the sums");
  const Tensor upstream = torch::stable::contiguous(grad);
  const float* up = input<float>(upstream);
  const Tensor out = empty_like(image_pred, image_pred.scalar_type());
  Tensor written = same_strides(out, bands.image) ? out : empty_like(bands.image, image_pred.scalar_type());
  for_dtype(image_pred.scalar_type(), "smoothness", [&](auto element) {
    using T = decltype(element);
    const auto kernels = FASTLOSS_PICK(smoothness_kernels<T>(step));
    T* to = output<T>(written);
    const bool aligned = reinterpret_cast<uintptr_t>(to) % 64 == 0 && bands.width % 16 == 0;
    const bool streamed = aligned && image_pred.numel() * static_cast<int64_t>(sizeof(T)) >= kStreamedGradient;
    bands.each<T>([&](int64_t, int64_t plane, const Rows<T>& rows) {
      std::vector<float> scratch(step == Step::isotropic ? 3 * scratch_row(bands.width) : 0);
      const float* g = up + plane * directions;
      kernels.grad(rows, {to + (rows.plane - input<T>(bands.image)), g[0], g[directions - 1], streamed,
                          scratch.data()});
    });
  });
  if (written.data_ptr() == out.data_ptr()) return written;
  Tensor result = out;
  torch::stable::copy_(result, written);
  return result;
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("smoothness_fwd", TORCH_BOX(&fastloss::smoothness_fwd));
  m.impl("smoothness_bwd", TORCH_BOX(&fastloss::smoothness_bwd));
}
