// The arithmetic of SSIM; included by ssim_simd.h. With G the window, a = x + y and d = x - y:
//
//   ma = G a, md = G d, va = G (a - sa)^2 - (ma - sa)^2, vd = G (d - sd)^2 - (md - sd)^2, sa, sd what cancels there
//   l = md^2 / ((ma^2 + md^2) / 2 + C1), s = vd / ((va + vd) / 2 + C2)      one minus luminance, minus structure
//   loss = l + s - l s                                                      one minus SSIM
//
//   p_aa, p_dd, p_a, p_d    d loss / d (G (a - sa)^2, G (d - sd)^2, ma, md)     the partials
//   grad x = G (p_a + p_d) + 2 (a - sa) G p_aa + 2 (d - sd) G p_dd
//   grad y = G (p_a - p_d) + 2 (a - sa) G p_aa - 2 (d - sd) G p_dd
//
// The steps along a row, or a few rows. In every row of scratch, column x0 of the tile is element kSsimPad: what a
// window reads to either side lies there too, and vectors are aligned.

namespace fastloss {
namespace FASTLOSS_ISA {

constexpr int kRows = W == 16 ? kSsimRowsAtOnce : 2;  // filtered along y at once: their windows fit the registers

// n elements `column` apart, n <= W; the other lanes read 0.
template <typename T>
FASTLOSS_INLINE vf ssim_gather(const T* from, int64_t column, int64_t n) {
  T found[W] = {};
  for (int64_t k = 0; k < n; ++k) found[k] = from[k * column];
  return load((const T*)found);
}

// The sample nearest to 0, so that no single pixel can cost the others their digits; 0 where nothing would cancel: then
// images of ordinary ranges are read as they are, and where they are equal the loss and its gradient are exactly 0.
FASTLOSS_INLINE float ssim_nearest(const float* samples, float c2) {
  float found = 0, least = __builtin_inff();
  for (int i = 0; i < 4; ++i) {
    const float size = __builtin_fabsf(samples[i]);
    if (size < least) least = size, found = samples[i];  // not of NaN
  }
  return least * least > 4096.0f * c2 ? found : 0.0f;
}

// What the tile's images have in common, by four of its pixels.
template <typename T>
static SsimShift ssim_shift(const SsimPlanes<T>& p, const SsimTile& t, const SsimOptions& o) {
  float a[4], d[4];
  for (int i = 0; i < 4; ++i) {
    const int64_t row = t.y0 + (i / 2 * 2 + 1) * (t.y1 - t.y0) / 4, column = t.x0 + (i % 2 * 2 + 1) * (t.x1 - t.x0) / 4;
    const int64_t slice = p.depth == 0 ? 0 : ((i == 1 || i == 2) * 2 + 1) * p.depth / 4 - p.z;
    const float x = p.x[slice * p.x_slice + row * p.x_row + column * p.x_column];
    const float y = p.y[slice * p.y_slice + row * p.y_row + column * p.y_column];
    a[i] = x + y;
    d[i] = x - y;
  }
  const float by_a = ssim_nearest(a, o.c2), by_d = ssim_nearest(d, o.c2);
  return {by_a, by_d, by_a - 2 * o.low, by_d};
}

// Columns begin .. begin + n of row y as x + y and x - y, shifted. Whole vectors, over the end.
template <typename T>
static void ssim_read(const SsimPlanes<T>& p, const SsimShift& shift, int64_t y, int64_t begin, int64_t n, float* a,
                      float* d) {
  const T *x = p.x + y * p.x_row + begin * p.x_column, *z = p.y + y * p.y_row + begin * p.y_column;
  const int64_t left = begin < 0 ? (-begin < n ? -begin : n) : 0;
  const int64_t end = begin + n < p.width ? n : p.width - begin;
  int64_t i = left;
  const vf by_a = all(shift.a), by_d = all(shift.d);  // once: what is stored might be the shift, for all GCC knows
  const float outside_a = 0 - shift.rest_a, outside_d = 0 - shift.rest_d;
  const auto store_pair = [&](vf u, vf v) __attribute__((always_inline)) {
    store(a + i, (u - by_a) + v);  // exact where both are near half the shift
    store(d + i, (u - v) - by_d);
  };
  if (p.x_column == 1 && p.y_column == 1) {
    for (; i + W <= end; i += W) store_pair(load(x + i), load(z + i));
    if (i < end) store_pair(load_some(x + i, end - i), load_some(z + i, end - i));
  } else {
    for (; i < end; i += W) {
      const int64_t count = end - i < W ? end - i : W;
      store_pair(ssim_gather(x + i * p.x_column, p.x_column, count),
                 ssim_gather(z + i * p.y_column, p.y_column, count));
    }
  }
  const auto outside = [&](int64_t k) { a[k] = outside_a, d[k] = outside_d; };
  for (i = 0; i < left; ++i) outside(i);
  for (i = end < left ? left : end; i < n; ++i) outside(i);
}

// Keeps GCC from loading a value again, across a cache line, wherever it is used.
FASTLOSS_INLINE vf in_register(vf x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#endif
  return x;
}

// The vector K elements after that at `pixel`, which is aligned.
template <int K>
FASTLOSS_INLINE vf ssim_shifted(const float* pixel) {
#if defined(__x86_64__) && FASTLOSS_BYTES == 64  // every load off the alignment would touch two cache lines
  if constexpr (K > 0) return (vf)_mm512_maskz_alignr_epi32(0xffff, (__m512i)load(pixel + W), (__m512i)load(pixel), K);
  if constexpr (K < 0)
    return (vf)_mm512_maskz_alignr_epi32(0xffff, (__m512i)load(pixel), (__m512i)load(pixel - W), W + K);
#endif
  return in_register(load(pixel + K));
}

// add(k, before, after) for the pairs of vectors k elements before and after that at `pixel`. R < 0: the radius is `r`.
template <int R, int K = 1, typename Add>
FASTLOSS_INLINE void ssim_pairs(int r, const float* pixel, const Add& add) {
  if constexpr (R < 0) {
    for (int k = 1; k <= r; ++k) add(k, load(pixel - k), load(pixel + k));
  } else if constexpr (K <= R) {
    add(K, ssim_shifted<-K>(pixel), ssim_shifted<K>(pixel));
    ssim_pairs<R, K + 1>(r, pixel, add);
  }
}

struct SsimTaps {
  vf of[kSsimRadius + 1];
};
FASTLOSS_INLINE SsimTaps ssim_taps(const SsimAxis& axis) {
  SsimTaps taps;
  for (int k = 0; k <= kSsimRadius; ++k) taps.of[k] = all(axis.taps[k]);
  return taps;
}

// Rows to fetch from memory while others are worked on: column j is `x_column` j bytes on.
struct SsimAhead {
  const char *x, *y;
  int64_t x_column, y_column;
};
constexpr int64_t kSsimAhead = 8;

// G a, G d, G a^2, G d^2 along x, columns begin .. end, vector by vector side by side.
template <int R>
static void ssim_moments(const SsimOptions& o, const float* a, const float* d, int64_t begin, int64_t end,
                         const SsimAhead& ahead, float* to) {
  const SsimTaps taps = ssim_taps(o.x);
  const int r = o.x.radius;
  for (int64_t j = begin; j < end; j += W) {
    __builtin_prefetch(ahead.x + j * ahead.x_column);
    __builtin_prefetch(ahead.y + j * ahead.y_column);
#pragma GCC unroll 2
    for (int m = 0; m < 2; ++m) {
      const float* pixel = (m == 0 ? a : d) + j;
      const vf c = load(pixel);
      vf mean = taps.of[0] * c, square = taps.of[0] * (c * c);
      ssim_pairs<R>(r, pixel, [&](int k, vf before, vf after) __attribute__((always_inline)) {
        mean += taps.of[k] * (before + after);
        square += taps.of[k] * (before * before + after * after);
      });
      store(to + 4 * j + m * W, mean);
      store(to + 4 * j + (2 + m) * W, square);
    }
  }
}

// The filter along x of M rows `step` apart, columns begin .. end, vector by vector side by side.
template <int R, int M>
static void ssim_filter(const SsimOptions& o, const float* from, int64_t step, int64_t begin, int64_t end, float* to) {
  const SsimTaps taps = ssim_taps(o.x);
  const int r = o.x.radius;
  for (int64_t j = begin; j < end; j += W) {
    for (int m = 0; m < M; ++m) {
      const float* pixel = from + m * step + j;
      vf total = taps.of[0] * load(pixel);
      ssim_pairs<R>(r, pixel, [&](int k, vf before, vf after) __attribute__((always_inline)) {
        total += taps.of[k] * (before + after);
      });
      store(to + M * j + m * W, total);
    }
  }
}

// The filter along y of kRows rows: of the vectors at `column` in the rows of their windows.
template <int R>
FASTLOSS_INLINE void ssim_along_y(const SsimTaps& taps, int radius, const float* const* rows, int64_t column, vf* to) {
  if constexpr (R < 0) {
    for (int b = 0; b < kRows; ++b) {
      to[b] = taps.of[0] * load(rows[b + radius] + column);
      for (int k = 1; k <= radius; ++k)
        to[b] += taps.of[k] * (load(rows[b + radius - k] + column) + load(rows[b + radius + k] + column));
    }
  } else {
    vf in[2 * R + kRows];
#pragma GCC unroll 18
    for (int i = 0; i < 2 * R + kRows; ++i) in[i] = load(rows[i] + column);
#pragma GCC unroll 8
    for (int b = 0; b < kRows; ++b) {
      vf total = taps.of[0] * in[b + R];
#pragma GCC unroll 5
      for (int k = 1; k <= R; ++k) total += taps.of[k] * (in[b + R - k] + in[b + R + k]);
      to[b] = total;
    }
  }
}

// kRows rows of the map, columns begin .. end of scratch. Rows top .. bottom of them and columns left .. right are of
// the tile, and count in the sum. The partials of row b begin at partials + b * maps * step, those of each kind `step`
// apart: by G a^2, by G d^2, by the means of x, of y, or of both.
struct SsimMap {
  SsimShift shift;
  int64_t begin, end, left, right;
  int top, bottom;
  const float* weights;  // or null; rows `step` apart
  float scale;           // of the partials
  bool needs_x, needs_y;
  float* partials;
  int64_t step;
  float* losses;  // the map itself, rows `step` apart; or null
};

// The (weighted) sum of the map, and the partials if `grad`; 32 vectors are added before the sum moves to double.
// `plain`: nothing is shifted, images begin at 0, and windows have more than one pixel, which spares a few operations.
// l / 2 and s / 2 come without a multiplication by 2 in the denominators, and
// the partials are doubled for the same end.
template <int R, bool grad, bool plain>
static double ssim_map(const SsimOptions& o, const SsimMap& tile_map, const float* const* rows) {
  const SsimMap map = tile_map;
  const SsimTaps taps = ssim_taps(o.y);
  const vf c1 = all(2 * o.c1), c2 = all(2 * o.c2), scale = all(4 * map.scale);
  const vf rest_a = all(map.shift.rest_a), rest_d = all(map.shift.rest_d);
  const bool structure = o.structure_only, one_pixel = o.one_pixel;
  const int maps = 2 + map.needs_x + map.needs_y, r = o.y.radius;
  vd total{};
  vf part{};
  int added = 0;
  for (int64_t j = map.begin; j < map.end; j += W) {
    vf moments[4][kRows];
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) ssim_along_y<R>(taps, r, rows, 4 * j + m * W, moments[m]);
    if (map.weights != nullptr) {  // what does not count may be NaN
      for (int b = 0; b < kRows; ++b) {
        const vi counts = load(map.weights + b * map.step + j) != 0.0f;
        for (int m = 0; m < 4; ++m) moments[m][b] = where(counts, moments[m][b]);
      }
    }
    const bool inside = j >= map.left && j + W <= map.right;
    for (int b = 0; b < kRows; ++b) {
      const vf mean_a = moments[0][b], mean_d = moments[1][b];  // shifted, as are the squares
      const vf square_of_a = in_register(mean_a * mean_a), square_of_d = in_register(mean_d * mean_d);
      const vf var_a = moments[2][b] - square_of_a, var_d = moments[3][b] - square_of_d;
      vf whole_a = mean_a, whole_d = mean_d, mean_aa = square_of_a, mean_dd = square_of_d;
      if constexpr (!plain) {
        whole_a += rest_a, whole_d += rest_d;
        mean_aa = whole_a * whole_a, mean_dd = whole_d * whole_d;
      }
      vf per_l = inverse(mean_aa + mean_dd + c1), half_l = mean_dd * per_l;
      vf per_s = inverse(var_a + var_d + c2);
      if (!plain && one_pixel) per_s = vf{};
      const vf half_s = var_d * per_s;
      if (structure) half_l = per_l = vf{};
      const vf s = half_s + half_s, l = half_l + half_l;
      vf loss = half_l + half_s - s * half_l, g = scale;
      if constexpr (!grad) {
        if (map.losses != nullptr) store(map.losses + b * map.step + j, loss + loss);
      }
      if (map.weights != nullptr) {
        const vf weight = load(map.weights + b * map.step + j);
        loss *= weight;
        g *= weight;
      }
      if (b >= map.top && b < map.bottom) {
        if (!inside) loss = where((lanes() >= (int)(map.left - j)) & (lanes() < (int)(map.right - j)), loss);
        part += loss;
      }
      if constexpr (grad) {
        float* const to = map.partials + b * maps * map.step + j;
        const vf by_s = g * per_s * (1.0f - l), by_l = g * per_l * (1.0f - s);
        const vf square_a = half_s * by_s, square_d = by_s - square_a, t = half_l * by_l;  // 2 p_aa = -square_a
        vf of_a, of_d;
        if constexpr (plain) {
          of_a = mean_a * (square_a - t), of_d = mean_d * (by_l - t - square_d);
        } else {
          of_a = mean_a * square_a - whole_a * t, of_d = whole_d * (by_l - t) - mean_d * square_d;
        }
        store(to, square_a);
        store(to + map.step, square_d);
        if (map.needs_x) store(to + 2 * map.step, of_a + of_d);
        if (map.needs_y) store(to + (map.needs_x ? 3 : 2) * map.step, of_a - of_d);
      }
    }
    added += kRows;
    if (added >= 32) {
      total += __builtin_convertvector(part, vd);
      part = vf{};
      added = 0;
    }
  }
  return 2 * sum(total + __builtin_convertvector(part, vd));
}

// The gradients of kRows rows, `row_stride` apart, from the filtered partials and the rows' pixels, `step` apart.
template <int R, int M>
static void ssim_gradient(const SsimOptions& o, const float* const* rows, int64_t n, const float* a, const float* d,
                          int64_t step, float* first, float* second, int64_t row_stride) {
  const SsimTaps taps = ssim_taps(o.y);
  const int r = o.y.radius;
  for (int64_t j = kSsimPad; j < kSsimPad + n; j += W) {
    vf filtered[M][kRows];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) ssim_along_y<R>(taps, r, rows, M * j + m * W, filtered[m]);
    for (int b = 0; b < kRows; ++b) {
      const int64_t offset = b * step + j, to = b * row_stride + j;
      const vf of_a = load(a + offset) * filtered[0][b], of_d = load(d + offset) * filtered[1][b];
      if (M == 4 || first != nullptr) store(first + to, filtered[2][b] - of_a + of_d);
      if (M == 4 || first == nullptr) store(second + to, filtered[M - 1][b] - of_a - of_d);
    }
  }
}

// The partials of kRows rows filtered along y, a row of whole vectors each: rows `row` apart, partials `partial`.
template <int R, int M>
static void ssim_spread(const SsimOptions& o, const float* const* rows, int64_t n, int count, float* to, int64_t row,
                        int64_t partial) {
  const SsimTaps taps = ssim_taps(o.y);
  const int r = o.y.radius;
  for (int64_t j = kSsimPad; j < kSsimPad + n; j += W) {
    for (int m = 0; m < M; ++m) {
      vf filtered[kRows];
      ssim_along_y<R>(taps, r, rows, M * j + m * W, filtered);
      for (int b = 0; b < count; ++b) store(to + m * partial + b * row + (j - kSsimPad), filtered[b]);
    }
  }
}

// The steps that know the window but not the type in memory: unrolled for the usual window, loops for the others.
struct SsimSteps {
  decltype(&ssim_moments<-1>) moments;
  decltype(&ssim_filter<-1, 4>) moments_of_depth;
  decltype(&ssim_map<-1, true, true>) map;
  decltype(&ssim_filter<-1, 3>) filter;
  decltype(&ssim_gradient<-1, 3>) gradient;
  decltype(&ssim_spread<-1, 3>) spread;
};
template <int R, bool plain>
FASTLOSS_INLINE SsimSteps ssim_steps_of(int maps) {
  if (maps == 4)
    return {ssim_moments<R>,   ssim_filter<R, 4>,   ssim_map<R, true, plain>,
            ssim_filter<R, 4>, ssim_gradient<R, 4>, ssim_spread<R, 4>};
  return {ssim_moments<R>,   ssim_filter<R, 4>,   maps == 3 ? ssim_map<R, true, plain> : ssim_map<R, false, plain>,
          ssim_filter<R, 3>, ssim_gradient<R, 3>, ssim_spread<R, 3>};
}
FASTLOSS_INLINE SsimSteps ssim_steps(const SsimOptions& o, const SsimShift& shift, int maps) {
  const bool plain = shift.rest_a == 0 && shift.rest_d == 0 && shift.a == 0 && !o.one_pixel;
  if (o.x.radius == kSsimRadius && o.y.radius == kSsimRadius)
    return plain ? ssim_steps_of<kSsimRadius, true>(maps) : ssim_steps_of<kSsimRadius, false>(maps);
  return plain ? ssim_steps_of<-1, true>(maps) : ssim_steps_of<-1, false>(maps);
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
