// Generated rows and the bank that they are compared with, as the kernels read them, and tiles of their distances.
#pragma once

#include "core/matmul.h"
#include "core/parallel.h"
#include "core/tensors.h"
#include "diversity/bank_tile.h"

#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace fastloss {

inline Metric metric_of(const std::string& name) {
  if (name == "l1") return Metric::l1;
  if (name == "l2") return Metric::l2;
  STD_TORCH_CHECK(name == "cosine", "diversity: unknown metric ", name);
  return Metric::cosine;
}

// 1 / |x| of a row's square, of zeros and of rows too small for it 0.
inline float factor_of(double square) {
  const double factor = square == 0 ? 0 : 1 / std::sqrt(square);
  return factor <= std::numeric_limits<float>::max() ? static_cast<float>(factor) : 0 * static_cast<float>(square);
}

// The generated rows and the bank, as the kernels read them.
struct Rows {
  Tensor generated, bank;
  Metric metric;
  Affine affine;
  int64_t count, bank_count, size;
  BankKernels kernels = bank_kernels();
  bool units = false;           // whether the rows are taken at length 1,
  std::vector<double> lengths;  // and then the generated ones' own

  Rows(const char* op, const Tensor& generated_rows, const Tensor& bank_rows, const std::string& metric_name,
       double scale, double shift)
      : generated(as_contiguous(generated_rows)),
        bank(bank_rows),
        metric(metric_of(metric_name)),
        affine{static_cast<float>(scale), static_cast<float>(shift)} {
    STD_TORCH_CHECK(generated.scalar_type() == ScalarType::Float, op, ": generated is not float32");
    STD_TORCH_CHECK(generated.dim() == 2 && bank.dim() == 2 && generated.size(1) == bank.size(1) && bank.size(0) > 0 &&
                        bank.size(1) > 0,
                    op, ": expected generated [N, P] and a bank [M, P], M and P at least 1");
    count = generated.size(0), bank_count = bank.size(0), size = bank.size(1);
    if (size != 1 && bank.stride(1) != 1) bank = as_contiguous(bank);
    generated_ = input<float>(generated);
    bank_ = bank.const_data_ptr();
    dtype_ = bank.scalar_type();
    stride_ = bank.stride(0);
  }

  const float* generated_row(int64_t i) const { return generated_ + i * size; }
  bool widens() const { return dtype_ != ScalarType::Float || affine.changes(); }

  // From here on the generated rows have length 1, and bank_factor() gives the bank's it. Zeros stay zeros.
  void make_units() {
    const Tensor made = new_float32({count, size});
    float* to = output<float>(made);
    lengths.resize(count);
    each_row(count, size, [&](int64_t i) {
      const float* row = generated_row(i);
      lengths[i] = std::sqrt(kernels.square(row, size));
      const double factor = lengths[i] == 0 ? 0 : 1 / lengths[i];
      for (int64_t k = 0; k < size; ++k) to[i * size + k] = static_cast<float>(row[k] * factor);
    });
    generated = made, generated_ = to, units = true;
  }
  float bank_factor(int64_t j) const {
    double square = 0;
    float buffer[kChunkElements];
    for_pieces(size, kChunkElements, [&](int64_t k, int64_t n) { square += kernels.square(read(j, k, n, buffer), n); });
    return factor_of(square);
  }

  // to = elements begin .. begin + n of bank row j, times `factor`
  void widen(int64_t j, int64_t begin, int64_t n, float* to, float factor = 1) const {
    const int64_t at = j * stride_ + begin;
    const Affine affine{this->affine.weight * factor, this->affine.shift * factor};
    switch (dtype_) {
      case ScalarType::Float: return kernels.widen_float(static_cast<const float*>(bank_) + at, n, affine, to);
      case ScalarType::BFloat16: return kernels.widen_bfloat16(static_cast<const BFloat16*>(bank_) + at, n, affine, to);
      case ScalarType::Half: return kernels.widen_half(static_cast<const Half*>(bank_) + at, n, affine, to);
      case ScalarType::Byte: return kernels.widen_byte(static_cast<const uint8_t*>(bank_) + at, n, affine, to);
      default: STD_TORCH_CHECK(false, "diversity: expected a bank of float32, bfloat16, float16 or uint8");
    }
  }
  // The same in place where the bank is float32 already, else in `buffer`.
  const float* read(int64_t j, int64_t begin, int64_t n, float* buffer) const {
    if (!widens()) return static_cast<const float*>(bank_) + j * stride_ + begin;
    widen(j, begin, n, buffer);
    return buffer;
  }

  RowSums sums(int64_t i, int64_t j) const {
    RowSums sums{};
    float buffer[kChunkElements];
    for (int64_t k = 0; k < size; k += kChunkElements) {
      const int64_t n = std::min(kChunkElements, size - k);
      kernels.add_row(metric, generated_row(i) + k, read(j, k, n, buffer), n, sums);
    }
    return sums;
  }
  // Distance of generated row i and bank row j, as good as rounded.
  float distance(int64_t i, int64_t j) const {
    const RowSums s = sums(i, j);
    if (metric != Metric::cosine) return static_cast<float>(s.difference / static_cast<double>(size));
    if (s.generated_square == 0 || s.bank_square == 0) return s.dot == 0 ? 1.0f : std::nanf("");
    const double d = 1 - s.dot / std::sqrt(s.generated_square * s.bank_square);
    return d < 0 ? 0.0f : static_cast<float>(d);
  }

 private:
  const float* generated_;
  const void* bank_;
  ScalarType dtype_;
  int64_t stride_;
};

// Whether torch rounds the factors of float32 products first, as torch.set_float32_matmul_precision("medium") lets it.
inline bool products_are_rounded() {
  constexpr int64_t n = 32;  // small ones it leaves as they are
  const Tensor a = new_float32({n, n}), b = new_float32({n, n});
  std::fill_n(output<float>(a), n * n, 1 + 0x1p-12f);
  std::fill_n(output<float>(b), n * n, 0.0f);
  for (int64_t i = 0; i < n; ++i) output<float>(b)[i * n] = 1;
  const Tensor product = blas_product(a, b, std::nullopt);
  return input<float>(product)[0] != 1 + 0x1p-12f;
}

// kBankRows rows of the bank in float32, kBankColumns of their elements at a time, zeros behind the last and in the
// place of rows that there are not.
struct BankTile {
  const Rows& rows;
  int64_t first, count;      // its rows of the bank
  float factors[kBankRows];  // by which they are multiplied
  alignas(64) float elements[kBankRows * kBankColumns] = {};

  BankTile(const Rows& rows, int64_t first, int64_t count) : rows(rows), first(first), count(count) {
    for (int64_t r = 0; r < count; ++r) factors[r] = rows.units ? rows.bank_factor(first + r) : 1;
  }
  void read(int64_t k, int64_t width) {
    for (int64_t r = 0; r < count; ++r) {
      float* to = elements + r * kBankColumns;
      rows.widen(first + r, k, width, to, factors[r]);
      std::fill(to + width, to + std::min(kBankColumns, width + kMaxLanes), 0.0f);
    }
  }
};

// to[i * stride + j] = distance of generated row row + i from bank row first + j, by differences: l1, l2, or of unit
// rows cosine, which is half the square of their difference. Nothing is lost where rows are nearly equal.
inline void tile_distances(const Rows& rows, int64_t row, int64_t count, int64_t first, int64_t n, float* to,
                           int64_t stride) {
  const auto add = rows.metric == Metric::l1 ? rows.kernels.add_l1 : rows.kernels.add_l2;
  const float mean = rows.units ? 0.5f : 1 / static_cast<float>(rows.size);
  const int64_t lanes = rows.kernels.lanes;
  for_each(blocks_of(n, kBankRows), [&](int64_t group) {
    BankTile tile(rows, first + group * kBankRows, std::min(kBankRows, n - group * kBankRows));
    alignas(64) float sums[kGeneratedRows * kBankRows * kMaxLanes];
    for_pieces(count, kGeneratedRows, [&](int64_t g, int64_t some) {
      std::fill_n(sums, some * kBankRows * lanes, 0.0f);
      for_pieces(rows.size, kBankColumns, [&](int64_t k, int64_t width) {
        tile.read(k, width);
        add(rows.generated_row(row + g) + k, rows.size, some, tile.elements, width, sums);
      });
      for (int64_t i = 0; i < some; ++i)
        for (int64_t r = 0; r < tile.count; ++r) {
          const bool known = !rows.units || (tile.factors[r] != 0 && rows.lengths[row + g + i] != 0);
          const float sum = rows.kernels.sum_vector(sums + (i * kBankRows + r) * lanes);
          to[(g + i) * stride + group * kBankRows + r] = known ? sum * mean : 1 + 0 * sum;
        }
    });
  });
}

// Adds to the gradient of each generated row the bank rows' signs (l1) or differences, a - b, of a tile, weighted with
// weights[i * stride + j]; without weights each counts once. Rows of weight 0 are passed by.
inline void add_gradients(const Rows& rows, int64_t row, int64_t some, int64_t first, int64_t n, const float* weights,
                          int64_t stride, float* gradient) {
  constexpr int64_t kGradientRows = 32;  // of which kBankColumns elements of the gradient are summed at a time
  const auto add = rows.metric == Metric::l1 ? rows.kernels.add_signs : rows.kernels.add_differences;
  const int64_t columns = blocks_of(rows.size, kBankColumns);
  for_each(blocks_of(some, kGradientRows) * columns, [&](int64_t task) {
    const int64_t g = task / columns * kGradientRows, end = std::min(some, g + kGradientRows);
    const int64_t k = task % columns * kBankColumns, width = std::min(kBankColumns, rows.size - k);
    alignas(64) float sums[kGradientRows * kBankColumns];
    std::fill_n(sums, (end - g) * kBankColumns, 0.0f);
    for_pieces(n, kBankRows, [&](int64_t b, int64_t bank_rows) {
      std::optional<BankTile> tile;
      for (int64_t i = g; i < end; ++i) {
        float of_rows[kBankRows] = {};
        bool any = false;
        for (int64_t r = 0; r < bank_rows; ++r) any |= (of_rows[r] = weights ? weights[i * stride + b + r] : 1.0f) != 0;
        if (!any) continue;
        if (!tile) tile.emplace(rows, first + b, bank_rows).read(k, width);
        add(rows.generated_row(row + i) + k, tile->elements, of_rows, width, sums + (i - g) * kBankColumns);
      }
    });
    for (int64_t i = g; i < end; ++i) {
      float* to = gradient + (row + i) * rows.size + k;
      const float* sum = sums + (i - g) * kBankColumns;
      for (int64_t j = 0; j < width; ++j) to[j] += sum[j];
    }
  });
}

}  // namespace fastloss
