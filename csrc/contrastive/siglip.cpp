// Sigmoid loss of all pairs. The gradient of a pair needs nothing but its own logit, so it is made in the forward,
// block after block of a bounded workspace, and the products of a block with the embeddings follow at once.

#include "contrastive/norms.h"
#include "core/isa.h"
#include "core/op.h"

namespace fastloss {
namespace {

struct SigmoidSums {
  double loss, slope;
};
struct SiglipKernels {
  SigmoidSums (*row)(const float* s, int64_t n, float bias, float share, float* g);
};

}  // namespace
}  // namespace fastloss

#define FASTLOSS_KERNELS "contrastive/siglip_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {
namespace {

using torch::stable::new_empty;

constexpr int64_t kImage = 1, kText = 2, kScaleAndBias = 4;  // bits of `needs`
constexpr double kGradientBlock = 64;                        // MiB of a block of the products' gradient at most
constexpr int64_t kWidest = 16384;                           // its columns at most

struct Inputs {
  Tensor image, text, scale, bias;
  Given image_ids, text_ids, row_weight;
  bool normalize, negative_only;
  int64_t needs;
  double workspace_mib;
  template <typename F>
  void fields(const F& f) {
    f(image), f(text), f(scale), f(bias), f(image_ids), f(text_ids), f(row_weight), f(normalize), f(negative_only);
    f(needs), f(workspace_mib);
  }
};

struct Needs {
  bool image, text, scale, bias;
  template <typename F>
  void fields(const F& f) {
    f(image), f(text), f(scale), f(bias);
  }
};

struct SigmoidLoss {
  LogitMatrix problem;
  const float scale, bias;
  const bool positives;
  std::vector<float> c, text_c;   // inverse lengths, or nothing
  std::vector<float> row_weight;  // of the rows in the loss

  // `weight` [M]: x.row_weight, or without it the upstream gradient of the rows' losses; nothing: 1
  SigmoidLoss(const Inputs& x, const Given& weight)
      : problem(x.image, x.text, form(x), 0.0),
        scale(number(x.scale)),
        bias(number(x.bias)),
        positives(!x.negative_only) {
    LogitMatrix& p = problem;
    STD_TORCH_CHECK(x.negative_only || p.rows == p.columns, "siglip: expected as many texts as images");
    p.masks(std::nullopt, x.image_ids, x.text_ids, std::nullopt);
    row_weight = padded(weight, ScalarType::Float, p.rows, p.rows, 1.0f);
    p.row_scale.assign(p.rows, scale);
    p.column_scale.assign(p.padded_columns, 1.0f);
    p.bias.assign(p.padded_columns, 0.0f);
    if (!x.normalize) return;
    c = measure(p.query);
    text_c = measure(p.key);
    for (int64_t i = 0; i < p.rows; ++i) p.row_scale[i] = static_cast<float>(static_cast<double>(scale) * c[i]);
    std::copy(text_c.begin(), text_c.end(), p.column_scale.begin());
  }

  Lengths images() const { return {problem.query, c.empty() ? nullptr : c.data()}; }
  Lengths texts() const { return {problem.key, text_c.empty() ? nullptr : text_c.data()}; }

 private:
  static Form form(const Inputs& x) {
    return {.diagonal = !x.negative_only, .bfloat16 = are_bfloat16(x.image, x.text)};
  }
  static float number(const Tensor& t) {
    STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == ScalarType::Float,
                    "siglip: expected one float32 scale and one bias");
    return input<float>(t)[0];
  }
  static std::vector<float> measure(const Tensor& x) {
    const auto kernels = contrastive_kernels();
    const int64_t width = x.size(1);
    const float* rows = input<float>(x);
    std::vector<float> to(x.size(0));
    each_row(x.size(0), width, [&](int64_t i) {
      to[i] = inverse_length(kernels.products(rows + i * width, rows + i * width, width).own);
    });
    return to;
  }
};

// Adds a b^T [a, n] to columns first .. of total [a, all], or begins with it.
void accumulate(const Tensor& a, const Tensor& b, Tensor& total, int64_t first, bool begins) {
  Tensor to = slice(total, 1, first, b.size(0));
  if (a.scalar_type() == ScalarType::BFloat16) {
    bf16_product(a, b, to, !begins);
    return;
  }
  const Tensor from = torch::stable::contiguous(product(a, b));
  if (begins) {
    torch::stable::copy_(to, from);
    return;
  }
  const float* more = input<float>(from);
  float* sums = output<float>(to);
  const int64_t n = to.size(1), row = to.stride(0);  // not in the loop: calls into torch
  const auto add = matmul_kernels().add;
  for_each(to.size(0), [&](int64_t d) { add(more + d * n, n, sums + d * row); });
}

// Grads, those that the forward saves too: all in float32, empty where they are not asked for.
struct Grads {
  Tensor image, text, scale, bias;
  template <typename F>
  void fields(const F& f) {
    f(image), f(text), f(scale), f(bias);
  }
};

struct Forward {
  Tensor loss;
  Grads saved;
  template <typename F>
  void fields(const F& f) {
    f(loss), f(saved);
  }
};

class Siglip {
 public:
  Siglip(SigmoidLoss& pairs, int64_t needs, double workspace_mib)
      : pairs_(pairs),
        p_(pairs.problem),
        contrastive_(contrastive_kernels()),
        matmul_(matmul_kernels()),
        kernels_(FASTLOSS_PICK(siglip_kernels())),
        needs_(needs),
        workspace_mib_(workspace_mib),
        loss_(p_.rows, 0.0),
        slope_(p_.rows, 0.0),
        of_row_(p_.rows, 0.0) {}

  Grads run() {
    const auto single = [&](std::vector<int64_t> shape) { return new_empty(p_.query, shape); };
    Grads to{single({needs_ & kImage ? p_.rows : 0, p_.width}), single({p_.width, needs_ & kText ? p_.columns : 0}),
             single({needs_ & kScaleAndBias ? 1 : 0}), single({needs_ & kScaleAndBias ? 1 : 0})};
    if (p_.empty()) {
      for (Tensor* t : {&to.image, &to.text}) torch::stable::zero_(*t);
    } else {
      const auto [height, width] = rectangle(p_, std::min(kGradientBlock, workspace_mib_ / 4), kWidest);
      const Tensor block = new_empty(p_.queries, {needs_ & kText ? height : 0, width});
      const Tensor panel = new_empty(p_.queries, {needs_ & kImage ? height : 0, kTerms});
      const int64_t deep = p_.narrow() ? height : kTerms;  // which cuts its sums itself
      for_pieces(p_.rows, height, [&, width = width](int64_t begin, int64_t m) {
        for_pieces(p_.columns, width, [&](int64_t first, int64_t n) {
          for_pieces(n, kTerms,
                     [&](int64_t c, int64_t some) { column_panel(begin, m, first + c, some, c, to, panel, block); });
          for_pieces(needs_ & kText ? m : 0, deep, [&](int64_t r, int64_t some) {
            const Tensor h = slice(slice(block, 0, r, some), 1, 0, n), images = slice(p_.queries, 0, begin + r, some);
            accumulate(flipped(images), flipped(h), to.text, first, begin + r == 0);
          });
        });
      });
    }
    if (needs_ == 0) {
      to.text = single({0, p_.width});
      return to;
    }
    if (needs_ & kScaleAndBias) {
      output<float>(to.bias)[0] = static_cast<float>(shared(slope_));
      output<float>(to.scale)[0] = static_cast<float>(scale_gradient());
    }
    if (needs_ & kImage) pairs_.images().put(0, to.image, to.image);
    Tensor text = single({needs_ & kText ? p_.columns : 0, p_.width});
    if (needs_ & kText) {
      torch::stable::copy_(text, flipped(to.text));
      pairs_.texts().put(0, text, text);
    }
    to.text = text;
    return to;
  }

  double row_loss(int64_t i) const { return loss_[i]; }
  double loss() const { return shared(loss_); }

 private:
  double shared(const std::vector<double>& rows) const {
    double total = 0;
    for (int64_t i = 0; i < p_.rows; ++i) total += pairs_.row_weight[i] * rows[i];
    return total;
  }

  double scale_gradient() const {
    double total = 0;
    for (int64_t i = 0; i < p_.rows; ++i) total += of_row_[i] * (pairs_.c.empty() ? 1.0f : pairs_.c[i]);
    return total;
  }

  // Rows begin .. and `n` columns first .., at most kTerms: their losses, H in a panel of its own, H text from that,
  // and H at column `at` of the block.
  void column_panel(int64_t begin, int64_t m, int64_t first, int64_t n, int64_t at, Grads& to, const Tensor& panel,
                    const Tensor& block) {
    const Tensor texts = slice(p_.keys, 0, first, n), raw = p_.raw(begin, m, first, n);
    const float* all_raw = input<float>(raw);
    const int64_t raw_pitch = raw.stride(0), panel_pitch = panel.size(1), block_pitch = block.size(1);
    for_each(blocks_of(m, kRows), [&](int64_t g) {
      for (int64_t r = g * kRows; r < std::min((g + 1) * kRows, m); ++r) {
        alignas(64) float h[kTerms];
        line(all_raw + r * raw_pitch, begin + r, first, n, needs_ ? h : nullptr);
        if (needs_ & kImage) put(h, n, panel, r * panel_pitch);
        if (needs_ & kText) put(h, n, block, r * block_pitch + at);
      }
    });
    if (!(needs_ & kImage)) return;
    Tensor rows = slice(to.image, 0, begin, m);
    accumulate(slice(slice(panel, 0, 0, m), 1, 0, n), flipped(texts), rows, 0, first == 0);
  }

  // One row of H to element `at` of a tensor of products' factors.
  void put(const float* h, int64_t n, const Tensor& to, int64_t at) const {
    if (p_.narrow())
      matmul_.narrow(h, n, output<BFloat16>(to) + at);
    else
      std::copy_n(h, n, output<float>(to) + at);
  }

  void line(const float* raw, int64_t i, int64_t first, int64_t n, float* to) {
    alignas(64) float s[kTerms], g[kTerms];
    p_.logits(contrastive_, raw, i, first, n, false, s);
    SigmoidSums sums = kernels_.row(s, n, pairs_.bias, pairs_.row_weight[i], to ? g : nullptr);
    if (pairs_.positives && i >= first && i < first + n) {
      const int64_t j = i - first;
      const double x = -(static_cast<double>(raw[j]) * p_.row_scale[i] * p_.column_scale[i] + pairs_.bias);
      const double e = std::exp(-std::abs(x)), slope = (x < 0 ? e : 1.0) / (1.0 + e);
      sums.loss += (x > 0 ? x : 0.0) + std::log1p(e);
      sums.slope -= slope;
      if (to) g[j] = static_cast<float>(-slope * pairs_.row_weight[i]);
    }
    loss_[i] += sums.loss;
    slope_[i] += sums.slope;
    if (to)
      of_row_[i] += contrastive_.finish(raw, g, n, p_.row_scale[i], &p_.column_scale[first], nullptr, nullptr, to);
  }

  const SigmoidLoss& pairs_;
  LogitMatrix& p_;
  const ContrastiveKernels contrastive_;
  const MatmulKernels matmul_;
  const SiglipKernels kernels_;
  const int64_t needs_;
  const double workspace_mib_;
  std::vector<double> loss_, slope_, of_row_;
};

Forward siglip_fwd(const Inputs& x) {
  SigmoidLoss pairs(x, x.row_weight);
  const bool reduced = x.row_weight.has_value();
  Siglip pass(pairs, reduced ? x.needs : 0, x.workspace_mib);
  const Grads grads = pass.run();
  const Tensor loss = reduced ? new_empty(x.scale, {}) : new_empty(x.scale, {x.image.size(0)});
  if (reduced)
    output<float>(loss)[0] = static_cast<float>(pass.loss());
  else
    for (int64_t i = 0; i < x.image.size(0); ++i) output<float>(loss)[i] = static_cast<float>(pass.row_loss(i));
  return {loss, grads};
}

Grads siglip_bwd(const Tensor& grad, const Inputs& x, const Grads& saved, const Needs& needs) {
  Grads grads = saved;
  float upstream = 1;
  if (x.row_weight.has_value()) {
    upstream = input<float>(torch::stable::contiguous(grad))[0];
  } else {
    SigmoidLoss pairs(x, grad);
    const int64_t bits = needs.image * kImage + needs.text * kText + (needs.scale || needs.bias) * kScaleAndBias;
    grads = Siglip(pairs, bits, x.workspace_mib).run();
  }
  const auto times = [upstream](const Tensor& from, const Tensor& like, bool needed) {
    return needed ? scaled(from, [upstream](int64_t) { return upstream; }, like) : new_empty(like, {0});
  };
  const auto number = [&](const Tensor& from, bool needed) {
    Tensor to = new_empty(x.scale, {needed ? 1 : 0});
    if (needed) output<float>(to)[0] = upstream * input<float>(from)[0];
    return to;
  };
  return {times(grads.image, x.image, needs.image), times(grads.text, x.text, needs.text),
          number(grads.scale, needs.scale), number(grads.bias, needs.bias)};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("siglip_fwd", FASTLOSS_BOX(&fastloss::siglip_fwd));
  m.impl("siglip_bwd", FASTLOSS_BOX(&fastloss::siglip_bwd));
}
