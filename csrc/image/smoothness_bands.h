// How the smoothness kernels are walked over an image.
#pragma once

#include "image/smoothness.h"
#include "core/constants.h"

namespace fastloss {
namespace {

// A guide's rows: `groups` planes of an image with `group_channels` channels side by side.
struct Guide {
  Tensor tensor;
  int64_t channels, groups, group_channels, depth, height, width, bytes = 0;
  const char* data = nullptr;
  EdgeKernel kernel = nullptr;

  explicit Guide(const Tensor& t)
      : tensor(is_dense(t, true) ? t : torch::stable::contiguous(t)),
        channels(t.size(1)),
        groups(is_dense(t, true) ? 1 : channels),
        group_channels(channels / std::max<int64_t>(1, groups)),
        depth(t.dim() == 5 ? t.size(2) : 1),
        height(t.size(t.dim() - 2)),
        width(t.size(t.dim() - 1)) {
    for_dtype(t.scalar_type(), "smoothness: guide", [&](auto element) {
      using T = decltype(element);
      data = static_cast<const char*>(tensor.const_data_ptr());
      bytes = sizeof(T);
      kernel = edge_kernel<T>();
    });
  }

  // The factors of a row of an image whose pixels have `step` elements.
  void row(int64_t image, int64_t z, int64_t y, bool second, int64_t step, int64_t pitch, std::vector<float>& sums,
           float* to) const {
    sums.resize(width * group_channels + 16);
    const int64_t line = width * group_channels, slice = height * line, plane = depth * slice;
    const int64_t offset = image * groups * plane + z * slice + y * line;
    const auto has = [&](int64_t i, int64_t n) { return i + 1 < n && (i > 0 || !second); };
    kernel({data + offset * bytes,
            -offset,
            tensor.numel() - offset,
            groups,
            plane,
            group_channels,
            width,
            {slice, line, group_channels},
            {has(z, depth), has(y, height), width > (second ? 2 : 1)},
            second},
           step, pitch, sums.data(), to);
  }
};

// An image cut into bands of whole rows, the same whatever the number of threads.
struct Bands {
  Tensor image;  // contiguous or channels_last
  Layout layout;
  int64_t images, channels, spatial, rows, per_slice;
  bool second;
  std::optional<Operand> weight;
  std::optional<Guide> guide;

  Bands(const Tensor& tensor, const std::optional<Tensor>& edges, const std::optional<Tensor>& map, int64_t order,
        int64_t block = kBlockElements)
      : image(tensor), images(tensor.size(0)), channels(tensor.size(1)), spatial(tensor.dim() - 2), second(order == 2) {
    STD_TORCH_CHECK(spatial == 2 || spatial == 3, "smoothness: the kernel takes 4-D and 5-D tensors");
    const bool last = !is_dense(tensor, false) && is_dense(tensor, true);
    if (!last) image = torch::stable::contiguous(tensor);
    const int64_t step = last ? channels : 1, width = tensor.size(tensor.dim() - 1);
    layout = {last ? 1 : channels, step, spatial == 3 ? tensor.size(2) : 1, tensor.size(tensor.dim() - 2),
              width * step};
    if (map) weight.emplace(*map, *memory_order(image));
    if (edges) guide.emplace(*edges);
    const int64_t together = guide ? layout.planes * layout.row : layout.row;
    rows = std::max<int64_t>(1, block / std::max<int64_t>(1, together));
    per_slice = image.numel() == 0 ? 0 : (layout.height + rows - 1) / rows;
  }

  bool plain() const { return !second && !weight && !guide; }

  // Slots of partial sums: one per image, slice, band and channel.
  int64_t parts() const { return layout.depth * per_slice; }
  int64_t slots() const { return images * parts() * channels; }
  int64_t slot(int64_t n, int64_t plane, int64_t z, int64_t begin) const {
    return ((n * layout.depth + z) * per_slice + begin / rows) * channels + plane * layout.step;
  }

  // body(image, plane, band, scratch) over torch's threads.
  template <typename T, typename Body>
  void for_each_band(bool backward, const Body& body) const {
    const int64_t groups = guide ? 1 : layout.planes, planes = guide ? layout.planes : 1;
    const int64_t size = std::min(rows, layout.height) * layout.row * planes;
    const int64_t grain = size == 0 ? 1 : std::max<int64_t>(1, 2 * kBlockElements / size);
    over_threads(0, images * groups * parts(), grain, [&](int64_t from, int64_t to) {
      Scratch scratch(layout, backward);
      std::vector<float> edges(guide ? Edges::size(layout, rows) : 0), sums;
      for (int64_t item = from; item < to && going_on(); ++item) {
        const int64_t begin = item % per_slice * rows, z = item / per_slice % layout.depth;
        const int64_t n = item / parts() / groups, end = std::min(layout.height, begin + rows);
        if (guide) fill(n, z, begin, end, backward, sums, edges.data());
        for (int64_t p = 0; p < planes; ++p) {
          const int64_t plane = item / parts() % groups + p, offset = (n * layout.planes + plane) * layout.size();
          body(n, plane,
               Band<T>{input<T>(image) + offset, -offset, image.numel() - offset, layout, z, begin, end, second,
                       weight ? &*weight : nullptr, offset, guide ? edges.data() : nullptr},
               scratch.memory);
        }
      }
    });
  }

 private:
  // The factors of the rows that a band reads.
  void fill(int64_t n, int64_t z, int64_t begin, int64_t end, bool backward, std::vector<float>& sums,
            float* edges) const {
    const auto row = [&](int64_t slice, int64_t y) {
      if (slice < 0 || slice >= layout.depth || y < 0 || y >= layout.height) return;
      guide->row(n, slice, y, second, layout.step, Edges::pitch(layout), sums,
                 edges + Edges::offset(layout, end - begin, slice - z, y - begin));
    };
    for (int64_t y = begin - backward; y < end + (backward && second); ++y) row(z, y);
    for (int64_t y = begin; backward && y < end; ++y) {
      row(z - 1, y);
      if (second) row(z + 1, y);
    }
  }
};

// Adds what a band's kernel has summed to the sums of its channels, [channels, axes].
inline void add_totals(const Memory& from, int64_t axes, int64_t step, double* to) {
  for (int64_t k = 0; k < axes; ++k)
    for (int64_t i = 0; i < from.period; i += step)
      for (int64_t c = 0; c < step; ++c) to[c * axes + k] += from.totals[(kAxes - axes + k) * from.period + i + c];
}

// Writes the upstream gradients of the sums of a plane, [N, C, axes], as a pattern along its rows.
inline void set_upstream(const float* up, int64_t axes, int64_t step, const Memory& to) {
  for (int64_t k = 0; k < axes; ++k)
    for (int64_t i = 0; i < to.period; i += step)
      for (int64_t c = 0; c < step; ++c) to.up[(kAxes - axes + k) * to.period + i + c] = up[c * axes + k];
}

}  // namespace
}  // namespace fastloss
