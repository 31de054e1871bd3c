// The distance of each generated row from a whole bank, as fastloss/diversity/bank_distance.py defines it: the soft-min
// or the mean of its distances. The bank is read once, a tile of rows at a time, and once more in the backward, which
// makes the distances of a tile again; of each generated row the forward keeps the least distance and a sum of powers.

#include "core/op.h"
#include "diversity/bank_rows.h"

namespace fastloss {
namespace {

constexpr int64_t kBlockRows = 1024;  // generated rows whose distances to a tile exist at a time
constexpr float kNothing = 0x1p-28f;  // weights of the whole bank that are left out, of a sum of 1

struct Inputs {
  Tensor generated, bank;
  std::string mode, metric;
  double temperature, scale, shift, workspace_mib;
  FASTLOSS_FIELDS(generated, bank, mode, metric, temperature, scale, shift, workspace_mib)
};
struct Saved {
  Tensor least, powers;
  FASTLOSS_FIELDS(least, powers)
};
struct Outputs {
  Tensor distance;
  Saved saved;
  FASTLOSS_FIELDS(distance, saved)
};
struct Needs {
  bool generated;
  FASTLOSS_FIELDS(generated)
};
struct Grads {
  Tensor generated;
  FASTLOSS_FIELDS(generated)
};

struct Comparison {
  Rows rows;
  bool is_mean;
  float temperature;
  int64_t tile_rows, block_rows;
  Tensor distances;  // of a block of generated rows from a tile of the bank

  explicit Comparison(const Inputs& x)
      : rows("bank_distance", x.generated, x.bank, x.metric, x.scale, x.shift),
        is_mean(x.mode == "mean"),
        temperature(static_cast<float>(x.temperature)),
        tile_rows(std::min(kTileRows, rows.bank_count)),
        block_rows(std::max<int64_t>(1, std::min(kBlockRows, rows.count))),
        distances(new_float32({block_rows, tile_rows})) {
    if (rows.metric == Metric::cosine) rows.make_units();
  }

  // body(first, n) for each tile of the bank
  template <typename Body>
  void for_tiles(const Body& body) const {
    for_pieces(rows.bank_count, tile_rows, [&](int64_t first, int64_t n) {
      check_signals();
      body(first, n);
    });
  }
  float* measure(int64_t row, int64_t count, int64_t first, int64_t n) const {
    float* to = output<float>(distances);
    tile_distances(rows, row, count, first, n, to, tile_rows);
    return to;
  }
};

float origin_of(float least) { return std::isinf(least) ? 0 : least; }

Outputs bank_distance_fwd(const Inputs& x) {
  const Comparison c(x);
  const int64_t count = c.rows.count;
  std::vector<float> least(count, std::numeric_limits<float>::infinity());
  std::vector<double> sums(count);
  c.for_tiles([&](int64_t first, int64_t n) {
    for_pieces(count, c.block_rows, [&](int64_t row, int64_t some) {
      float* found = c.measure(row, some, first, n);
      for_each(
          some,
          [&](int64_t i) {
            float* d = found + i * c.tile_rows;
            double& sum = sums[row + i];
            if (c.is_mean) {
              for (int64_t j = 0; j < n; ++j) sum += d[j];
              return;
            }
            const float before = least[row + i];
            float& now = least[row + i];
            for (int64_t j = 0; j < n; ++j)
              if (d[j] < now) now = d[j];
            if (sum != 0) sum *= std::exp((static_cast<double>(now) - before) / c.temperature);
            sum += c.rows.kernels.powers(d, n, origin_of(now), c.temperature, 1);
          },
          8);
    });
  });
  const int64_t kept = c.is_mean ? 0 : count;
  Outputs out{new_float32(count), {new_float32(kept), new_float32(kept)}};
  float* distance = output<float>(out.distance);
  const double bank_count = static_cast<double>(c.rows.bank_count);
  for (int64_t i = 0; i < count; ++i)
    distance[i] = static_cast<float>(c.is_mean ? sums[i] / bank_count
                                               : least[i] - c.temperature * std::log(sums[i] / bank_count));
  std::copy_n(least.begin(), kept, output<float>(out.saved.least));
  std::copy_n(sums.begin(), kept, output<float>(out.saved.powers));
  return out;
}

Grads bank_distance_bwd(const Tensor& grad, const Inputs& x, const Saved& saved, const Needs& needs) {
  if (!needs.generated) return {torch::stable::new_empty(x.generated, {0})};
  const Comparison c(x);
  const Rows& rows = c.rows;
  const Tensor upstream = as_contiguous(grad), least = as_contiguous(saved.least), powers = as_contiguous(saved.powers);
  STD_TORCH_CHECK(upstream.scalar_type() == ScalarType::Float && upstream.numel() == rows.count,
                  "bank_distance: grad is not float32 [N]");
  const float *of_distance = input<float>(upstream), *origins = input<float>(least), *sums = input<float>(powers);
  const Tensor out = new_float32({rows.count, rows.size});
  float* gradient = output<float>(out);
  std::fill_n(gradient, rows.count * rows.size, 0.0f);
  const float nothing = kNothing / static_cast<float>(rows.bank_count);
  c.for_tiles([&](int64_t first, int64_t n) {
    for_pieces(rows.count, c.block_rows, [&](int64_t row, int64_t some) {
      if (c.is_mean) return add_gradients(rows, row, some, first, n, nullptr, 0, gradient);
      float* weights = c.measure(row, some, first, n);
      for_each(
          some,
          [&](int64_t i) {
            float* w = weights + i * c.tile_rows;
            rows.kernels.powers(w, n, origin_of(origins[row + i]), c.temperature, 1 / sums[row + i]);
            for (int64_t j = 0; j < n; ++j)
              if (w[j] < nothing) w[j] = 0;
          },
          8);
      add_gradients(rows, row, some, first, n, weights, c.tile_rows, gradient);
    });
  });
  const double size = static_cast<double>(rows.size);
  each_row(rows.count, rows.size, [&](int64_t i) {
    float* to = gradient + i * rows.size;
    const float* unit = rows.generated_row(i);
    double factor = of_distance[i], along = 0;
    if (rows.units) {  // of u = g / |g|: without the part along u, over |g|
      for (int64_t k = 0; k < rows.size; ++k) along += static_cast<double>(to[k]) * unit[k];
      factor = rows.lengths[i] == 0 ? 0 : factor / rows.lengths[i];
    } else {
      factor *= (rows.metric == Metric::l2 ? 2 : 1) / size;
      if (c.is_mean) factor /= static_cast<double>(rows.bank_count);
    }
    for (int64_t k = 0; k < rows.size; ++k) to[k] = static_cast<float>((to[k] - along * unit[k]) * factor);
  });
  return {out};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("bank_distance_fwd", FASTLOSS_BOX(&fastloss::bank_distance_fwd));
  m.impl("bank_distance_bwd", FASTLOSS_BOX(&fastloss::bank_distance_bwd));
}
