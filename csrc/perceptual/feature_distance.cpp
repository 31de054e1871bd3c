// Distance of two lists of deep features: one call forward and one backward for all layers. L1 keeps the signs of the
// differences, two bits an element, and nothing else.

#include "core/constants.h"
#include "core/isa.h"
#include "core/op.h"
#include "core/parallel.h"
#include "core/tensors.h"

namespace fastloss {
namespace {

enum class Criterion { l1, l2, charbonnier, smooth_l1 };
constexpr int64_t kGroup = 32;      // elements that share two words of signs
constexpr int64_t kSignUnit = 256;  // a row of signs is padded to so many elements

template <typename T>
struct Pair {
  const T *feature, *target;
  int64_t n;
};
template <typename T>
struct Sides {
  T *feature, *target;  // or null
  bool streamed;
  const T* incoming;  // or null: what is added to the gradient of the features
};
template <typename T>
struct FeatureKernels {
  double (*sum)(const Pair<T>&, double p, uint32_t* signs);
  void (*grad)(const Pair<T>&, double p, float upstream, const Sides<T>&);
  void (*sign_grad)(const uint32_t* signs, int64_t n, float upstream, const Sides<T>&);
};

}  // namespace
}  // namespace fastloss

#define FASTLOSS_KERNELS "perceptual/feature_distance_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {
namespace {

using torch::stable::detail::from;

struct Inputs {
  std::vector<Tensor> features, targets;
  std::vector<double> weights;
  std::vector<int64_t> layout;
  ScalarType dtype;
  std::string criterion;
  double parameter;
  std::string reduction;
  FASTLOSS_FIELDS(features, targets, weights, layout, dtype, criterion, parameter, reduction)
};
// What the backward of L1 takes of them.
struct LayerInputs {
  std::vector<double> weights;
  std::vector<int64_t> layout;
  ScalarType dtype;
  std::string reduction;
  FASTLOSS_FIELDS(weights, layout, dtype, reduction)
};
struct Saved {
  Tensor signs;
  FASTLOSS_FIELDS(signs)
};
struct Needs {
  bool features, targets;
  FASTLOSS_FIELDS(features, targets)
};

Criterion criterion_of(const std::string& name) {
  if (name == "l1") return Criterion::l1;
  if (name == "l2") return Criterion::l2;
  if (name == "charbonnier") return Criterion::charbonnier;
  STD_TORCH_CHECK(name == "smooth_l1", "feature_distance: unknown criterion ", name);
  return Criterion::smooth_l1;
}

// A layer as `layout` has it: `rows` sums of `length` elements each, one after the other in memory.
struct Layer {
  std::vector<int64_t> sizes, strides;
  int64_t rows, length, groups;  // groups of signs in a row
  int64_t first_word;            // of its signs
  double scale;
};

// Elements begin .. end of a row; what a thread takes at a time.
struct Block {
  int64_t layer, row, begin, end;
};

struct Plan {
  std::vector<Layer> layers;
  std::vector<Block> blocks;
  int64_t rows = 1, words = 0;

  Plan(const std::vector<int64_t>& layout, const std::vector<double>& weights, const std::string& reduction) {
    const bool per_sample = reduction == "none";
    const int64_t end = static_cast<int64_t>(layout.size());
    for (int64_t offset = 0; offset < end; offset += 1 + 2 * layout[offset]) {
      const int64_t rank = layout[offset];
      const bool whole = rank >= (per_sample ? 1 : 0) && offset + 1 + 2 * rank <= end;
      STD_TORCH_CHECK(whole && layers.size() < weights.size(), "feature_distance: the layout does not fit");
      const auto first = layout.begin() + offset + 1;
      Layer layer{{first, first + rank}, {first + rank, first + 2 * rank}, 1, 1, 0, words, 0};
      for (int64_t d = 0; d < rank; ++d) (per_sample && d == 0 ? layer.rows : layer.length) *= layer.sizes[d];
      layer.groups = (layer.length + kSignUnit - 1) / kSignUnit * (kSignUnit / kGroup);
      words += layer.rows * layer.groups * 2;
      const int64_t count = reduction == "sum" ? 1 : std::max<int64_t>(layer.length, 1);
      layer.scale = weights[layers.size()] / static_cast<double>(count);
      if (per_sample) rows = layer.rows;
      for (int64_t row = 0; row < layer.rows; ++row)
        for (int64_t i = 0; i < layer.length; i += kBlockElements)
          blocks.push_back({static_cast<int64_t>(layers.size()), row, i, std::min(layer.length, i + kBlockElements)});
      layers.push_back(std::move(layer));
    }
    STD_TORCH_CHECK(layers.size() == weights.size(), "feature_distance: the layout does not fit");
  }

  // body(layer, block, its index, where it starts in the layer) for all blocks, over torch's threads.
  template <typename Body>
  void run(const Body& body) const {
    over_threads(0, static_cast<int64_t>(blocks.size()), 2, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last && going_on(); ++b) {
        const Layer& layer = layers[blocks[b].layer];
        body(layer, blocks[b], b, blocks[b].row * layer.length + blocks[b].begin);
      }
    });
  }

  uint32_t* signs(uint32_t* all, const Layer& layer, const Block& block) const {
    return all + layer.first_word + (block.row * layer.groups + block.begin / kGroup) * 2;
  }
};

Tensor new_empty_strided(const Tensor& like, const Layer& layer, ScalarType dtype) {
  const std::optional<ScalarType> type = dtype;
  StableIValue stack[] = {from(like),         from(layer.sizes),  from(layer.strides), from(type),
                          from(std::nullopt), from(std::nullopt), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::new_empty_strided", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The tensors as the layout has them: themselves, or copies.
std::vector<Tensor> laid_out(const std::vector<Tensor>& tensors, const Plan& plan) {
  STD_TORCH_CHECK(tensors.size() == plan.layers.size(), "feature_distance: the layout does not fit");
  std::vector<Tensor> found;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    const Layer& layer = plan.layers[i];
    bool same = t.dim() == static_cast<int64_t>(layer.sizes.size()), fits = same;
    for (int64_t d = 0; same && d < t.dim(); ++d) {
      same = t.size(d) == layer.sizes[d];
      fits = fits && (t.size(d) == 1 || t.numel() == 0 || t.stride(d) == layer.strides[d]);
    }
    STD_TORCH_CHECK(same, "feature_distance: the layout does not fit");
    STD_TORCH_CHECK(t.scalar_type() == tensors[0].scalar_type(), "feature_distance: dtypes differ");
    found.push_back(fits ? t : new_empty_strided(t, layer, t.scalar_type()));
    if (!fits) torch::stable::copy_(found.back(), t);
  }
  return found;
}

template <typename T>
std::vector<T*> pointers(const std::vector<Tensor>& tensors) {
  std::vector<T*> all;
  for (const Tensor& t : tensors) all.push_back(const_cast<T*>(input<T>(t)));
  return all;
}

Tensor sum_layers(const Inputs& x, const Plan& plan, Criterion criterion, uint32_t* signs) {
  const std::vector<Tensor> f = laid_out(x.features, plan), t = laid_out(x.targets, plan);
  STD_TORCH_CHECK(f[0].scalar_type() == t[0].scalar_type(), "feature_distance: features and targets differ in dtype");
  std::vector<double> partial(plan.blocks.size()), total(plan.rows);
  for_dtype(f[0].scalar_type(), "feature_distance", [&](auto element) {
    using T = decltype(element);
    const auto kernels = FASTLOSS_PICK(feature_kernels<T>(criterion));
    const std::vector<T*> from_f = pointers<T>(f), from_t = pointers<T>(t);
    plan.run([&](const Layer& layer, const Block& b, int64_t index, int64_t start) {
      const Pair<T> pair{from_f[b.layer] + start, from_t[b.layer] + start, b.end - b.begin};
      partial[index] = kernels.sum(pair, x.parameter, signs ? plan.signs(signs, layer, b) : nullptr);
      if (signs && b.end == layer.length)  // the padding
        std::fill(signs + layer.first_word + (b.row * layer.groups + (layer.length + kGroup - 1) / kGroup) * 2,
                  signs + layer.first_word + (b.row + 1) * layer.groups * 2, 0);
    });
  });
  for (size_t b = 0; b < partial.size(); ++b)  // in order, whatever the number of threads
    total[plan.blocks[b].row] += partial[b] * plan.layers[plan.blocks[b].layer].scale;
  Tensor out = x.reduction == "none" ? torch::stable::new_empty(f[0], {plan.rows}, ScalarType::Float)
                                     : torch::stable::new_empty(f[0], {}, ScalarType::Float);
  for (int64_t r = 0; r < plan.rows; ++r) output<float>(out)[r] = static_cast<float>(total[r]);
  return out;
}

// Gradients of all layers of the sides that need them; body(kernels, layer, block, start, upstream, sides) writes them.
template <typename Body>
std::vector<Tensor> gradients(const Tensor& grad, const std::vector<Tensor>& incoming, const Plan& plan,
                              ScalarType dtype, Criterion criterion, const Needs& needs, const Body& body) {
  const Tensor upstream = torch::stable::contiguous(grad);
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float, "feature_distance: grad is not float32");
  STD_TORCH_CHECK(grad.numel() == plan.rows, "feature_distance: grad has another shape than the loss");
  std::vector<Tensor> grads;
  for (int side = 0; side < int{needs.features} + int{needs.targets}; ++side)
    for (const Layer& layer : plan.layers) grads.push_back(new_empty_strided(grad, layer, dtype));
  const float* g = input<float>(upstream);
  const std::vector<Tensor> added = incoming.empty() ? incoming : laid_out(incoming, plan);
  STD_TORCH_CHECK(added.empty() || (needs.features && added[0].scalar_type() == dtype),
                  "feature_distance: the incoming gradients do not fit");
  for_dtype(dtype, "feature_distance", [&](auto element) {
    using T = decltype(element);
    const auto kernels = FASTLOSS_PICK(feature_kernels<T>(criterion));
    const std::vector<T*> to = pointers<T>(grads), from_others = pointers<T>(added);
    const int64_t second = needs.features ? static_cast<int64_t>(plan.layers.size()) : 0;
    plan.run([&](const Layer& layer, const Block& b, int64_t, int64_t start) {
      Sides<T> sides{needs.features ? to[b.layer] + start : nullptr,
                     needs.targets ? to[second + b.layer] + start : nullptr, false,
                     added.empty() ? nullptr : from_others[b.layer] + start};
      const auto low = reinterpret_cast<uintptr_t>(sides.feature) | reinterpret_cast<uintptr_t>(sides.target);
      sides.streamed =
          low % 64 == 0 && layer.rows * layer.length * static_cast<int64_t>(sizeof(T)) >= kStreamedGradientBytes;
      body(kernels, layer, b, start, static_cast<float>(g[b.row] * layer.scale), sides);
    });
  });
  return grads;
}

std::tuple<Tensor, Saved> l1_fwd(const Inputs& x) {
  const Plan plan(x.layout, x.weights, x.reduction);
  Tensor signs = torch::stable::new_empty(x.features[0], {plan.words}, ScalarType::Int);
  return {sum_layers(x, plan, Criterion::l1, output<uint32_t>(signs)), {signs}};
}

std::vector<Tensor> l1_bwd(const Tensor& grad, const Saved& saved, const std::vector<Tensor>& incoming,
                           const LayerInputs& x, const Needs& needs) {
  const Plan plan(x.layout, x.weights, x.reduction);
  STD_TORCH_CHECK(saved.signs.numel() == plan.words, "feature_distance: the signs do not fit");
  auto* words = const_cast<uint32_t*>(input<uint32_t>(saved.signs));
  return gradients(grad, incoming, plan, x.dtype, Criterion::l1, needs,
                   [&](const auto& kernels, const Layer& layer, const Block& b, int64_t, float up, const auto& to) {
                     kernels.sign_grad(plan.signs(words, layer, b), b.end - b.begin, up, to);
                   });
}

Tensor distance_fwd(const Inputs& x) {
  const Criterion criterion = criterion_of(x.criterion);
  STD_TORCH_CHECK(criterion != Criterion::l1, "feature_distance: L1 has an op of its own");
  return sum_layers(x, {x.layout, x.weights, x.reduction}, criterion, nullptr);
}

std::vector<Tensor> distance_bwd(const Tensor& grad, const Inputs& x, const std::vector<Tensor>& incoming,
                                 const Needs& needs) {
  const Plan plan(x.layout, x.weights, x.reduction);
  const std::vector<Tensor> f = laid_out(x.features, plan), t = laid_out(x.targets, plan);
  STD_TORCH_CHECK(f[0].scalar_type() == x.dtype && t[0].scalar_type() == x.dtype, "feature_distance: dtypes differ");
  return gradients(grad, incoming, plan, x.dtype, criterion_of(x.criterion), needs,
                   [&]<typename T>(const FeatureKernels<T>& kernels, const Layer&, const Block& b, int64_t start,
                                   float up, const Sides<T>& to) {
                     const T *from_f = input<T>(f[b.layer]) + start, *from_t = input<T>(t[b.layer]) + start;
                     kernels.grad({from_f, from_t, b.end - b.begin}, x.parameter, up, to);
                   });
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("feature_l1_fwd", FASTLOSS_BOX(&fastloss::l1_fwd));
  m.impl("feature_l1_bwd", FASTLOSS_BOX(&fastloss::l1_bwd));
  m.impl("feature_distance_fwd", FASTLOSS_BOX(&fastloss::distance_fwd));
  m.impl("feature_distance_bwd", FASTLOSS_BOX(&fastloss::distance_bwd));
}
