// The smoothness loss over rows of a band; included by for_each_isa.h.
//
// Each difference belongs to one pixel: a first one, x[i+1] - x[i], to pixel i; a second, x[i+1] - 2 x[i] + x[i-1], to
// pixel i too. The forward adds up their distances. The backward makes rows of the derivatives by the
// differences, once each, and gathers from them: a pixel's gradient is p[i-1] - p[i], or p[i-1] - 2 p[i] + p[i+1],
// summed over the axes.

namespace fastloss {
namespace FASTLOSS_ISA {

// `plain`: first differences without guide and weight, known at compile time.
template <bool plain, typename T>
struct Row {
  const T* pixels;
  int64_t first, last;  // what may be read of the tensor, from `pixels` on
  int64_t size, step;
  int64_t away[2];  // z, y: from the row to the next one
  bool has[kAxes];  // whether pixels of the row have a difference along z, y, x
  bool of_second;
  const float *edges, *weights;  // or null; the edges' rows for z, y, x are `pitch` apart
  int64_t pitch;

  bool second() const { return !plain && of_second; }
  const float* edge() const { return plain ? nullptr : edges; }
  const float* weight() const { return plain ? nullptr : weights; }
};

template <bool plain, typename T>
FASTLOSS_INLINE Row<plain, T> row_of(const Band<T>& band, int64_t z, int64_t y, float* buffer) {
  const Layout& layout = band.layout;
  const int64_t slice = layout.height * layout.row, from = z * slice + y * layout.row, rows = band.end - band.begin;
  const auto has = [&](int64_t i, int64_t n) { return i + 1 < n && (i > 0 || !band.second); };
  Row<plain, T> r{band.plane + from,
                  band.first - from,
                  band.last - from,
                  layout.row,
                  layout.step,
                  {slice, layout.row},
                  {has(z, layout.depth), has(y, layout.height), layout.row > (band.second ? 2 : 1) * layout.step},
                  band.second,
                  nullptr,
                  nullptr,
                  Edges::pitch(layout)};
  if (!plain && band.edges) r.edges = band.edges + Edges::offset(layout, rows, z - band.z, y - band.begin);
  if (!plain && band.weight) r.weights = band.weight->read(band.position + from, layout.row, buffer);
  return r;
}

template <bool inside, bool plain, typename T>
FASTLOSS_INLINE vf pixels(const Row<plain, T>& r, int64_t x) {
  return inside ? load(r.pixels + x) : load_inside(r.pixels, x, r.first, r.last);
}

// The differences along axis k of W pixels from x on. 0 where one would leave the image.
template <bool inside, bool plain, typename T>
FASTLOSS_INLINE vf difference(const Row<plain, T>& r, int k, int64_t x, vf c) {
  if (!r.has[k]) return vf{};
  const int64_t away = k == 2 ? r.step : r.away[k];
  vf d = pixels<inside>(r, x + away) - c;
  if (r.second()) d -= c - pixels<inside>(r, x - away);
  if constexpr (inside) return d;
  if (k < 2) return where(between(x, 0, r.size), d);
  return where(between(x, r.second() ? r.step : 0, r.size - r.step), d);
}

// Whether the W pixels from x on need no care: all in the row, and their neighbours too.
template <bool plain, typename T>
FASTLOSS_INLINE bool is_inside(const Row<plain, T>& r, int64_t x) {
  return x + W + r.step <= r.size && (x >= r.step || !r.second());
}

template <bool inside, bool plain, typename T>
FASTLOSS_INLINE vf weight_at(const Row<plain, T>& r, int64_t x) {
  return inside ? load(r.weight() + x) : load_inside(r.weight(), x, 0, r.size);
}
template <bool plain, typename T>
FASTLOSS_INLINE vf edge_at(const Row<plain, T>& r, int k, int64_t x) {
  return load(r.edge() + k * r.pitch + x);  // the padding allows it
}

template <Step step, bool inside, bool plain, typename T>
FASTLOSS_INLINE void add_pixels(const Row<plain, T>& r, int64_t x, float* sums, int64_t period) {
  const vf c = pixels<inside>(r, x);
  const auto add = [&](int k, vf loss) __attribute__((always_inline)) {
    if (r.weight()) loss = weighted(loss, weight_at<inside>(r, x));
    store(sums + k * period, load((const float*)sums + k * period) + loss);
  };
  vf squares{};
  for (int k = 0; k < kAxes; ++k) {
    if (!r.has[k]) continue;
    vf d = difference<inside>(r, k, x, c);
    if constexpr (step == Step::isotropic) {
      if (r.edge()) d *= edge_at(r, k, x);
      squares += d * d;
    } else {
      vf loss = step == Step::l1 ? abs(d) : d * d;
      if (r.edge()) loss *= edge_at(r, k, x);
      add(k, loss);
    }
  }
  if constexpr (step == Step::isotropic) add(2, sqrt(squares));
}

// Adds the distances of a band to `totals`, by axis and position in a row modulo `period`. isotropic: all along x.
template <Step step, bool plain, typename T>
static void smoothness_sum(const Band<T>& band, const Memory& memory) {
  const int64_t period = memory.period;
  float* const sums = memory.sums;
  double* const totals = memory.totals;
  for (int64_t i = 0; i < kAxes * period; ++i) sums[i] = 0, totals[i] = 0;
  const auto flush = [&] {  // 32 additions or so in float: the error does not grow with the image
    for (int64_t i = 0; i < kAxes * period; i += W) {
      vd total;
      __builtin_memcpy(&total, totals + i, sizeof total);
      total += __builtin_convertvector(load((const float*)sums + i), vd);
      __builtin_memcpy(totals + i, &total, sizeof total);
      store(sums + i, vf{});
    }
  };
  int64_t added = 0;
  for (int64_t y = band.begin; y < band.end; ++y) {
    const Row<plain, T> r = row_of<plain>(band, band.z, y, memory.weight);
    for (int64_t x = 0; x < r.size; ++added) {
      if (added == 32) flush(), added = 0;
      for (int64_t j = 0; j < period && x < r.size; j += W, x += W) {
        if (is_inside(r, x))
          add_pixels<step, true>(r, x, sums + j, period);
        else
          add_pixels<step, false>(r, x, sums + j, period);
      }
    }
  }
  flush();
}

template <Step step, bool inside, bool plain, typename T>
FASTLOSS_INLINE void grad_difference_pixels(const Row<plain, T>& r, int64_t x, const float* up, int64_t period,
                                            int axes, float* to, int64_t pitch) {
  const vf c = pixels<inside>(r, x);
  vf squares{}, steps[kAxes];
  if constexpr (step == Step::isotropic) {
    for (int k = 0; k < kAxes; ++k) {
      steps[k] = difference<inside>(r, k, x, c);
      if (r.edge() && r.has[k]) steps[k] *= edge_at(r, k, x);
      squares += steps[k] * steps[k];
    }
    const vf length = sqrt(squares);
    squares = where(length != 0.0f, load(up + 2 * period) / length);
  }
  for (int k = 0; k < kAxes; ++k) {
    if (!(axes >> k & 1)) continue;
    vf grad_difference{};
    if (r.has[k]) {
      if constexpr (step == Step::isotropic) {
        grad_difference = squares * steps[k];
      } else {
        const vf d = difference<inside>(r, k, x, c);
        grad_difference = load(up + k * period) * (step == Step::l1 ? sign(d) : d + d);
      }
      if (r.edge()) grad_difference *= edge_at(r, k, x);
      if (r.weight()) grad_difference = weighted(grad_difference, weight_at<inside>(r, x));
    }
    store(to + k * pitch, grad_difference);
  }
}

// The gradients by the differences of a row along the axes of which `axes` has the bit, written a vector at a time over
// the end of the row.
template <Step step, bool plain, typename T>
static void grad_difference_row(const Row<plain, T>& r, const float* up, int64_t period, int axes, float* to,
                                int64_t pitch) {
  for (int64_t x = 0, j = 0; x < r.size; x += W) {
    if (is_inside(r, x))
      grad_difference_pixels<step, true>(r, x, up + j, period, axes, to + x, pitch);
    else
      grad_difference_pixels<step, false>(r, x, up + j, period, axes, to + x, pitch);
    j = j + W == period ? 0 : j + W;
  }
}

// The gradients by the differences around a row: `before`, of it and `after` it, for each axis.
struct GradDifferences {
  const float *before[kAxes], *here[kAxes], *after[kAxes];
  bool volume, second;
};
template <bool plain>
FASTLOSS_INLINE vf gather(const GradDifferences& p, int64_t x) {
  const auto along = [&](int k) __attribute__((always_inline)) {
    const vf here = load(p.here[k] + x), g = load(p.before[k] + x) - here;
    return !plain && p.second ? g - (here - load(p.after[k] + x)) : g;
  };
  const vf g = along(1) + along(2);
  return p.volume ? g + along(0) : g;
}

// row(y, grad_differences) for each row of a band. Three sets of rows go round; two more hold the slices before and
// after.
template <Step step, bool plain, typename T, typename Body>
FASTLOSS_INLINE void band_grad_differences(const Band<T>& band, const Memory& memory, const Body& row) {
  const int64_t pitch = memory.pitch;
  const bool volume = band.layout.depth > 1;
  float* const start = memory.grad_differences + memory.pad;
  float* const none = start + 5 * kAxes * pitch;
  const auto set = [&](int64_t i) { return start + i * kAxes * pitch; };
  const auto of = [&](int64_t y) { return set((y + 3) % 3); };
  const auto grad_difference = [&](int64_t z, int64_t y, int axes, float* to) {
    grad_difference_row<step>(row_of<plain>(band, z, y, memory.weight), memory.up, memory.period, axes, to, pitch);
  };
  const int all_axes = volume ? 7 : 6;
  if (band.begin > 0) grad_difference(band.z, band.begin - 1, 2, of(band.begin - 1));
  if (band.second) grad_difference(band.z, band.begin, all_axes, of(band.begin));
  for (int64_t y = band.begin; y < band.end; ++y) {
    const int64_t next = band.second ? y + 1 : y;
    if (next < band.layout.height) grad_difference(band.z, next, next < band.end ? all_axes : 2, of(next));
    const float* here = of(y);
    GradDifferences p{{none, y > 0 ? of(y - 1) + pitch : none, here + 2 * pitch - band.layout.step},
                      {here, here + pitch, here + 2 * pitch},
                      {none, next < band.layout.height ? of(next) + pitch : none, here + 2 * pitch + band.layout.step},
                      volume,
                      band.second};
    if (volume && band.z > 0) {
      grad_difference(band.z - 1, y, 1, set(3));
      p.before[0] = set(3);
    }
    if (volume && band.second && band.z + 1 < band.layout.depth) {
      grad_difference(band.z + 1, y, 1, set(4));
      p.after[0] = set(4);
    }
    row(y, p);
  }
}

template <Step step, bool plain, typename T>
static void smoothness_grad(const Band<T>& band, const Memory& memory, T* plane, bool streamed) {
  const Layout& layout = band.layout;
  band_grad_differences<step, plain>(band, memory,
                                     [&](int64_t y, const GradDifferences& p) __attribute__((always_inline)) {
                                       T* to = plane + (band.z * layout.height + y) * layout.row;
                                       for (int64_t x = 0; x < layout.row; x += W)
                                         put(to + x, gather<plain>(p, x), layout.row - x, streamed);
                                     });
  if (streamed) fence();
}

template <Step step, bool plain, typename T>
static void smoothness_rows(const Band<T>& band, const Memory& memory, EachRow row, const void* context) {
  const int64_t size = band.layout.row;
  band_grad_differences<step, plain>(band, memory,
                                     [&](int64_t y, const GradDifferences& p) __attribute__((always_inline)) {
                                       for (int64_t x = 0; x < size; x += W)
                                         store(memory.line + x, gather<plain>(p, x));
                                       row(context, y, memory.line);
                                     });
}

// The sums over a guide's channels of its differences along axis k, at W elements of a row from x on.
template <bool inside, typename T>
FASTLOSS_INLINE vf guide_steps(const GuideRow& g, int64_t from, int64_t to, int64_t x) {
  vf sum{};
  for (int64_t i = 0; i < g.groups; ++i) {
    const T* channel = (const T*)g.pixels + i * g.plane;
    if constexpr (inside)
      sum += abs(load(channel + to + x) - load(channel + from + x));
    else
      sum += abs(load_inside(channel, to + x, g.first - i * g.plane, g.last - i * g.plane) -
                 load_inside(channel, from + x, g.first - i * g.plane, g.last - i * g.plane));
  }
  return sum;
}

// The factors of edge_row() along y (unless null) and x, of the vectors of a row of planes whose neighbours to the
// right are in it too: in one sweep, which loads each pixel once for both. Returns where it ended.
template <typename T>
FASTLOSS_INLINE int64_t edge_sweep(const GuideRow& g, float scale, float* along_y, float* along_x) {
  const int64_t below = along_y == nullptr ? 0 : g.away[1], groups = g.groups, plane = g.plane;
  int64_t x = 0;
  for (; x + 1 + W <= g.width; x += W) {
    vf down{}, right{};
    const T* channel = (const T*)g.pixels + x;
    for (int64_t i = 0; i < groups; ++i, channel += plane) {
      const vf c = load(channel);
      down += abs(load(channel + below) - c);
      right += abs(load(channel + 1) - c);
    }
    store(along_x + x, exp(right * scale));
    if (along_y != nullptr) store(along_y + x, exp(down * scale));
  }
  return x;
}

// The factors exp(-mean) of a row's differences along each axis that has some,
// 0 where there is none, `step` times each.
template <typename T>
static void edge_row(const GuideRow& row, int64_t step, int64_t pitch, float* sums, float* to) {
  const GuideRow g = row;
  const float scale = -1.0f / (float)(g.groups * g.group_channels);
  int64_t begin = 0;
  if (g.group_channels == 1 && step == 1 && g.has[2] && !g.has[0] && !g.second)
    begin = edge_sweep<T>(g, scale, g.has[1] ? to + pitch : nullptr, to + 2 * pitch);
  for (int k = 0; k < kAxes; ++k) {
    if (!g.has[k]) continue;
    const int64_t before = g.second ? -g.away[k] : 0, after = g.away[k];
    const int64_t first = k == 2 && g.second ? 1 : 0, last = k == 2 ? g.width - 1 : g.width;
    float* const line = to + k * pitch;
    if (g.group_channels > 1) {
      for (int64_t x = 0; x < g.width * g.group_channels; x += W)
        store(sums + x, guide_steps<false, T>(g, before, after, x));
      for (int64_t x = 0; x < g.width; ++x) {
        float s = 0;
        for (int64_t c = 0; c < g.group_channels; ++c) s += sums[x * g.group_channels + c];
        sums[x] = s;
      }
    }
    float* const out = step == 1 ? line : sums;
    for (int64_t x = begin; x < g.width; x += W) {
      const bool inside = x + before >= g.first && x + after + W <= g.width;
      const vf s = g.group_channels > 1 ? load((const float*)sums + x)
                   : inside             ? guide_steps<true, T>(g, before, after, x)
                                        : guide_steps<false, T>(g, before, after, x);
      const vf factor = exp(s * scale);
      store(out + x, x >= first && x + W <= last ? factor : where(between(x, first, last), factor));
    }
    if (step > 1)
      for (int64_t x = 0; x < g.width; ++x)
        for (int64_t c = 0; c < step; ++c) line[x * step + c] = sums[x];
  }
}

template <Step step, typename T>
static SmoothnessKernels<T> smoothness_kernels_of(bool plain) {
  if (plain) return {smoothness_sum<step, true, T>, smoothness_grad<step, true, T>, smoothness_rows<step, true, T>};
  return {smoothness_sum<step, false, T>, smoothness_grad<step, false, T>, smoothness_rows<step, false, T>};
}
template <typename T>
static SmoothnessKernels<T> smoothness_kernels(Step step, bool plain) {
  switch (step) {
    case Step::l1: return smoothness_kernels_of<Step::l1, T>(plain);
    case Step::l2: return smoothness_kernels_of<Step::l2, T>(plain);
    case Step::isotropic: return smoothness_kernels_of<Step::isotropic, T>(plain);
  }
  return {};
}
template <typename T>
static EdgeKernel edge_kernel() {
  return edge_row<T>;
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
