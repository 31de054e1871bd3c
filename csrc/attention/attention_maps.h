// What the kernels of attention maps are handed.
#pragma once

#include "core/tensors.h"

namespace fastloss {

enum class MapMetric { js, kl, sym_kl, mse, l1, cosine };
constexpr float kLeastScore = -1e2f;  // LEAST_SCORE in divergence.py

// How an element becomes what is compared.
struct Preparation {
  bool logits, scores, added;  // `added`: the mask is added; else 0 leaves the key out
  float temperature;           // of logits
};

// The numbers of a row that are kept, as attention_maps.py has them.
struct MapStatistics {
  float peak_a, log_a, peak_b, log_b, inner_a, inner_b, scale;
};
struct RowValue {
  double value;
  bool counts;
};
// A row of both maps in float32, of whole vectors, whose last one is filled with what counts for nothing; and room for
// as much again.
struct Row {
  const float *a, *b;
  float *more_a, *more_b;
  int64_t n;
  double mean;  // 1 / keys that take part, 0 where none does
};
// What a row's gradients are multiplied with, and where they go; null: nowhere.
struct RowGradient {
  float upstream;
  float *a, *b;
  bool streamed;  // past the caches: both are aligned
};

// What leaves keys out of a gradient; null: nothing.
struct Left {
  const float* mask;    // 0
  const float* scores;  // those that stand for masked keys, as prepared
};

struct MapKernels {
  void (*prepare_float)(const float* from, const float* mask, const Preparation&, int64_t n, float* to);
  void (*prepare_bfloat16)(const BFloat16* from, const float* mask, const Preparation&, int64_t n, float* to);
  void (*prepare_half)(const Half* from, const float* mask, const Preparation&, int64_t n, float* to);
  // The value of the row. Of the statistics, `scale` is given, which is `mean`.
  RowValue (*forward)(const Row&, MapStatistics&);
  void (*backward)(const Row&, const MapStatistics&, const RowGradient&);
  // to[i] = from[i], 0 where the key is left out; `streamed` past the caches, to an aligned address
  void (*write_float)(const float* from, const Left&, int64_t n, float* to, bool streamed);
  void (*write_bfloat16)(const float* from, const Left&, int64_t n, BFloat16* to, bool streamed);
  void (*write_half)(const float* from, const Left&, int64_t n, Half* to, bool streamed);
  void (*finish)();  // after what was streamed
  // p = the softmax of a prepared row, added to `sum` too; false, and zeros, where it has none
  bool (*soften)(const float* logits, int64_t n, float* p, float* sum);
  void (*scale)(float* x, int64_t n, float by);
  // The gradient of the logits from the slopes by p, times `by`.
  void (*through_softmax)(const float* p, const float* slopes, int64_t n, float by, float* to);
};

}  // namespace fastloss
