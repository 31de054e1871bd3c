// Softmax statistics of each row's own negatives [M, K, D], read once; what the queries' gradient needs of them is
// summed in the same read, and their own gradient costs one more read and one write.

#include "contrastive/softmax_stats_per_query.h"
#include "contrastive/save.h"
#include "core/constants.h"
#include "core/isa.h"
#include "core/op.h"
#include "core/parallel.h"

#include <cmath>
#include <limits>

namespace fastloss {
namespace {

constexpr char kOp[] = "softmax_stats_per_query";
constexpr int64_t kGroup = 8;                 // negatives at a time: what is read twice stays in the L1 cache
constexpr int64_t kPrefetchBytes = 16 << 10;  // at least: rows are short for the CPU's own prefetch
constexpr int64_t kGradLogits = 64;           // negatives whose logits' gradients are made at a time
constexpr int64_t kTasks = 256;               // pieces to cut small batches into, whatever the number of threads,
constexpr int64_t kLeastNegatives = 64;       // and the least negatives of one
constexpr int kMaxPowers = 3;                 // log-sum-exps of one row: log sum e^(power s)
constexpr float kTinySquare = static_cast<float>(kTinyNorm * kTinyNorm);

// One row's query, and the options of the call.
struct QueryRow {
  const float* query;  // whole_vectors(dim) floats, the last ones 0
  int64_t dim;
  float scale, logit_limit;
  bool normalize, moments;
  int powers;
  float power[kMaxPowers];
};
// Statistics over one piece of a row's negatives; sum_exp is relative to max.
struct PieceStats {
  float max = kLowest;
  double sum_exp[kMaxPowers] = {}, sum = 0, count = 0;
};
// A row's statistics and their gradients.
struct UpstreamRow {
  float grad_lse[kMaxPowers], max, lse[kMaxPowers], grad_sum;

  bool is_zero() const { return grad_lse[0] == 0 && grad_lse[1] == 0 && grad_lse[2] == 0 && grad_sum == 0; }
};
// Where the forward writes what it reads of a piece's negatives; null: nowhere.
struct PieceOutput {
  float* weighted_keys;  // one sum of vectors for each power, then with `moments` the unweighted one
  float *logits, *inverse_norms;
};
template <typename T>
struct PerQueryKernels {
  // mask[k]: whether negative k counts, and is read; null: all do
  void (*read)(const T* rows, int64_t stride, const bool* mask, int64_t count, const QueryRow&, PieceStats&,
               const PieceOutput&);
  void (*grad_weights)(const float* logits, const float* inverse_norms, int64_t n, const QueryRow&, const UpstreamRow&,
                       float* query_weight, float* negative_weight);
  void (*grad)(const T* rows, int64_t stride, int64_t count, const QueryRow&, const float* query_weight,
               const float* negative_weight, T* to, bool streamed);
};

}  // namespace
}  // namespace fastloss

#define FASTLOSS_KERNELS "contrastive/per_query_simd.h"
#include "core/for_each_isa.h"

namespace fastloss::softmax_stats_per_query {
namespace {

using torch::stable::new_empty;

// The call's sizes and options, and its negatives with rows that are contiguous in themselves.
struct PerQuery {
  const Tensor query, negatives, mask, scale, logit_limit;
  const Operand query_operand;
  const int64_t rows, count, dim, pieces, piece_length;
  const bool normalize, moments;
  const double hardness;
  const int powers, sums, stats_count;

  explicit PerQuery(const Inputs& x)
      : query(matrix(x.query)),
        negatives(rows_contiguous(x.negatives)),
        mask(x.mask.has_value() ? as_contiguous(*x.mask) : negatives),
        scale(as_contiguous(x.row_scale)),
        logit_limit(x.logit_limit.has_value() ? as_contiguous(*x.logit_limit) : scale),
        query_operand(query, {0, 1}),
        rows(query.size(0)),
        count(negatives.size(1)),
        dim(query.size(1)),
        pieces(std::max<int64_t>(1, std::min((kTasks + rows) / std::max<int64_t>(rows, 1), count / kLeastNegatives))),
        piece_length((count + pieces - 1) / pieces),
        normalize(x.normalize),
        moments(x.moments),
        hardness(x.hardness),
        powers(hardness > 0 ? 3 : 1),
        sums(powers + moments),
        stats_count(2 + 2 * moments + powers - 1),
        has_mask_(x.mask.has_value()),
        has_limit_(x.logit_limit.has_value()) {
    STD_TORCH_CHECK(negatives.size(0) == rows && negatives.size(2) == dim, kOp, ": negatives: expected [", rows,
                    ", K, ", dim, "]");
    STD_TORCH_CHECK(!has_mask_ || (mask.scalar_type() == ScalarType::Bool && mask.numel() == rows * count), kOp,
                    ": mask: expected bool [", rows, ", ", count, "]");
    check_rows("row_scale", scale);
    check_rows("logit_limit", logit_limit);
  }

  template <typename T>
  const T* negative(int64_t row, int64_t k) const {
    return input<T>(negatives) + row * negatives.stride(0) + k * negatives.stride(1);
  }

  const bool* mask_from(int64_t row, int64_t k) const {
    return has_mask_ ? input<bool>(mask) + row * count + k : nullptr;
  }

  // Row i's query as padded floats in `memory`, and the options beside it.
  QueryRow query_row(int64_t i, std::vector<float>& memory) const {
    memory.assign(whole_vectors(dim), 0.0f);
    const float* found = query_operand.read(i * dim, dim, memory.data());
    if (found != memory.data()) std::copy_n(found, dim, memory.data());
    const float row_limit = has_limit_ ? input<float>(logit_limit)[i] : std::numeric_limits<float>::infinity();
    return {memory.data(), dim,    input<float>(scale)[i],        row_limit, normalize,
            moments,       powers, {power(0), power(1), power(2)}};
  }

  // 1, 1 + hardness, hardness
  float power(int a) const { return static_cast<float>((a != 2) + (a != 0) * hardness); }

  // Where the rows' log-sum-exps of power a begin in the statistics, whose order is that of softmax_stats.py.
  int64_t lse_offset(int a) const { return (a == 0 ? 0 : stats_count - 3 + a) * rows; }

  // body(row, piece, first negative, negatives, query) for the pieces that have some, over torch's threads
  template <typename Body>
  void for_each_piece(const Body& body) const {
    const int64_t grain = std::max<int64_t>(1, 2 * kBlockElements / std::max<int64_t>(1, piece_length * dim));
    over_threads(0, rows * pieces, grain, [&](int64_t first, int64_t last) {
      std::vector<float> memory;
      for (int64_t task = first; task < last && going_on(); ++task) {
        const int64_t begin = task % pieces * piece_length;
        if (begin >= count) continue;  // no negatives: there may be no memory either
        body(task / pieces, task % pieces, begin, std::min(piece_length, count - begin),
             query_row(task / pieces, memory));
      }
    });
  }

  // How many rows of D numbers are worth a thread.
  int64_t rows_grain() const { return kBlockElements / std::clamp<int64_t>(dim, 1, kBlockElements); }

  // A row's statistics, and their gradients from `grad`.
  UpstreamRow upstream_row(const float* grad, const float* stats, int64_t i) const {
    UpstreamRow up{{}, stats[rows + i], {}, moments ? grad[2 * rows + i] : 0.0f};
    for (int a = 0; a < powers; ++a) {
      up.grad_lse[a] = grad[lse_offset(a) + i];
      up.lse[a] = stats[lse_offset(a) + i];
    }
    return up;
  }

 private:
  static Tensor matrix(const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 2, kOp, ": query: expected [M, D]");
    return t;
  }
  static Tensor rows_contiguous(const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 3, kOp, ": negatives: expected [M, K, D]");
    return t.size(2) != 1 && t.stride(2) != 1 ? as_contiguous(t) : t;
  }
  void check_rows(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == rows, kOp, ": ", name, ": expected float32 [",
                    rows, "]");
  }

  const bool has_mask_, has_limit_;
};

// Joins one row's pieces, in order: its statistics, and its weighted keys (null where they are not wanted).
void merge_pieces(const PerQuery& call, const PieceStats* parts, const float* part_keys, int64_t row, float* stats,
                  float* weighted_keys) {
  const int64_t stride = whole_vectors(call.dim), rows = call.rows;
  PieceStats all;
  for (int64_t p = 0; p < call.pieces; ++p) {
    all.max = std::max(all.max, parts[p].max);
    all.sum += parts[p].sum;
    all.count += parts[p].count;
  }
  const float infinity = std::numeric_limits<float>::infinity();
  for (int a = 0; a < call.sums; ++a) {
    const bool unweighted = a == call.powers;
    const double power = call.power(a);
    const auto part_weight = [&](int64_t p) {
      return unweighted || parts[p].max == all.max ? 1.0 : std::exp(power * (parts[p].max - all.max));
    };
    double sum_exp = 0;
    for (int64_t p = 0; p < call.pieces && !unweighted; ++p) sum_exp += parts[p].sum_exp[a] * part_weight(p);
    if (!unweighted)
      stats[call.lse_offset(a)] =
          all.max == infinity ? infinity : static_cast<float>((a == 0 ? all.max : 0) + std::log(sum_exp));
    if (!weighted_keys) continue;
    float* sum = weighted_keys + (a * rows + row) * call.dim;
    std::fill_n(sum, call.dim, 0.0f);
    for (int64_t p = 0; p < call.pieces; ++p) {
      const float weight = static_cast<float>(unweighted ? 1.0 : sum_exp == 0 ? 0.0 : part_weight(p) / sum_exp);
      const float* part = part_keys + (p * call.sums + a) * stride;
      for (int64_t d = 0; d < call.dim; ++d) sum[d] += weight * part[d];
    }
  }
  stats[rows] = all.max == kLowest ? -infinity : all.max;
  if (!call.moments) return;
  stats[2 * rows] = static_cast<float>(all.sum);
  stats[3 * rows] = static_cast<float>(all.count);
}

Save saves(const Inputs& x) { return save_of(kOp, x.save, {Save::kNothing, Save::kWeightedKeys, Save::kLogits}); }

// Writes the gradients of queries and their scales (empty: not needed) from the weighted keys of the forward.
void make_query_grads(const PerQuery& call, const float* grad_stats, const Saved& saved, const Needs& needs,
                      Grads& grads) {
  if (!needs.query && !needs.row_scale) return;
  const int64_t rows = call.rows, dim = call.dim;
  const float *stats = input<float>(saved.stats), *weighted_keys = input<float>(saved.weighted_keys);
  for_dtype(call.query.scalar_type(), kOp, [&](auto element) {
    using T = decltype(element);
    T* query_grad = needs.query ? output<T>(grads.query) : nullptr;
    float* scale_grad = needs.row_scale ? output<float>(grads.row_scale) : nullptr;
    over_threads(0, rows, call.rows_grain(), [&](int64_t first, int64_t last) {
      std::vector<float> memory, sum(dim);
      for (int64_t i = first; i < last && going_on(); ++i) {
        const QueryRow q = call.query_row(i, memory);
        const UpstreamRow up = call.upstream_row(grad_stats, stats, i);
        std::fill(sum.begin(), sum.end(), 0.0f);
        const auto keys_of = [&](int a) { return weighted_keys + (a * rows + i) * dim; };
        const auto add = [&](float weight, const float* more) {
          for (int64_t d = 0; d < dim && weight != 0; ++d) sum[d] += weight * more[d];  // a row left out may be NaN
        };
        const bool has_hardness = call.powers == kMaxPowers && (up.grad_lse[1] != 0 || up.grad_lse[2] != 0);
        add(up.grad_lse[0], keys_of(0));
        for (int64_t d = 0; d < dim && has_hardness; ++d) {  // what cancels, before it is multiplied by the hardness
          const float h = up.grad_lse[1] * keys_of(1)[d];
          sum[d] += h + q.power[2] * (h + up.grad_lse[2] * keys_of(2)[d]);
        }
        if (call.moments) add(up.grad_sum, keys_of(call.powers));
        double dot = 0;
        for (int64_t d = 0; d < dim && scale_grad; ++d) dot += q.query[d] * sum[d];
        if (scale_grad) scale_grad[i] = static_cast<float>(dot);
        for (int64_t d = 0; d < dim && query_grad; ++d) query_grad[i * dim + d] = static_cast<T>(q.scale * sum[d]);
      }
    });
  });
}

// Writes the gradients of the negatives from the logits and inverse norms that the forward has saved.
void make_negatives_grad(const PerQuery& call, const float* grad_stats, const Saved& saved, Grads& grads) {
  const int64_t dim = call.dim;
  const float *stats = input<float>(saved.stats), *logits = input<float>(saved.logits);
  const float* inverse_norms = input<float>(saved.inverse_norms);
  for_dtype(call.negatives.scalar_type(), kOp, [&](auto element) {
    using T = decltype(element);
    const auto kernels = FASTLOSS_PICK(per_query_kernels<T>());
    T* to = output<T>(grads.negatives);
    const bool aligned = reinterpret_cast<uintptr_t>(to) % 64 == 0 && dim * sizeof(T) % 64 == 0;
    const int64_t bytes = call.rows * call.count * dim * static_cast<int64_t>(sizeof(T));
    const bool streamed = aligned && bytes >= kStreamedGradientBytes;
    call.for_each_piece([&](int64_t row, int64_t, int64_t begin, int64_t n, const QueryRow& q) {
      const UpstreamRow up = call.upstream_row(grad_stats, stats, row);
      if (up.is_zero()) {
        std::fill_n(to + (row * call.count + begin) * dim, n * dim, static_cast<T>(0.0f));
        return;
      }
      for_pieces(n, kGradLogits, [&](int64_t k, int64_t some) {
        const int64_t entry = row * call.count + begin + k;
        float query_weight[kGradLogits], negative_weight[kGradLogits];
        kernels.grad_weights(logits + entry, inverse_norms + entry, some, q, up, query_weight, negative_weight);
        kernels.grad(call.negative<T>(row, begin + k), call.negatives.stride(1), some, q, query_weight, negative_weight,
                     to + entry * dim, streamed);
      });
    });
  });
}

}  // namespace

Saved softmax_stats_per_query_fwd(const Inputs& x) {
  const Save save = saves(x);
  const PerQuery call(x);
  const int64_t stride = whole_vectors(call.dim), saved_rows = save == Save::kLogits ? call.rows : 0;
  const bool saves_keys = save != Save::kNothing;
  const auto new_empty_float32 = [&](std::vector<int64_t> shape) {
    return new_empty(x.query, shape, ScalarType::Float);
  };
  Saved saved{new_empty_float32({call.stats_count, call.rows}),
              new_empty_float32({saves_keys ? call.sums : 0, call.rows, call.dim}),
              new_empty_float32({saved_rows, call.count}), new_empty_float32({saved_rows, call.count})};
  std::vector<PieceStats> parts(call.rows * call.pieces);
  std::vector<float> part_keys(saves_keys ? call.rows * call.pieces * call.sums * stride : 0);
  float *logits = output<float>(saved.logits), *inverse_norms = output<float>(saved.inverse_norms);
  for_dtype(call.negatives.scalar_type(), kOp, [&](auto element) {
    using T = decltype(element);
    const auto kernels = FASTLOSS_PICK(per_query_kernels<T>());
    call.for_each_piece([&](int64_t row, int64_t piece, int64_t begin, int64_t n, const QueryRow& q) {
      const int64_t task = row * call.pieces + piece, entry = row * call.count + begin;
      const PieceOutput to{saves_keys ? &part_keys[task * call.sums * stride] : nullptr,
                           saved_rows ? logits + entry : nullptr, saved_rows ? inverse_norms + entry : nullptr};
      kernels.read(call.negative<T>(row, begin), call.negatives.stride(1), call.mask_from(row, begin), n, q,
                   parts[task], to);
    });
  });
  float* stats = output<float>(saved.stats);
  float* weighted_keys = saves_keys ? output<float>(saved.weighted_keys) : nullptr;
  for_each(
      call.rows,
      [&](int64_t i) {
        merge_pieces(call, &parts[i * call.pieces], part_keys.data() + i * call.pieces * call.sums * stride, i,
                     stats + i, weighted_keys);
      },
      call.rows_grain());
  return saved;
}

Grads softmax_stats_per_query_bwd(const Tensor& grad, const Inputs& x, const Saved& saved, const Needs& needs) {
  const Save save = saves(x);
  const PerQuery call(x);
  const int64_t rows = call.rows;
  STD_TORCH_CHECK(grad.numel() == call.stats_count * rows && grad.scalar_type() == ScalarType::Float, kOp,
                  ": grad: expected float32 [", call.stats_count, ", ", rows, "]");
  STD_TORCH_CHECK(save == Save::kLogits || (save == Save::kWeightedKeys && !needs.negatives), kOp, ": save: \"", x.save,
                  "\" leaves nothing for this gradient");
  const Tensor grad_stats = as_contiguous(grad);
  Grads grads{new_empty(x.query, {needs.query ? rows : 0, call.dim}),
              new_empty(x.negatives, {needs.negatives ? rows : 0, call.count, call.dim}),
              new_empty(x.query, {needs.row_scale ? rows : 0}, ScalarType::Float)};
  make_query_grads(call, input<float>(grad_stats), saved, needs, grads);
  if (needs.negatives) make_negatives_grad(call, input<float>(grad_stats), saved, grads);
  return grads;
}

}  // namespace fastloss::softmax_stats_per_query

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  using namespace fastloss::softmax_stats_per_query;
  m.impl("softmax_stats_per_query_fwd", FASTLOSS_BOX(&softmax_stats_per_query_fwd));
  m.impl("softmax_stats_per_query_bwd", FASTLOSS_BOX(&softmax_stats_per_query_bwd));
}
