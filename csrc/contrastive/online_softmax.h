// Log-sum-exps and other statistics of each row (and column) of the logits, from chunks of raw products; and of how
// many rows these products are kept for the backward. What the softmax ops' forwards share.
#pragma once

#include "contrastive/logit_matrix.h"

#include <cmath>
#include <memory>

namespace fastloss {

constexpr size_t kFactors = 3;

// What one tile says of one row.
struct RowPart {
  float most;
  double total[kFactors];
  SumAndCount moments;
};

// What the groups of rows of one chunk say of its columns.
struct ColumnParts {
  int64_t width;
  std::vector<float> most, total[kFactors], sum, count;

  ColumnParts(const LogitMatrix& p, int64_t groups, int64_t columns) : width((columns + 15) / 16 * 16) {
    if (!p.symmetric) return;
    const size_t size = groups * width;
    most.assign(size, kLowest);
    for (size_t f = 0; f < p.factors.size(); ++f) total[f].assign(size, 0.0f);
    sum.assign(p.moments ? size : 0, 0.0f);
    count.assign(p.moments ? size : 0, 0.0f);
  }
};

class Statistics {
 public:
  // stats: [directions, statistics, rows]
  Statistics(const LogitMatrix& p, float* stats)
      : p_(p), kernels_(contrastive_kernels()), blocks_(blocks_of(p.columns, kColumns)), stats_(stats) {
    if (!p.symmetric) return;
    most_.assign(p.padded_columns, kLowest);
    for (size_t f = 0; f < p.factors.size(); ++f) total_[f].assign(p.padded_columns, 0.0);
    moments_.assign(p.moments ? p.columns : 0, {0, 0});
  }

  // Rows begin .. begin + count, all of whose columns come chunk by chunk.
  void start(int64_t begin, int64_t count) {
    begin_ = begin;
    count_ = count;
    parts_.assign(count * blocks_, {kLowest, {}, {}});
  }

  // raw [count, n]: the products with columns first .. first + n, first a multiple of kColumns
  void chunk(const Tensor& raw, int64_t first, int64_t n) {
    const int64_t groups = blocks_of(count_, kRows), across = blocks_of(n, kColumns);
    ColumnParts columns(p_, groups, n);
    over_threads(0, groups * across, tiles_grain(count_, n), [&](int64_t from, int64_t to) {
      const auto scratch = std::make_unique_for_overwrite<float[]>(std::min(kRows, count_) * kColumns);
      for (int64_t t = from; t < to && going_on(); ++t)
        tile(raw, t / across, first, t % across * kColumns, n, columns, scratch.get());
    });
    if (!p_.symmetric) return;
    for_each(across, [&](int64_t b) { merge_columns(columns, groups, first, b * kColumns, n); });
  }

  void finish_rows() {
    for_each(count_, [&](int64_t r) { finish_row(r); }, 512);
  }

  void finish_columns() {
    if (!p_.symmetric) return;
    for (int64_t j = 0; j < p_.columns; ++j) {
      double total[kFactors];
      for (size_t f = 0; f < p_.factors.size(); ++f) total[f] = total_[f][j];
      write(p_.directions() - 1, j, most_[j], total, p_.moments ? moments_[j] : SumAndCount{0, 0});
    }
  }

 private:
  void tile(const Tensor& raw, int64_t group, int64_t first, int64_t at, int64_t n, ColumnParts& columns,
            float* scratch) {
    const int64_t row = group * kRows, rows = std::min(kRows, count_ - row), whole = std::min(kColumns, n - at);
    const int64_t idle = p_.idle(begin_ + row, first + at, whole), width = whole - idle;
    if (width == 0) return;
    at += idle;
    const float* from = input<float>(raw) + row * raw.stride(0) + at;
    const auto read = [&](bool back) {
      for (int64_t r = 0; r < rows; ++r)
        p_.logits(kernels_, from + r * raw.stride(0), begin_ + row + r, first + at, width, back,
                  &scratch[r * kColumns]);
    };
    float* sum = p_.moments && p_.symmetric ? &columns.sum[group * columns.width + at] : nullptr;
    float* number = sum ? &columns.count[group * columns.width + at] : nullptr;
    float* most = p_.symmetric ? &columns.most[group * columns.width + at] : nullptr;
    const bool together = !p_.two_ceilings;
    read(false);
    for (int64_t r = 0; r < rows; ++r) {
      const float* s = &scratch[r * kColumns];
      RowPart& part = parts_[(row + r) * blocks_ + (first + at) / kColumns];
      part.most = kernels_.most(s, width, together ? most : nullptr);
      for (size_t f = 0; f < p_.factors.size(); ++f) part.total[f] = kernels_.row(s, width, p_.factors[f], part.most);
      if (p_.moments) part.moments = kernels_.moments(s, width, together ? sum : nullptr, number);
    }
    if (!p_.symmetric) return;
    if (!together) {
      read(true);
      for (int64_t r = 0; r < rows; ++r) {
        kernels_.most(&scratch[r * kColumns], width, most);
        if (p_.moments) kernels_.moments(&scratch[r * kColumns], width, sum, number);
      }
    }
    for (size_t f = 0; f < p_.factors.size(); ++f)
      for (int64_t r = 0; r < rows; ++r)
        kernels_.columns(&scratch[r * kColumns], width, p_.factors[f], most,
                         &columns.total[f][group * columns.width + at]);
  }

  void merge_columns(const ColumnParts& columns, int64_t groups, int64_t first, int64_t at, int64_t n) {
    const int64_t width = std::min(kColumns, n - at), j = first + at;
    float before[kColumns];
    std::copy_n(&most_[j], (width + 15) / 16 * 16, before);
    for (int64_t g = 0; g < groups; ++g) kernels_.raise(width, &columns.most[g * columns.width + at], &most_[j]);
    for (size_t f = 0; f < p_.factors.size(); ++f)
      for (int64_t g = 0; g < groups; ++g)
        kernels_.merge(width, p_.factors[f], g == 0 ? before : &most_[j], &most_[j],
                       &columns.most[g * columns.width + at], &columns.total[f][g * columns.width + at], &total_[f][j]);
    if (!p_.moments) return;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < width; ++i) {
        moments_[j + i].sum += columns.sum[g * columns.width + at + i];
        moments_[j + i].count += columns.count[g * columns.width + at + i];
      }
  }

  void finish_row(int64_t r) {
    const RowPart* parts = parts_.data() + r * blocks_;  // none without columns
    float most = kLowest;
    for (int64_t b = 0; b < blocks_; ++b)
      if (parts[b].most > most || parts[b].most != parts[b].most) most = parts[b].most;
    double total[kFactors] = {};
    SumAndCount moments{0, 0};
    for (int64_t b = 0; b < blocks_; ++b) {
      for (size_t f = 0; f < p_.factors.size(); ++f)
        total[f] += parts[b].total[f] * std::exp(p_.factors[f] * (static_cast<double>(parts[b].most) - most));
      moments.sum += parts[b].moments.sum;
      moments.count += parts[b].moments.count;
    }
    if (p_.upper)
      join_column(begin_ + r, most, total, moments);
    else
      write(0, begin_ + r, most, total, moments);
  }

  // What row i found joins what column i did: they are one row of a symmetric matrix.
  void join_column(int64_t i, float most, const double* total, const SumAndCount& moments) {
    const double before = most_[i];
    if (most > most_[i] || most != most) most_[i] = most;
    for (size_t f = 0; f < p_.factors.size(); ++f)
      total_[f][i] = total_[f][i] * std::exp(p_.factors[f] * (before - most_[i])) +
                     total[f] * std::exp(p_.factors[f] * (static_cast<double>(most) - most_[i]));
    if (!p_.moments) return;
    moments_[i].sum += moments.sum;
    moments_[i].count += moments.count;
  }

  void write(int64_t direction, int64_t i, float most, const double* total, const SumAndCount& moments) {
    const auto put = [&](int64_t statistic, double value) {
      stats_[(direction * p_.statistics() + statistic) * p_.rows + i] = static_cast<float>(value);
    };
    const double infinity = std::numeric_limits<double>::infinity();
    const double top = most <= kLowest ? -infinity : most;
    for (size_t f = 0; f < p_.factors.size(); ++f)
      put(p_.lse_of(f), std::isinf(top) ? top : (f == 0 ? top : 0) + std::log(total[f]));
    put(1, top);
    if (!p_.moments) return;
    put(2, moments.sum);
    put(3, moments.count);
  }

  const LogitMatrix& p_;
  const ContrastiveKernels kernels_;
  const int64_t blocks_;
  float* stats_;
  int64_t begin_ = 0, count_ = 0;
  std::vector<RowPart> parts_;
  std::vector<float> most_;
  std::vector<double> total_[kFactors];
  std::vector<SumAndCount> moments_;
};

// Writes all statistics, and returns the products of the first `rows` rows, all their columns, if `rows` > 0.
inline std::optional<Tensor> make_statistics(LogitMatrix& p, double workspace_mib, int64_t rows, float* stats) {
  Statistics forward(p, stats);
  std::optional<Tensor> kept;
  const bool all = rows > 0 && rows == p.rows;
  // If not all rows are kept, chunks are those of the backward, which makes the other rows again: from a product of
  // other height a library may return other bits for the same row.
  const auto [height, width] =
      all && !p.upper ? std::pair(p.rows, p.columns) : rectangle(p, std::min(kProduct, workspace_mib / 4), kWide);
  const bool whole = all && height >= p.rows && width >= p.columns;  // one product, which itself is kept
  if (rows > 0 && !whole) kept = torch::stable::new_empty(p.query, {rows, p.columns});
  for_pieces(p.rows, height, [&, width = width](int64_t begin, int64_t count) {
    forward.start(begin, count);
    for_pieces(p.columns, width, [&](int64_t first, int64_t n) {
      if (p.below(begin, first + n)) return;
      const Tensor raw = p.raw(begin, count, first, n);
      forward.chunk(raw, first, n);
      if (whole) kept = raw;
      if (whole || begin >= rows) return;
      const int64_t some = std::min(count, rows - begin);
      Tensor part = slice(slice(*kept, 0, begin, some), 1, first, n);
      torch::stable::copy_(part, slice(raw, 0, 0, some));
    });
    forward.finish_rows();
  });
  forward.finish_columns();
  return kept;
}

}  // namespace fastloss
