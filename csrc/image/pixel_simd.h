// The pixel loss over a stretch of elements; included by for_each_isa.h.

#include "image/pixel_distance_simd.h"

namespace fastloss {
namespace FASTLOSS_ISA {

// The four accumulators run over 16 vectors each before they move to double: the error does not grow with n.
template <Kind kind, typename T>
static double pixel_sum(const Stretch<T>& s, double p) {
  const auto term = [&](int64_t i) __attribute__((always_inline)) {
    const vf value = distance<kind>(load(s.image_pred + i) - load(s.image + i), p);
    return s.weight ? weighted(value, load(s.weight + i)) : value;
  };
  vd total{};
  int64_t i = 0;
  while (i + 4 * W <= s.n) {
    vf a{}, b{}, c{}, e{};
    for (int step = 0; step < 16 && i + 4 * W <= s.n; ++step, i += 4 * W) {
      a += term(i);
      b += term(i + W);
      c += term(i + 2 * W);
      e += term(i + 3 * W);
    }
    total += __builtin_convertvector((a + b) + (c + e), vd);
  }
  double rest = 0;
  for (; i < s.n; i += W) {
    const int64_t count = s.n - i < W ? s.n - i : W;
    vf value = distance<kind>(load_some(s.image_pred + i, count) - load_some(s.image + i, count), p);
    if (s.weight) value = weighted(value, load_some(s.weight + i, count));
    for (int64_t k = 0; k < count; ++k) rest += value[k];
  }
  return sum(total) + rest;
}

template <Kind kind, typename T>
static void pixel_map(const Stretch<T>& s, double p, float* out) {
  int64_t i = 0;
  for (; i + W <= s.n; i += W) {
    const vf value = distance<kind>(load(s.image_pred + i) - load(s.image + i), p);
    store(out + i, s.weight ? weighted(value, load(s.weight + i)) : value);
  }
  if (i == s.n) return;
  const int64_t count = s.n - i;
  vf value = distance<kind>(load_some(s.image_pred + i, count) - load_some(s.image + i, count), p);
  if (s.weight) value = weighted(value, load_some(s.weight + i, count));
  store_some(out + i, value, count);
}

template <Kind kind, typename T>
static void pixel_grad(const Stretch<T>& s, double p, const PixelUpstream& up, const Gradients<T>& to) {
  const vf scale = all(up.scalar);
  int64_t i = 0;
  for (; i + W <= s.n; i += W) {
    vf g = up.map ? load(up.map + i) : scale;
    g *= slope<kind>(load(s.image_pred + i) - load(s.image + i), p);
    if (s.weight) g = weighted(g, load(s.weight + i));
    if (to.streamed) {
      if (to.image_pred) stream(to.image_pred + i, g);
      if (to.image) stream(to.image + i, -g);
    } else {
      if (to.image_pred) store(to.image_pred + i, g);
      if (to.image) store(to.image + i, -g);
    }
  }
  if (to.streamed) fence();
  if (i == s.n) return;
  const int64_t count = s.n - i;
  vf g = up.map ? load_some(up.map + i, count) : scale;
  g *= slope<kind>(load_some(s.image_pred + i, count) - load_some(s.image + i, count), p);
  if (s.weight) g = weighted(g, load_some(s.weight + i, count));
  if (to.image_pred) store_some(to.image_pred + i, g, count);
  if (to.image) store_some(to.image + i, -g, count);
}

template <typename T>
static PixelKernels<T> pixel_kernels(Kind kind) {
#define FASTLOSS_KIND(k) \
  case Kind::k: return {pixel_sum<Kind::k, T>, pixel_map<Kind::k, T>, pixel_grad<Kind::k, T>};
  switch (kind) {
    FASTLOSS_KIND(l1)
    FASTLOSS_KIND(l2)
    FASTLOSS_KIND(l1_5)
    FASTLOSS_KIND(l3)
    FASTLOSS_KIND(l4)
    FASTLOSS_KIND(lp)
    FASTLOSS_KIND(charbonnier)
    FASTLOSS_KIND(huber)
  }
#undef FASTLOSS_KIND
  return {};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
