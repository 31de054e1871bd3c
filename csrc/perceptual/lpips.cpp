// The LPIPS head: one call forward and one backward for all layers. With u = x / (|x| + eps) over the channels of a
// pixel, v the same of y, and d = u - v (with inside_eps, |x| is sqrt(sum x^2 + inside_eps) everywhere, and eps is 0):
//
//   value of a pixel   sum_c w d^2
//   gradients          dx = 2 g (w d - k x / |x|) / (|x| + eps), k = sum_c w d u;   dy the same of -d, v and y
//
// The forward keeps |x|, |y| and both k of a pixel (Statistics), from which the backward is one pass over x and y.

#include "core/constants.h"
#include "core/isa.h"
#include "core/op.h"
#include "core/parallel.h"
#include "core/tensors.h"

namespace fastloss {
namespace {

template <typename F>
struct Statistics {
  F *norm_x, *norm_y, *k_x, *k_y;

  Statistics at(int64_t pixel) const { return {norm_x + pixel, norm_y + pixel, k_x + pixel, k_y + pixel}; }
};

// Pixels of one image. Planar: the channels of a pixel are `stride` elements apart, and pixels lie side by side; in
// rows: the other way round, with stride == channels.
template <typename T>
struct Pixels {
  const T *x, *y;
  const float* lin;
  int64_t channels, stride, count;
};
struct Eps {
  float added, inside;  // to the norm, and to the sum of squares within its root
};
template <typename T>
struct LpipsSides {
  T *x, *y;  // or null
  bool streamed;
};
struct Upstream {
  const float* per_pixel;  // or null: all have the same
  float scale;
};
template <typename T>
struct LpipsKernels {
  double (*planar)(const Pixels<T>&, const Eps&, const Statistics<float>&, float* map, float* scratch);
  double (*rows)(const Pixels<T>&, const Eps&, const Statistics<float>&, float* map, float* scratch);
  void (*planar_grad)(const Pixels<T>&, float eps, const Statistics<const float>&, Upstream, const LpipsSides<T>&,
                      float* scratch);
  void (*rows_grad)(const Pixels<T>&, float eps, const Statistics<const float>&, Upstream, const LpipsSides<T>&,
                    float* scratch);
};

constexpr int64_t kPad = 16;  // planar tiles are whole vectors wide

}  // namespace
}  // namespace fastloss

#define FASTLOSS_KERNELS "perceptual/lpips_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {
namespace {

struct Inputs {
  std::vector<Tensor> features, targets, lin_weights;
  double eps, inside_eps;
  bool spatial;
  FASTLOSS_FIELDS(features, targets, lin_weights, eps, inside_eps, spatial)
};
struct Saved {
  Tensor statistics;  // see Statistics: [4, pixels]
  FASTLOSS_FIELDS(statistics)
};
struct Needs {
  bool features, targets;
  FASTLOSS_FIELDS(features, targets)
};

constexpr int64_t kTile = 32768;  // elements of x, and of y, that a planar forward keeps in the L2 cache: 256 KiB
constexpr int64_t kGradPixels = 512;

bool in_rows(const Tensor& t) {  // channels last, dense
  const int64_t c = t.size(1), strides[] = {t.size(2) * t.size(3) * c, 1, t.size(3) * c, c};
  for (int d = 0; d < 4; ++d)
    if (t.size(d) != 1 && t.stride(d) != strides[d]) return false;
  return true;
}

struct Layer {
  Tensor x, y, lin;
  int64_t images, channels, pixels, first_pixel;  // the last: among the pixels of all layers
  bool rows;
};

// Pixels begin .. end of an image of a layer; what a thread takes at a time.
struct Block {
  int64_t layer, image, begin, end;
};

struct Plan {
  std::vector<Layer> layers;
  std::vector<Block> blocks;
  int64_t pixels = 0;
  ScalarType dtype;

  Plan(const Inputs& inputs, bool backward) {
    const std::vector<Tensor>&features = inputs.features, &targets = inputs.targets, &lins = inputs.lin_weights;
    STD_TORCH_CHECK(!features.empty() && features.size() == targets.size(), "lpips: the lists differ in length");
    STD_TORCH_CHECK(lins.empty() || lins.size() == features.size(), "lpips: expected one lin weight a layer, or none");
    dtype = features[0].scalar_type();
    for (size_t i = 0; i < features.size(); ++i) {
      const Tensor &x = features[i], &y = targets[i];
      bool same = x.dim() == 4 && y.dim() == 4 && x.scalar_type() == dtype && y.scalar_type() == dtype;
      for (int64_t d = 0; same && d < 4; ++d) same = x.size(d) == y.size(d);
      STD_TORCH_CHECK(same && x.size(0) == features[0].size(0), "lpips: shapes or dtypes differ");
      const bool rows = !x.is_contiguous() && in_rows(x) && in_rows(y);
      const auto plain = [&](const Tensor& t) { return rows ? t : torch::stable::contiguous(t); };
      Layer layer{plain(x), plain(y), lin_of(lins, i, x), x.size(0), x.size(1), x.size(2) * x.size(3), pixels, rows};
      STD_TORCH_CHECK(layer.lin.scalar_type() == ScalarType::Float && layer.lin.numel() == layer.channels,
                      "lpips: expected float32 lin weights, one a channel");
      pixels += layer.images * layer.pixels;
      cut(layer, backward);
      layers.push_back(std::move(layer));
    }
  }

  static Tensor lin_of(const std::vector<Tensor>& lins, size_t i, const Tensor& x) {
    if (!lins.empty()) return torch::stable::contiguous(lins[i]);
    Tensor ones = torch::stable::new_empty(x, {x.size(1)}, ScalarType::Float);
    std::fill_n(output<float>(ones), x.size(1), 1.0f);
    return ones;
  }

  static int64_t padded(int64_t count) { return (count + kPad - 1) / kPad * kPad; }

  // The images in blocks of about the same size, the same whatever the number of threads.
  void cut(const Layer& layer, bool backward) {
    const int64_t most = backward && !layer.rows ? kGradPixels : kTile / std::max<int64_t>(1, layer.channels);
    const int64_t parts = (layer.pixels + std::max(most, kPad) - 1) / std::max(most, kPad);
    const int64_t width = parts == 0 ? 0 : padded((layer.pixels + parts - 1) / parts);
    for (int64_t image = 0; image < layer.images; ++image)
      for (int64_t p = 0; p < layer.pixels; p += width)
        blocks.push_back({static_cast<int64_t>(layers.size()), image, p, std::min(layer.pixels, p + width)});
  }

  // Floats of scratch that every thread needs: a tile of x and of y and seven numbers a pixel, or eight.
  int64_t scratch(bool backward) const {
    int64_t most = 0;
    for (const Block& b : blocks) {
      const int64_t width = padded(b.end - b.begin);
      if (!layers[b.layer].rows) most = std::max(most, width * (backward ? 8 : 2 * layers[b.layer].channels + 7));
    }
    return most + kPad;
  }

  // body(layer, block, its index, its pixels, how far they are from the layer's start, scratch), over torch's threads.
  template <typename T, typename Body>
  void run(bool backward, const Body& body) const {
    const int64_t floats = scratch(backward);
    over_threads(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t first, int64_t last) {
      std::vector<float> buffer(floats);
      float* aligned = buffer.data();
      while (reinterpret_cast<uintptr_t>(aligned) % 64 != 0) ++aligned;
      for (int64_t i = first; i < last && going_on(); ++i) {
        const Block& b = blocks[i];
        const Layer& layer = layers[b.layer];
        const int64_t start = b.image * layer.channels * layer.pixels + b.begin * (layer.rows ? layer.channels : 1);
        const Pixels<T> pixels{input<T>(layer.x) + start,
                               input<T>(layer.y) + start,
                               input<float>(layer.lin),
                               layer.channels,
                               layer.rows ? layer.channels : layer.pixels,
                               b.end - b.begin};
        body(layer, b, i, pixels, start, aligned);
      }
    });
  }

  static int64_t pixel(const Layer& layer, const Block& b) {
    return layer.first_pixel + b.image * layer.pixels + b.begin;
  }
};

// [4, pixels], one row after the other.
template <typename F>
Statistics<F> statistics_in(F* rows, int64_t pixels) {
  return {rows, rows + pixels, rows + 2 * pixels, rows + 3 * pixels};
}

std::tuple<Tensor, Saved> lpips_fwd(const Inputs& x) {
  const Plan plan(x, false);
  const int64_t images = x.features[0].size(0);
  Tensor out = torch::stable::new_empty(x.features[0], {x.spatial ? plan.pixels : images}, ScalarType::Float);
  Tensor kept = torch::stable::new_empty(x.features[0], {4, plan.pixels}, ScalarType::Float);
  auto* values = output<float>(out);
  const Statistics<float> all = statistics_in(output<float>(kept), plan.pixels);
  std::vector<double> partial(plan.blocks.size()), total(images);
  for_dtype(plan.dtype, "lpips", [&](auto element) {
    using T = decltype(element);
    const auto kernels = FASTLOSS_PICK(lpips_kernels<T>());
    const Eps eps{static_cast<float>(x.eps), static_cast<float>(x.inside_eps)};
    plan.run<T>(false,
                [&](const Layer& layer, const Block& b, int64_t i, const Pixels<T>& pixels, int64_t, float* scratch) {
                  const int64_t pixel = Plan::pixel(layer, b);
                  const auto kernel = layer.rows ? kernels.rows : kernels.planar;
                  partial[i] = kernel(pixels, eps, all.at(pixel), x.spatial ? values + pixel : nullptr, scratch);
                });
  });
  if (x.spatial) return {out, {kept}};
  for (size_t i = 0; i < partial.size(); ++i)  // in order, whatever the number of threads
    total[plan.blocks[i].image] += partial[i] / static_cast<double>(plan.layers[plan.blocks[i].layer].pixels);
  for (int64_t n = 0; n < images; ++n) values[n] = static_cast<float>(total[n]);
  return {out, {kept}};
}

// Gradients of one list: made as empty_like makes them, and where that is not how the kernel writes, written aside.
struct Gradients {
  std::vector<Tensor> made, written;

  Gradients(const std::vector<Tensor>& tensors, const Plan& plan, bool features) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& like = features ? plan.layers[i].x : plan.layers[i].y;
      made.push_back(empty_like(tensors[i], tensors[i].scalar_type()));
      written.push_back(same_strides(made[i], like) ? made[i] : empty_like(like, like.scalar_type()));
    }
  }

  template <typename T>
  T* at(int64_t layer, int64_t start) const {
    return written.empty() ? nullptr : output<T>(written[layer]) + start;
  }

  void append_to(std::vector<Tensor>& all) const {
    for (size_t i = 0; i < made.size(); ++i) {
      Tensor result = made[i];
      if (written[i].data_ptr() != result.data_ptr()) torch::stable::copy_(result, written[i]);
      all.push_back(result);
    }
  }
};

std::vector<Tensor> lpips_bwd(const Tensor& grad, const Saved& saved, const Inputs& x, const Needs& needs) {
  const Plan plan(x, true);
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && saved.statistics.numel() == 4 * plan.pixels &&
                      grad.numel() == (x.spatial ? plan.pixels : x.features[0].size(0)),
                  "lpips: grad or statistics have another shape or dtype than the forward's");
  const Tensor upstream = torch::stable::contiguous(grad), kept = torch::stable::contiguous(saved.statistics);
  const auto* g = input<float>(upstream);
  const Statistics<const float> all = statistics_in(input<float>(kept), plan.pixels);
  const Gradients to_x(needs.features ? x.features : std::vector<Tensor>{}, plan, true);
  const Gradients to_y(needs.targets ? x.targets : std::vector<Tensor>{}, plan, false);
  for_dtype(plan.dtype, "lpips", [&](auto element) {
    using T = decltype(element);
    const auto kernels = FASTLOSS_PICK(lpips_kernels<T>());
    plan.run<T>(
        true, [&](const Layer& layer, const Block& b, int64_t, const Pixels<T>& pixels, int64_t start, float* scratch) {
          const int64_t pixel = Plan::pixel(layer, b);
          const Upstream up =
              x.spatial ? Upstream{g + pixel, 2.0f} : Upstream{nullptr, 2.0f * g[b.image] / (float)layer.pixels};
          LpipsSides<T> sides{to_x.at<T>(b.layer, start), to_y.at<T>(b.layer, start), false};
          const auto low = reinterpret_cast<uintptr_t>(sides.x) | reinterpret_cast<uintptr_t>(sides.y);
          const int64_t row = pixels.stride * static_cast<int64_t>(sizeof(T));
          const int64_t bytes = layer.images * layer.channels * layer.pixels * static_cast<int64_t>(sizeof(T));
          sides.streamed = low % 64 == 0 && row % 64 == 0 && bytes >= kStreamedGradientBytes;
          const auto kernel = layer.rows ? kernels.rows_grad : kernels.planar_grad;
          kernel(pixels, static_cast<float>(x.eps), all.at(pixel), up, sides, scratch);
        });
  });
  std::vector<Tensor> found;
  to_x.append_to(found);
  to_y.append_to(found);
  return found;
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("lpips_fwd", FASTLOSS_BOX(&fastloss::lpips_fwd));
  m.impl("lpips_bwd", FASTLOSS_BOX(&fastloss::lpips_bwd));
}
