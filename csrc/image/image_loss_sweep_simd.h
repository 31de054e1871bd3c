// The usual terms of an image loss in one sweep over a row, sums and gradient alike: a pixel loss, and first
// differences to the right and down without guide or weights; included by image_loss_simd.h.

namespace fastloss {
namespace FASTLOSS_ISA {

constexpr int64_t kSweepAhead = 256;  // elements, fetched from memory while others are worked on

template <Step step>
FASTLOSS_INLINE vf step_length(vf d) {
  return step == Step::l1 ? abs(d) : d * d;
}
template <Step step>
FASTLOSS_INLINE vf step_slope(vf d) {
  return step == Step::l1 ? sign(d) : d + d;
}

struct SweepSums {
  vf pixel, down, right;
};

// W elements from x on. Not `inside`: some of them, or of their neighbours, lie outside the row.
template <Kind kind, Step step, bool inside, typename T, typename G>
FASTLOSS_INLINE void sweep_pixels(const SweepRow<T, G>& r, double p, bool sums, bool grads, int64_t x, SweepSums& to) {
  const auto pixels = [&](const T* from, int64_t i) __attribute__((always_inline)) {
    return inside ? load(from + i) : load_inside(from, i, r.first, r.last);
  };
  const int64_t n = inside ? W : r.size - x;
  const vf c = pixels(r.image_pred, x), d = c - pixels(r.image, x);
  vf right = pixels(r.image_pred, x + r.step) - c;
  if (!inside) right = where(between(x, 0, r.size - r.step), right);
  const vf down = pixels(r.image_pred, x + r.below) - c;
  const vf weight = r.weight ? load_up_to(r.weight + x, n) : vf{};
  const auto counted = [&](vf x) __attribute__((always_inline)) { return r.weight ? weighted(x, weight) : x; };
  if (sums) {
    const vf distances = counted(distance<kind>(d, p)), below = step_length<step>(down);
    to.pixel += inside ? distances : where(between(x, 0, r.size), distances);
    to.down += inside ? below : where(between(x, 0, r.size), below);
    to.right += step_length<step>(right);
  }
  if (grads) {
    vf g = counted(slope<kind>(d, p) * r.scale);
    if (r.to.image) put(r.to.image + x, r.more.image ? load_up_to(r.more.image + x, n) - g : -g, n, r.to.streamed);
    if (!r.to.image_pred) return;
    vf left = c - pixels(r.image_pred, x - r.step);
    if (!inside) left = where(between(x, r.step, r.size), left);
    const vf slope_down = step_slope<step>(down);
    g += r.along_y * (load((const float*)r.above + x) - slope_down);
    g += r.along_x * (step_slope<step>(left) - step_slope<step>(right));
    store(r.above + x, slope_down);
    if (r.more.image_pred) g += load_up_to(r.more.image_pred + x, n);
    put(r.to.image_pred + x, g, n, r.to.streamed);
  }
}

FASTLOSS_INLINE void add_sums(const SweepSums& from, double* to) {
  const vf sums[3] = {from.pixel, from.down, from.right};
  for (int i = 0; i < 3; ++i)
    store_bits(to + 16 * i, load_bits<vd>(to + 16 * i) + __builtin_convertvector(sums[i], vd));
}

// Vectors from x up to `end`: few are not inside, so that one function does for sums, gradients and both.
template <Kind kind, Step step, typename T, typename G>
__attribute__((noinline)) static void sweep_edge(const SweepRow<T, G>& r, double p, bool sums, bool grads, int64_t x,
                                                 int64_t end) {
  SweepSums to{};
  for (; x < end; x += W) sweep_pixels<kind, step, false>(r, p, sums, grads, x, to);
  if (sums) add_sums(to, r.sums);
}

template <Kind kind, Step step, bool sums, bool grads, typename T, typename G>
static void sweep_row(const SweepRow<T, G>& row, double p) {
  const SweepRow<T, G> r = row;
  int64_t x = (r.step + W - 1) / W * W;
  sweep_edge<kind, step>(r, p, sums, grads, 0, x < r.size ? x : r.size);
  while (x + W + r.step <= r.size) {
    SweepSums to{};  // of 32 vectors, before they move to double: the error does not grow with the image
    for (int k = 0; k < 32 && x + W + r.step <= r.size; ++k, x += W) {
      __builtin_prefetch(r.image + x + kSweepAhead);
      __builtin_prefetch(r.image_pred + r.below + x + kSweepAhead);
      sweep_pixels<kind, step, true>(r, p, sums, grads, x, to);
    }
    if (sums) add_sums(to, r.sums);
  }
  sweep_edge<kind, step>(r, p, sums, grads, x, r.size);
}

template <Kind kind, Step step, typename T, typename G>
static void image_sweep(const SweepRow<T, G>& r, double p) {
  if (r.sums == nullptr) return sweep_row<kind, step, false, true>(r, p);
  if constexpr (sizeof(G) == sizeof(float)) {  // as the forward has it, which makes the sums
    const bool grads = r.to.image != nullptr || r.to.image_pred != nullptr;
    return grads ? sweep_row<kind, step, true, true>(r, p) : sweep_row<kind, step, true, false>(r, p);
  }
}

// The slopes of a row down to the next one, `below` further on: what the sweep of that one finds in `above`.
template <Step step, typename T>
static void image_above(const T* row, int64_t below, int64_t size, float* above) {
  for (int64_t x = 0; x < size; x += W)
    store(above + x, step_slope<step>(load_up_to(row + below + x, size - x) - load_up_to(row + x, size - x)));
}

template <Kind kind, Step step, typename T, typename G>
static Sweep<T, G> sweep_of() {
  return {image_sweep<kind, step, T, G>, image_above<step, T>};
}
template <Step step, typename T, typename G>
static Sweep<T, G> sweep_of(Kind kind) {
  switch (kind) {
    case Kind::l1: return sweep_of<Kind::l1, step, T, G>();
    case Kind::l2: return sweep_of<Kind::l2, step, T, G>();
    case Kind::charbonnier: return sweep_of<Kind::charbonnier, step, T, G>();
    default: return {};
  }
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
