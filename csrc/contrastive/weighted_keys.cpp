// One pass over blocks of columns makes statistics and weighted sums of keys: both are kept relative to the largest
// logit so far, and scaled down when a block has a larger one.

#include "contrastive/weighted_keys.h"

#include <cmath>

namespace fastloss {
namespace {

constexpr int64_t kGroup = 8;     // rows of a block that a thread takes at a time
constexpr size_t kSums = 4;       // three log-sum-exps and the plain sum
constexpr double kPullBlock = 8;  // MiB of a block of logits at most, and of the weights of each sum

// What the blocks so far say of a row; `kept` is what the last one leaves of the sums before it.
struct Running {
  float most = kLowest;
  float kept[kSums] = {};
  double total[kSums] = {}, sum = 0, count = 0;
};

class WeightedKeys {
 public:
  WeightedKeys(LogitMatrix& p, double workspace_mib)
      : p_(p), kernels_(contrastive_kernels()), matmul_(matmul_kernels()) {
    std::tie(height_, width_) =
        rectangle(p, std::min(kPullBlock, workspace_mib / (2 + static_cast<double>(p.sums()))), kWide);
  }

  void run(float* stats, Tensor& sums) {
    p_.once = height_ >= p_.rows;
    for_pieces(p_.rows, height_, [&](int64_t begin, int64_t m) {
      rows_.assign(m, Running());
      for_pieces(p_.columns, width_, [&](int64_t first, int64_t n) { block(begin, m, first, n, sums); });
      for_each(blocks_of(m, kGroup), [&](int64_t g) {
        for (int64_t r = g * kGroup; r < std::min(m, (g + 1) * kGroup); ++r) finish(begin, r, stats, sums);
      });
    });
  }

 private:
  void block(int64_t begin, int64_t m, int64_t first, int64_t n, Tensor& sums) {
    const Tensor raw = p_.raw(begin, m, first, n), keys = flipped(slice(p_.keys, 0, first, n));
    std::vector<Panels> weights;
    while (weights.size() < static_cast<size_t>(p_.sums())) weights.emplace_back(floats({m, n}), m, n);
    for_each(blocks_of(m, kGroup), [&](int64_t g) {
      std::vector<float> s((n + 15) / 16 * 16);
      for (int64_t r = g * kGroup; r < std::min(m, (g + 1) * kGroup); ++r)
        line(begin, r, first, n, input<float>(raw) + r * raw.stride(0), weights, s.data());
    });
    for (size_t a = 0; a < weights.size(); ++a) {
      const Tensor part = product(weights[a], keys);
      float* to = output<float>(sums) + (static_cast<int64_t>(a) * p_.rows + begin) * p_.width;
      for_each(blocks_of(m, kGroup), [&](int64_t g) {
        for (int64_t r = g * kGroup; r < std::min(m, (g + 1) * kGroup); ++r) {
          const float* from = input<float>(part) + r * part.stride(0);
          if (first == 0)
            std::copy_n(from, p_.width, to + r * p_.width);
          else
            matmul_.rescale(from, p_.width, rows_[r].kept[a], to + r * p_.width);
        }
      });
    }
  }

  void line(int64_t begin, int64_t r, int64_t first, int64_t n, const float* raw, const std::vector<Panels>& weights,
            float* s) {
    Running& row = rows_[r];
    for_pieces(n, kColumns, [&](int64_t c, int64_t some) {
      p_.logits(kernels_, raw + c, begin + r, first + c, some, false, s + c);
    });
    const float before = row.most, now = kernels_.most(s, n, nullptr);
    if (now > before || now != now) row.most = now;
    for (size_t f = 0; f < p_.factors.size(); ++f) {
      const double kept = std::exp(p_.factors[f] * (static_cast<double>(before) - row.most));
      row.kept[f] = static_cast<float>(kept);
      row.total[f] *= kept;
      for_pieces(n, kTerms, [&](int64_t c, int64_t some) {
        row.total[f] +=
            kernels_.pull(s + c, some, p_.factors[f], row.most, &p_.column_scale[first + c], weights[f].at(r, c));
      });
    }
    if (!p_.moments) return;
    const SumAndCount more = kernels_.moments(s, n, nullptr, nullptr);
    row.sum += more.sum;
    row.count += more.count;
    row.kept[p_.factors.size()] = 1;
    for_pieces(n, kTerms, [&](int64_t c, int64_t some) {
      kernels_.pull_sum(s + c, some, &p_.column_scale[first + c], weights[p_.factors.size()].at(r, c));
    });
  }

  void finish(int64_t begin, int64_t r, float* stats, Tensor& sums) {
    const Running& row = rows_[r];
    const double infinity = std::numeric_limits<double>::infinity(), top = row.most <= kLowest ? -infinity : row.most;
    const auto put = [&](int64_t statistic, double value) {
      stats[statistic * p_.rows + begin + r] = static_cast<float>(value);
    };
    for (size_t f = 0; f < p_.factors.size(); ++f) {
      put(p_.lse_of(f), std::isinf(top) ? top : (f == 0 ? top : 0) + std::log(row.total[f]));
      const float share = row.total[f] == 0 || top == -infinity ? 0.0f : static_cast<float>(1 / row.total[f]);
      float* sum = output<float>(sums) + (static_cast<int64_t>(f) * p_.rows + begin + r) * p_.width;
      for (int64_t d = 0; d < p_.width; ++d) sum[d] *= share;
    }
    put(1, top);
    if (!p_.moments) return;
    put(2, row.sum);
    put(3, row.count);
  }

  LogitMatrix& p_;
  const ContrastiveKernels kernels_;
  const MatmulKernels matmul_;
  int64_t height_ = 0, width_ = 0;
  std::vector<Running> rows_;
};

}  // namespace

void make_weighted_keys(LogitMatrix& p, double workspace_mib, float* stats, Tensor& weighted_keys) {
  if (p.columns == 0) torch::stable::zero_(weighted_keys);
  WeightedKeys(p, workspace_mib).run(stats, weighted_keys);
}

}  // namespace fastloss
