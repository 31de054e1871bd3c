// Softmax statistics of each row's own negatives [M, K, D], read once; what the queries' gradient needs of them is
// summed in the same read, and their own gradient costs one more read and one write.

#include "contrastive/softmax_stats_per_query.h"
#include "core/isa.h"
#include "core/op.h"
#include "core/parallel.h"

#include <cmath>
#include <limits>

namespace fastloss {
namespace {

constexpr int64_t kGroup = 8;               // negatives at a time: what is read twice stays in the L1 cache
constexpr int64_t kAhead = 16 << 10;        // bytes at least to fetch ahead: rows are short for the CPU's own prefetch
constexpr int64_t kLanes = 16;              // floats of the widest vector
constexpr int64_t kSlopes = 64;             // negatives whose slopes are made at a time
constexpr int64_t kTasks = 256;             // pieces to cut small batches into, whatever the number of threads,
constexpr int64_t kPiece = 64;              // and the least negatives of one
constexpr float kLowest = -3.40282347e38f;  // stands for the maximum of nothing: -inf - -inf is NaN
constexpr float kTinySquare = 1e-24f;       // of the length that counts as zero

constexpr int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

struct EachQuery {
  const float* query;  // padded(width) floats, the last ones 0
  int64_t width;
  float scale, ceiling;
  bool normalize, moments;
  int powers;
  float power[3];  // log sum exp(power s)
};
struct EachPart {
  float most = kLowest;
  double total[3] = {}, sum = 0, count = 0;
};
struct EachSlope {
  float mass[3], most, lse[3], sum;  // upstream gradients of the log-sum-exps and of the sum; the largest logit
};
template <typename T>
struct EachKernels {
  void (*read)(const T* rows, int64_t stride, int64_t count, const EachQuery&, EachPart&, float* pulls, float* logits,
               float* inverse);
  void (*slopes)(const float* logits, const float* inverse, int64_t n, const EachQuery&, const EachSlope&, float* along,
                 float* back);
  void (*grad)(const T* rows, int64_t stride, int64_t count, const EachQuery&, const float* along, const float* back,
               T* to, bool streamed);
};

}  // namespace
}  // namespace fastloss

#define FASTLOSS_KERNELS "contrastive/per_query_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {
namespace {

using torch::stable::new_empty;

constexpr int64_t kStreamedGradient = int64_t{8} << 20;  // as in pixel.cpp: what will not stay in the caches

// [M, K, D] with vectors that are contiguous in themselves.
Tensor with_contiguous_rows(const Tensor& t) {
  return t.dim() == 3 && t.size(2) != 1 && t.stride(2) != 1 ? torch::stable::contiguous(t) : t;
}

// The call's sizes and options, and its negatives with rows that are contiguous in themselves.
struct Each {
  const Tensor query, negatives, scale, ceiling;
  const Operand operand;
  const int64_t rows, count, width, pieces, length;
  const bool normalize, moments;
  const double hardness;
  const int powers, sums, statistics;

  explicit Each(const StatsPerQuery::Inputs& x)
      : query(x.query),
        negatives(with_contiguous_rows(x.negatives)),
        scale(torch::stable::contiguous(x.row_scale)),
        ceiling(x.ceiling.has_value() ? torch::stable::contiguous(*x.ceiling) : scale),
        operand(query, {0, 1}),
        rows(query.size(0)),
        count(negatives.size(1)),
        width(query.size(1)),
        pieces(std::max<int64_t>(1, std::min((kTasks + rows) / std::max<int64_t>(rows, 1), count / kPiece))),
        length((count + pieces - 1) / pieces),
        normalize(x.normalize),
        moments(x.moments),
        hardness(x.hardness),
        powers(hardness > 0 ? 3 : 1),
        sums(powers + moments),
        statistics(2 + 2 * moments + powers - 1),
        ceilinged_(x.ceiling.has_value()) {
    const bool fits =
        query.dim() == 2 && negatives.dim() == 3 && negatives.size(0) == rows && negatives.size(2) == width;
    STD_TORCH_CHECK(fits, "softmax_stats_per_query: expected query [M, D] and negatives [M, K, D]");
    const bool singles = scale.scalar_type() == ScalarType::Float && ceiling.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(singles && scale.numel() == rows && ceiling.numel() == rows,
                    "softmax_stats_per_query: expected float32 [M] scales and ceilings");
  }

  template <typename T>
  const T* at(int64_t row, int64_t k) const {
    return input<T>(negatives) + row * negatives.stride(0) + k * negatives.stride(1);
  }

  // Row i's query as padded floats in `space`, and the options beside it.
  EachQuery of(int64_t i, std::vector<float>& space) const {
    space.assign(padded(width), 0.0f);
    const float* found = operand.read(i * width, width, space.data());
    if (found != space.data()) std::copy_n(found, width, space.data());
    const float most = ceilinged_ ? input<float>(ceiling)[i] : std::numeric_limits<float>::infinity();
    return {space.data(), width,  input<float>(scale)[i],        most, normalize,
            moments,      powers, {power(0), power(1), power(2)}};
  }

  float power(int a) const { return static_cast<float>((a != 2) + (a != 0) * hardness); }

  // Where the log-sum-exp of power a is among the statistics, which are as in softmax_stats.py.
  int64_t place(int a) const { return (a == 0 ? 0 : statistics - 3 + a) * rows; }

  // body(row, piece, first negative, negatives, query) for the pieces that have some, over torch's threads
  template <typename Body>
  void each(const Body& body) const {
    const int64_t grain = std::max<int64_t>(1, 2 * kBlock / std::max<int64_t>(1, length * width));
    over_threads(0, rows * pieces, grain, [&](int64_t first, int64_t last) {
      std::vector<float> space;
      for (int64_t task = first; task < last && going_on(); ++task) {
        const int64_t begin = task % pieces * length;
        if (begin >= count) continue;  // no negatives: there may be no memory either
        body(task / pieces, task % pieces, begin, std::min(length, count - begin), of(task / pieces, space));
      }
    });
  }

 private:
  const bool ceilinged_;
};

// One row's pieces in order: its statistics, and its sums of vectors over them (null where they are not wanted).
void merge(const Each& call, const EachPart* parts, const float* pulls, int64_t row, float* stats, float* to) {
  const int64_t stride = padded(call.width), rows = call.rows;
  EachPart all;
  for (int64_t p = 0; p < call.pieces; ++p) {
    all.most = std::max(all.most, parts[p].most);
    all.sum += parts[p].sum;
    all.count += parts[p].count;
  }
  const float infinity = std::numeric_limits<float>::infinity();
  for (int a = 0; a < call.sums; ++a) {
    const bool plain = a == call.powers;
    const double power = call.power(a);
    const auto factor = [&](int64_t p) {
      return plain || parts[p].most == all.most ? 1.0 : std::exp(power * (parts[p].most - all.most));
    };
    double total = 0;
    for (int64_t p = 0; p < call.pieces && !plain; ++p) total += parts[p].total[a] * factor(p);
    if (!plain)
      stats[call.place(a)] =
          all.most == infinity ? infinity : static_cast<float>((a == 0 ? all.most : 0) + std::log(total));
    if (!to) continue;
    float* sum = to + (a * rows + row) * call.width;
    std::fill_n(sum, call.width, 0.0f);
    for (int64_t p = 0; p < call.pieces; ++p) {
      const float share = static_cast<float>(plain ? 1.0 : total == 0 ? 0.0 : factor(p) / total);
      const float* part = pulls + (p * call.sums + a) * stride;
      for (int64_t d = 0; d < call.width; ++d) sum[d] += share * part[d];
    }
  }
  stats[rows] = all.most == kLowest ? -infinity : all.most;
  if (!call.moments) return;
  stats[2 * rows] = static_cast<float>(all.sum);
  stats[3 * rows] = static_cast<float>(all.count);
}

}  // namespace

StatsPerQuery::Saved StatsPerQuery::forward(const Inputs& x) {
  const bool logits = x.save == "logits", keys = logits || x.save == "weighted_keys";
  STD_TORCH_CHECK(keys || x.save.empty(), "softmax_stats_per_query: there is no save ", x.save);
  const Each call(x);
  const int64_t stride = padded(call.width), saved_rows = logits ? call.rows : 0;
  Saved saved{new_empty(x.query, {call.statistics, call.rows}, ScalarType::Float),
              new_empty(x.query, {keys ? call.sums : 0, call.rows, call.width}, ScalarType::Float),
              new_empty(x.query, {saved_rows, call.count}, ScalarType::Float),
              new_empty(x.query, {saved_rows, call.count}, ScalarType::Float)};
  std::vector<EachPart> parts(call.rows * call.pieces);
  std::vector<float> sums(keys ? call.rows * call.pieces * call.sums * stride : 0);
  float *to_logits = output<float>(saved.logits), *to_norms = output<float>(saved.inverse_norms);
  for_dtype(x.negatives.scalar_type(), "softmax_stats_per_query", [&](auto element) {
    using T = decltype(element);
    const auto kernels = FASTLOSS_PICK(each_kernels<T>());
    call.each([&](int64_t row, int64_t piece, int64_t begin, int64_t n, const EachQuery& q) {
      const int64_t task = row * call.pieces + piece, entry = row * call.count + begin;
      kernels.read(call.at<T>(row, begin), call.negatives.stride(1), n, q, parts[task],
                   keys ? &sums[task * call.sums * stride] : nullptr, logits ? to_logits + entry : nullptr,
                   logits ? to_norms + entry : nullptr);
    });
  });
  float *to_stats = output<float>(saved.stats), *to_keys = keys ? output<float>(saved.weighted_keys) : nullptr;
  const int64_t grain = kBlock / std::clamp<int64_t>(stride, 1, kBlock);
  over_threads(0, call.rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last && going_on(); ++i)
      merge(call, &parts[i * call.pieces], sums.data() + i * call.pieces * call.sums * stride, i, to_stats + i,
            to_keys);
  });
  return saved;
}

StatsPerQuery::Grads StatsPerQuery::backward(const Tensor& grad, const Inputs& x, const Saved& saved,
                                             const Needs& needs) {
  const Each call(x);
  const int64_t rows = call.rows, width = call.width;
  STD_TORCH_CHECK(grad.numel() == call.statistics * rows && grad.scalar_type() == ScalarType::Float,
                  "softmax_stats_per_query: expected a float32 gradient of the statistics");
  STD_TORCH_CHECK(needs.negatives ? x.save == "logits" : !x.save.empty(),
                  "softmax_stats_per_query: the forward saved nothing for this gradient");
  const Tensor upstream = torch::stable::contiguous(grad);
  const float *up = input<float>(upstream), *lse = input<float>(saved.stats), *sums = input<float>(saved.weighted_keys);
  Grads grads{new_empty(x.query, {needs.query ? rows : 0, width}),
              new_empty(x.negatives, {needs.negatives ? rows : 0, call.count, width}),
              new_empty(x.query, {needs.row_scale ? rows : 0}, ScalarType::Float)};
  const auto slope_of = [&](int64_t i) {
    EachSlope g{{}, lse[rows + i], {}, call.moments ? up[2 * rows + i] : 0.0f};
    for (int a = 0; a < call.powers; ++a) g.mass[a] = up[call.place(a) + i], g.lse[a] = lse[call.place(a) + i];
    return g;
  };
  const int64_t wanted = needs.query || needs.row_scale ? rows : 0;
  for_dtype(x.query.scalar_type(), "softmax_stats_per_query", [&](auto element) {
    using T = decltype(element);
    const int64_t grain = kBlock / std::clamp<int64_t>(width, 1, kBlock);
    over_threads(0, wanted, grain, [&](int64_t first, int64_t last) {
      std::vector<float> space, sum(width);
      for (int64_t i = first; i < last && going_on(); ++i) {
        const EachQuery q = call.of(i, space);
        const EachSlope g = slope_of(i);
        std::fill(sum.begin(), sum.end(), 0.0f);
        const auto weighted = [&](int a) { return sums + (a * rows + i) * width; };
        const auto add = [&](float weight, const float* more) {
          for (int64_t d = 0; d < width && weight != 0; ++d) sum[d] += weight * more[d];  // a row left out may be NaN
        };
        const bool hard = call.powers == 3 && (g.mass[1] != 0 || g.mass[2] != 0);
        add(g.mass[0], weighted(0));
        for (int64_t d = 0; d < width && hard; ++d) {  // what cancels, before it is times the hardness
          const float harder = g.mass[1] * weighted(1)[d];
          sum[d] += harder + q.power[2] * (harder + g.mass[2] * weighted(2)[d]);
        }
        if (call.moments) add(g.sum, weighted(call.powers));
        double along = 0;
        for (int64_t d = 0; d < width && needs.row_scale; ++d) along += q.query[d] * sum[d];
        if (needs.row_scale) output<float>(grads.row_scale)[i] = static_cast<float>(along);
        for (int64_t d = 0; d < width && needs.query; ++d)
          output<T>(grads.query)[i * width + d] = static_cast<T>(q.scale * sum[d]);
      }
    });
  });
  if (!needs.negatives) return grads;
  for_dtype(x.negatives.scalar_type(), "softmax_stats_per_query", [&](auto element) {
    using T = decltype(element);
    const auto kernels = FASTLOSS_PICK(each_kernels<T>());
    T* to = output<T>(grads.negatives);
    const bool aligned = reinterpret_cast<uintptr_t>(to) % 64 == 0 && width * sizeof(T) % 64 == 0;
    const bool streamed = aligned && rows * call.count * width * static_cast<int64_t>(sizeof(T)) >= kStreamedGradient;
    call.each([&](int64_t row, int64_t, int64_t begin, int64_t n, const EachQuery& q) {
      const EachSlope g = slope_of(row);
      if (g.mass[0] == 0 && g.mass[1] == 0 && g.mass[2] == 0 && g.sum == 0) {
        std::fill_n(to + (row * call.count + begin) * width, n * width, static_cast<T>(0.0f));
        return;
      }
      for (int64_t k = begin; k < begin + n; k += kSlopes) {
        const int64_t some = std::min(kSlopes, begin + n - k), entry = row * call.count + k;
        float along[kSlopes], back[kSlopes];
        kernels.slopes(input<float>(saved.logits) + entry, input<float>(saved.inverse_norms) + entry, some, q, g, along,
                       back);
        kernels.grad(call.at<T>(row, k), call.negatives.stride(1), some, q, along, back, to + entry * width, streamed);
      }
    });
  });
  return grads;
}

}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("softmax_stats_per_query_fwd", FASTLOSS_BOX(&fastloss::StatsPerQuery::forward));
  m.impl("softmax_stats_per_query_bwd", FASTLOSS_BOX(&fastloss::StatsPerQuery::backward));
}
