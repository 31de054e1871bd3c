// The matrix of logits s_ij of a contrastive loss: its operands, which of its entries count, and the functions that
// compute with a row of a tile of it. It is never stored whole: raw products <query_i, key_j> come a block at a time.
#pragma once

#include "core/constants.h"
#include "core/matmul.h"
#include "core/op.h"
#include "core/parallel.h"
#include "core/tensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fastloss {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kTileColumns = 1024;  // a tile of logits is read twice: it stays in a thread's cache
constexpr int64_t kTileRows = 32;
constexpr int64_t kPairWord = 32;               // columns of a word of listed pairs, see pairs.py
constexpr int64_t kSelfSimilarityBlock = 1024;  // rows and columns of a block at most with `self_similarity`

// What the matrix is like, field by field as Form in options.py.
struct Form {
  bool diagonal = false;         // row i's positive is column i, which is no negative of it
  bool symmetric = false;        // the columns' statistics too: a second direction
  bool self_similarity = false;  // query and key are the same rows: entries above the diagonal stand for those below
  bool moments = false;          // sum and number of the negatives' logits
  bool bfloat16 = false;         // products may be made in it
  bool are_negatives = false;    // of listed pairs: they alone are negatives; else they alone are none
  FASTLOSS_FIELDS(diagonal, symmetric, self_similarity, moments, bfloat16, are_negatives)
};

// What makes logits of the raw products of one row, and what of a stretch of columns.
struct RowOperands {
  float scale, logit_limit;
  int64_t id;
};
struct ColumnOperands {
  const float *scale, *bias;
  const int64_t* ids;        // null: none
  const float* logit_limit;  // null: the row's limit holds
};
struct SumAndCount {
  double sum, count;
};
struct SquareAndDot {
  double square, dot;
};
// With hardness beta, of a row or of columns: the maximum, and the log-sum-exps of (1 + beta) (s - max) and
// beta (s - max); and their gradients.
template <typename T>
struct HardnessStats {
  T max, lse_1p_beta, lse_beta;
};
template <typename T>
struct HardnessGrads {
  T lse_1p_beta, lse_beta;
};
template <typename T>
using Combine = void (*)(const float* v, float v_weight, const float* x, float x_weight, int64_t n, T* to);
struct ContrastiveKernels {
  void (*logits)(const float* raw, int64_t n, const RowOperands&, const ColumnOperands&, float* to);
  float (*max)(const float* s, int64_t n, float* column_max);
  double (*sum_exp)(const float* s, int64_t n, float power, float max);
  void (*add_column_exps)(const float* s, int64_t n, float power, const float* max, float* sum_exp);
  SumAndCount (*moments)(const float* s, int64_t n, float* column_sum, float* column_count);
  void (*merge_sum_exps)(int64_t n, float power, const float* max_before, const float* max_now, const float* part_max,
                         const float* part, double* sum_exp);
  void (*raise_max)(int64_t n, const float* part_max, float* max);
  void (*grad_both)(const float* s, int64_t n, float exponent, float row_grad, const float* column_grad, float* g);
  void (*grad_row)(const float* s, int64_t n, float lse, float grad_lse, float* g);
  void (*grad_columns)(const float* s, int64_t n, const float* lse, const float* grad_lse, float* g);
  void (*grad_hardness_row)(const float* s, int64_t n, float hardness, const HardnessStats<float>&,
                            const HardnessGrads<float>&, float* g);
  void (*grad_hardness_columns)(const float* s, int64_t n, float hardness, const HardnessStats<const float*>&,
                                const HardnessGrads<const float*>&, float* g);
  void (*grad_sum)(const float* s, int64_t n, float row_grad, const float* column_grad, float* g);
  double (*grad_raw)(const float* raw, const float* g, int64_t n, float row_scale, const float* column_scale,
                     float* scale_grad, float* bias_grad, float* to);
  double (*weights)(const float* s, int64_t n, float power, float max, const float* column_scale, float* to);
  void (*weights_of_sum)(const float* s, int64_t n, const float* column_scale, float* to);
  SquareAndDot (*square_and_dot)(const float* a, const float* b, int64_t n);
  Combine<float> combine;
  Combine<BFloat16> combine_bfloat16;
  Combine<Half> combine_half;
};

ContrastiveKernels contrastive_kernels();  // of the CPU at hand

// How many tiles of a block are worth a thread.
inline int64_t tiles_grain(int64_t rows, int64_t columns) {
  const int64_t elements = std::min(rows, kTileRows) * std::min(columns, kTileColumns);
  return std::max<int64_t>(1, kBlockElements / std::max<int64_t>(elements, 1));
}

inline bool are_bfloat16(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == ScalarType::BFloat16 && b.scalar_type() == ScalarType::BFloat16;
}

// A matrix in float32, contiguous: itself, or a copy.
inline Tensor to_float32(const Tensor& t) {
  const Tensor from = as_contiguous(t);
  if (from.scalar_type() == ScalarType::Float) return from;
  const Tensor to = new_float32({from.size(0), from.size(1)});
  const auto kernels = matmul_kernels();
  for_blocks(from.numel(), [&](int64_t begin, int64_t end) {
    float* target = output<float>(to) + begin;
    if (from.scalar_type() == ScalarType::Half)
      kernels.widen_half(input<Half>(from) + begin, end - begin, target);
    else
      kernels.widen_bfloat16(input<BFloat16>(from) + begin, end - begin, target);
  });
  return to;
}

// The op's operands, those of columns padded to whole vectors, and what is computed of them.
struct LogitMatrix {
  const char* const op;                             // the name that errors bear
  Tensor query, key;                                // float32, contiguous
  Tensor query_factor, key_factor;                  // the factors of products: the same, or bfloat16
  std::vector<Tensor> query_pieces, key_pieces;     // kTerms columns each: of `current_rows` of query, of all of key
  std::pair<int64_t, int64_t> current_rows{-1, 0};  // the first, and how many
  int64_t rows, columns, dim, padded_columns;
  bool diagonal, moments, self_similarity, symmetric, two_limits = false;
  bool each_key_once = false;  // no key is needed for a second product: their pieces are not kept in key_pieces
  // There is one log-sum-exp, log sum e^(power s), for each power: for 1 and, with hardness, for 1 + hardness and for
  // hardness. The last two are of s - max.
  std::vector<float> powers{1.0f};
  std::vector<float> row_scale, column_scale, bias, logit_limit, column_limit;
  std::vector<int64_t> targets, row_ids, column_ids;  // targets: -1 where there is none
  OptionalTensor pair_spans, pair_words;              // listed pairs, as in pairs.py
  const int64_t* all_spans = nullptr;                 // their elements, null: none; asking a tensor for them takes long
  const std::array<int32_t, 2>* all_words = nullptr;
  const bool pairs_are_negatives;  // those that are listed; else the others

  // `query_name`, `key_name`: what the op's arguments are called.
  LogitMatrix(const char* op, const Tensor& q, const Tensor& k, const Form& form, double hardness = 0,
              const char* query_name = "query", const char* key_name = "key")
      : op(op),
        query(float_matrix(query_name, q)),
        key(float_matrix(key_name, k)),
        query_factor(query),
        key_factor(key),
        rows(q.size(0)),
        columns(k.size(0)),
        dim(q.size(1)),
        padded_columns(whole_vectors(columns)),
        diagonal(form.diagonal),
        moments(form.moments),
        self_similarity(form.self_similarity),
        symmetric(form.symmetric || form.self_similarity),
        pairs_are_negatives(form.are_negatives) {
    STD_TORCH_CHECK(k.size(1) == dim, op, ": ", key_name, ": expected [N, ", dim, "] as ", query_name, " is [M, ", dim,
                    "], got [N, ", k.size(1), "]");
    STD_TORCH_CHECK(!symmetric || rows == columns, op, ": ", key_name, ": expected as many rows as ", query_name,
                    " has");
    if (form.bfloat16 && has_bf16_products()) {
      const auto rounded = [](const Tensor& t, const Tensor& in_float32) {
        return t.scalar_type() == ScalarType::BFloat16 ? as_contiguous(t)
                                                       : torch::stable::to(in_float32, ScalarType::BFloat16);
      };
      query_factor = rounded(q, query);
      key_factor = rounded(k, key);
    }
    if (hardness > 0) powers = {1.0f, static_cast<float>(1 + hardness), static_cast<float>(hardness)};
    bias.assign(padded_columns, 0.0f);
    logit_limit.assign(rows, std::numeric_limits<float>::infinity());
    targets.assign(rows, -1);
    row_ids.assign(rows, 0);
  }

  // An operand of `size` numbers as a vector of `padded_size`; what is missing, or after its end, is `filling`.
  template <typename T>
  std::vector<T> operand(const char* name, const OptionalTensor& values, int64_t size, int64_t padded_size,
                         T filling) const {
    std::vector<T> to(padded_size, filling);
    if (!values.has_value()) return to;
    constexpr bool is_float = std::is_same_v<T, float>;
    STD_TORCH_CHECK(values->scalar_type() == (is_float ? ScalarType::Float : ScalarType::Long), op, ": ", name,
                    ": expected ", is_float ? "float32" : "int64");
    STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == size, op, ": ", name, ": expected shape [", size, "]");
    const Tensor from = as_contiguous(*values);
    std::copy_n(input<T>(from), size, to.begin());
    return to;
  }
  template <typename T>
  std::vector<T> row_operand(const char* name, const OptionalTensor& values, T filling) const {
    return operand(name, values, rows, rows, filling);
  }
  template <typename T>
  std::vector<T> column_operand(const char* name, const OptionalTensor& values, T filling) const {
    return operand(name, values, columns, padded_columns, filling);
  }

  void set_scales(const Tensor& of_rows, const OptionalTensor& of_columns, const OptionalTensor& column_bias) {
    row_scale = row_operand("row_scale", of_rows, 0.0f);
    column_scale = column_operand("column_scale", of_columns, 1.0f);
    if (column_bias.has_value()) bias = column_operand("bias", column_bias, 0.0f);
  }
  void set_targets(const OptionalTensor& of_rows) {
    if (of_rows.has_value()) targets = row_operand<int64_t>("targets", of_rows, -1);
  }
  // Pairs of equal ids are left out.
  void set_ids(const OptionalTensor& of_rows, const OptionalTensor& of_columns) {
    if (!of_rows.has_value() || !of_columns.has_value()) return;
    row_ids = row_operand<int64_t>("row_ids", of_rows, 0);
    column_ids = column_operand<int64_t>("column_ids", of_columns, 0);
  }
  // Logits above a row's limit are left out; of the transposed matrix those above the column's.
  void set_logit_limit(const OptionalTensor& of_rows) {
    if (!of_rows.has_value()) return;
    const float none = std::numeric_limits<float>::infinity();
    logit_limit = row_operand("logit_limit", of_rows, none);
    two_limits = symmetric;
    if (symmetric) column_limit = column_operand("logit_limit", of_rows, none);
  }

  // Pairs that are left out, or are the only ones that are not.
  void set_pairs(const OptionalTensor& spans, const OptionalTensor& words) {
    if (!spans.has_value() || !words.has_value()) return;
    STD_TORCH_CHECK(!self_similarity, op, ": pair_spans: half of the pairs are made, of which a list may have others");
    STD_TORCH_CHECK(
        spans->scalar_type() == ScalarType::Long && spans->dim() == 2 && spans->size(0) == rows && spans->size(1) == 2,
        op, ": pair_spans: expected int64 [", rows, ", 2]");
    STD_TORCH_CHECK(words->scalar_type() == ScalarType::Int && words->dim() == 2 && words->size(1) == 2, op,
                    ": pair_words: expected int32 [P, 2]");
    pair_spans = as_contiguous(*spans);
    pair_words = as_contiguous(*words);
    all_spans = input<int64_t>(*pair_spans);
    all_words = reinterpret_cast<const std::array<int32_t, 2>*>(input<int32_t>(*pair_words));
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t* span = all_spans + 2 * i;
      STD_TORCH_CHECK(0 <= span[0] && span[0] <= span[1] && span[1] <= words->size(0), op,
                      ": pair_spans: expected parts of the words");
    }
  }

  // Calls body(j) with each column of first .. first + n that is listed with row i, in order.
  template <typename Body>
  void each_listed(int64_t i, int64_t first, int64_t n, const Body& body) const {
    const int64_t* span = all_spans + 2 * i;
    const auto* end = all_words + span[1];
    const auto* word = std::lower_bound(all_words + span[0], end, first / kPairWord,
                                        [](const auto& w, int64_t number) { return w[0] < number; });
    for (; word < end && (*word)[0] * kPairWord < first + n; ++word)
      for (uint32_t bits = static_cast<uint32_t>((*word)[1]); bits != 0; bits &= bits - 1) {
        const int64_t j = (*word)[0] * kPairWord + std::countr_zero(bits);
        if (j >= first && j < first + n) body(j);
      }
  }

  // Logits of row i, columns first .. first + n; what is no negative becomes -inf. `transposed` makes a difference
  // with two limits only.
  void logits(const ContrastiveKernels& kernels, const float* raw, int64_t i, int64_t first, int64_t n, bool transposed,
              float* to) const {
    const RowOperands row{row_scale[i], logit_limit[i], row_ids[i]};
    const ColumnOperands of_columns{&column_scale[first], &bias[first],
                                    column_ids.empty() ? nullptr : &column_ids[first],
                                    transposed && two_limits ? &column_limit[first] : nullptr};
    kernels.logits(raw, n, row, of_columns, to);
    const auto leave_out = [&](int64_t j) {
      if (j >= first && j < first + n) to[j - first] = -std::numeric_limits<float>::infinity();
    };
    if (diagonal) leave_out(i);
    if (self_similarity)
      std::fill_n(to, std::clamp<int64_t>(i + 1 - first, 0, n), -std::numeric_limits<float>::infinity());
    leave_out(targets[i]);
    if (all_spans) leave_out_pairs(i, first, n, to);
  }

  // The raw products of m rows from `begin` on and n columns from `first` on.
  Tensor products(int64_t begin, int64_t m, int64_t first, int64_t n) {
    if (in_bfloat16()) return product(slice(query_factor, 0, begin, m), slice(key_factor, 0, first, n));
    if (is_small(m, n, dim)) return blas_product(slice(query, 0, begin, m), slice(key, 0, first, n), std::nullopt);
    const auto cut = [&](const Tensor& x, std::vector<Tensor>& pieces) {
      pieces.clear();
      for_pieces(dim, kTerms, [&](int64_t k, int64_t terms) { pieces.push_back(dense(slice(x, 1, k, terms))); });
    };
    if (current_rows != std::pair(begin, m)) cut(slice(query, 0, begin, m), query_pieces);
    current_rows = {begin, m};
    if (!each_key_once && key_pieces.empty()) cut(key, key_pieces);
    std::optional<Tensor> sum;
    for_pieces(dim, kTerms, [&](int64_t k, int64_t terms) {
      const size_t piece = static_cast<size_t>(k / kTerms);
      const Tensor keys =
          each_key_once ? dense(slice(slice(key, 0, first, n), 1, k, terms)) : slice(key_pieces[piece], 0, first, n);
      sum = product(query_pieces[piece], keys, sum);
    });
    return *sum;
  }

  // Whether the factors of products, the gradient of the raw products too, are rounded to bfloat16.
  bool in_bfloat16() const { return query_factor.scalar_type() == ScalarType::BFloat16; }
  bool has_hardness() const { return powers.size() > 1; }
  float hardness() const { return powers[2]; }
  bool empty() const { return rows == 0 || columns == 0; }
  int64_t directions() const { return symmetric && !self_similarity ? 2 : 1; }
  // With `self_similarity`: whether no entry of rows from `begin` on and columns before `end` is above the diagonal.
  bool is_below_diagonal(int64_t begin, int64_t end) const { return self_similarity && end <= begin; }
  // Of n columns from `first` on, how many (whole vectors) have no entry above the diagonal in rows from `begin` on.
  int64_t columns_below_diagonal(int64_t begin, int64_t first, int64_t n) const {
    return self_similarity ? std::clamp<int64_t>((begin + 1 - first) / kLanes * kLanes, 0, n) : 0;
  }
  // Statistics of one row and direction, in the order of softmax_stats.py.
  int64_t stats_count() const { return 2 + 2 * moments + 2 * has_hardness(); }
  // Those with a gradient, each of which has weighted keys: the log-sum-exps, then the sum.
  int64_t sums_count() const { return static_cast<int64_t>(powers.size()) + moments; }
  // Which statistic is the log-sum-exp of powers[a].
  int64_t lse_index(size_t a) const { return a == 0 ? 0 : stats_count() - 3 + static_cast<int64_t>(a); }

 private:
  void leave_out_pairs(int64_t i, int64_t first, int64_t n, float* to) const {
    constexpr float none = -std::numeric_limits<float>::infinity();
    if (!pairs_are_negatives) return each_listed(i, first, n, [&](int64_t j) { to[j - first] = none; });
    int64_t next = first;  // what lies between two negatives is none
    each_listed(i, first, n, [&](int64_t j) {
      std::fill(to + (next - first), to + (j - first), none);
      next = j + 1;
    });
    std::fill(to + (next - first), to + n, none);
  }
  Tensor float_matrix(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.dim() == 2, op, ": ", name, ": expected a matrix");
    const ScalarType dtype = t.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": ",
                    name, ": expected float32, bfloat16 or float16");
    return to_float32(t);
  }
};

struct BlockSize {
  int64_t rows, columns;
};

// The size of a block of as many float32 logits as fit in `mib`, one row of a tile at least; columns are whole tiles.
inline BlockSize block_size(const LogitMatrix& p, double mib, int64_t max_columns) {
  const int64_t elements = static_cast<int64_t>(std::min(mib, 1e6) * kMiB) / 4;
  int64_t max_rows = p.rows;
  if (p.self_similarity) {
    max_columns = std::min(max_columns, kSelfSimilarityBlock);
    max_rows = std::min(max_rows, kSelfSimilarityBlock);
  }
  const int64_t fit = std::max(elements / kTileColumns, int64_t{1}) * kTileColumns;
  const int64_t columns = std::min({max_columns, fit, p.columns});
  const int64_t rows = std::clamp<int64_t>(elements / std::max<int64_t>(columns, 1), 1, std::max<int64_t>(max_rows, 1));
  return {rows > kTileRows ? rows / kTileRows * kTileRows : rows, columns};
}

}  // namespace fastloss
