// Row and column log-sum-exps of a chunk of logits, and the chunk's gradient; included by each_isa.h. Rows are padded
// to whole vectors, so that nothing here ends in the middle of one.

namespace fastloss {
namespace FASTLOSS_ISA {

FASTLOSS_INLINE void store_bits(double* to, vd v) { __builtin_memcpy(to, &v, sizeof v); }

// The largest of n > 0 logits and the sum of the exponentials of their differences to it.
static LogSum contrastive_row(const float* logits, int64_t n) {
  vf top[4];
  for (vf& t : top) t = all(kLowest);
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int u = 0; u < 4; ++u) {
      const vf x = load(logits + i + u * W);
      top[u] = x > top[u] ? x : top[u];
    }
  for (; i < n; i += W) {
    const vf x = load(logits + i);
    top[0] = x > top[0] ? x : top[0];
  }
  float most = kLowest;
  for (const vf& t : top)
    for (int k = 0; k < W; ++k) most = t[k] > most ? t[k] : most;
  vd total{};
  for (i = 0; i < n;) {
    vf part{};  // of 32 vectors, before it moves to double: the error does not grow with n
    for (int step = 0; step < 32 && i < n; ++step, i += W) part += exp(load(logits + i) - most);
    total += __builtin_convertvector(part, vd);
  }
  return {most, sum(total)};
}

// Adds `rows` rows to the running log-sum-exps of n <= kColumns columns.
static void contrastive_columns(const float* logits, int64_t stride, int64_t rows, int64_t n, float* most,
                                double* total) {
  float top[kColumns], part[kColumns];
  for (int64_t i = 0; i < n; i += W) store(top + i, load(most + i));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; i += W) {
      const vf x = load(logits + r * stride + i), t = load(top + i);
      store(top + i, x > t ? x : t);
    }
  for (int64_t i = 0; i < n; i += W) {
    const vd factor = __builtin_convertvector(exp(load(most + i) - load(top + i)), vd);
    store_bits(total + i, load_bits<vd>(total + i) * factor);
    store(most + i, load(top + i));
  }
  for (int64_t r = 0; r < rows;) {
    for (int64_t i = 0; i < n; i += W) store(part + i, vf{});
    const int64_t end = r + 32 < rows ? r + 32 : rows;
    for (; r < end; ++r)
      for (int64_t i = 0; i < n; i += W)
        store(part + i, load(part + i) + exp(load(logits + r * stride + i) - load(top + i)));
    for (int64_t i = 0; i < n; i += W)
      store_bits(total + i, load_bits<vd>(total + i) + __builtin_convertvector(load(part + i), vd));
  }
}

// Logits become g p_row + g_j p_col, in place; the positives' entries are the caller's.
static void contrastive_grad(float* logits, int64_t n, const Row& row, const Columns& columns) {
  for (int64_t i = 0; i < n; i += W) {
    const vf x = load(logits + i);
    vf g = row.grad * exp((x - row.positive) - row.loss);
    if (columns.grad) g += load(columns.grad + i) * exp((x - load(columns.positive + i)) - load(columns.loss + i));
    store(logits + i, g);
  }
}

static ContrastiveKernels contrastive_kernels() {
  return {contrastive_row, contrastive_columns, contrastive_grad};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
