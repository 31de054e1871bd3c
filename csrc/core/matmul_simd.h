// What is done with rows of floats around a matrix product; included by for_each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

static void contrastive_add(const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(to + i) + load(from + i));
  for (; i < n; ++i) to[i] += from[i];
}

// to[j][i] = from[i][j]
static void contrastive_transpose(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to,
                                  int64_t back) {
  for (int64_t j = 0; j < columns; j += 16)
    for (int64_t i = 0; i < rows; i += 16) {
      const int64_t m = rows - i < 16 ? rows - i : 16, n = columns - j < 16 ? columns - j : 16;
      if (m == 16 && n == 16) {
        turn_square(from + i * stride + j, 4 * stride, to + j * back + i, 4 * back);
        continue;
      }
      for (int64_t c = 0; c < n; ++c)
        for (int64_t r = 0; r < m; ++r) to[(j + c) * back + i + r] = from[(i + r) * stride + j + c];
    }
}

// to = factor to + from
static void contrastive_rescale(const float* from, int64_t n, float factor, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(to + i) * factor + load(from + i));
  for (; i < n; ++i) to[i] = to[i] * factor + from[i];
}
static void contrastive_narrow(const float* from, int64_t n, BFloat16* to) {
  for (int64_t i = 0; i < n; i += W) store_up_to(to + i, load_up_to(from + i, n - i), n - i);
}

template <typename T>
static void contrastive_widen(const T* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += W) store_up_to(to + i, load_up_to(from + i, n - i), n - i);
}

static MatmulKernels matmul_kernels() {
  return {contrastive_add,    contrastive_transpose,       contrastive_rescale,
          contrastive_narrow, contrastive_widen<BFloat16>, contrastive_widen<Half>};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
