// The statistics of DISTS: of every channel of a sample, with d = f - t, the means of f and d and the mean squares
// about their means of f, t and d, for a list of layers; and the gradient, one pass over both.

#include "core/constants.h"
#include "core/isa.h"
#include "core/op.h"
#include "core/parallel.h"
#include "core/tensors.h"

namespace fastloss {
namespace {

struct Moments {
  double mean_f, mean_t, mean_d, square_f, square_t, square_d;  // the squares are sums
};
// With x' = x - mean_x - rest_x: g_f = constant_f + slope_f f' + g_d, g_t = slope_t t' - g_d,
// g_d = constant_d + slope_d d'.
struct Slopes {
  float mean_f, mean_t, mean_d, rest_f, rest_t, rest_d, constant_f, constant_d, slope_f, slope_t, slope_d;
};
template <typename T>
struct PlaneSides {
  T *feature, *target;  // or null
  bool streamed;
};
template <typename T>
struct DistsKernels {
  Moments (*moments)(const T* f, const T* t, int64_t n);
  void (*grad)(const T* f, const T* t, int64_t n, const Slopes&, const PlaneSides<T>&);
};

}  // namespace
}  // namespace fastloss

#define FASTLOSS_KERNELS "perceptual/dists_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {
namespace {

struct Inputs {
  std::vector<Tensor> features, targets;
  FASTLOSS_FIELDS(features, targets)
};
struct Saved {
  Tensor rest;  // what rounding left of the means of f, t and d: [3, N, C]
  FASTLOSS_FIELDS(rest)
};
struct Needs {
  bool features, targets;
  FASTLOSS_FIELDS(features, targets)
};

struct PlaneLayer {
  Tensor f, t;  // contiguous
  int64_t channels, pixels, first_channel;
};
// Planes begin .. end of a layer, what a thread takes at a time.
struct PlaneBlock {
  int64_t layer, begin, end;
};

struct PlanePlan {
  std::vector<PlaneLayer> layers;
  std::vector<PlaneBlock> blocks;
  int64_t samples, channels = 0;
  ScalarType dtype;

  PlanePlan(const std::vector<Tensor>& features, const std::vector<Tensor>& targets)
      : samples(features.at(0).size(0)), dtype(features[0].scalar_type()) {
    STD_TORCH_CHECK(features.size() == targets.size(), "dists: lists of different lengths");
    for (size_t i = 0; i < features.size(); ++i) {
      const Tensor &f = features[i], &t = targets[i];
      STD_TORCH_CHECK(f.dim() == 4 && t.dim() == 4 && f.size(0) == samples, "dists: expected [N, C, H, W]");
      for (int64_t d = 0; d < 4; ++d) STD_TORCH_CHECK(f.size(d) == t.size(d), "dists: the shapes differ");
      STD_TORCH_CHECK(f.scalar_type() == dtype && t.scalar_type() == dtype, "dists: the dtypes differ");
      const int64_t pixels = f.size(2) * f.size(3), planes = samples * f.size(1);
      layers.push_back({torch::stable::contiguous(f), torch::stable::contiguous(t), f.size(1), pixels, channels});
      channels += f.size(1);
      const int64_t step = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, pixels));
      for (int64_t p = 0; p < planes; p += step)
        blocks.push_back({static_cast<int64_t>(i), p, std::min(planes, p + step)});
    }
  }

  // Where the statistics of a plane are: in the first of five tables of [samples, channels].
  int64_t column(const PlaneLayer& layer, int64_t plane) const {
    return plane / layer.channels * channels + layer.first_channel + plane % layer.channels;
  }

  // body(layer, its index, plane) for all planes, over torch's threads.
  template <typename Body>
  void run(const Body& body) const {
    over_threads(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last && going_on(); ++b)
        for (int64_t p = blocks[b].begin; p < blocks[b].end; ++p) body(layers[blocks[b].layer], blocks[b].layer, p);
    });
  }
};

std::tuple<Tensor, Saved> dists_fwd(const Inputs& x) {
  const PlanePlan plan(x.features, x.targets);
  const int64_t table = plan.samples * plan.channels;
  Tensor stats = torch::stable::new_empty(x.features[0], {5, plan.samples, plan.channels}, ScalarType::Float);
  Tensor rest = torch::stable::new_empty(x.features[0], {3, plan.samples, plan.channels}, ScalarType::Float);
  float *out = output<float>(stats), *left = output<float>(rest);
  for_dtype(plan.dtype, "dists", [&](auto element) {
    using T = decltype(element);
    const auto kernels = FASTLOSS_PICK(dists_kernels<T>());
    plan.run([&](const PlaneLayer& layer, int64_t, int64_t plane) {
      const int64_t n = layer.pixels, column = plan.column(layer, plane);
      const Moments m = kernels.moments(input<T>(layer.f) + plane * n, input<T>(layer.t) + plane * n, n);
      const double values[] = {m.mean_f, m.mean_d, m.square_f / n, m.square_t / n, m.square_d / n};
      for (int k = 0; k < 5; ++k) out[k * table + column] = static_cast<float>(values[k]);
      const float mean_f = out[column], mean_d = out[table + column];
      left[column] = static_cast<float>(m.mean_f - mean_f);
      left[table + column] = static_cast<float>(m.mean_t - (mean_f - mean_d));
      left[2 * table + column] = static_cast<float>(m.mean_d - mean_d);
    });
  });
  return {stats, {rest}};
}

std::vector<Tensor> dists_bwd(const Tensor& grad, const Inputs& x, const Tensor& stats, const Saved& saved,
                              const Needs& needs) {
  const PlanePlan plan(x.features, x.targets);
  const int64_t table = plan.samples * plan.channels;
  const bool fits = grad.numel() == 5 * table && stats.numel() == 5 * table && saved.rest.numel() == 3 * table;
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && fits,
                  "dists: expected a float32 gradient of the statistics");
  const Tensor upstream = torch::stable::contiguous(grad), means = torch::stable::contiguous(stats),
               left = torch::stable::contiguous(saved.rest);
  const float *g = input<float>(upstream), *s = input<float>(means), *r = input<float>(left);
  std::vector<Tensor> grads;
  for (int side = 0; side < int{needs.features} + int{needs.targets}; ++side)
    for (const PlaneLayer& layer : plan.layers)
      grads.push_back(
          torch::stable::new_empty(layer.f, {plan.samples, layer.channels, layer.f.size(2), layer.f.size(3)}));
  for_dtype(plan.dtype, "dists", [&](auto element) {
    using T = decltype(element);
    const auto kernels = FASTLOSS_PICK(dists_kernels<T>());
    const int64_t second = needs.features ? static_cast<int64_t>(plan.layers.size()) : 0;
    std::vector<T*> to;
    for (Tensor& t : grads) to.push_back(output<T>(t));
    plan.run([&](const PlaneLayer& layer, int64_t index, int64_t plane) {
      const int64_t n = layer.pixels, column = plan.column(layer, plane);
      const float scale = 1.0f / static_cast<float>(n);
      const float mean_f = s[column], mean_d = s[table + column];
      const Slopes slopes{mean_f,
                          mean_f - mean_d,
                          mean_d,
                          r[column],
                          r[table + column],
                          r[2 * table + column],
                          g[column] * scale,
                          g[table + column] * scale,
                          2 * g[2 * table + column] * scale,
                          2 * g[3 * table + column] * scale,
                          2 * g[4 * table + column] * scale};
      PlaneSides<T> sides{needs.features ? to[index] + plane * n : nullptr,
                          needs.targets ? to[second + index] + plane * n : nullptr, false};
      const auto low = reinterpret_cast<uintptr_t>(sides.feature) | reinterpret_cast<uintptr_t>(sides.target);
      sides.streamed = low % 64 == 0 && layer.f.numel() * static_cast<int64_t>(sizeof(T)) >= kStreamedGradientBytes;
      kernels.grad(input<T>(layer.f) + plane * n, input<T>(layer.t) + plane * n, n, slopes, sides);
    });
  });
  return grads;
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("dists_fwd", FASTLOSS_BOX(&fastloss::dists_fwd));
  m.impl("dists_bwd", FASTLOSS_BOX(&fastloss::dists_bwd));
}
