// Means and mean squares of two planes, and their gradient; included by for_each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

constexpr int64_t kPiece = 2048;  // elements: both planes' stay in the L1 cache between the two passes

struct Sums {
  double f, t, d;
};
// In double: where a mean is near zero the gradient divides by it, and what floats lose of the sum would show. That of
// d is of the rounded differences, which the gradient takes it from: of a single pixel nothing must be left.
template <typename T>
FASTLOSS_INLINE Sums add_up(const T* f, const T* t, int64_t n) {
  vd of_f{}, of_t{}, of_d{};
  const auto add = [&](vf x, vf y) __attribute__((always_inline)) {
    of_f += __builtin_convertvector(x, vd);
    of_t += __builtin_convertvector(y, vd);
    of_d += __builtin_convertvector(x - y, vd);
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) add(load(f + i), load(t + i));
  if (i < n) add(load_some(f + i, n - i), load_some(t + i, n - i));
  return {sum(of_f), sum(of_t), sum(of_d)};
}

struct Squares {
  double f, t, d;
};
// The squares of n <= kPiece elements of f, t and d = f - t about the numbers given.
template <typename T>
FASTLOSS_INLINE Squares add_squares(const T* f, const T* t, int64_t n, float about_f, float about_t, float about_d) {
  vf ff[2] = {}, tt[2] = {}, dd[2] = {};
  const auto add = [&](int k, vf x, vf y, vf d) __attribute__((always_inline)) {
    ff[k] += x * x;
    tt[k] += y * y;
    dd[k] += d * d;
  };
  const auto full = [&](int k, int64_t i) __attribute__((always_inline)) {
    const vf x = load(f + i), y = load(t + i);
    add(k, x - about_f, y - about_t, (x - y) - about_d);
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    full(0, i);
    full(1, i + W);
  }
  for (; i < n; i += W) {
    const int64_t count = n - i < W ? n - i : W;
    const vf x = load_some(f + i, count), y = load_some(t + i, count);
    vi lane{};
    for (int k = 0; k < W; ++k) lane[k] = k;
    const vi inside = lane < (int32_t)count;
    const auto masked = [&](vf v) __attribute__((always_inline)) { return (vf)((vi)v & inside); };
    add(0, masked(x - about_f), masked(y - about_t), masked((x - y) - about_d));
  }
  const auto total = [](const vf* v) __attribute__((always_inline)) {
    return sum(__builtin_convertvector(v[0], vd) + __builtin_convertvector(v[1], vd));
  };
  return {total(ff), total(tt), total(dd)};
}

// Mean and sum of squares about it, of the elements so far.
struct Running {
  double mean, square;
};
// Adds `count` elements to the `before` ones of `r`; their mean is given, and their squares about a number close to it
// (Chan, Golub, LeVeque).
FASTLOSS_INLINE void merge(Running& r, int64_t before, int64_t count, double mean, float about, double square_about) {
  const double off = mean - about, step = mean - r.mean, part = (double)count / (double)(before + count);
  r.square += square_about - (double)count * off * off + step * step * (double)before * part;
  r.mean += step * part;
}

// A piece is summed for its means, then about them.
template <typename T>
static Moments plane_moments(const T* f, const T* t, int64_t n) {
  Running of_f{}, of_t{}, of_d{};
  for (int64_t start = 0; start < n; start += kPiece) {
    const int64_t count = n - start < kPiece ? n - start : kPiece;
    const Sums sums = add_up(f + start, t + start, count);
    const double mean_f = sums.f / count, mean_t = sums.t / count, mean_d = sums.d / count;
    const float about_f = (float)mean_f, about_t = (float)mean_t, about_d = (float)mean_d;
    const Squares p = add_squares(f + start, t + start, count, about_f, about_t, about_d);
    merge(of_f, start, count, mean_f, about_f, p.f);
    merge(of_t, start, count, mean_t, about_t, p.t);
    merge(of_d, start, count, mean_d, about_d, p.d);
  }
  return {of_f.mean, of_t.mean, of_d.mean, of_f.square, of_t.square, of_d.square};
}

template <typename T>
static void plane_grad(const T* f, const T* t, int64_t n, const Slopes& s, const PlaneSides<T>& to) {
  const auto slopes = [&](vf x, vf y, vf& of_f, vf& of_t) __attribute__((always_inline)) {
    const vf d = s.constant_d + s.slope_d * ((x - y) - s.mean_d - s.rest_d);
    of_f = s.constant_f + s.slope_f * (x - s.mean_f - s.rest_f) + d;
    of_t = s.slope_t * (y - s.mean_t - s.rest_t) - d;
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    vf a, b;
    slopes(load(f + i), load(t + i), a, b);
    if (to.streamed) {
      if (to.feature) stream(to.feature + i, a);
      if (to.target) stream(to.target + i, b);
    } else {
      if (to.feature) store(to.feature + i, a);
      if (to.target) store(to.target + i, b);
    }
  }
  if (to.streamed) fence();
  if (i == n) return;
  vf a, b;
  slopes(load_some(f + i, n - i), load_some(t + i, n - i), a, b);
  if (to.feature) store_some(to.feature + i, a, n - i);
  if (to.target) store_some(to.target + i, b, n - i);
}

template <typename T>
static DistsKernels<T> dists_kernels() {
  return {plane_moments<T>, plane_grad<T>};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
