// What the kernels of attention consistency from queries and keys are handed.
#pragma once

#include <cstdint>

namespace fastloss {

constexpr int64_t kQueryRows = 32;  // rows of both maps that are made at a time
constexpr int64_t kKeyPanel = 64;   // keys that lie side by side in memory, for a product to read

enum class Divergence { kl, sym_kl, js };

// What the forward keeps of a row: the softmax of a view is e^(s - max) / sum. The means are what the gradient
// subtracts: kl, sym_kl: of log p - log q under each view; js: of log(p / m) and log(q / m). A row that does not count
// has max = inf, which makes all its probabilities 0.
struct RowStatistics {
  float max1, sum1, max2, sum2, mean1, mean2;
};

struct AttentionQkKernels {
  // to[r][c] = sum_t a[r * a_row + t * a_term] b[t * b_term + c], or added to it; columns are a multiple of kLanes
  void (*product)(const float* a, int64_t a_row, int64_t a_term, int64_t rows, const float* b, int64_t b_term,
                  int64_t columns, int64_t terms, float* to, int64_t to_row, bool adds);
  // The divergence of a row of logits [n] and its statistics; e1 and e2 are [n] of memory. -inf is a key left out.
  float (*forward)(Divergence, const float* s1, const float* s2, int64_t n, float* e1, float* e2, RowStatistics&);
  // The logits become their gradients, times `weight`.
  void (*backward)(Divergence, float* s1, float* s2, int64_t n, const RowStatistics&, float weight);
};

AttentionQkKernels attention_qk_kernels();  // of the CPU at hand

}  // namespace fastloss
