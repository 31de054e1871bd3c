// Log-sum-exps and other statistics of each row (and column) of the logits, from blocks of raw products: what the
// forwards of the softmax ops share. It also saves those products, of as many rows as the op is told.
#pragma once

#include "contrastive/logit_matrix.h"

#include <cmath>
#include <memory>

namespace fastloss {

constexpr size_t kMaxPowers = 3;  // of LogitMatrix::powers

// What one tile contributes to the statistics of one row; sum_exp, one per power, is relative to max.
struct RowPart {
  float max;
  double sum_exp[kMaxPowers];
  SumAndCount moments;
};

// What each group of kTileRows rows of a block contributes to the statistics of the block's columns.
struct ColumnParts {
  int64_t stride;  // from one group to the next
  std::vector<float> max, sum_exp[kMaxPowers], sum, count;

  ColumnParts(const LogitMatrix& p, int64_t groups, int64_t columns) : stride(whole_vectors(columns)) {
    if (!p.symmetric) return;
    const size_t size = groups * stride;
    max.assign(size, kLowest);
    for (size_t a = 0; a < p.powers.size(); ++a) sum_exp[a].assign(size, 0.0f);
    sum.assign(p.moments ? size : 0, 0.0f);
    count.assign(p.moments ? size : 0, 0.0f);
  }
};

class Statistics {
 public:
  // Writes to stats [directions, statistics, rows].
  Statistics(const LogitMatrix& p, float* stats)
      : p_(p), kernels_(contrastive_kernels()), tiles_per_row_(blocks_of(p.columns, kTileColumns)), stats_(stats) {
    if (!p.symmetric) return;
    column_max_.assign(p.padded_columns, kLowest);
    for (size_t a = 0; a < p.powers.size(); ++a) column_sum_exp_[a].assign(p.padded_columns, 0.0);
    column_moments_.assign(p.moments ? p.columns : 0, {0, 0});
  }

  // Begins with rows begin .. begin + count, all of whose columns come block by block.
  void start_rows(int64_t begin, int64_t count) {
    begin_ = begin;
    count_ = count;
    row_parts_.assign(count * tiles_per_row_, {kLowest, {}, {}});
  }

  // raw [count, n]: the products with columns first .. first + n, where first is a multiple of kTileColumns.
  void add_block(const Tensor& raw, int64_t first, int64_t n) {
    const int64_t groups = blocks_of(count_, kTileRows), across = blocks_of(n, kTileColumns);
    ColumnParts columns(p_, groups, n);
    over_threads(0, groups * across, tiles_grain(count_, n), [&](int64_t begin, int64_t end) {
      const auto workspace = std::make_unique_for_overwrite<float[]>(std::min(kTileRows, count_) * kTileColumns);
      for (int64_t t = begin; t < end && going_on(); ++t)
        add_tile(raw, t / across, first, t % across * kTileColumns, n, columns, workspace.get());
    });
    if (!p_.symmetric) return;
    for_each(across, [&](int64_t tile) { merge_columns(columns, groups, first, tile * kTileColumns, n); });
  }

  void finish_rows() {
    for_each(count_, [&](int64_t r) { finish_row(r); }, 512);
  }

  void finish_columns() {
    if (!p_.symmetric) return;
    for (int64_t j = 0; j < p_.columns; ++j) {
      double sum_exp[kMaxPowers];
      for (size_t a = 0; a < p_.powers.size(); ++a) sum_exp[a] = column_sum_exp_[a][j];
      write(p_.directions() - 1, j, column_max_[j], sum_exp, p_.moments ? column_moments_[j] : SumAndCount{0, 0});
    }
  }

 private:
  // The tile of the block whose rows are the group's and whose columns begin at `offset`.
  void add_tile(const Tensor& raw, int64_t group, int64_t first, int64_t offset, int64_t n, ColumnParts& columns,
                float* logits) {
    const int64_t row = group * kTileRows, rows = std::min(kTileRows, count_ - row);
    const int64_t tile_columns = std::min(kTileColumns, n - offset);
    const int64_t skipped = p_.columns_below_diagonal(begin_ + row, first + offset, tile_columns);
    const int64_t width = tile_columns - skipped;
    if (width == 0) return;
    offset += skipped;
    const float* from = input<float>(raw) + row * raw.stride(0) + offset;
    const auto make_logits = [&](bool transposed) {
      for (int64_t r = 0; r < rows; ++r)
        p_.logits(kernels_, from + r * raw.stride(0), begin_ + row + r, first + offset, width, transposed,
                  &logits[r * kTileColumns]);
    };
    const int64_t part = group * columns.stride + offset;
    float* sum = p_.moments && p_.symmetric ? &columns.sum[part] : nullptr;
    float* count = sum ? &columns.count[part] : nullptr;
    float* max = p_.symmetric ? &columns.max[part] : nullptr;
    const bool same_logits = !p_.two_limits;  // for both directions
    make_logits(false);
    for (int64_t r = 0; r < rows; ++r) {
      const float* s = &logits[r * kTileColumns];
      RowPart& of_row = row_parts_[(row + r) * tiles_per_row_ + (first + offset) / kTileColumns];
      of_row.max = kernels_.max(s, width, same_logits ? max : nullptr);
      for (size_t a = 0; a < p_.powers.size(); ++a)
        of_row.sum_exp[a] = kernels_.sum_exp(s, width, p_.powers[a], of_row.max);
      if (p_.moments) of_row.moments = kernels_.moments(s, width, same_logits ? sum : nullptr, count);
    }
    if (!p_.symmetric) return;
    if (!same_logits) {
      make_logits(true);
      for (int64_t r = 0; r < rows; ++r) {
        kernels_.max(&logits[r * kTileColumns], width, max);
        if (p_.moments) kernels_.moments(&logits[r * kTileColumns], width, sum, count);
      }
    }
    for (size_t a = 0; a < p_.powers.size(); ++a)
      for (int64_t r = 0; r < rows; ++r)
        kernels_.add_column_exps(&logits[r * kTileColumns], width, p_.powers[a], max, &columns.sum_exp[a][part]);
  }

  // Adds what all groups of a block contribute to the columns of one tile's width.
  void merge_columns(const ColumnParts& columns, int64_t groups, int64_t first, int64_t offset, int64_t n) {
    const int64_t width = std::min(kTileColumns, n - offset), j = first + offset;
    float before[kTileColumns];
    std::copy_n(&column_max_[j], whole_vectors(width), before);
    const auto part = [&](int64_t g) { return g * columns.stride + offset; };
    for (int64_t g = 0; g < groups; ++g) kernels_.raise_max(width, &columns.max[part(g)], &column_max_[j]);
    for (size_t a = 0; a < p_.powers.size(); ++a)
      for (int64_t g = 0; g < groups; ++g)
        kernels_.merge_sum_exps(width, p_.powers[a], g == 0 ? before : &column_max_[j], &column_max_[j],
                                &columns.max[part(g)], &columns.sum_exp[a][part(g)], &column_sum_exp_[a][j]);
    if (!p_.moments) return;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < width; ++i) {
        column_moments_[j + i].sum += columns.sum[part(g) + i];
        column_moments_[j + i].count += columns.count[part(g) + i];
      }
  }

  void finish_row(int64_t r) {
    const RowPart* parts = row_parts_.data() + r * tiles_per_row_;  // none without columns
    float max = kLowest;
    for (int64_t b = 0; b < tiles_per_row_; ++b)
      if (parts[b].max > max || parts[b].max != parts[b].max) max = parts[b].max;
    double sum_exp[kMaxPowers] = {};
    SumAndCount moments{0, 0};
    for (int64_t b = 0; b < tiles_per_row_; ++b) {
      for (size_t a = 0; a < p_.powers.size(); ++a)
        sum_exp[a] += parts[b].sum_exp[a] * std::exp(p_.powers[a] * (static_cast<double>(parts[b].max) - max));
      moments.sum += parts[b].moments.sum;
      moments.count += parts[b].moments.count;
    }
    if (p_.self_similarity)
      add_to_column(begin_ + r, max, sum_exp, moments);
    else
      write(0, begin_ + r, max, sum_exp, moments);
  }

  // With `self_similarity` row i and column i are the same entries: what is right of the diagonal and what is above it.
  void add_to_column(int64_t i, float max, const double* sum_exp, const SumAndCount& moments) {
    const double before = column_max_[i];
    if (max > column_max_[i] || max != max) column_max_[i] = max;
    for (size_t a = 0; a < p_.powers.size(); ++a)
      column_sum_exp_[a][i] = column_sum_exp_[a][i] * std::exp(p_.powers[a] * (before - column_max_[i])) +
                              sum_exp[a] * std::exp(p_.powers[a] * (static_cast<double>(max) - column_max_[i]));
    if (!p_.moments) return;
    column_moments_[i].sum += moments.sum;
    column_moments_[i].count += moments.count;
  }

  void write(int64_t direction, int64_t i, float found_max, const double* sum_exp, const SumAndCount& moments) {
    const auto put = [&](int64_t statistic, double value) {
      stats_[(direction * p_.stats_count() + statistic) * p_.rows + i] = static_cast<float>(value);
    };
    const double infinity = std::numeric_limits<double>::infinity();
    const double max = found_max <= kLowest ? -infinity : found_max;
    for (size_t a = 0; a < p_.powers.size(); ++a)
      put(p_.lse_index(a), std::isinf(max) ? max : (a == 0 ? max : 0) + std::log(sum_exp[a]));
    put(1, max);
    if (!p_.moments) return;
    put(2, moments.sum);
    put(3, moments.count);
  }

  const LogitMatrix& p_;
  const ContrastiveKernels kernels_;
  const int64_t tiles_per_row_;
  float* stats_;
  int64_t begin_ = 0, count_ = 0;
  std::vector<RowPart> row_parts_;
  std::vector<float> column_max_;
  std::vector<double> column_sum_exp_[kMaxPowers];  // relative to column_max_
  std::vector<SumAndCount> column_moments_;
};

// Writes all statistics and returns the products of the first `saved_rows` rows with all keys, where there are any.
inline std::optional<Tensor> make_statistics(LogitMatrix& p, double workspace_mib, int64_t saved_rows, float* stats) {
  Statistics statistics(p, stats);
  std::optional<Tensor> saved_logits;
  const bool all_rows = saved_rows > 0 && saved_rows == p.rows;
  // If not all rows are saved, blocks are those of the backward, which makes the other rows again: a library's product
  // may have other bits for the same row if the number of rows is another.
  const auto [block_rows, block_columns] =
      all_rows && !p.self_similarity ? BlockSize{p.rows, p.columns}
                                     : block_size(p, std::min(kProductMiB, workspace_mib / 4), kProductColumns);
  const bool one_product = all_rows && block_rows >= p.rows && block_columns >= p.columns;  // which itself is saved
  if (saved_rows > 0 && !one_product) saved_logits = new_float32({saved_rows, p.columns});
  for_pieces(p.rows, block_rows, [&, block_columns = block_columns](int64_t begin, int64_t count) {
    statistics.start_rows(begin, count);
    for_pieces(p.columns, block_columns, [&](int64_t first, int64_t n) {
      if (p.is_below_diagonal(begin, first + n)) return;
      const Tensor raw = p.products(begin, count, first, n);
      statistics.add_block(raw, first, n);
      if (one_product) saved_logits = raw;
      if (one_product || begin >= saved_rows) return;
      const int64_t saved_count = std::min(count, saved_rows - begin);
      Tensor part = slice(slice(*saved_logits, 0, begin, saved_count), 1, first, n);
      torch::stable::copy_(part, slice(raw, 0, 0, saved_count));
    });
    statistics.finish_rows();
  });
  statistics.finish_columns();
  return saved_logits;
}

}  // namespace fastloss
