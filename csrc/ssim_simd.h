// SSIM over a tile of a plane; included by each_isa.h, after ssim.h. With G the window, a = x + y and d = x - y:
//
//   ma = G a, md = G d, va = G a^2 - ma^2, vd = G d^2 - md^2
//   l = md^2 / ((ma^2 + md^2) / 2 + C1), s = vd / ((va + vd) / 2 + C2)      one minus luminance, minus structure
//   1 - SSIM = l + s - l s
//
// A tile goes from row to row. Each row is filtered along x once, into a ring of as many rows as the window has; the
// filter along y then reads the ring. The backward makes the moments again, the partial derivatives of the map with
// respect to them, and filters those in the same way: the window is symmetric, so it is its own transpose.

namespace fastloss {
namespace FASTLOSS_ISA {

// n elements `column` apart, n <= W; the other lanes read 0.
template <typename T>
FASTLOSS_INLINE vf ssim_gather(const T* from, int64_t column, int64_t n) {
  T found[W] = {};
  for (int64_t k = 0; k < n; ++k) found[k] = from[k * column];
  return load((const T*)found);
}

// Columns begin .. begin + n of row y as x + y and x - y, 0 outside the image. Whole vectors, over the end.
template <typename T>
static void ssim_read(const SsimPlanes<T>& p, int64_t y, int64_t begin, int64_t n, float* a, float* d) {
  const T *x = p.x + y * p.x_row + begin * p.x_column, *z = p.y + y * p.y_row + begin * p.y_column;
  const int64_t left = begin < 0 ? (-begin < n ? -begin : n) : 0;
  const int64_t end = begin + n < p.width ? n : p.width - begin;
  int64_t i = left;
  const auto keep = [&](vf u, vf v) __attribute__((always_inline)) {
    store(a + i, u + v);
    store(d + i, u - v);
  };
  if (p.x_column == 1 && p.y_column == 1) {
    for (; i + W <= end; i += W) keep(load(x + i), load(z + i));
    if (i < end) keep(load_some(x + i, end - i), load_some(z + i, end - i));
  } else {
    for (; i < end; i += W) {
      const int64_t count = end - i < W ? end - i : W;
      keep(ssim_gather(x + i * p.x_column, p.x_column, count), ssim_gather(z + i * p.y_column, p.y_column, count));
    }
  }
  for (i = 0; i < left; ++i) a[i] = d[i] = 0;
  for (i = end < left ? left : end; i < n; ++i) a[i] = d[i] = 0;
}

// Keeps GCC from loading a value again, across a cache line, wherever it is used.
FASTLOSS_INLINE vf in_register(vf x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#endif
  return x;
}

// The filter along x of columns j .. j + W: `center` is the middle of their windows. R < 0: the radius is o.radius.
template <int R>
FASTLOSS_INLINE vf ssim_along_x(const SsimOptions& o, const float* center) {
  vf total = o.taps[0] * load(center);
#pragma GCC unroll 5
  for (int k = 1; k <= (R < 0 ? o.radius : R); ++k) total += o.taps[k] * (load(center - k) + load(center + k));
  return total;
}

// The filter along y of the vector at `at` in each of the rows.
template <int R>
FASTLOSS_INLINE vf ssim_along_y(const SsimOptions& o, const float* const* rows, int64_t at) {
  const int r = R < 0 ? o.radius : R;
  vf total = o.taps[0] * load(rows[r] + at);
#pragma GCC unroll 5
  for (int k = 1; k <= r; ++k) total += o.taps[k] * (load(rows[r - k] + at) + load(rows[r + k] + at));
  return total;
}

// G a, G d, G a^2, G d^2 along x of n columns, vector by vector side by side. a and d begin a radius to the left.
template <int R>
static void ssim_moments(const SsimOptions& o, const float* a, const float* d, int64_t n, float* to) {
  const int r = R < 0 ? o.radius : R;
  vf taps[kSsimRadius + 1];  // o may lie where `to` does, for all the compiler knows
  for (int k = 0; k <= r; ++k) taps[k] = all(o.taps[k]);
  for (int64_t j = 0; j < n; j += W, to += 4 * W) {
#pragma GCC unroll 2
    for (int m = 0; m < 2; ++m) {
      const float* center = (m == 0 ? a : d) + j + r;
      const vf c = load(center);
      vf mean = taps[0] * c, square = taps[0] * (c * c);
#pragma GCC unroll 5
      for (int k = 1; k <= r; ++k) {
        const vf before = in_register(load(center - k)), after = in_register(load(center + k));
        mean += taps[k] * (before + after);
        square += taps[k] * (before * before + after * after);
      }
      store(to + m * W, mean);
      store(to + (2 + m) * W, square);
    }
  }
}

// One minus luminance and one minus structure, the reciprocals of their denominators, and the two means.
struct SsimMap {
  vf l, s, per_l, per_s, mean_a, mean_d;
};

template <int R>
FASTLOSS_INLINE SsimMap ssim_map(const SsimOptions& o, const float* const* rows, int64_t j) {
  SsimMap m;
  m.mean_a = ssim_along_y<R>(o, rows, 4 * j);
  m.mean_d = ssim_along_y<R>(o, rows, 4 * j + W);
  const vf mean_aa = m.mean_a * m.mean_a, mean_dd = m.mean_d * m.mean_d;
  const vf var_a = ssim_along_y<R>(o, rows, 4 * j + 2 * W) - mean_aa;
  const vf var_d = ssim_along_y<R>(o, rows, 4 * j + 3 * W) - mean_dd;
  m.per_l = 1.0f / (0.5f * (mean_aa + mean_dd) + o.c1);
  m.per_s = 1.0f / (0.5f * (var_a + var_d) + o.c2);
  m.l = mean_dd * m.per_l;
  m.s = var_d * m.per_s;
  if (o.structure) m.l = m.per_l = vf{};
  return m;
}

// The (weighted) sum of a row of the map; accumulators run over 16 vectors before they move to double.
template <int R>
static double ssim_sum_row(const SsimOptions& o, const float* const* rows, int64_t n, const float* weights) {
  vd total{};
  for (int64_t j = 0; j < n;) {
    vf part{};
    for (int i = 0; i < 16 && j < n; ++i, j += W) {
      const SsimMap m = ssim_map<R>(o, rows, j);
      vf loss = m.l + m.s - m.l * m.s;
      if (weights != nullptr) loss *= load(weights + j);
      part += n - j < W ? where(lanes() < (int)(n - j), loss) : loss;
    }
    total += __builtin_convertvector(part, vd);
  }
  return sum(total);
}

// Partial derivatives of the map of a row, times upstream and weight, with respect to G a^2, G d^2, and to the means:
// of x, of y, or of both, each in a row of its own.
template <int R>
static void ssim_partials(const SsimOptions& o, const float* const* rows, int64_t n, const float* weights,
                          float upstream, bool needs_x, bool needs_y, float* to, int64_t step) {
  for (int64_t j = 0; j < n; j += W, to += W) {
    const SsimMap m = ssim_map<R>(o, rows, j);
    const vf g = weights == nullptr ? all(upstream) : upstream * load(weights + j);
    const vf by_s = g * (1.0f - m.l) * m.per_s, by_l = g * (1.0f - m.s) * m.per_l;
    const vf half_s = 0.5f * m.s, half_l = 0.5f * m.l;
    const vf square_a = -by_s * half_s, square_d = by_s * (1.0f - half_s);
    const vf of_a = 2.0f * m.mean_a * (-by_l * half_l - square_a);
    const vf of_d = 2.0f * m.mean_d * (by_l * (1.0f - half_l) - square_d);
    store(to, square_a);
    store(to + step, square_d);
    if (needs_x) store(to + 2 * step, of_a + of_d);
    if (needs_y) store(to + (needs_x ? 3 : 2) * step, of_a - of_d);
  }
}

// The filter along x of M rows `step` apart, vector by vector side by side; `from` begins a radius to the left.
template <int R, int M>
static void ssim_filter(const SsimOptions& o, const float* from, int64_t step, int64_t n, float* to) {
  for (int64_t j = 0; j < n; j += W, to += M * W)
    for (int m = 0; m < M; ++m) store(to + m * W, ssim_along_x<R>(o, from + m * step + j + (R < 0 ? o.radius : R)));
}

// The gradients of a row from the filtered partial derivatives and its own pixels.
template <int R, int M>
static void ssim_gradient(const SsimOptions& o, const float* const* rows, int64_t n, const float* a, const float* d,
                          float* first, float* second) {
  for (int64_t j = 0; j < n; j += W) {
    const vf of_a = 2.0f * load(a + j) * ssim_along_y<R>(o, rows, M * j);
    const vf of_d = 2.0f * load(d + j) * ssim_along_y<R>(o, rows, M * j + W);
    const vf mean = ssim_along_y<R>(o, rows, M * j + 2 * W);
    if constexpr (M == 4) {
      store(first + j, mean + of_a + of_d);
      store(second + j, ssim_along_y<R>(o, rows, M * j + 3 * W) + of_a - of_d);
    } else if (first != nullptr) {
      store(first + j, mean + of_a + of_d);
    } else {
      store(second + j, mean + of_a - of_d);
    }
  }
}

// The steps that know the window but not the type in memory: unrolled for the usual window, a loop for the others.
struct SsimSteps {
  decltype(&ssim_moments<-1>) moments;
  decltype(&ssim_sum_row<-1>) sum_row;
  decltype(&ssim_partials<-1>) partials;
  decltype(&ssim_filter<-1, 3>) filter;
  decltype(&ssim_gradient<-1, 3>) gradient;
};
template <int R>
FASTLOSS_INLINE SsimSteps ssim_steps_of(bool both) {
  if (both) return {ssim_moments<R>, ssim_sum_row<R>, ssim_partials<R>, ssim_filter<R, 4>, ssim_gradient<R, 4>};
  return {ssim_moments<R>, ssim_sum_row<R>, ssim_partials<R>, ssim_filter<R, 3>, ssim_gradient<R, 3>};
}
FASTLOSS_INLINE SsimSteps ssim_steps(int radius, bool both) {
  return radius == kSsimRadius ? ssim_steps_of<kSsimRadius>(both) : ssim_steps_of<-1>(both);
}

// Columns begin .. end of row y of the weights, at to[0] for column x; nothing where there are none.
static const float* ssim_weights(const SsimWeights& w, int64_t y, int64_t x, int64_t begin, int64_t end, float* to) {
  if (w.read == nullptr) return nullptr;
  const float* found = w.read(w.from, y, begin, end - begin, to + (begin - x));
  if (found != to + (begin - x)) __builtin_memcpy(to + (begin - x), found, (end - begin) * sizeof(float));
  return to;
}

// A ring of rows filtered along x, as many as a window has.
struct SsimRing {
  float* data;
  int64_t count, size;

  FASTLOSS_INLINE float* row(const SsimRing& ring, int64_t k) {  // k may be as low as minus two windows
    return ring.data + (k + 2 * ring.count) % ring.count * ring.size;
  }
  FASTLOSS_INLINE void clear(const SsimRing& ring, int64_t k) {
    float* const to = row(ring, k);
    for (int64_t i = 0; i < ring.size; ++i) to[i] = 0;
  }
  FASTLOSS_INLINE void window(const SsimRing& ring, int64_t y, const float** rows) {
    for (int64_t k = 0; k < ring.count; ++k) rows[k] = row(ring, y - ring.count / 2 + k);
  }
};

// The filtered moments of row k, n columns from column x on.
template <typename T>
FASTLOSS_INLINE void ssim_fill(const SsimPlanes<T>& p, const SsimOptions& o, const SsimSteps& steps,
                               const SsimRing& ring, int64_t k, int64_t x, int64_t n, float* a, float* d) {
  if (k < 0 || k >= p.height) return SsimRing::clear(ring, k);
  ssim_read(p, k, x - o.radius, n + 2 * o.radius, a, d);
  steps.moments(o, a, d, n, SsimRing::row(ring, k));
}

// The (weighted) sum of the map over a tile that lies within it.
template <typename T>
static double ssim_sum(const SsimPlanes<T>& p, const SsimTile& t, const SsimOptions& o, const SsimWeights& weights,
                       float* scratch) {
  const int64_t n = t.x1 - t.x0, step = ssim_step(n);
  const SsimSteps steps = ssim_steps(o.radius, false);
  float *a = scratch, *d = a + step, *w = d + step;
  const SsimRing ring{w + step, 2 * o.radius + 1, 4 * step};
  const float* rows[2 * kSsimRadius + 1];
  double total = 0;
  int64_t next = t.y0 - o.radius;
  for (int64_t y = t.y0; y < t.y1; ++y) {
    for (; next <= y + o.radius; ++next) ssim_fill(p, o, steps, ring, next, t.x0, n, a, d);
    SsimRing::window(ring, y, rows);
    total += steps.sum_row(o, rows, n, ssim_weights(weights, y, t.x0, t.x0, t.x1, w));
  }
  return total;
}

// The gradient of upstream * ssim_sum of the whole map with respect to the pixels of a tile of the plane, row by row:
// emit(y, gx, gy), each null or the floats of columns x0 .. x1.
template <typename T, typename Emit>
static void ssim_rows(const SsimPlanes<T>& p, const SsimTile& t, const SsimOptions& o, const SsimWeights& weights,
                      float upstream, bool needs_x, bool needs_y, float* scratch, const Emit& emit) {
  const int64_t r = o.radius, n = t.x1 - t.x0, wide = n + 2 * r, step = ssim_step(n);
  const int maps = 2 + needs_x + needs_y;
  const SsimSteps steps = ssim_steps(o.radius, needs_x && needs_y);
  float *a = scratch, *d = a + step, *w = d + step, *gx = w + step, *gy = gx + step, *partials = gy + step;
  const SsimRing moments{partials + 4 * step, 2 * r + 1, 4 * step};
  const SsimRing filtered{moments.data + moments.count * moments.size, 2 * r + 1, maps * step};
  const float* rows[2 * kSsimRadius + 1];
  // the part of the map whose windows see the tile
  const int64_t top = t.y0 - r > o.margin ? t.y0 - r : o.margin;
  const int64_t left = t.x0 - r > o.margin ? t.x0 - r : o.margin;
  const int64_t right = t.x1 + r < p.width - o.margin ? t.x1 + r : p.width - o.margin;
  int64_t next = top - r;
  for (int64_t y = t.y0 - r; y < t.y1 + r; ++y) {
    if (y < top || y >= p.height - o.margin || left >= right) {
      SsimRing::clear(filtered, y);
    } else {
      for (; next <= y + r; ++next) ssim_fill(p, o, steps, moments, next, t.x0 - r, wide, a, d);
      SsimRing::window(moments, y, rows);
      steps.partials(o, rows, wide, ssim_weights(weights, y, t.x0 - r, left, right, w), upstream, needs_x, needs_y,
                     partials, step);
      for (int m = 0; m < maps; ++m) {  // nothing comes from beyond the map
        float* const row = partials + m * step;
        for (int64_t i = 0; i < left - (t.x0 - r); ++i) row[i] = 0;
        for (int64_t i = right - (t.x0 - r); i < wide; ++i) row[i] = 0;
      }
      steps.filter(o, partials, step, n, SsimRing::row(filtered, y));
    }
    const int64_t at = y - r;
    if (at < t.y0) continue;
    ssim_read(p, at, t.x0, n, a, d);
    SsimRing::window(filtered, at, rows);
    steps.gradient(o, rows, n, a, d, needs_x ? gx : nullptr, needs_y ? gy : nullptr);
    emit(at, needs_x ? gx : nullptr, needs_y ? gy : nullptr);
  }
}

// n floats in the type of the gradient, `column` elements apart.
template <typename T>
FASTLOSS_INLINE void ssim_write(const float* from, int64_t n, T* to, int64_t column, bool streamed) {
  for (int64_t i = 0; i < n; i += W) {
    const int64_t count = n - i < W ? n - i : W;
    if (column == 1) {
      put(to + i, load(from + i), count, streamed);
    } else {
      T narrow[W];
      store(narrow, load(from + i));
      for (int64_t k = 0; k < count; ++k) to[(i + k) * column] = narrow[k];
    }
  }
}

template <typename T>
static void ssim_grad(const SsimPlanes<T>& p, const SsimTile& t, const SsimOptions& o, const SsimWeights& weights,
                      float upstream, const SsimGradients<T>& to, float* scratch) {
  const int64_t n = t.x1 - t.x0;
  ssim_rows(p, t, o, weights, upstream, to.x != nullptr, to.y != nullptr, scratch,
            [&](int64_t y, const float* gx, const float* gy) __attribute__((always_inline)) {
              if (gx != nullptr) ssim_write(gx, n, to.x + y * to.x_row + t.x0 * to.x_column, to.x_column, to.streamed);
              if (gy != nullptr) ssim_write(gy, n, to.y + y * to.y_row + t.x0 * to.y_column, to.y_column, to.streamed);
            });
  if (to.streamed) fence();
}

template <typename T>
static SsimKernels<T> ssim_kernels() {
  return {ssim_sum<T>, ssim_grad<T>};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
