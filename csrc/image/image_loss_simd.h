// The losses of an image pair over a band of rows; included by for_each_isa.h.

#include "image/pixel_distance_simd.h"
#include "image/image_loss_sweep_simd.h"

namespace fastloss {
namespace FASTLOSS_ISA {

// Writes the gradients of a row: the pixel loss's (`on`), `line` for the prediction (or null), and `more` (or null).
template <Kind kind, bool on, typename T, typename G>
static void image_row(const Stretch<T>& s, double p, float scale, const float* line, const Gradients<const float>& more,
                      const Gradients<G>& to) {
  const auto part = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    vf g{};
    if constexpr (on) {
      g = scale * slope<kind>(load_up_to(s.image_pred + i, n) - load_up_to(s.image + i, n), p);
      if (s.weight) g = weighted(g, load_up_to(s.weight + i, n));
    }
    if (to.image_pred) {
      vf grad = line ? g + load_up_to(line + i, n) : g;
      if (more.image_pred) grad += load_up_to(more.image_pred + i, n);
      put(to.image_pred + i, grad, n, to.streamed);
    }
    if (to.image) put(to.image + i, more.image ? load_up_to(more.image + i, n) - g : -g, n, to.streamed);
  };
  int64_t i = 0;
  for (; i + W <= s.n; i += W) part(i, W);  // knows that its vectors are whole
  if (i < s.n) part(i, s.n - i);
}

static void image_fence() { fence(); }

// G: the type of the gradients.
template <typename T, typename G>
static ImageRowKernels<T, G> image_row_kernels(bool pixel, Kind kind, Step step, bool plain) {
  ImageRowKernels<T, G> found{image_row<Kind::l2, false, T, G>, image_fence, {}};
  if (pixel && plain && step == Step::l1) found.sweep = sweep_of<Step::l1, T, G>(kind);
  if (pixel && plain && step == Step::l2) found.sweep = sweep_of<Step::l2, T, G>(kind);
#define FASTLOSS_KIND(k) \
  case Kind::k: found.row = image_row<Kind::k, true, T, G>; break;
  if (pixel) switch (kind) {
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
  return found;
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
