// The nearest bank row of each generated row, as fastloss/diversity/nearest.py defines it. The bank is read once, a
// tile of rows at a time. A tile's distances are first made fast (l1: by a kernel of its own; l2, cosine: from a matrix
// product) with a bound of their error; those that may be the least are then computed once more, in float64.

#include "core/op.h"
#include "diversity/bank_rows.h"

#include <cmath>
#include <limits>

namespace fastloss {
namespace {

constexpr int64_t kTileElements = 1 << 20;  // elements of a tile that is made float32, or kBankRows rows if larger
constexpr int64_t kScores = 1 << 20;        // distances to a tile, or kBankRows to each generated row of a block
constexpr int64_t kSearchRows = 1024;       // generated rows in a block
constexpr double kUnit = 0x1p-23;           // eps of float32: twice the rounding error of an operation
constexpr double kRounded = 0x1.04p-8;      // error of a product whose factors were rounded to bfloat16 first
constexpr double kSmallestSquare = 1e-12;   // products of smaller rows may underflow: their cosine is made exactly

struct Inputs {
  Tensor generated, bank;
  std::string metric;
  double scale, shift, workspace_mib;
  FASTLOSS_FIELDS(generated, bank, metric, scale, shift, workspace_mib)
};
struct Nearest {
  Tensor distance, row;
  FASTLOSS_FIELDS(distance, row)
};
struct Row {
  Tensor row;
  FASTLOSS_FIELDS(row)
};
struct Needs {
  bool generated;
  FASTLOSS_FIELDS(generated)
};
struct Grads {
  Tensor generated;
  FASTLOSS_FIELDS(generated)
};

class Search {
 public:
  Search(const Rows& rows, double workspace_mib)
      : rows_(rows),
        tile_rows_(tile_rows(rows, workspace_mib)),
        distance_(rows.count, std::numeric_limits<float>::infinity()),
        index_(rows.count) {
    if (rows.metric == Metric::l1) {
      scores_ = new_float32({std::min(kSearchRows, rows.count), tile_rows_});
      return;
    }
    if (products_are_rounded()) rounding_ = kRounded;
    if (rows.widens()) wide_tile_ = new_float32({tile_rows_, rows.size});
    squares_.resize(rows.count);
    tile_squares_.resize(tile_rows_);
    each_row(rows.count, rows.size,
             [&](int64_t i) { squares_[i] = rows_.kernels.square(rows_.generated_row(i), rows_.size); });
  }

  void run() {
    for_pieces(rows_.bank_count, tile_rows_, [&](int64_t first, int64_t n) {
      check_signals();
      const auto tile = rows_.metric == Metric::l1 ? std::nullopt : std::make_optional(read_tile(first, n));
      for_pieces(rows_.count, kSearchRows, [&](int64_t row, int64_t count) {
        if (tile)
          search_by_product(row, count, *tile, first);
        else
          search_l1(row, count, first, n);
      });
    });
  }

  void write(float* distance, int64_t* index) const {
    std::copy(distance_.begin(), distance_.end(), distance);
    std::copy(index_.begin(), index_.end(), index);
  }

 private:
  // A quarter of the workspace at most for a tile's elements, and one for its distances.
  static int64_t tile_rows(const Rows& rows, double workspace_mib) {
    const int64_t quarter = static_cast<int64_t>(workspace_mib * (1 << 20) / 16);
    int64_t n = std::min(kScores, quarter) / std::max<int64_t>(1, std::min(kSearchRows, rows.count));
    if (rows.metric == Metric::l1)
      n = std::min(n, kTileRows);
    else
      n = std::min(n, rows.widens() ? std::min(kTileElements, quarter) / rows.size : kProductColumns);
    return std::min(std::max(n / kBankRows, int64_t{1}) * kBankRows, rows.bank_count);
  }

  void search_l1(int64_t row, int64_t count, int64_t first, int64_t n) {
    float* all_scores = output<float>(scores_);
    tile_distances(rows_, row, count, first, n, all_scores, tile_rows_);
    for_each(count, [&](int64_t i) { choose(row + i, all_scores + i * tile_rows_, first, n); }, 8);
  }

  // A tile of the bank in float32, and the squares of its rows.
  Tensor read_tile(int64_t first, int64_t n) {
    const Tensor tile = wide_tile_ ? slice(*wide_tile_, 0, 0, n) : slice(rows_.bank, 0, first, n);
    float* to = wide_tile_ ? output<float>(*wide_tile_) : nullptr;
    each_row(n, rows_.size, [&](int64_t r) {
      float* row = to ? to + r * rows_.size : nullptr;
      const float* read = rows_.read(first + r, 0, rows_.size, row);
      tile_squares_[r] = rows_.kernels.square(read, rows_.size);
    });
    return tile;
  }

  // By mean (a - b)^2 or 1 - cos(a, b) from products, in whose place they are written.
  void search_by_product(int64_t row, int64_t count, const Tensor& tile, int64_t first) {
    const Tensor products = blas_product(slice(rows_.generated, 0, row, count), tile, std::nullopt);
    const int64_t n = tile.size(0), stride = products.stride(0);
    float* all_scores = output<float>(products);
    const double mean = 1 / static_cast<double>(rows_.size);
    for_each(
        count,
        [&](int64_t i) {
          const double square = squares_[row + i];
          float* scores = all_scores + i * stride;
          for (int64_t j = 0; j < n; ++j) {
            const double dot = scores[j], other = tile_squares_[j];
            scores[j] = static_cast<float>(rows_.metric == Metric::l2 ? (square + other - 2 * dot) * mean
                                                                      : 1 - dot * inverse(square) * inverse(other));
          }
          choose(row + i, scores, first, n);
        },
        8);
  }
  // 1 / |x|, 0 for zeros; NaN, by which the distance is computed exactly, where products may have underflowed
  static double inverse(double square) {
    if (square == 0) return 0;
    return square < kSmallestSquare ? std::nan("") : 1 / std::sqrt(square);
  }

  // By how much a score may be wrong, at most.
  double error(int64_t i, int64_t j, float score) const {
    const double size = static_cast<double>(rows_.size);
    if (rows_.metric == Metric::l1) return kUnit * score * (kBankColumns / 4 + size / kBankColumns + 16);
    const double terms =
        kUnit * (std::min<double>(size, 2 * kTerms) + size / kTerms + 16) + rounding_;  // BLAS sums by blocks
    return rows_.metric == Metric::l2 ? terms * (squares_[i] + tile_squares_[j]) / size : 2 * terms;
  }

  // Distances that are not surely above the least so far are computed exactly, the least of the tile first. NaN stays.
  void choose(int64_t i, const float* scores, int64_t first, int64_t n) {
    if (std::isnan(distance_[i])) return;
    int64_t likely = -1;
    for (int64_t j = 0; j < n; ++j)
      if (scores[j] < (likely < 0 ? std::numeric_limits<float>::infinity() : scores[likely])) likely = j;
    const auto may_be_nearest = [&](int64_t j) { return !(scores[j] - error(i, j, scores[j]) > distance_[i]); };
    if (likely >= 0 && may_be_nearest(likely)) {
      const float d = rows_.distance(i, first + likely);
      if (d < distance_[i]) distance_[i] = d, index_[i] = first + likely;
    }
    for (int64_t j = 0; j < n; ++j) {
      if (!may_be_nearest(j) || (index_[i] == first + j && first + j > 0)) continue;
      const float d = rows_.distance(i, first + j);
      const bool nearer = d < distance_[i] || (d == distance_[i] && first + j < index_[i]) || std::isnan(d);
      if (nearer) distance_[i] = d, index_[i] = first + j;
      if (std::isnan(d)) return;
    }
  }

  const Rows& rows_;
  int64_t tile_rows_;
  std::vector<float> distance_;
  std::vector<int64_t> index_;  // of the nearest so far; 0 before there is one
  std::vector<double> squares_, tile_squares_;
  double rounding_ = 0;
  Tensor scores_;
  std::optional<Tensor> wide_tile_;
};

Nearest nearest_fwd(const Inputs& x) {
  const Rows rows("nearest", x.generated, x.bank, x.metric, x.scale, x.shift);
  Nearest out{new_float32(rows.count), torch::stable::new_empty(x.generated, {rows.count}, ScalarType::Long)};
  Search search(rows, x.workspace_mib);
  search.run();
  search.write(output<float>(out.distance), output<int64_t>(out.row));
  return out;
}

Grads nearest_bwd(const Tensor& grad, const Inputs& x, const Row& nearest, const Needs& needs) {
  if (!needs.generated) return {torch::stable::new_empty(x.generated, {0})};
  const Rows rows("nearest", x.generated, x.bank, x.metric, x.scale, x.shift);
  const Tensor upstream = as_contiguous(grad), found = as_contiguous(nearest.row);
  STD_TORCH_CHECK(upstream.scalar_type() == ScalarType::Float && upstream.numel() == rows.count,
                  "nearest: grad is not float32 [N]");
  Tensor out = new_float32({rows.count, rows.size});
  const float* of_distance = input<float>(upstream);
  const int64_t* winners = input<int64_t>(found);
  float* to = output<float>(out);
  each_row(rows.count, rows.size, [&](int64_t i) {
    const int64_t j = winners[i];
    double of_generated = of_distance[i] / static_cast<double>(rows.size), of_bank = 0;
    if (rows.metric == Metric::l2) of_generated *= 2, of_bank = -of_generated;
    if (rows.metric == Metric::cosine) {  // d/da (1 - <a,b> / |a||b|) = <a,b> a / |a|^3 |b| - b / |a||b|
      const RowSums s = rows.sums(i, j);
      const double norms = std::sqrt(s.generated_square * s.bank_square);
      of_bank = norms == 0 ? 0 : -of_distance[i] / norms;
      of_generated = norms == 0 ? 0 : -of_bank * (s.dot / s.generated_square);
    }
    float buffer[kChunkElements];
    for (int64_t k = 0; k < rows.size; k += kChunkElements) {
      const int64_t n = std::min(kChunkElements, rows.size - k);
      rows.kernels.gradient(rows.metric, rows.generated_row(i) + k, rows.read(j, k, n, buffer), n, of_generated,
                            of_bank, to + i * rows.size + k);
    }
  });
  return {out};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("nearest_fwd", FASTLOSS_BOX(&fastloss::nearest_fwd));
  m.impl("nearest_bwd", FASTLOSS_BOX(&fastloss::nearest_bwd));
}
