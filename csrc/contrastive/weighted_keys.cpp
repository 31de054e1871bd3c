// One pass over blocks of columns makes statistics and weighted keys: both are kept relative to the largest logit so
// far, and scaled down when a block has a larger one.

#include "contrastive/weighted_keys.h"

#include <cmath>

namespace fastloss {
namespace {

constexpr int64_t kGroupRows = 8;       // rows of a block that a thread takes at a time
constexpr size_t kMaxSums = 4;          // three log-sum-exps and the sum
constexpr double kWeightsBlockMiB = 8;  // a block of logits at most, and the weights of each sum

// The statistics of a row over the blocks so far. `rescale`: what the weighted keys of the blocks before the last are
// multiplied by.
struct RunningRow {
  float max = kLowest;
  float rescale[kMaxSums] = {};
  double sum_exp[kMaxSums] = {}, sum = 0, count = 0;
};

class WeightedKeys {
 public:
  WeightedKeys(LogitMatrix& p, double workspace_mib)
      : p_(p),
        kernels_(contrastive_kernels()),
        matmul_(matmul_kernels()),
        block_(block_size(p, std::min(kWeightsBlockMiB, workspace_mib / (2 + static_cast<double>(p.sums_count()))),
                          kProductColumns)) {}

  void run(float* stats, Tensor& weighted_keys) {
    p_.each_key_once = block_.rows >= p_.rows;
    for_pieces(p_.rows, block_.rows, [&](int64_t begin, int64_t m) {
      rows_.assign(m, RunningRow());
      for_pieces(p_.columns, block_.columns,
                 [&](int64_t first, int64_t n) { add_block(begin, m, first, n, weighted_keys); });
      each_row_of_block(m, [&](int64_t r) { finish(begin, r, stats, weighted_keys); });
    });
  }

 private:
  template <typename Body>
  static void each_row_of_block(int64_t m, const Body& body) {
    for_each(blocks_of(m, kGroupRows), [&](int64_t g) {
      for (int64_t r = g * kGroupRows; r < std::min(m, (g + 1) * kGroupRows); ++r) body(r);
    });
  }

  void add_block(int64_t begin, int64_t m, int64_t first, int64_t n, Tensor& weighted_keys) {
    const Tensor raw = p_.products(begin, m, first, n), keys = transposed(slice(p_.key_factor, 0, first, n));
    std::vector<Panels> weights;
    while (weights.size() < static_cast<size_t>(p_.sums_count())) weights.emplace_back(new_float32({m, n}), m, n);
    for_each(blocks_of(m, kGroupRows), [&](int64_t g) {
      std::vector<float> s(whole_vectors(n));
      for (int64_t r = g * kGroupRows; r < std::min(m, (g + 1) * kGroupRows); ++r)
        add_row(begin, r, first, n, input<float>(raw) + r * raw.stride(0), weights, s.data());
    });
    for (size_t a = 0; a < weights.size(); ++a) {
      const Tensor part = product(weights[a], keys);
      float* to = output<float>(weighted_keys) + (static_cast<int64_t>(a) * p_.rows + begin) * p_.dim;
      each_row_of_block(m, [&](int64_t r) {
        const float* from = input<float>(part) + r * part.stride(0);
        if (first == 0)
          std::copy_n(from, p_.dim, to + r * p_.dim);
        else
          matmul_.rescale(from, p_.dim, rows_[r].rescale[a], to + r * p_.dim);
      });
    }
  }

  // Row r of the block: its statistics, and the weights of its keys.
  void add_row(int64_t begin, int64_t r, int64_t first, int64_t n, const float* raw, const std::vector<Panels>& weights,
               float* s) {
    RunningRow& row = rows_[r];
    for_pieces(n, kTileColumns, [&](int64_t c, int64_t count) {
      p_.logits(kernels_, raw + c, begin + r, first + c, count, false, s + c);
    });
    const float before = row.max, block_max = kernels_.max(s, n, nullptr);
    if (block_max > before || block_max != block_max) row.max = block_max;
    for (size_t a = 0; a < p_.powers.size(); ++a) {
      const double rescale = std::exp(p_.powers[a] * (static_cast<double>(before) - row.max));
      row.rescale[a] = static_cast<float>(rescale);
      row.sum_exp[a] *= rescale;
      for_pieces(n, kTerms, [&](int64_t c, int64_t count) {
        row.sum_exp[a] +=
            kernels_.weights(s + c, count, p_.powers[a], row.max, &p_.column_scale[first + c], weights[a].at(r, c));
      });
    }
    if (!p_.moments) return;
    const SumAndCount more = kernels_.moments(s, n, nullptr, nullptr);
    row.sum += more.sum;
    row.count += more.count;
    row.rescale[p_.powers.size()] = 1;
    for_pieces(n, kTerms, [&](int64_t c, int64_t count) {
      kernels_.weights_of_sum(s + c, count, &p_.column_scale[first + c], weights[p_.powers.size()].at(r, c));
    });
  }

  void finish(int64_t begin, int64_t r, float* stats, Tensor& weighted_keys) {
    const RunningRow& row = rows_[r];
    const double infinity = std::numeric_limits<double>::infinity(), max = row.max <= kLowest ? -infinity : row.max;
    const auto put = [&](int64_t statistic, double value) {
      stats[statistic * p_.rows + begin + r] = static_cast<float>(value);
    };
    for (size_t a = 0; a < p_.powers.size(); ++a) {
      put(p_.lse_index(a), std::isinf(max) ? max : (a == 0 ? max : 0) + std::log(row.sum_exp[a]));
      const float weight = row.sum_exp[a] == 0 || max == -infinity ? 0.0f : static_cast<float>(1 / row.sum_exp[a]);
      float* sum = output<float>(weighted_keys) + (static_cast<int64_t>(a) * p_.rows + begin + r) * p_.dim;
      for (int64_t d = 0; d < p_.dim; ++d) sum[d] *= weight;
    }
    put(1, max);
    if (!p_.moments) return;
    put(2, row.sum);
    put(3, row.count);
  }

  LogitMatrix& p_;
  const ContrastiveKernels kernels_;
  const MatmulKernels matmul_;
  const BlockSize block_;
  std::vector<RunningRow> rows_;
};

}  // namespace

void make_weighted_keys(LogitMatrix& p, double workspace_mib, float* stats, Tensor& weighted_keys) {
  if (p.columns == 0) torch::stable::zero_(weighted_keys);
  WeightedKeys(p, workspace_mib).run(stats, weighted_keys);
}

}  // namespace fastloss
