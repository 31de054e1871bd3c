// What is done with rows of floats around a matrix product; included by for_each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

static void matmul_add(const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(to + i) + load(from + i));
  for (; i < n; ++i) to[i] += from[i];
}

// to[j][i] = from[i][j]
static void matmul_transpose(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to,
                             int64_t to_stride) {
  for (int64_t j = 0; j < columns; j += 16)
    for (int64_t i = 0; i < rows; i += 16) {
      const int64_t m = rows - i < 16 ? rows - i : 16, n = columns - j < 16 ? columns - j : 16;
      if (m == 16 && n == 16) {
        transpose_square(from + i * stride + j, 4 * stride, to + j * to_stride + i, 4 * to_stride);
        continue;
      }
      for (int64_t c = 0; c < n; ++c)
        for (int64_t r = 0; r < m; ++r) to[(j + c) * to_stride + i + r] = from[(i + r) * stride + j + c];
    }
}

// to = weight to + from
static void matmul_rescale(const float* from, int64_t n, float weight, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(to + i) * weight + load(from + i));
  for (; i < n; ++i) to[i] = to[i] * weight + from[i];
}
static void matmul_narrow(const float* from, int64_t n, BFloat16* to) {
  for (int64_t i = 0; i < n; i += W) store_up_to(to + i, load_up_to(from + i, n - i), n - i);
}

template <typename T>
static void matmul_widen(const T* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += W) store_up_to(to + i, load_up_to(from + i, n - i), n - i);
}

static MatmulKernels matmul_kernels() {
  return {matmul_add, matmul_transpose, matmul_rescale, matmul_narrow, matmul_widen<BFloat16>, matmul_widen<Half>};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
