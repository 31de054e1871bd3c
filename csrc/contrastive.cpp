// Softmax contrastive loss of paired rows, in one direction or both. Logits exist one chunk of rows at a time: a
// library's matrix product writes them, one pass turns them into log-sum-exps or into their own gradient.

#include "common.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cmath>
#include <limits>

namespace fastloss {
namespace {

constexpr int64_t kColumns = 1024;          // columns a thread takes at a time,
constexpr int64_t kRows = 64;               // and rows of them: what it reads twice stays in its cache
constexpr int64_t kHeight = 1024;           // rows of a chunk: fewer make a matrix product slower, more no faster
constexpr float kLowest = -3.40282347e38f;  // stands for the maximum of nothing: -inf - -inf is NaN

struct LogSum {
  float most;
  double total;
};
struct Row {
  float grad, positive, loss;
};
struct Columns {
  const float *grad, *positive, *loss;  // grad null: the columns' direction is not asked for
};
struct ContrastiveKernels {
  LogSum (*row)(const float* logits, int64_t n);
  void (*columns)(const float* logits, int64_t stride, int64_t rows, int64_t n, float* most, double* total);
  void (*grad)(float* logits, int64_t n, const Row&, const Columns&);
};

}  // namespace
}  // namespace fastloss

#define FASTLOSS_KERNELS "contrastive_simd.h"
#include "each_isa.h"

namespace fastloss {
namespace {

using torch::stable::narrow;
using torch::stable::transpose;

// body(i) for i in 0 .. count, over torch's threads.
template <typename Body>
void for_each(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i);
  });
}

// out = a b + beta out
void product(Tensor& out, const Tensor& a, const Tensor& b, double beta) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, 1.0));
}

// log(1 + e^x), where x = -inf says that a row has no negatives
double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

// The chunks of the logits query key^T in a workspace of bounded size.
struct Chunks {
  const Tensor query, keys;  // keys: [D, N]
  const int64_t rows, columns, padded, stride, height;
  const Tensor space;

  Chunks(const Tensor& query, const Tensor& key, double workspace_mib)
      : query(query),
        keys(transpose(key, 0, 1)),
        rows(query.size(0)),
        columns(key.size(0)),
        padded((columns + 15) / 16 * 16),
        stride(padded + 16),  // rows of a power of two would fall on the same lines of the cache
        height(height_for(workspace_mib)),
        space(torch::stable::new_empty(query, {height, stride})) {
    const bool fits = query.dim() == 2 && key.dim() == 2 && query.size(1) == key.size(1) && columns >= rows;
    STD_TORCH_CHECK(fits, "contrastive: expected query [M, D] and key [N, D] with N >= M");
    const bool single = query.scalar_type() == ScalarType::Float && key.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(single, "contrastive: expected float32 tensors");
  }

  int64_t height_for(double mib) const {
    const double fit = mib * 1048576 / static_cast<double>(sizeof(float) * stride);
    return std::max<int64_t>(1, std::min({rows, kHeight, static_cast<int64_t>(std::min(fit, 1e9))}));
  }

  float* at(int64_t row) const { return output<float>(space) + row * stride; }

  // body(first row, rows, logits as a tensor) for every chunk
  template <typename Body>
  void each(const Body& body) const {
    for (int64_t begin = 0; begin < rows; begin += height) {
      const int64_t count = std::min(height, rows - begin);
      Tensor all = space, some = narrow(all, 0, 0, count), logits = narrow(some, 1, 0, columns), of = query;
      product(logits, narrow(of, 0, begin, count), keys, 0);
      body(begin, count, logits);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_fwd(const Tensor& query, const Tensor& key, bool symmetric,
                                                           double workspace_mib) {
  const Chunks chunks(query, key, workspace_mib);
  const int64_t rows = chunks.rows, padded = chunks.padded;
  STD_TORCH_CHECK(!symmetric || rows == chunks.columns, "contrastive: symmetric needs as many keys as queries");
  const auto kernels = FASTLOSS_PICK(contrastive_kernels());
  Tensor loss = torch::stable::new_empty(query, {rows}), positive = torch::stable::new_empty(query, {rows});
  Tensor row_loss = torch::stable::new_empty(query, {rows});
  Tensor column_loss = torch::stable::new_empty(query, {symmetric ? rows : 0});
  float *to_loss = output<float>(loss), *to_positive = output<float>(positive), *to_row = output<float>(row_loss);
  std::vector<float> most(symmetric ? padded : 0, kLowest);
  std::vector<double> total(symmetric ? padded : 0, 0.0);
  chunks.each([&](int64_t begin, int64_t count, const Tensor&) {
    for_each(count, [&](int64_t r) {
      float* logits = chunks.at(r);
      const int64_t i = begin + r;
      to_positive[i] = logits[i];
      logits[i] = -std::numeric_limits<float>::infinity();  // what follows is of the negatives alone
      std::fill(logits + chunks.columns, logits + padded, logits[i]);
      const LogSum negatives = kernels.row(logits, padded);
      to_row[i] = static_cast<float>(softplus(negatives.most + std::log(negatives.total) - to_positive[i]));
    });
    if (!symmetric) return;
    for_each((padded + kColumns - 1) / kColumns, [&](int64_t block) {
      const int64_t first = block * kColumns, n = std::min(kColumns, padded - first);
      for (int64_t r = 0; r < count; r += kRows)
        kernels.columns(chunks.at(r) + first, chunks.stride, std::min(kRows, count - r), n, &most[first],
                        &total[first]);
    });
  });
  for (int64_t i = 0; i < rows; ++i) {
    to_loss[i] = to_row[i];
    if (!symmetric) continue;
    float& back = output<float>(column_loss)[i];
    back = static_cast<float>(softplus(most[i] + std::log(total[i]) - to_positive[i]));
    to_loss[i] = 0.5f * (to_row[i] + back);
  }
  return {loss, positive, row_loss, column_loss};
}

std::tuple<Tensor, Tensor> contrastive_bwd(const Tensor& grad, const Tensor& query, const Tensor& key, bool symmetric,
                                           double workspace_mib, const Tensor& positive, const Tensor& row_loss,
                                           const Tensor& column_loss, bool needs_query, bool needs_key) {
  const Chunks chunks(query, key, workspace_mib);
  const auto kernels = FASTLOSS_PICK(contrastive_kernels());
  const int64_t rows = chunks.rows, width = query.size(1);
  STD_TORCH_CHECK(grad.dim() == 1 && grad.size(0) == rows && grad.scalar_type() == ScalarType::Float,
                  "contrastive: grad is not float32 [M]");
  const auto none = [&] { return torch::stable::new_empty(query, {0}); };
  Tensor to_query = needs_query ? torch::stable::new_empty(query, {rows, width}) : none();
  Tensor to_key = needs_key ? torch::stable::new_empty(key, {chunks.columns, width}) : none();
  if (needs_key) torch::stable::zero_(to_key);
  const int64_t length = symmetric ? chunks.padded : rows;
  std::vector<float> share(length), at(symmetric ? length : 0), back(symmetric ? length : 0);
  const Tensor upstream = torch::stable::contiguous(grad);
  const float* row = input<float>(row_loss);
  for (int64_t i = 0; i < rows; ++i) {
    share[i] = input<float>(upstream)[i] * (symmetric ? 0.5f : 1.0f);
    if (!symmetric) continue;
    at[i] = input<float>(positive)[i];
    back[i] = input<float>(column_loss)[i];
  }
  const Columns columns{symmetric ? share.data() : nullptr, at.data(), back.data()};
  chunks.each([&](int64_t begin, int64_t count, const Tensor& logits) {
    for_each(count, [&](int64_t r) {
      const int64_t i = begin + r;
      float* to = chunks.at(r);
      std::fill(to + chunks.columns, to + chunks.padded, 0.0f);
      kernels.grad(to, chunks.padded, {share[i], input<float>(positive)[i], row[i]}, columns);
      // p - 1 = -(1 - e^-loss): all the digits of a positive that has almost all of the probability
      to[i] = share[i] * (std::expm1(-row[i]) + (symmetric ? std::expm1(-back[i]) : 0.0f));
    });
    if (needs_query) {
      Tensor part = narrow(to_query, 0, begin, count);
      product(part, logits, key, 0);
    }
    Tensor of = query, same = logits;
    if (needs_key) product(to_key, transpose(same, 0, 1), narrow(of, 0, begin, count), 1);
  });
  return {to_query, to_key};
}

}  // namespace
}  // namespace fastloss
