// Divergences of attention maps, row by row, as fastloss/attention/attention_maps.py defines them: one call forward and
// one backward for all layers. A thread makes a row of both maps float32, leaves masked keys out, and compares them.

#include "attention/attention_maps.h"
#include "core/constants.h"
#include "core/isa.h"
#include "core/large_pages.h"
#include "core/op.h"
#include "core/parallel.h"

#include <array>

#define FASTLOSS_KERNELS "attention/attention_maps_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {
namespace {

struct Inputs {
  std::vector<Tensor> a, b, masks;
  std::vector<double> weights;
  std::string inputs, metric;
  double temperature;
  std::string reduction;
  bool head_mean;
  FASTLOSS_FIELDS(a, b, masks, weights, inputs, metric, temperature, reduction, head_mean)
};
struct Saved {
  Tensor statistics, scales;
  FASTLOSS_FIELDS(statistics, scales)
};
struct Needs {
  bool a, b;
  FASTLOSS_FIELDS(a, b)
};

MapMetric metric_of(const std::string& name) {
  if (name == "js") return MapMetric::js;
  if (name == "kl") return MapMetric::kl;
  if (name == "sym_kl") return MapMetric::sym_kl;
  if (name == "mse") return MapMetric::mse;
  if (name == "l1") return MapMetric::l1;
  STD_TORCH_CHECK(name == "cosine", "attention_maps: unknown metric ", name);
  return MapMetric::cosine;
}

// Which of its numbers the statistics of a row are, in order.
std::vector<float MapStatistics::*> kept_of(MapMetric metric, bool logits) {
  using S = MapStatistics;
  if (logits) return {&S::peak_a, &S::log_a, &S::peak_b, &S::log_b, &S::inner_a, &S::inner_b, &S::scale};
  if (metric == MapMetric::cosine) return {&S::peak_a, &S::log_a, &S::peak_b};
  if (metric == MapMetric::mse || metric == MapMetric::l1) return {&S::scale};
  return {};
}

struct Layer {
  Tensor a, b;  // [rows, keys] in memory, [rows / queries, heads, queries, keys] where heads are averaged
  std::optional<Operand> mask;
  int64_t rows, keys;
  int64_t first_row;  // of the rows of all layers
  int64_t heads, queries;

  // Where a row is, of one of the heads.
  int64_t start(int64_t row, int64_t head = 0) const {
    return ((row / queries * heads + head) * queries + row % queries) * keys;
  }
};
// Of a row of means: the softmaxes of all heads of both maps, [heads, padded keys] each, and how many there are.
struct Heads {
  float *a, *b;
  int64_t count_a, count_b;
};
// Rows begin .. end of a layer; what a thread takes at a time.
struct Block {
  int64_t layer, begin, end;
};

std::vector<int64_t> all_dims(const Tensor& t) {
  std::vector<int64_t> order;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) order.push_back(d);
  return order;
}

// 1 / the keys that take part, 0 where none does
double inverse_count(const float* mask, int64_t keys) {
  int64_t count = keys;
  if (mask) {
    count = 0;
    for (int64_t i = 0; i < keys; ++i) count += mask[i] != 0.0f;
  }
  return count ? 1 / static_cast<double>(count) : 0.0;
}

struct Plan {
  std::vector<Layer> layers;
  std::vector<Block> blocks;
  MapMetric metric;
  Preparation how;
  MapKernels kernels;
  std::vector<float MapStatistics::*> kept;
  int64_t rows = 0, most_keys = 0, most_heads = 0;  // of heads to be averaged
  ScalarType dtype;

  explicit Plan(const Inputs& x) : metric(metric_of(x.metric)) {
    const bool logits = x.inputs == "logits", masked = !x.masks.empty();
    STD_TORCH_CHECK(!x.a.empty() && x.b.size() == x.a.size() && x.weights.size() == x.a.size() &&
                        (!masked || x.masks.size() == x.a.size()),
                    "attention_maps: expected a, b and weights of as many layers");
    dtype = x.a[0].scalar_type();
    how = {logits, x.inputs == "scores", masked && x.masks[0].scalar_type() != ScalarType::Bool,
           static_cast<float>(x.temperature)};
    STD_TORCH_CHECK(logits || !x.head_mean, "attention_maps: means over heads are of logits");
    kernels = FASTLOSS_PICK(map_kernels(metric, logits && !x.head_mean));
    kept = kept_of(metric, logits && !x.head_mean);
    for (size_t i = 0; i < x.a.size(); ++i) {
      const Tensor &a = x.a[i], &b = x.b[i];
      bool fits = a.dim() >= 1 && a.dim() == b.dim() && a.scalar_type() == dtype && b.scalar_type() == dtype &&
                  (!masked || x.masks[i].dim() == a.dim());
      for (int64_t d = 0; fits && d < a.dim(); ++d)
        fits = a.size(d) == b.size(d) && (!masked || x.masks[i].size(d) == a.size(d));
      STD_TORCH_CHECK(fits && a.size(a.dim() - 1) > 0, "attention_maps: the maps of layer ", i, " do not fit");
      STD_TORCH_CHECK(!x.head_mean || (a.dim() >= 3 && a.size(a.dim() - 3) > 0), "attention_maps: expected heads");
      const int64_t keys = a.size(a.dim() - 1), heads = x.head_mean ? a.size(a.dim() - 3) : 1;
      const int64_t count = a.numel() / keys / heads, queries = x.head_mean ? a.size(a.dim() - 2) : count;
      layers.push_back(
          {as_contiguous(a), as_contiguous(b), std::nullopt, count, keys, rows, heads, std::max<int64_t>(1, queries)});
      if (masked) layers.back().mask.emplace(x.masks[i], all_dims(x.masks[i]));
      const int64_t step = std::max<int64_t>(1, kBlockElements / (keys * heads));
      for (int64_t row = 0; row < count; row += step)
        blocks.push_back({static_cast<int64_t>(i), row, std::min(count, row + step)});
      rows += count;
      most_keys = std::max(most_keys, keys);
      if (x.head_mean) most_heads = std::max(most_heads, heads);
    }
  }

  void prepare(const float* from, const float* mask, int64_t n, float* to) const {
    kernels.prepare_float(from, mask, how, n, to);
  }
  void prepare(const BFloat16* from, const float* mask, int64_t n, float* to) const {
    kernels.prepare_bfloat16(from, mask, how, n, to);
  }
  void prepare(const Half* from, const float* mask, int64_t n, float* to) const {
    kernels.prepare_half(from, mask, how, n, to);
  }
  void write(const float* from, const Left& left, int64_t n, float* to, bool streamed) const {
    kernels.write_float(from, left, n, to, streamed);
  }
  void write(const float* from, const Left& left, int64_t n, BFloat16* to, bool streamed) const {
    kernels.write_bfloat16(from, left, n, to, streamed);
  }
  void write(const float* from, const Left& left, int64_t n, Half* to, bool streamed) const {
    kernels.write_half(from, left, n, to, streamed);
  }

  // The gradients of a row's logits in all heads, from the slopes by their mean; `p`, their softmaxes, is overwritten.
  template <typename T>
  void write_heads(const Layer& layer, const float* slopes, float* p, int64_t count, const Left& left, T* to,
                   bool streamed) const {
    const float by = 1 / static_cast<float>(std::max<int64_t>(count, 1));
    for (int64_t h = 0; h < layer.heads; ++h, p += whole_vectors(layer.keys), to += layer.queries * layer.keys) {
      kernels.through_softmax(p, slopes, layer.keys, by, p);
      write(p, left, layer.keys, to, streamed);
    }
  }

  // Whether rows of a layer are compared where they lie: float32 in whole vectors that nothing is done to.
  bool as_they_lie(const Layer& layer) const {
    const bool changed = most_heads > 0 || layer.mask || how.scores || (how.logits && how.temperature != 1.0f);
    return dtype == ScalarType::Float && !changed && layer.keys % kLanes == 0;
  }

  // The means over the heads of a row of both maps, zeros where one has no softmax; their own in `of`.
  template <typename T>
  bool average(const Layer& layer, int64_t r, float* a, float* b, float* mask_room, Heads& of) const {
    const int64_t n = layer.keys, width = whole_vectors(n);
    std::fill_n(a, width, 0.0f), std::fill_n(b, width, 0.0f);
    of.count_a = of.count_b = 0;
    for (int64_t h = 0; h < layer.heads; ++h) {
      const int64_t start = layer.start(r, h);
      const float* mask = layer.mask ? layer.mask->read(start, n, mask_room) : nullptr;
      float *const p = of.a + h * width, *const q = of.b + h * width;
      prepare(input<T>(layer.a) + start, mask, n, p);
      prepare(input<T>(layer.b) + start, mask, n, q);
      of.count_a += kernels.soften(p, n, p, a);
      of.count_b += kernels.soften(q, n, q, b);
    }
    const bool there = of.count_a > 0 && of.count_b > 0;
    kernels.scale(a, n, there ? 1 / static_cast<float>(of.count_a) : 0.0f);
    kernels.scale(b, n, there ? 1 / static_cast<float>(of.count_b) : 0.0f);
    return there;
  }

  // body(layer, block, its index, row, the row's mask or null, room for rows, its heads if they are averaged) for all
  // rows, over torch's threads.
  template <typename T, typename Body>
  void each_row(const Body& body) const {
    over_threads(0, static_cast<int64_t>(blocks.size()), 2, [&](int64_t first, int64_t last) {
      const int64_t width = whole_vectors(most_keys);
      std::vector<float> room((5 + 2 * most_heads) * width);
      Heads heads{&room[0] + 5 * width, &room[0] + (5 + most_heads) * width, 0, 0};
      for (int64_t k = first; k < last && going_on(); ++k) {
        const Block& block = blocks[k];
        const Layer& layer = layers[block.layer];
        float *const a = &room[0], *const b = &room[width];
        Row row{a, b, &room[2 * width], &room[3 * width], layer.keys, 0};
        const bool in_place = as_they_lie(layer);
        for (int64_t r = block.begin; r < block.end; ++r) {
          const int64_t start = layer.start(r);
          const bool there = most_heads == 0 || average<T>(layer, r, a, b, &room[4 * width], heads);
          const float* mask = layer.mask ? layer.mask->read(start, layer.keys, &room[4 * width]) : nullptr;
          if (in_place) {
            row.a = input<float>(layer.a) + start, row.b = input<float>(layer.b) + start;
          } else if (most_heads == 0) {
            prepare(input<T>(layer.a) + start, mask, layer.keys, a);
            prepare(input<T>(layer.b) + start, mask, layer.keys, b);
          }
          if (how.added) mask = nullptr;
          row.mean = there ? inverse_count(mask, layer.keys) : 0.0;
          body(layer, k, r, mask, row, heads);
        }
      }
      kernels.finish();
    });
  }
};

std::tuple<Tensor, Saved> maps_fwd(const Inputs& x) {
  const Plan plan(x);
  const int64_t kept = static_cast<int64_t>(plan.kept.size());
  Saved saved{new_float32({kept, plan.rows}), new_float32(static_cast<int64_t>(x.a.size()))};
  const bool each = x.reduction == "none";
  Tensor out = each ? new_float32(plan.rows) : new_float32();
  float *statistics = output<float>(saved.statistics), *scales = output<float>(saved.scales), *to = output<float>(out);
  std::vector<double> sums(plan.blocks.size());
  std::vector<int64_t> counts(plan.blocks.size());
  for_dtype(plan.dtype, "attention_maps", [&](auto element) {
    plan.each_row<decltype(element)>(
        [&](const Layer& layer, int64_t block, int64_t r, const float*, const Row& row, const Heads&) {
          MapStatistics s{};
          s.scale = static_cast<float>(row.mean);
          const RowValue got = plan.kernels.forward(row, s);
          for (int64_t k = 0; k < kept; ++k) statistics[k * plan.rows + layer.first_row + r] = s.*plan.kept[k];
          if (each) to[layer.first_row + r] = static_cast<float>(got.value * x.weights[plan.blocks[block].layer]);
          sums[block] += got.value;
          counts[block] += got.counts;
        });
  });
  std::vector<double> of_layer(plan.layers.size());
  std::vector<int64_t> counted(plan.layers.size());
  for (size_t k = 0; k < sums.size(); ++k) {  // in order, whatever the number of threads
    of_layer[plan.blocks[k].layer] += sums[k];
    counted[plan.blocks[k].layer] += counts[k];
  }
  double total = 0;
  for (size_t i = 0; i < of_layer.size(); ++i) {
    const double scale = x.reduction == "mean" ? 1 / static_cast<double>(std::max<int64_t>(counted[i], 1)) : 1.0;
    scales[i] = static_cast<float>(scale);
    total += of_layer[i] * scale * x.weights[i];
  }
  if (!each) *to = static_cast<float>(total);
  return {out, saved};
}

// Of each layer, whether its gradients go past the caches: where they are large, and their rows whole vectors.
std::vector<char> streamed_layers(const Plan& plan, const std::vector<Tensor>& grads) {
  std::vector<char> streamed;
  for (const Layer& layer : plan.layers) {
    const int64_t bytes = layer.rows * layer.heads * layer.keys * (plan.dtype == ScalarType::Float ? 4 : 2);
    streamed.push_back(bytes >= kStreamedGradientBytes && layer.keys % kLanes == 0);
  }
  for (size_t k = 0; k < grads.size(); ++k)
    if (reinterpret_cast<uintptr_t>(grads[k].const_data_ptr()) % 64 != 0) streamed[k % streamed.size()] = false;
  return streamed;
}

std::vector<Tensor> maps_bwd(const Tensor& grad, const Saved& saved, const Inputs& x, const Needs& needs) {
  const Plan plan(x);
  const int64_t kept = static_cast<int64_t>(plan.kept.size());
  const bool each = x.reduction == "none";
  const Tensor upstream = as_contiguous(grad), statistics = as_contiguous(saved.statistics);
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.numel() == (each ? plan.rows : 1),
                  "attention_maps: grad is not float32, or has another shape than the loss");
  STD_TORCH_CHECK(statistics.numel() == kept * plan.rows && saved.scales.numel() == static_cast<int64_t>(x.a.size()),
                  "attention_maps: the statistics do not fit");
  std::vector<Tensor> grads;
  for (const bool of_b : {false, true}) {
    if (of_b ? !needs.b : !needs.a) continue;
    for (const Tensor& t : of_b ? x.b : x.a) {
      std::vector<int64_t> sizes;
      for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
      grads.push_back(torch::stable::new_empty(t, sizes, plan.dtype));
      use_large_pages(grads.back());
    }
  }
  const std::vector<char> streamed = streamed_layers(plan, grads);
  const float *g = input<float>(upstream), *from = input<float>(statistics), *scales = input<float>(saved.scales);
  const double of_input = plan.how.logits ? 1 / x.temperature : 1.0;
  const size_t first_b = needs.a ? x.a.size() : 0;
  for_dtype(plan.dtype, "attention_maps", [&](auto element) {
    using T = decltype(element);
    plan.each_row<T>(
        [&](const Layer& layer, int64_t block, int64_t r, const float* mask, const Row& row, const Heads& heads) {
          MapStatistics s{};
          for (int64_t k = 0; k < kept; ++k) s.*plan.kept[k] = from[k * plan.rows + layer.first_row + r];
          const int64_t i = plan.blocks[block].layer, start = layer.start(r);
          const double weight = static_cast<double>(scales[i]) * x.weights[i] * of_input;
          T* const to_a = needs.a ? output<T>(grads[i]) + start : nullptr;
          T* const to_b = needs.b ? output<T>(grads[first_b + i]) + start : nullptr;
          RowGradient to{static_cast<float>(g[each ? layer.first_row + r : 0] * weight), needs.a ? row.more_a : nullptr,
                         needs.b ? row.more_b : nullptr, false};
          if constexpr (std::is_same_v<T, float>)
            if (plan.as_they_lie(layer)) {
              plan.kernels.backward(row, s, {to.upstream, to_a, to_b, streamed[i] != 0});
              return;
            }
          plan.kernels.backward(row, s, to);
          if (plan.most_heads > 0) {
            const Left left{mask, nullptr};
            if (to_a) plan.write_heads(layer, to.a, heads.a, heads.count_a, left, to_a, streamed[i] != 0);
            if (to_b) plan.write_heads(layer, to.b, heads.b, heads.count_b, left, to_b, streamed[i] != 0);
            return;
          }
          if (to_a) plan.write(to.a, {mask, plan.how.scores ? row.a : nullptr}, layer.keys, to_a, streamed[i] != 0);
          if (to_b) plan.write(to.b, {mask, plan.how.scores ? row.b : nullptr}, layer.keys, to_b, streamed[i] != 0);
        });
  });
  return grads;
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("attention_maps_fwd", FASTLOSS_BOX(&fastloss::maps_fwd));
  m.impl("attention_maps_bwd", FASTLOSS_BOX(&fastloss::maps_bwd));
}
