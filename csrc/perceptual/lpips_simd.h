// The LPIPS head over some pixels of one image; included by for_each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

// What a pixel's channels are divided by, |x| + eps, and the inverse of that. Both are 0 where |x| is 0 or too large
// for a float: so then are the quotients (an infinite x over it is NaN all the same).
struct Divisor {
  vf value, inverse;
};
FASTLOSS_INLINE Divisor divisor(vf norm, float eps) {
  const vf value = norm + eps;
  const vi dead = (norm == 0.0f) | (norm == __builtin_inff());
  return {(vf)((vi)value & ~dead), (vf)((vi)(1.0f / value) & ~dead)};
}

// x / by as if divided, so that a lone channel gives 1 in u and in v: with FMA
// the product is mended by what is missing.
FASTLOSS_INLINE vf divide(vf x, const Divisor& by) {
  const vf quotient = x * by.inverse;
#if FASTLOSS_BYTES > 16
  return quotient + (x - quotient * by.value) * by.inverse;
#else
  return by.inverse != 0.0f ? x / by.value : quotient;
#endif
}

// Copies `rows` channels of x (or y) into the tile, as float, and adds their squares.
template <int rows, typename T>
FASTLOSS_INLINE void pack(const T* from, int64_t stride, int64_t count, float* tile, int64_t width, float* squares) {
  for (int64_t p = 0; p < count; p += W) {
    vf total[2] = {};
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      __builtin_prefetch(from + (r + rows) * stride + p, 0, 2);
      const vf v = load_up_to(from + r * stride + p, count - p);
      store(tile + r * width + p, v);
      total[r % 2] += v * v;
    }
    store(squares + p, load(squares + p) + (total[0] + total[1]));
  }
}

// The values of pixels and k of x and y, of `width` pixels each; before them the divisors and their inverses.
struct Sums {
  float *divisor_x, *inverse_x, *divisor_y, *inverse_y, *value, *k_x, *k_y;

  Sums(float* at, int64_t width)
      : divisor_x(at),
        inverse_x(at + width),
        divisor_y(at + 2 * width),
        inverse_y(at + 3 * width),
        value(at + 4 * width),
        k_x(at + 5 * width),
        k_y(at + 6 * width) {}
};

// Adds w d^2, w d u and w d v of `rows` channels to the pixels' sums.
template <int rows>
FASTLOSS_INLINE void compare(const float* x, const float* y, const float* lin, int64_t width, const Sums& to) {
  for (int64_t p = 0; p < width; p += W) {
    const Divisor by_x{load(to.divisor_x + p), load(to.inverse_x + p)};
    const Divisor by_y{load(to.divisor_y + p), load(to.inverse_y + p)};
    vf value[2] = {}, k_x[2] = {}, k_y[2] = {};
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const vf u = divide(load(x + r * width + p), by_x), v = divide(load(y + r * width + p), by_y);
      const vf d = u - v, weighted = lin[r] * d;
      value[r % 2] += weighted * d;
      k_x[r % 2] += weighted * u;
      k_y[r % 2] += weighted * v;
    }
    store(to.value + p, load(to.value + p) + (value[0] + value[1]));
    store(to.k_x + p, load(to.k_x + p) + (k_x[0] + k_x[1]));
    store(to.k_y + p, load(to.k_y + p) + (k_y[0] + k_y[1]));
  }
}

// The channels are packed into a tile while their squares are summed: lines that lie a power of two apart would
// drive each other out of the caches before the second pass.
template <typename T>
static double lpips_planar(const Pixels<T>& s, const Eps& eps, const Statistics<float>& kept, float* map,
                           float* scratch) {
  const int64_t width = (s.count + kPad - 1) / kPad * kPad;
  float *x = scratch, *y = x + s.channels * width, *first = y + s.channels * width;
  const Sums sums(first, width);
  for (int64_t p = 0; p < 7 * width; p += W) store(first + p, vf{});
  if (s.count % W != 0)
    for (int64_t c = 0; c < 2 * s.channels; ++c)
      for (int64_t p = s.count / W * W; p < width; p += W) store(x + c * width + p, vf{});
  int64_t c = 0;
  for (; c + 8 <= s.channels; c += 8) {
    pack<8>(s.x + c * s.stride, s.stride, s.count, x + c * width, width, sums.divisor_x);
    pack<8>(s.y + c * s.stride, s.stride, s.count, y + c * width, width, sums.divisor_y);
  }
  for (; c < s.channels; ++c) {
    pack<1>(s.x + c * s.stride, s.stride, s.count, x + c * width, width, sums.divisor_x);
    pack<1>(s.y + c * s.stride, s.stride, s.count, y + c * width, width, sums.divisor_y);
  }
  for (int64_t p = 0; p < s.count; p += W) {
    const vf norm_x = sqrt(load(sums.divisor_x + p) + eps.inside), norm_y = sqrt(load(sums.divisor_y + p) + eps.inside);
    store_up_to(kept.norm_x + p, norm_x, s.count - p);
    store_up_to(kept.norm_y + p, norm_y, s.count - p);
    const Divisor by_x = divisor(norm_x, eps.added), by_y = divisor(norm_y, eps.added);
    store(sums.divisor_x + p, by_x.value);
    store(sums.inverse_x + p, by_x.inverse);
    store(sums.divisor_y + p, by_y.value);
    store(sums.inverse_y + p, by_y.inverse);
  }
  for (c = 0; c + 16 <= s.channels; c += 16) compare<16>(x + c * width, y + c * width, s.lin + c, width, sums);
  for (; c < s.channels; ++c) compare<1>(x + c * width, y + c * width, s.lin + c, width, sums);
  vd total{};
  for (int64_t p = 0; p < s.count; p += W) {
    const int64_t n = s.count - p;
    const vf value = load(sums.value + p);
    total += __builtin_convertvector(value, vd);
    if (map) store_up_to(map + p, value, n);
    store_up_to(kept.k_x + p, load(sums.k_x + p), n);
    store_up_to(kept.k_y + p, load(sums.k_y + p), n);
  }
  return sum(total);
}

// body(first channel, how many of them) for the channels of a pixel in steps of W.
template <typename Body>
FASTLOSS_INLINE void each_channel(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + W <= channels; c += W) body(c, (int64_t)W);
  if (c < channels) body(c, channels - c);
}

template <typename T>
static double lpips_rows(const Pixels<T>& s, const Eps& eps, const Statistics<float>& kept, float* map, float*) {
  double total = 0;
  for (int64_t p = 0; p < s.count; ++p) {
    const T *x = s.x + p * s.stride, *y = s.y + p * s.stride;
    vf square_x{}, square_y{};
    each_channel(s.channels, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
      const vf a = load_up_to(x + c, n), b = load_up_to(y + c, n);
      square_x += a * a;
      square_y += b * b;
    });
    const vf norm_x = sqrt(all(sum(square_x) + eps.inside)), norm_y = sqrt(all(sum(square_y) + eps.inside));
    const Divisor by_x = divisor(norm_x, eps.added), by_y = divisor(norm_y, eps.added);
    vf value{}, k_x{}, k_y{};
    each_channel(s.channels, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
      const vf u = divide(load_up_to(x + c, n), by_x), v = divide(load_up_to(y + c, n), by_y);
      const vf d = u - v, weighted = load_up_to(s.lin + c, n) * d;
      value += weighted * d;
      k_x += weighted * u;
      k_y += weighted * v;
    });
    const float at = sum(value);
    total += at;
    if (map) map[p] = at;
    kept.norm_x[p] = norm_x[0];
    kept.norm_y[p] = norm_y[0];
    kept.k_x[p] = sum(k_x);
    kept.k_y[p] = sum(k_y);
  }
  return total;
}

// dx = (w d - u ratio) scale of a pixel, dy the same of -d and -v.
struct LpipsFactors {
  Divisor by;
  vf ratio, scale;
};
FASTLOSS_INLINE LpipsFactors lpips_factors(vf norm, vf k, float eps, vf upstream) {
  const Divisor by = divisor(norm, eps);
  const vf ratio = k * (by.value / norm);  // |x| + eps over |x|: 1, unless |x| is as small as eps
  return {by, (vf)((vi)ratio & (norm != 0.0f)), upstream * by.inverse};
}

template <typename T>
FASTLOSS_INLINE void gradients_of(vf x, vf y, vf lin, const LpipsFactors& of_x, const LpipsFactors& of_y, T* to_x,
                                  T* to_y, int64_t n, bool streamed) {
  const vf u = divide(x, of_x.by), v = divide(y, of_y.by);
  const vf weighted = lin * (u - v);
  const vf dx = (weighted - u * of_x.ratio) * of_x.scale, dy = (v * of_y.ratio - weighted) * of_y.scale;
  if (streamed) {
    if (to_x) stream(to_x, dx);
    if (to_y) stream(to_y, dy);
  } else {
    if (to_x) store_up_to(to_x, dx, n);
    if (to_y) store_up_to(to_y, dy, n);
  }
}

template <typename T>
static void lpips_planar_grad(const Pixels<T>& s, float eps, const Statistics<const float>& kept, Upstream up,
                              const LpipsSides<T>& to, float* scratch) {
  const int64_t width = (s.count + kPad - 1) / kPad * kPad, whole = s.count / W * W;
  const auto put_factors = [&](float* at, const LpipsFactors& f) __attribute__((always_inline)) {
    store(at, f.by.value);
    store(at + width, f.by.inverse);
    store(at + 2 * width, f.ratio);
    store(at + 3 * width, f.scale);
  };
  const auto factors = [&](const float* at) __attribute__((always_inline)) {
    return LpipsFactors{{load(at), load(at + width)}, load(at + 2 * width), load(at + 3 * width)};
  };
  float *of_x = scratch, *of_y = scratch + 4 * width;
  for (int64_t p = 0; p < s.count; p += W) {
    const int64_t n = s.count - p;
    const vf g = up.per_pixel ? up.scale * load_up_to(up.per_pixel + p, n) : all(up.scale);
    put_factors(of_x + p, lpips_factors(load_up_to(kept.norm_x + p, n), load_up_to(kept.k_x + p, n), eps, g));
    put_factors(of_y + p, lpips_factors(load_up_to(kept.norm_y + p, n), load_up_to(kept.k_y + p, n), eps, g));
  }
  for (int64_t c = 0; c < s.channels; ++c) {
    const T *x = s.x + c * s.stride, *y = s.y + c * s.stride;
    T *to_x = to.x ? to.x + c * s.stride : nullptr, *to_y = to.y ? to.y + c * s.stride : nullptr;
    const vf lin = all(s.lin[c]);
    for (int64_t p = 0; p < whole; p += W) {
      __builtin_prefetch(x + 2 * s.stride + p, 0, 2);  // a channel's pixels are few for the CPU's own prefetch
      __builtin_prefetch(y + 2 * s.stride + p, 0, 2);
      gradients_of(load(x + p), load(y + p), lin, factors(of_x + p), factors(of_y + p), to_x ? to_x + p : nullptr,
                   to_y ? to_y + p : nullptr, W, to.streamed);
    }
    if (whole < s.count) {
      const int64_t n = s.count - whole;
      gradients_of(load_some(x + whole, n), load_some(y + whole, n), lin, factors(of_x + whole), factors(of_y + whole),
                   to_x ? to_x + whole : nullptr, to_y ? to_y + whole : nullptr, n, false);
    }
  }
  if (to.streamed) fence();
}

template <typename T>
static void lpips_rows_grad(const Pixels<T>& s, float eps, const Statistics<const float>& kept, Upstream up,
                            const LpipsSides<T>& to, float*) {
  for (int64_t p = 0; p < s.count; ++p) {
    const int64_t row = p * s.stride;
    const vf g = all(up.per_pixel ? up.scale * up.per_pixel[p] : up.scale);
    const LpipsFactors of_x = lpips_factors(all(kept.norm_x[p]), all(kept.k_x[p]), eps, g);
    const LpipsFactors of_y = lpips_factors(all(kept.norm_y[p]), all(kept.k_y[p]), eps, g);
    each_channel(s.channels, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
      gradients_of(load_up_to(s.x + row + c, n), load_up_to(s.y + row + c, n), load_up_to(s.lin + c, n), of_x, of_y,
                   to.x ? to.x + row + c : nullptr, to.y ? to.y + row + c : nullptr, n, to.streamed && n == W);
    });
  }
  if (to.streamed) fence();
}

template <typename T>
static LpipsKernels<T> lpips_kernels() {
  return {lpips_planar<T>, lpips_rows<T>, lpips_planar_grad<T>, lpips_rows_grad<T>};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
