// Means and mean squares of two planes, and their gradient; included by each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

constexpr int64_t kPiece = 2048;  // elements: both planes' stay in the L1 cache between the two passes

struct Piece {
  double sum_f, sum_t;                       // about what is subtracted
  double square_f, square_t, square_d;
};

// Sums over n <= kPiece elements of f - about_f and t - about_t, and with `squares` of their squares.
template <bool squares, typename T>
FASTLOSS_INLINE Piece add_up(const T* f, const T* t, int64_t n, float about_f, float about_t) {
  vf sf[2] = {}, st[2] = {}, ff[2] = {}, tt[2] = {}, dd[2] = {};
  const auto add = [&](int k, vf x, vf y) __attribute__((always_inline)) {
    sf[k] += x;
    st[k] += y;
    if constexpr (squares) {
      const vf d = x - y;
      ff[k] += x * x;
      tt[k] += y * y;
      dd[k] += d * d;
    }
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    add(0, load(f + i) - about_f, load(t + i) - about_t);
    add(1, load(f + i + W) - about_f, load(t + i + W) - about_t);
  }
  for (; i < n; i += W) {
    const int64_t count = n - i < W ? n - i : W;
    vi lane{};
    for (int k = 0; k < W; ++k) lane[k] = k;
    const vi inside = lane < (int32_t)count;
    add(0, (vf)((vi)(load_some(f + i, count) - about_f) & inside), (vf)((vi)(load_some(t + i, count) - about_t) & inside));
  }
  const auto total = [](const vf* v) __attribute__((always_inline)) {
    return sum(__builtin_convertvector(v[0], vd) + __builtin_convertvector(v[1], vd));
  };
  return {total(sf), total(st), total(ff), total(tt), total(dd)};
}

// A piece is summed for its means, then about them; pieces merge by the update of Chan, Golub and LeVeque, in double.
template <typename T>
static Moments plane_moments(const T* f, const T* t, int64_t n) {
  Moments m{};
  for (int64_t at = 0; at < n; at += kPiece) {
    const int64_t count = n - at < kPiece ? n - at : kPiece;
    const Piece sums = add_up<false>(f + at, t + at, count, 0.0f, 0.0f);
    const float about_f = (float)(sums.sum_f / count), about_t = (float)(sums.sum_t / count);
    const Piece p = add_up<true>(f + at, t + at, count, about_f, about_t);
    const double off_f = p.sum_f / count, off_t = p.sum_t / count;  // what rounding left of the means
    const double step_f = about_f + off_f - m.mean_f, step_t = about_t + off_t - m.mean_t, step_d = step_f - step_t;
    const double share = (double)count / (double)(at + count), weight = (double)at * share;
    m.square_f += p.square_f - count * off_f * off_f + step_f * step_f * weight;
    m.square_t += p.square_t - count * off_t * off_t + step_t * step_t * weight;
    m.square_d += p.square_d - count * (off_f - off_t) * (off_f - off_t) + step_d * step_d * weight;
    m.mean_f += step_f * share;
    m.mean_t += step_t * share;
  }
  return m;
}

template <typename T>
static void plane_grad(const T* f, const T* t, int64_t n, const Slopes& s, const PlaneSides<T>& to) {
  const auto slopes = [&](vf x, vf y, vf& of_f, vf& of_t) __attribute__((always_inline)) {
    x = x - s.mean_f - s.rest_f;
    y = y - s.mean_t - s.rest_t;
    const vf d = s.d * (x - y);
    of_f = s.f + s.ff * x + d;
    of_t = s.t + s.tt * y - d;
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
