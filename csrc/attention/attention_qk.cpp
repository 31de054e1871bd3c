// Attention consistency from queries and keys, as fastloss/attention/attention_qk.py defines it. kQueryRows rows of
// both maps at a time are made as products, compared, and in the backward turned into their gradients, which two more
// products take to the queries and keys: no map is ever whole in memory.

#include "attention/attention_qk_task.h"
#include "core/isa.h"
#include "core/op.h"

#include <cmath>
#include <limits>

#define FASTLOSS_KERNELS "attention/attention_qk_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {

AttentionQkKernels attention_qk_kernels() { return FASTLOSS_PICK(attention_qk_kernels()); }

namespace {

struct Saved {
  Tensor statistics, counted;
  FASTLOSS_FIELDS(statistics, counted)
};
struct Needs {
  bool q1, k1, q2, k2;
  FASTLOSS_FIELDS(q1, k1, q2, k2)
};
struct Grads {
  Tensor q1, k1, q2, k2;
  FASTLOSS_FIELDS(q1, k1, q2, k2)
};

std::tuple<Tensor, Saved> attention_qk_fwd(const QkInputs& x) {
  const QkProblem problem(x);
  const int64_t rows = problem.rows();
  const Tensor statistics = new_float32({rows, kStatistics}), values = new_float32(rows), count = new_float32();
  float* value = output<float>(values);
  auto* of_row = reinterpret_cast<RowStatistics*>(output<float>(statistics));
  for_each(problem.tasks(), [&](int64_t index) {
    QkTask task(problem, index, false);
    const auto e1 = task.row_memory(), e2 = task.row_memory();
    task.each_block([&](const QkBlock& block) {
      for (int64_t r = 0; r < block.rows; ++r)
        value[block.row + r] = problem.kernels.forward(problem.divergence, task.logits(0, r), task.logits(1, r),
                                                       block.width, e1.get(), e2.get(), of_row[block.row + r]);
    });
  });
  double sum = 0;
  int64_t counted = 0;
  for (int64_t r = 0; r < rows; ++r) {
    sum += value[r];
    counted += of_row[r].max1 != std::numeric_limits<float>::infinity() || std::isnan(value[r]);
  }
  *output<float>(count) = static_cast<float>(counted);
  if (x.reduction == "none") return {reshaped(values, {x.q1.size(0), x.q1.size(1), x.q1.size(2)}), {statistics, count}};
  const Tensor out = new_float32();
  *output<float>(out) = static_cast<float>(x.reduction == "mean" ? sum / std::max<int64_t>(counted, 1) : sum);
  return {out, {statistics, count}};
}

// The gradient with respect to the keys of one view: a sum over the tasks that share them, in a fixed order.
Tensor sum_of_parts(const QkProblem& problem, const Tensor& keys, const Tensor& parts, int64_t view) {
  Tensor out = new_like(keys, keys.size(0), keys.size(1));
  const int64_t dim = keys.size(3), padded = whole_vectors(dim), of_slice = problem.part_elements(view);
  const float* from = input<float>(parts);
  for_dtype(keys.scalar_type(), "attention_qk", [&](auto type) {
    using T = decltype(type);
    T* to = output<T>(out);
    for_each(keys.size(0) * keys.size(1), [&](int64_t head) {
      for (int64_t j = 0; j < problem.keys; ++j)
        for (int64_t c = 0; c < dim; ++c) {
          const float* at = from + (head * problem.padded_keys + j) * padded + c;
          float total = 0;
          for (int64_t s = 0; s < problem.slices; ++s) total += at[s * of_slice];
          to[(head * problem.keys + j) * dim + c] = static_cast<T>(total);
        }
    });
  });
  return out;
}

Grads attention_qk_bwd(const Tensor& grad, const QkInputs& x, const Saved& saved, const Needs& needs) {
  const QkProblem problem(x);
  const Tensor upstream = as_contiguous(grad);
  const float* weights = input<float>(upstream);
  const auto* of_row = reinterpret_cast<const RowStatistics*>(input<float>(saved.statistics));
  const float count = *input<float>(saved.counted);
  const float share = x.reduction == "mean" && count > 0 ? 1 / count : 1;
  const int64_t step = x.reduction == "none" ? 1 : 0;
  const bool needs_q[] = {needs.q1, needs.q2}, needs_k[] = {needs.k1, needs.k2};
  std::optional<Tensor> of_queries[2], of_keys[2];
  for (int v = 0; v < 2; ++v) {
    const QkView& view = problem.views[v];
    if (needs_q[v]) of_queries[v] = new_like(view.q, view.q.size(0), view.q.size(1));
    if (!needs_k[v]) continue;
    const int64_t elements = problem.slices * problem.part_elements(v);
    of_keys[v] = new_float32(elements);
    if (problem.tasks() == 0) std::fill_n(output<float>(*of_keys[v]), elements, 0.0f);
  }
  for_each(problem.tasks(), [&](int64_t index) {
    QkTask task(problem, index, true);
    for (int v = 0; v < 2; ++v)
      if (of_keys[v]) task.clear_keys(v, output<float>(*of_keys[v]));
    task.each_block([&](const QkBlock& block) {
      for (int64_t r = 0; r < block.rows; ++r)
        problem.kernels.backward(problem.divergence, task.logits(0, r), task.logits(1, r), block.width,
                                 of_row[block.row + r], weights[(block.row + r) * step] * share);
      for (int v = 0; v < 2; ++v) {
        if (of_queries[v]) task.write_queries(block, v, *of_queries[v]);
        if (of_keys[v]) task.add_keys(block, v, output<float>(*of_keys[v]));
      }
    });
  });
  Tensor grads[4];
  for (int v = 0; v < 2; ++v) {
    const QkView& view = problem.views[v];
    grads[2 * v] = of_queries[v] ? *of_queries[v] : torch::stable::new_empty(view.q, {0});
    grads[2 * v + 1] =
        of_keys[v] ? sum_of_parts(problem, view.k, *of_keys[v], v) : torch::stable::new_empty(view.k, {0});
  }
  return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("attention_qk_fwd", FASTLOSS_BOX(&fastloss::attention_qk_fwd));
  m.impl("attention_qk_bwd", FASTLOSS_BOX(&fastloss::attention_qk_bwd));
}
