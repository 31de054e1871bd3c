// SSIM of volumes, with a window of its own along each axis, and SSIM maps; images are volumes of one slice. Slices are
// walked as the planes of ssim.cpp are, on moments that are filtered along the depth as their rows are read. Of the
// partials, filtered along the rows and columns, only the slices that a window along the depth sees are in memory.

#include "image/per_image.h"
#include "image/ssim.h"

namespace fastloss {
namespace {

struct Windows {
  int64_t z, y, x;
  double z_sigma, y_sigma, x_sigma;
  FASTLOSS_FIELDS(z, y, x, z_sigma, y_sigma, x_sigma)
};
struct Inputs {
  Tensor image, image_pred;
  std::optional<Tensor> weight;
  Windows windows;
  bool same;
  double c1, c2, low;
  bool structure_only;
  bool as_map;
  int64_t keep;
  FASTLOSS_FIELDS(image, image_pred, weight, windows, same, c1, c2, low, structure_only, as_map, keep)
};
struct Saved {
  Tensor gradients;  // what `keep` asks for; Python's Saved.kept
  FASTLOSS_FIELDS(gradients)
};
using Grads = PerImage<Tensor>;
using Needs = PerImage<bool>;

constexpr int64_t kVolumeRows = 64;     // of a tile
constexpr int64_t kSlices = 16;         // whose partials are made before gradients are
constexpr int64_t kTilesTogether = 16;  // at least, if there are as many volumes: work for the threads

// The checked arguments of a call; `weight` is of the map, or what the map's gradient is.
struct Volumes {
  const Tensor &image, &image_pred;
  SsimOptions options;
  int64_t channels, volumes, depth, height, width, map_depth, map_height, map_width;
  std::optional<Operand> weights;

  Volumes(const Inputs& x, const std::optional<Tensor>& weight) : image(x.image), image_pred(x.image_pred) {
    const Windows& w = x.windows;
    options = ssim_options(
        {ssim_axis(w.z, w.z_sigma, x.same), ssim_axis(w.y, w.y_sigma, x.same), ssim_axis(w.x, w.x_sigma, x.same)}, x.c1,
        x.c2, x.low, x.structure_only);
    STD_TORCH_CHECK(image.dim() == 5 && image_pred.dim() == 5 && image.scalar_type() == image_pred.scalar_type(),
                    "ssim_volume: expected two 5-D volumes of one dtype");
    bool fits = true;
    for (int64_t d = 0; d < 5; ++d) fits = fits && image.size(d) == image_pred.size(d);
    STD_TORCH_CHECK(fits, "ssim_volume: image_pred has another shape than image");
    channels = image.size(1);
    volumes = image.size(0) * channels;
    depth = image.size(2);
    height = image.size(3);
    width = image.size(4);
    map_depth = depth - 2 * options.z.margin;
    map_height = height - 2 * options.y.margin;
    map_width = width - 2 * options.x.margin;
    STD_TORCH_CHECK(map_depth > 0 && map_height > 0 && map_width > 0, "ssim_volume: no window fits");
    if (!weight.has_value()) return;
    const int64_t shape[5] = {image.size(0), channels, map_depth, map_height, map_width};
    std::vector<int64_t> order;
    for (int64_t d = 0; d < 5; ++d) {
      fits = fits && weight->dim() == 5 && weight->size(d) == shape[d];
      if (fits && shape[d] != 1) order.push_back(d);
    }
    STD_TORCH_CHECK(fits, "ssim_volume: weight has another shape than the SSIM map");
    weights.emplace(*weight, order);
  }

  int64_t size() const { return depth * height * width; }
  int64_t map_slice() const { return map_height * map_width; }

  // Slice z of a volume.
  template <typename T>
  SsimPlanes<T> slice(int64_t volume, int64_t z) const {
    const auto at = [&](const Tensor& t) {
      return input<T>(t) + volume / channels * t.stride(0) + volume % channels * t.stride(1) + z * t.stride(2);
    };
    return {at(image),
            at(image_pred),
            image.stride(3),
            image.stride(4),
            image_pred.stride(3),
            image_pred.stride(4),
            height,
            width,
            z,
            depth,
            image.stride(2),
            image_pred.stride(2)};
  }
  SsimPlaneWeights weights_of(int64_t volume, int64_t map_z) const {
    const int64_t start = (volume * map_depth + map_z) * map_slice();
    return {weights ? &*weights : nullptr, start, map_width, options.y.margin, options.x.margin};
  }
};

// Where gradients of the sums go, contiguous; null where one is not asked for.
struct Targets {
  float *x = nullptr, *y = nullptr;
  int64_t maps() const { return 2 + (x != nullptr) + (y != nullptr); }
};

// The walk over all volumes: some volumes together, of each some slices of the map, then the gradients that these
// allow.
template <typename T>
class Pass {
 public:
  Pass(const Volumes& call, const Targets& to, float* map)
      : call_(call),
        to_(to),
        map_(map),
        rows_(call.depth == 1 ? kSsimRows : kVolumeRows),
        tiles_per_row_((call.width + kSsimColumns - 1) / kSsimColumns),
        tiles_((call.height + rows_ - 1) / rows_ * tiles_per_row_),
        block_(std::min(call.map_depth, kSlices)),
        together_(std::clamp<int64_t>(kTilesTogether / (block_ * tiles_), 1, call.volumes)),
        slots_(std::min(call.map_depth, block_ + 2 * call.options.z.radius)),
        line_((call.width + 15) / 16 * 16),
        partials_(to.maps() > 2 ? together_ * slots_ * to.maps() * call.height * line_ : 0),
        sums_(call.volumes * call.map_depth * tiles_) {}

  void run() {
    for (int64_t v = 0; v < call_.volumes; v += together_) {
      const int64_t last = std::min(call_.volumes, v + together_);
      int64_t done = 0;  // slices whose gradients are written
      for (int64_t z = 0; z < call_.map_depth; z += block_) {
        const int64_t end = std::min(call_.map_depth, z + block_);
        make(v, last, z, end);
        if (to_.maps() == 2) continue;
        const SsimAxis& axis = call_.options.z;
        const int64_t known = end == call_.map_depth ? call_.depth : end + axis.margin - axis.radius;
        if (known <= done) continue;
        emit(v, last, done, known);
        done = known;
      }
    }
  }

  // The sum over a volume's map.
  double sum(int64_t volume) const {
    double total = 0;
    const int64_t per_volume = call_.map_depth * tiles_;
    for (int64_t i = volume * per_volume; i < (volume + 1) * per_volume; ++i) total += sums_[i];
    return total;
  }

 private:
  float* partials(int64_t place, int64_t map_z) {
    return partials_.data() + (place * slots_ + map_z % slots_) * to_.maps() * call_.height * line_;
  }

  // Slices z .. end of the map of some volumes: their sums, and the partials filtered within each slice.
  void make(int64_t first, int64_t last, int64_t z, int64_t end) {
    const SsimKernels<T> kernels = ssim_kernels<T>();
    const int64_t slices = end - z, columns = std::min(call_.width, kSsimColumns);
    const int64_t work = std::max<int64_t>(1, std::min(call_.height, rows_) * columns);
    over_threads(0, (last - first) * tiles_ * slices, std::max<int64_t>(1, kBlockElements / work / 4),
                 [&](int64_t begin, int64_t stop) {
                   SsimWorkspace workspace(columns, kernels.size);
                   for (int64_t i = begin; i < stop && going_on(); ++i)
                     tile(kernels, first, first + i / (tiles_ * slices), z + i % slices, i / slices % tiles_,
                          workspace);
                 });
  }

  void tile(const SsimKernels<T>& kernels, int64_t first, int64_t volume, int64_t map_z, int64_t number,
            SsimWorkspace& workspace) {
    const int64_t y = number / tiles_per_row_ * rows_, x = number % tiles_per_row_ * kSsimColumns;
    const SsimTile tile{y, std::min(call_.height, y + rows_), x, std::min(call_.width, x + kSsimColumns)};
    const SsimPlaneWeights weights = call_.weights_of(volume, map_z);
    const SsimWeights reader{weights.weights == nullptr ? nullptr : SsimPlaneWeights::read, &weights};
    SsimSlice slice{nullptr, nullptr, call_.map_width, line_, call_.height * line_};
    if (map_ != nullptr) slice.map = map_ + (volume * call_.map_depth + map_z) * call_.map_slice();
    if (to_.maps() > 2) slice.partials = partials(volume - first, map_z);
    void* const walk = workspace.walk.data();
    kernels.start(walk, call_.template slice<T>(volume, map_z + call_.options.z.margin), tile, call_.options, reader,
                  1.0f, to_.x != nullptr, to_.y != nullptr, workspace.scratch, slice);
    sums_[(volume * call_.map_depth + map_z) * tiles_ + number] = kernels.advance(walk, tile.y1, SsimGradients{});
  }

  // The gradients of slices z .. end of some volumes.
  void emit(int64_t first, int64_t last, int64_t z, int64_t end) {
    const SsimKernels<T> kernels = ssim_kernels<T>();
    const int64_t slices = end - z, height = call_.height;
    const int64_t grain = std::max<int64_t>(1, kBlockElements / call_.width / 4);
    over_threads(0, (last - first) * slices * height, grain, [&](int64_t begin, int64_t stop) {
      SsimWorkspace workspace(kSsimColumns, 0);
      for (int64_t i = begin; i < stop && going_on(); ++i) {
        const int64_t place = i / (slices * height), slice = z + i / height % slices, y = i % height;
        const SsimAxis& axis = call_.options.z;
        SsimDepthRows rows{};
        for (int64_t k = -axis.radius; k <= axis.radius; ++k) {
          const int64_t map_z = slice - axis.margin + k;
          if (map_z < 0 || map_z >= call_.map_depth) continue;
          const float* const from = partials(place, map_z) + y * line_;
          for (int64_t m = 0; m < to_.maps(); ++m) rows.of[m][k + axis.radius] = from + m * height * line_;
        }
        const int64_t offset = (first + place) * call_.size() + (slice * height + y) * call_.width;
        kernels.depth(call_.template slice<T>(first + place, slice), call_.options, rows, y, call_.weights.has_value(),
                      to_.x ? to_.x + offset : nullptr, to_.y ? to_.y + offset : nullptr, workspace.scratch);
      }
    });
  }

  const Volumes& call_;
  const Targets to_;
  float* const map_;
  const int64_t rows_, tiles_per_row_, tiles_, block_, together_, slots_, line_;
  std::vector<float> partials_;  // (volumes together, slots, maps, height, line)
  std::vector<double> sums_;     // (volumes, slices of the map, tiles)
};

Tensor kept_for(const Tensor& like, int64_t count) {
  if (count == 0) return torch::stable::new_empty(like, {0}, ScalarType::Float);
  return torch::stable::new_empty(like, {count, like.numel()}, ScalarType::Float);
}

Targets targets(const Tensor& kept, bool x, bool y, int64_t size) {
  float* const data = output<float>(kept);
  return {x ? data : nullptr, y ? data + (x ? size : 0) : nullptr};
}

std::tuple<Tensor, Saved> ssim_volume_fwd(const Inputs& x) {
  const Volumes call(x, x.weight);
  STD_TORCH_CHECK(!x.as_map || (x.keep == 0 && !x.weight), "ssim_volume: a map has no weight and keeps nothing");
  const Tensor kept = kept_for(x.image, (x.keep & 1) + (x.keep >> 1 & 1));
  const auto empty = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(x.image, {sizes.begin(), sizes.size()}, ScalarType::Float);
  };
  const int64_t n = x.image.size(0);
  const Tensor out =
      x.as_map ? empty({n, call.channels, call.map_depth, call.map_height, call.map_width}) : empty({n, call.channels});
  for_dtype(x.image.scalar_type(), "ssim_volume", [&](auto element) {
    Pass<decltype(element)> pass(call, targets(kept, x.keep & 1, x.keep & 2, x.image.numel()),
                                 x.as_map ? output<float>(out) : nullptr);
    pass.run();
    for (int64_t v = 0; !x.as_map && v < call.volumes; ++v) output<float>(out)[v] = static_cast<float>(pass.sum(v));
  });
  return {out, {kept}};
}

// Gradients of the sums times the upstream ones of the volumes, in the type and layout of `like`.
template <typename T>
Tensor scaled(const float* from, const float* up, const Tensor& like) {
  const auto scale = ssim_kernels<T>().scale;
  const Tensor out = empty_like(like, like.scalar_type());
  Tensor written = out;
  if (!out.is_contiguous())
    written = torch::stable::new_empty(like, {like.size(0), like.size(1), like.size(2), like.size(3), like.size(4)});
  T* const to = output<T>(written);
  const int64_t volumes = like.size(0) * like.size(1), size = like.numel() / std::max<int64_t>(1, volumes);
  const int64_t pieces = blocks_of(size, kBlockElements);
  for_each(
      volumes * pieces,
      [&](int64_t i) {
        const int64_t volume = i / pieces, at = i % pieces * kBlockElements, begin = volume * size + at;
        scale(from + begin, nullptr, up == nullptr ? 1.0f : up[volume], std::min(kBlockElements, size - at), to + begin,
              false);
      },
      2);
  if (written.data_ptr() == out.data_ptr()) return written;
  Tensor result = out;
  torch::stable::copy_(result, written);
  return result;
}

Grads ssim_volume_bwd(const Tensor& grad, const Saved& saved, const Inputs& x, const Needs& needs) {
  const Volumes call(x, x.as_map ? std::optional<Tensor>(grad) : x.weight);
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float, "ssim_volume: expected a float32 gradient");
  const Tensor upstream = torch::stable::contiguous(grad);
  const float* const up = x.as_map ? nullptr : input<float>(upstream);
  const auto none = [&] { return torch::stable::new_empty(x.image, {0}); };
  const int64_t size = x.image.numel();
  Grads grads{none(), none()};
  for_dtype(x.image.scalar_type(), "ssim_volume", [&](auto element) {
    using T = decltype(element);
    bool first = x.keep & 1, second = x.keep & 2;
    Tensor found = saved.gradients;
    if (x.keep == 0) {  // of a map, or nobody asked for a gradient when the forward ran
      first = needs.image, second = needs.image_pred;
      found = kept_for(x.image, first + second);
      Pass<T>(call, targets(found, first, second, size), nullptr).run();
    }
    STD_TORCH_CHECK(found.numel() == (first + second) * size && first >= needs.image && second >= needs.image_pred,
                    "ssim_volume: the gradient asked for was not kept");
    const Targets from = targets(found, first, second, size);
    if (needs.image) grads.image = scaled<T>(from.x, up, x.image);
    if (needs.image_pred) grads.image_pred = scaled<T>(from.y, up, x.image_pred);
  });
  return grads;
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("ssim_volume_fwd", FASTLOSS_BOX(&fastloss::ssim_volume_fwd));
  m.impl("ssim_volume_bwd", FASTLOSS_BOX(&fastloss::ssim_volume_bwd));
}
