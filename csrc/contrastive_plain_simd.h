// Rows of embeddings: their products with each other, and the gradient of their normalisation; included by each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

// <a, a> and <a, b>, each in four chains of vectors.
static PlainProducts plain_products(const float* a, const float* b, int64_t n) {
  vf own[4] = {}, both[4] = {};
  for (int64_t i = 0; i < n;)
    for (int k = 0; k < 4 && i < n; ++k, i += W) {
      const vf x = load_up_to(a + i, n - i), y = load_up_to(b + i, n - i);
      own[k] += x * x;
      both[k] += x * y;
    }
  const auto total = [](const vf* v) {
    return sum(__builtin_convertvector(v[0] + v[1], vd) + __builtin_convertvector(v[2] + v[3], vd));
  };
  return {total(own), total(both)};
}

// to = factor v + along x (no x: 0)
template <typename T>
static void plain_combine(const float* v, float factor, const float* x, float along, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += W)
    store_up_to(to + i, factor * load_up_to(v + i, n - i) + (x ? along * load_up_to(x + i, n - i) : all(0.0f)), n - i);
}

template <typename T>
static PlainKernels<T> plain_kernels() {
  return {plain_products, plain_combine<T>};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
