// Mode seeking: how far two images of a condition are apart, as far as their noises are, as
// fastloss/diversity/mode_seeking.py defines it. One pass over the four tensors, and one for their gradients.

#include "core/constants.h"
#include "core/op.h"
#include "image/pixel.h"

#include <cmath>

namespace fastloss {
namespace {

struct Inputs {
  Tensor images_a, images_b, z_a, z_b;
  std::string form;
  double eps, margin;
  FASTLOSS_FIELDS(images_a, images_b, z_a, z_b, form, eps, margin)
};
struct Saved {
  Tensor of_images, of_noises;
  FASTLOSS_FIELDS(of_images, of_noises)
};
struct Outputs {
  Tensor loss;
  Saved saved;
  FASTLOSS_FIELDS(loss, saved)
};
template <typename T>
struct PerInput {
  T images_a, images_b, z_a, z_b;
  FASTLOSS_FIELDS(images_a, images_b, z_a, z_b)
};

// Two tensors [N, P] of one dtype, in blocks of a sample's elements.
struct Pair {
  Tensor a, b;
  int64_t samples, size, blocks;

  Pair(const Tensor& one, const Tensor& other) : a(as_contiguous(one)), b(as_contiguous(other)) {
    STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(0) && a.size(1) == b.size(1) &&
                        a.scalar_type() == b.scalar_type() && a.numel() > 0,
                    "mode_seeking: expected pairs [N, P] of one shape and dtype, with elements");
    samples = a.size(0), size = a.size(1), blocks = blocks_of(size, kBlockElements);
  }

  // body(sample, first element, number of elements) for each block, over torch's threads
  template <typename Body>
  void for_blocks(const Body& body) const {
    each_row(samples * blocks, std::min(size, kBlockElements), [&](int64_t task) {
      const int64_t k = task % blocks * kBlockElements;
      body(task / blocks, k, std::min(kBlockElements, size - k));
    });
  }

  // Mean |a - b| of each sample.
  std::vector<double> distances() const {
    std::vector<double> parts(samples * blocks), means(samples);
    for_dtype(a.scalar_type(), "mode_seeking", [&](auto element) {
      using T = decltype(element);
      const auto kernels = pixel_kernels<T>(Kind::l1);
      for_blocks([&](int64_t sample, int64_t k, int64_t n) {
        const int64_t at = sample * size + k;
        parts[sample * blocks + k / kBlockElements] = kernels.sum({input<T>(b) + at, input<T>(a) + at, nullptr, n}, 1);
      });
    });
    for (int64_t i = 0; i < samples * blocks; ++i) means[i / blocks] += parts[i];
    for (double& mean : means) mean /= static_cast<double>(size);
    return means;
  }

  // The gradients weight(sample) sign(a - b) of a, and the opposite of b; null tensors are not written.
  template <typename Weight>
  void gradients(const Weight& weight, const Tensor& of_a, const Tensor& of_b) const {
    for_dtype(a.scalar_type(), "mode_seeking", [&](auto element) {
      using T = decltype(element);
      const auto kernels = pixel_kernels<T>(Kind::l1);
      T* first = of_a.numel() ? output<T>(of_a) : nullptr;
      T* second = of_b.numel() ? output<T>(of_b) : nullptr;
      const int64_t row_bytes = size * static_cast<int64_t>(sizeof(T));
      const bool aligned =
          (reinterpret_cast<uintptr_t>(first) | reinterpret_cast<uintptr_t>(second) | row_bytes) % 64 == 0;
      const bool streamed = aligned && samples * row_bytes >= kStreamedGradientBytes;
      for_blocks([&](int64_t sample, int64_t k, int64_t n) {
        const int64_t at = sample * size + k;
        const Gradients<T> to{second ? second + at : nullptr, first ? first + at : nullptr, streamed};
        kernels.grad({input<T>(b) + at, input<T>(a) + at, nullptr, n}, 1, {nullptr, static_cast<float>(weight(sample))},
                     to);
      });
    });
  }
};

double mean_of(const std::vector<double>& values) {
  double total = 0;
  for (double value : values) total += value;
  return total / static_cast<double>(values.size());
}

Outputs mode_seeking_fwd(const Inputs& x) {
  const Pair images(x.images_a, x.images_b), noises(x.z_a, x.z_b);
  STD_TORCH_CHECK(images.samples == noises.samples, "mode_seeking: expected one noise for each of the images");
  const auto d_images = images.distances(), d_noises = noises.distances();
  const bool per_sample = x.form == "dsgan";
  const double count = static_cast<double>(images.samples);
  const double image_size = static_cast<double>(images.size), noise_size = static_cast<double>(noises.size);
  const int64_t kept = per_sample ? images.samples : 1;
  Outputs out{new_float32(), {new_float32(kept), new_float32(kept)}};
  float *of_images = output<float>(out.saved.of_images), *of_noises = output<float>(out.saved.of_noises);
  double loss = 0;
  if (per_sample) {
    for (int64_t i = 0; i < kept; ++i) {
      const double ratio = d_noises[i] == 0 ? 0 : d_images[i] / (d_noises[i] + x.eps);
      const bool counts = d_noises[i] != 0 && !(ratio > x.margin);  // NaN too
      loss -= (ratio > x.margin ? x.margin : ratio) / count;
      const double slope = counts ? 1 / (d_noises[i] + x.eps) / count : 0;
      of_images[i] = static_cast<float>(-slope / image_size);
      of_noises[i] = static_cast<float>(counts ? slope * ratio / noise_size : 0);
    }
  } else {
    const double d_image = mean_of(d_images), d_z = mean_of(d_noises);
    const double ratio = d_image / (d_z == 0 ? 1 : d_z);
    loss = d_z == 0 ? 0 : 1 / (ratio + x.eps);
    const double slope = d_z == 0 ? 0 : loss * loss / d_z / count;
    of_images[0] = static_cast<float>(-slope / image_size);
    of_noises[0] = static_cast<float>(d_z == 0 ? 0 : slope * ratio / noise_size);
  }
  *output<float>(out.loss) = static_cast<float>(loss);
  return out;
}

PerInput<Tensor> mode_seeking_bwd(const Tensor& grad, const Inputs& x, const Saved& saved,
                                  const PerInput<bool>& needs) {
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.numel() == 1,
                  "mode_seeking: grad is not one float32 number");
  const double upstream = *input<float>(grad);
  const Tensor of_images = as_contiguous(saved.of_images), of_noises = as_contiguous(saved.of_noises);
  const auto gradient = [](const Tensor& t, bool needed) {
    return needed ? torch::stable::new_empty(t, {t.size(0), t.size(1)}) : torch::stable::new_empty(t, {0});
  };
  PerInput<Tensor> out{gradient(x.images_a, needs.images_a), gradient(x.images_b, needs.images_b),
                       gradient(x.z_a, needs.z_a), gradient(x.z_b, needs.z_b)};
  const auto write = [&](const Tensor& one, const Tensor& other, const Tensor& factors, const Tensor& of_one,
                         const Tensor& of_other) {
    if (of_one.numel() == 0 && of_other.numel() == 0) return;
    const float* factor = input<float>(factors);
    const int64_t step = x.form == "dsgan" ? 1 : 0;
    Pair(one, other).gradients([&](int64_t sample) { return upstream * factor[sample * step]; }, of_one, of_other);
  };
  write(x.images_a, x.images_b, of_images, out.images_a, out.images_b);
  write(x.z_a, x.z_b, of_noises, out.z_a, out.z_b);
  return out;
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("mode_seeking_fwd", FASTLOSS_BOX(&fastloss::mode_seeking_fwd));
  m.impl("mode_seeking_bwd", FASTLOSS_BOX(&fastloss::mode_seeking_bwd));
}
