// Sums over generated rows and bank rows; included by for_each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

template <typename T>
static void bank_widen(const T* from, int64_t n, const Affine& affine, float* to) {
  int64_t i = 0;
  if (affine.changes())
    for (; i + W <= n; i += W) store(to + i, load(from + i) * affine.weight + affine.shift);
  else
    for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) store_some(to + i, load_some(from + i, n - i) * affine.weight + affine.shift, n - i);
}
static void bank_widen_byte(const uint8_t* from, int64_t n, const Affine& affine, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = (float)from[i] * affine.weight + affine.shift;
}

// `rows` generated rows against four bank rows: each vector that is loaded serves several pairs.
template <bool squares, int rows>
FASTLOSS_INLINE void add_tile(const float* generated, int64_t stride, const float* bank, int64_t n, float* sums) {
  constexpr int bank_rows = 4;
  vf total[rows][bank_rows] = {};
  int64_t i = 0;
  const auto add = [&](int64_t at, auto read) {
    vf b[bank_rows];
#pragma GCC unroll 4
    for (int r = 0; r < bank_rows; ++r) b[r] = load(bank + r * kBankColumns + at);
#pragma GCC unroll 4
    for (int g = 0; g < rows; ++g) {
      const vf a = read(generated + g * stride + at);
#pragma GCC unroll 4
      for (int r = 0; r < bank_rows; ++r) {
        const vf d = a - b[r];
        total[g][r] += squares ? d * d : abs(d);
      }
    }
  };
  for (; i + W <= n; i += W) add(i, [](const float* from) __attribute__((always_inline)) { return load(from); });
  if (i < n) add(i, [&](const float* from) __attribute__((always_inline)) { return load_some(from, n - i); });
#pragma GCC unroll 4
  for (int g = 0; g < rows; ++g)
#pragma GCC unroll 4
    for (int r = 0; r < bank_rows; ++r) {
      float* to = sums + (g * kBankRows + r) * W;
      store(to, load(to) + total[g][r]);
    }
}

template <bool squares>
static void bank_add(const float* generated, int64_t stride, int64_t count, const float* bank, int64_t n, float* sums) {
  int64_t g = 0;
  for (; g + 2 <= count; g += 2)
    for (int r = 0; r < kBankRows; r += 4)
      add_tile<squares, 2>(generated + g * stride, stride, bank + r * kBankColumns, n, sums + (g * kBankRows + r) * W);
  if (g < count)
    for (int r = 0; r < kBankRows; r += 4)
      add_tile<squares, 1>(generated + g * stride, stride, bank + r * kBankColumns, n, sums + (g * kBankRows + r) * W);
}

static float bank_sum_vector(const float* vector) { return sum(load(vector)); }

static double bank_square(const float* row, int64_t n) {
  vd total{};
  for (int64_t i = 0; i < n; i += W) {
    const vd x = __builtin_convertvector(load_up_to(row + i, n - i), vd);
    total += x * x;
  }
  return sum(total);
}

// The sums that a metric needs, in float64.
static void bank_add_row(Metric metric, const float* generated, const float* bank, int64_t n, RowSums& sums) {
  vd first{}, second{}, third{};
  for (int64_t i = 0; i < n; i += W) {
    const vf a = load_up_to(generated + i, n - i), b = load_up_to(bank + i, n - i);
    const vd x = __builtin_convertvector(a, vd), y = __builtin_convertvector(b, vd);
    if (metric == Metric::cosine) {
      first += x * y;
      second += x * x;
      third += y * y;
    } else if (metric == Metric::l2) {
      first += (x - y) * (x - y);
    } else {
      first += __builtin_convertvector(abs(a - b), vd);
    }
  }
  if (metric == Metric::cosine) {
    sums.dot += sum(first);
    sums.generated_square += sum(second);
    sums.bank_square += sum(third);
  } else {
    sums.difference += sum(first);
  }
}

static void bank_gradient(Metric metric, const float* generated, const float* bank, int64_t n, double of_generated,
                          double of_bank, float* to) {
  for (int64_t i = 0; i < n; i += W) {
    const vf a = load_up_to(generated + i, n - i), b = load_up_to(bank + i, n - i);
    const vd x = __builtin_convertvector(a, vd), y = __builtin_convertvector(b, vd);
    const vf g = metric == Metric::l1 ? sign(a - b) * (float)of_generated
                                      : __builtin_convertvector(x * of_generated + y * of_bank, vf);
    store_up_to(to + i, g, n - i);
  }
}

template <bool signs>
static void bank_add_weighted(const float* generated, const float* bank, const float* weights, int64_t n, float* to) {
  vf w[kBankRows];
#pragma GCC unroll 8
  for (int r = 0; r < kBankRows; ++r) w[r] = all(weights[r]);
  for (int64_t i = 0; i < n; i += W) {
    const vf a = load_up_to(generated + i, n - i);
    vf total = load(to + i);
#pragma GCC unroll 8
    for (int r = 0; r < kBankRows; ++r) {
      const vf d = a - load(bank + r * kBankColumns + i);
      total += w[r] * (signs ? sign(d) : d);
    }
    store(to + i, total);
  }
}

static double bank_powers(float* x, int64_t n, float origin, float temperature, float weight) {
  vf total{};
  for (int64_t i = 0; i < n; i += W) {
    vf power = weight * exp((origin - load_up_to(x + i, n - i)) / temperature);
    if (n - i < W) power = where(lanes() < (int)(n - i), power);
    total += power;
    store_up_to(x + i, power, n - i);
  }
  return sum(__builtin_convertvector(total, vd));
}

static BankKernels bank_kernels() {
  return {bank_widen<float>,
          bank_widen<BFloat16>,
          bank_widen<Half>,
          bank_widen_byte,
          bank_add<false>,
          bank_add<true>,
          bank_sum_vector,
          bank_square,
          bank_add_row,
          bank_gradient,
          bank_add_weighted<true>,
          bank_add_weighted<false>,
          bank_powers,
          W};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
