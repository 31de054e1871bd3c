// Distances of rows from one another, as fastloss/diversity/pair_distances.py defines them, by direct differences.

#include "core/op.h"
#include "diversity/bank_rows.h"

namespace fastloss {
namespace {

constexpr int64_t kBlockRows = 1024;  // rows that are compared with a tile at a time

struct Inputs {
  Tensor x;
  std::string metric;
  FASTLOSS_FIELDS(x, metric)
};
struct Needs {
  bool x;
  FASTLOSS_FIELDS(x)
};
struct Grads {
  Tensor x;
  FASTLOSS_FIELDS(x)
};

// body(row, count, first, n) for blocks of rows against tiles of the same rows
template <typename Body>
void for_tiles(const Rows& rows, const Body& body) {
  for_pieces(rows.count, kTileRows, [&](int64_t first, int64_t n) {
    for_pieces(rows.count, kBlockRows, [&](int64_t row, int64_t some) {
      check_signals();
      body(row, some, first, n);
    });
  });
}

Rows rows_of(const Inputs& x) { return {"pair_distances", x.x, as_contiguous(x.x), x.metric, 1, 0}; }

Tensor pair_distances_fwd(const Inputs& x) {
  const Rows rows = rows_of(x);
  const Tensor out = new_float32({rows.count, rows.count});
  float* to = output<float>(out);
  for_tiles(rows, [&](int64_t row, int64_t some, int64_t first, int64_t n) {
    tile_distances(rows, row, some, first, n, to + row * rows.count + first, rows.count);
  });
  return out;
}

Grads pair_distances_bwd(const Tensor& grad, const Inputs& x, const Needs& needs) {
  if (!needs.x) return {torch::stable::new_empty(x.x, {0})};
  const Rows rows = rows_of(x);
  const Tensor upstream = as_contiguous(grad);
  const int64_t count = rows.count;
  STD_TORCH_CHECK(upstream.scalar_type() == ScalarType::Float && upstream.numel() == count * count,
                  "pair_distances: grad is not float32 [N, N]");
  const float* of_distances = input<float>(upstream);
  const Tensor out = new_float32({count, rows.size}), both = new_float32({std::min(kBlockRows, count), kTileRows});
  float *to = output<float>(out), *weights = output<float>(both);
  std::fill_n(to, count * rows.size, 0.0f);
  const float mean = (rows.metric == Metric::l2 ? 2 : 1) / static_cast<float>(rows.size);
  for_tiles(rows, [&](int64_t row, int64_t some, int64_t first, int64_t n) {
    for (int64_t i = 0; i < some; ++i)  // a row has its distance from another twice
      for (int64_t j = 0; j < n; ++j)
        weights[i * kTileRows + j] =
            mean * (of_distances[(row + i) * count + first + j] + of_distances[(first + j) * count + row + i]);
    add_gradients(rows, row, some, first, n, weights, kTileRows, to);
  });
  return {out};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("pair_distances_fwd", FASTLOSS_BOX(&fastloss::pair_distances_fwd));
  m.impl("pair_distances_bwd", FASTLOSS_BOX(&fastloss::pair_distances_bwd));
}
