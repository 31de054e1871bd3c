// The distance of each generated row from a whole bank, as fastloss/diversity/bank_distance.py defines it: the soft-min
// or the mean of its distances. The bank is read once, a tile of rows at a time, and once more in the backward. Of each
// generated row the forward keeps the least distance and a sum of powers; with `keep` all distances, which the backward
// else makes again. Those of near rows, which are no products, are kept with a sign.

#include "core/op.h"
#include "diversity/bank_rows.h"

namespace fastloss {
namespace {

constexpr int64_t kBlockRows = 1024;        // generated rows whose distances to a tile exist at a time
constexpr int64_t kTileElements = 1 << 20;  // of a tile of the bank that is multiplied, or kBankRows rows if larger
constexpr double kNear = 1.0 / 16;          // of the squares' sum: a smaller distance lost four bits to the product
constexpr float kNothing = 0x1p-28f;        // weights of the whole bank that are left out, of a sum of 1

struct Inputs {
  Tensor generated, bank;
  std::string mode, metric;
  double temperature, scale, shift, workspace_mib;
  bool keep;
  FASTLOSS_FIELDS(generated, bank, mode, metric, temperature, scale, shift, workspace_mib, keep)
};
struct Saved {
  Tensor least, powers, distances;
  FASTLOSS_FIELDS(least, powers, distances)
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

// Generated rows against a tile of the bank at a time.
class Comparison {
 public:
  Rows rows;
  bool is_mean, by_products;
  float temperature;
  int64_t tile_rows, block_rows;

  explicit Comparison(const Inputs& x)
      : rows("bank_distance", x.generated, x.bank, x.metric, x.scale, x.shift),
        is_mean(x.mode == "mean"),
        by_products(rows.metric != Metric::l1 && !products_are_rounded()),
        temperature(static_cast<float>(x.temperature)),
        tile_rows(std::min(kTileRows, rows.bank_count)),
        block_rows(std::max<int64_t>(1, std::min(kBlockRows, rows.count))) {
    if (rows.metric == Metric::cosine) rows.make_units();
    if (by_products) prepare_products();
    distances_ = new_float32({block_rows, tile_rows});
    near.resize(block_rows);
  }

  // body(first, n) for each tile of the bank, which is then ready to be measured
  template <typename Body>
  void for_tiles(const Body& body) {
    for_pieces(rows.bank_count, tile_rows, [&](int64_t first, int64_t n) {
      check_signals();
      if (by_products) read_tile(first, n);
      body(first, n);
    });
  }
  // Distances of generated rows from the tile: row i's from i * tile_rows on. The bank rows that are near row i are in
  // near[i], if products were made.
  float* measure(int64_t row, int64_t count, int64_t first, int64_t n) {
    float* to = output<float>(distances_);
    if (!by_products) {
      tile_distances(rows, row, count, first, n, to, tile_rows);
      return to;
    }
    const Tensor found = view_of(distances_, {count, n}, {tile_rows, 1}, 0);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(found.get(), found.get(), generated(row, count).get(),
                                                    transposed(tile(n)).get(), 0.0, 1.0));
    for_each(count, [&](int64_t i) { distances_of(row, i, first, n, to + i * tile_rows); }, 8);
    return to;
  }
  // What measure() returned, which the forward kept.
  void keep(float* kept, int64_t row, int64_t i, int64_t first, int64_t n, const float* found) const {
    float* to = kept + (row + i) * rows.bank_count + first;
    std::copy_n(found, n, to);
    for (const int64_t j : near[i]) to[j] = std::copysign(to[j], -1.0f);
  }
  float* recall(const float* kept, int64_t row, int64_t count, int64_t first, int64_t n) {
    float* to = output<float>(distances_);
    for_each(
        count,
        [&](int64_t i) {
          const float* from = kept + (row + i) * rows.bank_count + first;
          near[i].clear();
          for (int64_t j = 0; j < n; ++j) {
            if (std::signbit(from[j])) near[i].push_back(j);
            to[i * tile_rows + j] = std::fabs(from[j]);
          }
        },
        8);
    return to;
  }
  const Tensor& weights() const { return distances_; }  // what measure() returned the memory of
  Tensor generated(int64_t row, int64_t count) const {
    return slice(centred_ ? *centred_ : rows.generated, 0, row, count);
  }
  // The tile's rows, about the centre; of cosine not at length 1.
  Tensor tile(int64_t n) const { return tile_ ? slice(*tile_, 0, 0, n) : slice(rows.bank, 0, first_, n); }
  float tile_factor(int64_t j) const { return rows.units ? factors_[j] : 1; }

  std::vector<std::vector<int64_t>> near;

 private:
  void prepare_products() {
    const int64_t n = std::min(kProductColumns, kTileElements / std::max(block_rows, rows.size));
    tile_rows = std::min(std::max(n, kBankRows), rows.bank_count);
    if (rows.metric == Metric::l2 || rows.widens()) tile_ = new_float32({tile_rows, rows.size});
    factors_.resize(tile_rows), squares_.resize(tile_rows), generated_squares_.resize(rows.count);
    centre_.resize(rows.size);
    if (rows.metric == Metric::l2) centre();
  }
  // The generated rows about their mean, where that is finite.
  void centre() {
    centred_ = new_float32({rows.count, rows.size});
    float* to = output<float>(*centred_);
    std::vector<double> sums(rows.size);
    for (int64_t i = 0; i < rows.count; ++i)
      for (int64_t k = 0; k < rows.size; ++k) sums[k] += rows.generated_row(i)[k];
    for (int64_t k = 0; k < rows.size; ++k) {
      const float mean = static_cast<float>(sums[k] / static_cast<double>(std::max<int64_t>(rows.count, 1)));
      centre_[k] = std::isfinite(mean) ? mean : 0;
    }
    each_row(rows.count, rows.size, [&](int64_t i) {
      const float* row = rows.generated_row(i);
      for (int64_t k = 0; k < rows.size; ++k) to[i * rows.size + k] = row[k] - centre_[k];
      generated_squares_[i] = rows.kernels.square(to + i * rows.size, rows.size);
    });
  }
  void read_tile(int64_t first, int64_t n) {
    first_ = first;
    float* to = tile_ ? output<float>(*tile_) : nullptr;
    each_row(n, rows.size, [&](int64_t j) {
      float* copy = to ? to + j * rows.size : nullptr;
      if (copy) rows.widen(first + j, 0, rows.size, copy);
      if (rows.metric == Metric::l2)
        for (int64_t k = 0; k < rows.size; ++k) copy[k] -= centre_[k];
      squares_[j] = rows.kernels.square(copy ? copy : rows.read(first + j, 0, rows.size, nullptr), rows.size);
      factors_[j] = rows.units ? factor_of(squares_[j]) : 1;
    });
  }
  // Of products distances, in their place.
  void distances_of(int64_t row, int64_t i, int64_t first, int64_t n, float* to) {
    const double square = generated_squares_[row + i], mean = 1 / static_cast<double>(rows.size);
    near[i].clear();
    for (int64_t j = 0; j < n; ++j) {
      const double all = rows.units ? 1 : square + squares_[j];
      const double d = rows.units ? 1 - static_cast<double>(to[j]) * factors_[j] : all - 2 * static_cast<double>(to[j]);
      if (d > kNear * all) {
        to[j] = static_cast<float>(rows.units ? d : d * mean);
      } else {  // NaN too
        to[j] = rows.distance(row + i, first + j);
        near[i].push_back(j);
      }
    }
  }

  int64_t first_ = 0;  // bank row of the tile
  Tensor distances_;
  std::optional<Tensor> tile_, centred_;
  std::vector<float> centre_, factors_;
  std::vector<double> squares_, generated_squares_;  // of the tile's rows, of the generated ones
};

float origin_of(float least) { return std::isinf(least) ? 0 : least; }

Outputs bank_distance_fwd(const Inputs& x) {
  Comparison c(x);
  const int64_t count = c.rows.count;
  std::vector<float> least(count, std::numeric_limits<float>::infinity());
  std::vector<double> sums(count);
  const bool keeps = x.keep && !c.is_mean;
  const Tensor distances = new_float32({keeps ? count : 0, keeps ? c.rows.bank_count : 0});
  c.for_tiles([&](int64_t first, int64_t n) {
    for_pieces(count, c.block_rows, [&](int64_t row, int64_t some) {
      float* found = c.measure(row, some, first, n);
      for_each(
          some,
          [&](int64_t i) {
            float* d = found + i * c.tile_rows;
            double& sum = sums[row + i];
            if (keeps) c.keep(output<float>(distances), row, i, first, n, d);
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
  Outputs out{new_float32(count), {new_float32(kept), new_float32(kept), distances}};
  float* distance = output<float>(out.distance);
  const double bank_count = static_cast<double>(c.rows.bank_count);
  for (int64_t i = 0; i < count; ++i)
    distance[i] = static_cast<float>(c.is_mean ? sums[i] / bank_count
                                               : least[i] - c.temperature * std::log(sums[i] / bank_count));
  std::copy_n(least.begin(), kept, output<float>(out.saved.least));
  std::copy_n(sums.begin(), kept, output<float>(out.saved.powers));
  return out;
}

// The same by products, where `weights` came from distances by products: near rows one by one, the others together.
void add_product_gradients(const Comparison& c, int64_t row, int64_t some, int64_t first, int64_t n, float* weights,
                           const Tensor& gradient) {
  const Rows& rows = c.rows;
  const Tensor of_block = slice(gradient, 0, row, some);
  const float* generated = input<float>(c.generated(row, some));
  float* to = output<float>(of_block);
  for_each(some, [&](int64_t i) {
    float *out = to + i * rows.size, *w = weights + i * c.tile_rows;
    float buffer[kChunkElements];
    double total = 0;
    for (const int64_t j : c.near[i]) {
      const float weight = w[j], factor = rows.units ? rows.bank_factor(first + j) : 1;
      w[j] = 0;
      if (weight == 0) continue;
      for_pieces(rows.size, kChunkElements, [&](int64_t k, int64_t width) {
        rows.widen(first + j, k, width, buffer, factor);
        for (int64_t e = 0; e < width; ++e) out[k + e] += weight * (rows.generated_row(row + i)[k + e] - buffer[e]);
      });
    }
    for (int64_t j = 0; j < n; ++j) {
      total += w[j];
      w[j] *= c.tile_factor(j);
    }
    if (total == 0) return;
    for (int64_t k = 0; k < rows.size; ++k) out[k] += static_cast<float>(total) * generated[i * rows.size + k];
  });
  const Tensor all = view_of(c.weights(), {some, n}, {c.tile_rows, 1}, 0);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(of_block.get(), of_block.get(), all.get(), c.tile(n).get(), 1.0, -1.0));
}

Grads bank_distance_bwd(const Tensor& grad, const Inputs& x, const Saved& saved, const Needs& needs) {
  if (!needs.generated) return {torch::stable::new_empty(x.generated, {0})};
  Comparison c(x);
  const Rows& rows = c.rows;
  const Tensor upstream = as_contiguous(grad), least = as_contiguous(saved.least), powers = as_contiguous(saved.powers);
  const Tensor kept = as_contiguous(saved.distances);
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
      float* weights =
          kept.numel() ? c.recall(input<float>(kept), row, some, first, n) : c.measure(row, some, first, n);
      for_each(
          some,
          [&](int64_t i) {
            float* w = weights + i * c.tile_rows;
            rows.kernels.powers(w, n, origin_of(origins[row + i]), c.temperature, 1 / sums[row + i]);
            for (int64_t j = 0; j < n; ++j)
              if (w[j] < nothing) w[j] = 0;
          },
          8);
      if (c.by_products)
        add_product_gradients(c, row, some, first, n, weights, out);
      else
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
