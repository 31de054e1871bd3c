// How attention consistency from queries and keys is cut into tasks, and what a task holds: packed keys, and the rows
// of both maps that are at hand.
#pragma once

#include "attention/attention_qk.h"
#include "core/constants.h"
#include "core/op.h"
#include "core/parallel.h"

#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

namespace fastloss {

constexpr int64_t kStatistics = sizeof(RowStatistics) / sizeof(float);
constexpr int64_t kLeastTasks = 8;       // heads are cut into slices of query rows where there are fewer
constexpr int64_t kGradientTerms = 256;  // of a sum over keys, before it is added to memory

struct QkInputs {
  Tensor q1, k1, q2, k2;
  std::optional<Tensor> mask, key_spans, query_spans;
  std::string metric;
  double scale1, scale2;
  bool causal;
  std::string reduction;
  FASTLOSS_FIELDS(q1, k1, q2, k2, mask, key_spans, query_spans, metric, scale1, scale2, causal, reduction)
};

// Queries [B, H, Q, d] and keys [B, G, K, d] of any strides. G divides H: head h attends to the keys of h / (H / G).
struct QkView {
  Tensor q, k;
  float scale;
  int64_t dim, padded_dim, heads_of_key;
};

inline Tensor new_like(const Tensor& t, int64_t batch, int64_t heads) {
  return torch::stable::new_empty(t, {batch, heads, t.size(2), t.size(3)});
}
inline Tensor reshaped(const Tensor& t, std::array<int64_t, 3> sizes) {
  const std::array<int64_t, 3> strides{sizes[1] * sizes[2], sizes[2], 1};
  AtenTensorHandle to = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 3, sizes.data(), strides.data(), 0, &to));
  return Tensor(to);
}

// Elements first .. first + rows of a matrix of any strides, in float32 times `scale`, zeros in the padding.
inline void read_rows(const Tensor& t, int64_t batch, int64_t head, int64_t first, int64_t rows, float scale,
                      int64_t to_row, float* to) {
  const int64_t dim = t.size(3), step = t.stride(3);
  for_dtype(t.scalar_type(), "attention_qk", [&](auto type) {
    using T = decltype(type);
    const T* from = input<T>(t) + batch * t.stride(0) + head * t.stride(1) + first * t.stride(2);
    for (int64_t r = 0; r < rows; ++r, from += t.stride(2), to += to_row) {
      if (step == 1)
        for (int64_t c = 0; c < dim; ++c) to[c] = static_cast<float>(from[c]) * scale;
      else
        for (int64_t c = 0; c < dim; ++c) to[c] = static_cast<float>(from[c * step]) * scale;
      std::fill(to + dim, to + to_row, 0.0f);
    }
  });
}

struct QkProblem {
  QkView views[2];
  std::optional<Tensor> mask;
  const int32_t* key_spans = nullptr;  // [2, Q]: the first key of each query, and the one after its last
  Divergence divergence;
  bool causal;
  int64_t batch, heads, queries, keys, padded_keys;
  int64_t groups;  // of heads that share their keys with no other, in both views
  int64_t slices;  // into which the rows of a group are cut
  AttentionQkKernels kernels = attention_qk_kernels();

  explicit QkProblem(const QkInputs& x) : mask(x.mask), causal(x.causal) {
    batch = x.q1.size(0), heads = x.q1.size(1), queries = x.q1.size(2), keys = x.k1.size(2);
    padded_keys = blocks_of(keys, kKeyPanel) * kKeyPanel;
    views[0] = view(x.q1, x.k1, x.scale1), views[1] = view(x.q2, x.k2, x.scale2);
    STD_TORCH_CHECK(x.metric == "kl" || x.metric == "sym_kl" || x.metric == "js", "attention_qk: unknown metric ",
                    x.metric);
    divergence = x.metric == "kl" ? Divergence::kl : x.metric == "js" ? Divergence::js : Divergence::sym_kl;
    if (mask)
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 4 && mask->size(0) == batch &&
                          mask->size(1) == heads && mask->size(2) == queries && mask->size(3) == keys,
                      "attention_qk: expected a bool mask [B, H, Q, K]");
    if (x.key_spans) {
      STD_TORCH_CHECK(x.key_spans->scalar_type() == ScalarType::Int && x.key_spans->is_contiguous() &&
                          x.key_spans->numel() == 2 * queries,
                      "attention_qk: expected dense int32 spans [2, Q]");
      key_spans = input<int32_t>(*x.key_spans);
    }
    groups = std::gcd(x.k1.size(1), x.k2.size(1));
    slices = std::min(std::max<int64_t>(1, blocks_of(queries, kQueryRows)),
                      blocks_of(kLeastTasks, std::max<int64_t>(1, batch * groups)));
  }

  int64_t rows() const { return batch * heads * queries; }
  int64_t tasks() const { return rows() == 0 ? 0 : batch * groups * slices; }
  // Of the gradient with respect to a view's keys, from one slice of each group.
  int64_t part_elements(int64_t v) const { return batch * views[v].k.size(1) * padded_keys * views[v].padded_dim; }
  // The first key of a query and the one after its last, as far as they follow from its place.
  std::pair<int64_t, int64_t> keys_of(int64_t query) const {
    if (key_spans) return {std::max(0, key_spans[query]), std::min<int64_t>(keys, key_spans[queries + query])};
    return {0, causal ? std::min(keys, query + 1) : keys};
  }

 private:
  QkView view(const Tensor& q, const Tensor& k, double scale) const {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.size(0) == batch && q.size(1) == heads && q.size(2) == queries &&
                        k.size(0) == batch && k.size(1) > 0 && heads % k.size(1) == 0 && k.size(2) == keys &&
                        k.size(3) == q.size(3),
                    "attention_qk: expected queries [B, H, Q, d] and keys [B, G, K, d], G a divisor of H");
    return {q, k, static_cast<float>(scale), q.size(3), whole_vectors(q.size(3)), heads / k.size(1)};
  }
};

struct QkBlock {
  int64_t head, query, rows;
  int64_t row;           // of all rows [B, H, Q], its first
  int64_t first, width;  // the keys that any of them may have, in whole panels
};

class QkTask {
 public:
  QkTask(const QkProblem& problem, int64_t index, bool backward)
      : p_(problem),
        slice_(index % p_.slices),
        group_(index / p_.slices % p_.groups),
        batch_(index / p_.slices / p_.groups),
        stride_(p_.padded_keys + kLanes) {  // so that rows do not meet in the sets of the caches
    for (int v = 0; v < 2; ++v) {
      const QkView& view = p_.views[v];
      Memory& m = memory_[v];
      m.queries = floats(kQueryRows * view.padded_dim);
      m.panels = floats(p_.padded_keys * view.dim);
      m.logits = floats(kQueryRows * stride_);
      if (!backward) continue;
      m.keys = floats(p_.padded_keys * view.padded_dim);
      m.gradient = floats(kQueryRows * view.padded_dim);
    }
  }

  std::unique_ptr<float[]> row_memory() const { return floats(p_.padded_keys); }
  float* logits(int v, int64_t row) const { return memory_[v].logits.get() + row * stride_; }

  // body(block) with the logits of its rows at hand, for each block of each head.
  template <typename Body>
  void each_block(const Body& body) {
    const int64_t in_group = p_.heads / p_.groups;
    for (int64_t h = group_ * in_group; h < (group_ + 1) * in_group; ++h) {
      for (int v = 0; v < 2; ++v) pack(v, h / p_.views[v].heads_of_key);
      for (int64_t i = slice_ * kQueryRows; i < p_.queries && going_on(); i += p_.slices * kQueryRows) {
        const QkBlock block = block_at(h, i);
        for (int v = 0; v < 2; ++v) make_logits(block, v);
        for (int64_t r = 0; r < block.rows; ++r) leave_out(block, r);
        body(block);
      }
    }
  }

  // Of the keys' gradient the part of this task: zeros.
  void clear_keys(int v, float* parts) const {
    const int64_t in_group = p_.views[v].k.size(1) / p_.groups, of_head = p_.padded_keys * p_.views[v].padded_dim;
    std::fill_n(part(v, group_ * in_group, parts), in_group * of_head, 0.0f);
  }

  // With the logits' gradients in their place: those of the block's queries.
  void write_queries(const QkBlock& block, int v, const Tensor& grad) const {
    const QkView& view = p_.views[v];
    const Memory& m = memory_[v];
    const int64_t padded = view.padded_dim;
    std::fill_n(m.gradient.get(), block.rows * padded, 0.0f);
    for_pieces(block.width, kGradientTerms, [&](int64_t j, int64_t n) {
      p_.kernels.product(m.logits.get() + j, stride_, 1, block.rows, m.keys.get() + (block.first + j) * padded, padded,
                         padded, n, m.gradient.get(), padded, true);
    });
    for_dtype(grad.scalar_type(), "attention_qk", [&](auto type) {
      using T = decltype(type);
      T* to = output<T>(grad) + block.row * view.dim;
      for (int64_t r = 0; r < block.rows; ++r)
        for (int64_t c = 0; c < view.dim; ++c)
          to[r * view.dim + c] = static_cast<T>(m.gradient[r * padded + c] * view.scale);
    });
  }

  // Likewise: what the block adds to those of its keys. The queries at hand are scaled.
  void add_keys(const QkBlock& block, int v, float* parts) const {
    const QkView& view = p_.views[v];
    const int64_t padded = view.padded_dim;
    p_.kernels.product(memory_[v].logits.get(), 1, stride_, block.width, memory_[v].queries.get(), padded, padded,
                       block.rows, part(v, block.head / view.heads_of_key, parts) + block.first * padded, padded, true);
  }

 private:
  struct Memory {
    std::unique_ptr<float[]> queries;   // [rows, padded dim], scaled
    std::unique_ptr<float[]> panels;    // [panels, dim, kKeyPanel]
    std::unique_ptr<float[]> keys;      // [keys, padded dim], for the backward
    std::unique_ptr<float[]> logits;    // [rows, stride], from the block's first key on
    std::unique_ptr<float[]> gradient;  // [rows, padded dim]
    int64_t packed_head = -1;
  };

  static std::unique_ptr<float[]> floats(int64_t n) { return std::make_unique_for_overwrite<float[]>(n); }

  float* part(int v, int64_t key_head, float* parts) const {
    const QkView& view = p_.views[v];
    const int64_t head = (slice_ * p_.batch + batch_) * view.k.size(1) + key_head;
    return parts + head * p_.padded_keys * view.padded_dim;
  }

  QkBlock block_at(int64_t head, int64_t query) const {
    const int64_t rows = std::min(kQueryRows, p_.queries - query);
    int64_t first = p_.keys, end = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const auto [begin, after] = p_.keys_of(query + r);
      if (begin < after) first = std::min(first, begin), end = std::max(end, after);
    }
    if (first >= end) first = end = 0;
    first = first / kKeyPanel * kKeyPanel;
    const int64_t row = (batch_ * p_.heads + head) * p_.queries + query;
    return {head, query, rows, row, first, blocks_of(end - first, kKeyPanel) * kKeyPanel};
  }

  void pack(int v, int64_t key_head) {
    const QkView& view = p_.views[v];
    Memory& m = memory_[v];
    if (m.packed_head == key_head) return;
    m.packed_head = key_head;
    const auto rows = floats(kKeyPanel * view.padded_dim);
    for (int64_t j = 0; j < p_.padded_keys; j += kKeyPanel) {
      const int64_t n = std::min(kKeyPanel, p_.keys - j);
      float* from = m.keys ? m.keys.get() + j * view.padded_dim : rows.get();
      read_rows(view.k, batch_, key_head, j, n, 1, view.padded_dim, from);
      std::fill(from + n * view.padded_dim, from + kKeyPanel * view.padded_dim, 0.0f);
      float* panel = m.panels.get() + j * view.dim;
      for (int64_t c = 0; c < view.dim; ++c)
        for (int64_t r = 0; r < kKeyPanel; ++r) panel[c * kKeyPanel + r] = from[r * view.padded_dim + c];
    }
  }

  void make_logits(const QkBlock& block, int v) const {
    const QkView& view = p_.views[v];
    const Memory& m = memory_[v];
    read_rows(view.q, batch_, block.head, block.query, block.rows, view.scale, view.padded_dim, m.queries.get());
    for (int64_t j = 0; j < block.width; j += kKeyPanel)
      p_.kernels.product(m.queries.get(), view.padded_dim, 1, block.rows, m.panels.get() + (block.first + j) * view.dim,
                         kKeyPanel, kKeyPanel, view.dim, m.logits.get() + j, stride_, false);
  }

  // -inf at the keys that a row does not have.
  void leave_out(const QkBlock& block, int64_t r) const {
    const float none = -std::numeric_limits<float>::infinity();
    auto [begin, end] = p_.keys_of(block.query + r);
    begin = std::clamp<int64_t>(begin - block.first, 0, block.width);
    end = std::clamp<int64_t>(end - block.first, begin, block.width);
    for (int v = 0; v < 2; ++v) {
      std::fill(logits(v, r), logits(v, r) + begin, none);
      std::fill(logits(v, r) + end, logits(v, r) + block.width, none);
    }
    if (!p_.mask) return;
    const Tensor& mask = *p_.mask;
    const int64_t step = mask.stride(3);
    const bool* keep = input<bool>(mask) + batch_ * mask.stride(0) + block.head * mask.stride(1) +
                       (block.query + r) * mask.stride(2) + block.first * step;
    for (int v = 0; v < 2; ++v) {
      float* s = logits(v, r);
      if (step == 1)
        for (int64_t j = begin; j < end; ++j) s[j] = keep[j] ? s[j] : none;
      else
        for (int64_t j = begin; j < end; ++j) s[j] = keep[j * step] ? s[j] : none;
    }
  }

  const QkProblem& p_;
  const int64_t slice_, group_, batch_, stride_;
  Memory memory_[2];
};

}  // namespace fastloss
