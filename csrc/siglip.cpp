// Sigmoid loss of all pairs. The gradient of a pair needs nothing but its own logit, so it is made in the forward, block
// after block of a bounded workspace, and the products of a block with the embeddings follow at once.

#include "contrastive.h"

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

#define FASTLOSS_KERNELS "siglip_simd.h"
#include "each_isa.h"

namespace fastloss {
namespace {

using torch::stable::new_empty;
using Given = std::optional<Tensor>;

constexpr int64_t kImage = 1, kText = 2;  // bits of `needs`; 4: only the scales and the bias
constexpr double kGradientBlock = 64;     // MiB of a block of the products' gradient at most
constexpr int64_t kWidest = 16384;        // its columns at most

struct Pairs {
  Problem problem;
  std::vector<float> share;  // weights of the rows in the loss; empty: 1
  float bias;
  bool positives;

  Pairs(const Tensor& image, const Tensor& text, const Tensor& row_scale, const Given& column_scale,
        const Tensor& shift, const Given& row_ids, const Given& column_ids, const Given& weights, bool negative_only,
        bool bfloat16)
      : problem(image, text, std::string(negative_only ? "" : "diagonal") + (bfloat16 ? "+bfloat16" : ""), 0.0),
        positives(!negative_only) {
    STD_TORCH_CHECK(shift.numel() == 1 && shift.scalar_type() == ScalarType::Float,
                    "siglip: expected one float32 bias");
    STD_TORCH_CHECK(negative_only || problem.rows == problem.columns, "siglip: expected as many texts as images");
    problem.scales(row_scale, column_scale, std::nullopt);
    problem.masks(std::nullopt, row_ids, column_ids, std::nullopt);
    share = padded(weights, ScalarType::Float, problem.rows, problem.rows, 1.0f);
    bias = input<float>(shift)[0];
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
  const auto add = contrastive_kernels().add;
  for_each(to.size(0), [&](int64_t d) { add(more + d * n, n, sums + d * row); });
}

// Gradients, all in float32, empty where they are not asked for.
struct Gradients {
  Tensor image, text, row_scale, column_scale, bias;
};

class Siglip {
 public:
  Siglip(Pairs& pairs, int64_t needs, double workspace_mib)
      : pairs_(pairs),
        p_(pairs.problem),
        contrastive_(contrastive_kernels()),
        kernels_(FASTLOSS_PICK(siglip_kernels())),
        needs_(needs),
        workspace_mib_(workspace_mib),
        loss_(p_.rows, 0.0),
        slope_(p_.rows, 0.0),
        of_row_(p_.rows, 0.0),
        of_column_(p_.columns, 0.0) {}

  Gradients run() {
    const auto single = [&](std::vector<int64_t> shape) { return new_empty(p_.query, shape); };
    Gradients to{single({needs_ & kImage ? p_.rows : 0, p_.width}), single({p_.width, needs_ & kText ? p_.columns : 0}),
                 single({needs_ ? p_.rows : 0}), single({needs_ ? p_.columns : 0}), single({needs_ ? 1 : 0})};
    if (p_.empty()) {
      for (Tensor* t : {&to.image, &to.text}) torch::stable::zero_(*t);
    } else {
      const auto [height, width] = rectangle(p_, std::min(kGradientBlock, workspace_mib_ / 4), kWidest);
      const Tensor block = new_empty(p_.queries, {needs_ & kText ? height : 0, width});
      const Tensor panel = new_empty(p_.queries, {needs_ & kImage ? height : 0, kTerms});
      const int64_t deep = p_.narrow() ? height : kTerms;  // which cuts its sums itself
      for_pieces(p_.rows, height, [&, width = width](int64_t begin, int64_t m) {
        for_pieces(p_.columns, width, [&](int64_t first, int64_t n) {
          for_pieces(n, kTerms, [&](int64_t c, int64_t some) {
            column_panel(begin, m, first + c, some, c, to, panel, block);
          });
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
    output<float>(to.bias)[0] = static_cast<float>(shared(slope_));
    Tensor text = single({needs_ & kText ? p_.columns : 0, p_.width});
    if (needs_ & kText) torch::stable::copy_(text, flipped(to.text));
    to.text = text;
    for (int64_t i = 0; i < p_.rows; ++i) output<float>(to.row_scale)[i] = static_cast<float>(of_row_[i]);
    std::copy(of_column_.begin(), of_column_.end(), output<float>(to.column_scale));
    if (needs_ & kImage) along(p_.query, to.image, p_.row_scale, to.row_scale);
    if (needs_ & kText) along(p_.key, to.text, p_.column_scale, to.column_scale);
    return to;
  }

  double row_loss(int64_t i) const { return loss_[i]; }
  double loss() const { return shared(loss_); }

 private:
  double shared(const std::vector<double>& rows) const {
    double total = 0;
    for (int64_t i = 0; i < p_.rows; ++i) total += pairs_.share[i] * rows[i];
    return total;
  }

  // The gradient of embeddings' scales, <x, dx> / scale: its rounding errors are those of dx, so that the part of dx along
  // x, which the length takes away again, goes with its errors.
  void along(const Tensor& x, const Tensor& grad, const std::vector<float>& scale, Tensor& to) const {
    for_each(blocks_of(x.size(0), kRows), [&](int64_t block) {
      for (int64_t i = block * kRows; i < std::min((block + 1) * kRows, x.size(0)); ++i) {
        const float *one = input<float>(x) + i * p_.width, *two = input<float>(grad) + i * p_.width;
        double total = 0;
        for (int64_t d = 0; d < p_.width; ++d) total += static_cast<double>(one[d]) * two[d];
        output<float>(to)[i] = scale[i] == 0 ? 0.0f : static_cast<float>(total / scale[i]);
      }
    });
  }

  // Rows begin .. and `n` columns first .., at most kTerms: their losses, H in a panel of its own, H text from that, and
  // H at column `at` of the block.
  void column_panel(int64_t begin, int64_t m, int64_t first, int64_t n, int64_t at, Gradients& to, const Tensor& panel,
                    const Tensor& block) {
    const Tensor texts = slice(p_.keys, 0, first, n), raw = p_.raw(begin, m, first, n);
    const int64_t groups = blocks_of(m, kRows), width = (n + 15) / 16 * 16;
    std::vector<float> of_scale(needs_ ? groups * width : 0, 0.0f);
    for_each(groups, [&](int64_t g) {
      for (int64_t r = g * kRows; r < std::min((g + 1) * kRows, m); ++r) {
        alignas(64) float h[kTerms];
        line(input<float>(raw) + r * raw.stride(0), begin + r, first, n, needs_ ? &of_scale[g * width] : nullptr,
             needs_ ? h : nullptr);
        if (needs_ & kImage) put(h, n, panel, r * panel.size(1));
        if (needs_ & kText) put(h, n, block, r * block.size(1) + at);
      }
    });
    for (int64_t g = 0; needs_ && g < groups; ++g)
      for (int64_t j = 0; j < n; ++j) of_column_[first + j] += of_scale[g * width + j];
    if (!(needs_ & kImage)) return;
    Tensor rows = slice(to.image, 0, begin, m);
    accumulate(slice(slice(panel, 0, 0, m), 1, 0, n), flipped(texts), rows, 0, first == 0);
  }

  // One row of H to element `at` of a tensor of products' factors.
  void put(const float* h, int64_t n, const Tensor& to, int64_t at) const {
    if (p_.narrow())
      contrastive_.narrow(h, n, output<BFloat16>(to) + at);
    else
      std::copy_n(h, n, output<float>(to) + at);
  }

  void line(const float* raw, int64_t i, int64_t first, int64_t n, float* of_scale, float* to) {
    alignas(64) float s[kTerms], g[kTerms];
    p_.logits(contrastive_, raw, i, first, n, false, s);
    SigmoidSums sums = kernels_.row(s, n, pairs_.bias, pairs_.share[i], to ? g : nullptr);
    if (pairs_.positives && i >= first && i < first + n) {
      const int64_t j = i - first;
      const double x = -(static_cast<double>(raw[j]) * p_.row_scale[i] * p_.column_scale[i] + pairs_.bias);
      const double e = std::exp(-std::abs(x)), slope = (x < 0 ? e : 1.0) / (1.0 + e);
      sums.loss += (x > 0 ? x : 0.0) + std::log1p(e);
      sums.slope -= slope;
      if (to) g[j] = static_cast<float>(-slope * pairs_.share[i]);
    }
    loss_[i] += sums.loss;
    slope_[i] += sums.slope;
    if (to)
      of_row_[i] += contrastive_.finish(raw, g, n, p_.row_scale[i], &p_.column_scale[first], of_scale, nullptr, to);
  }

  const Pairs& pairs_;
  Problem& p_;
  const ContrastiveKernels contrastive_;
  const SiglipKernels kernels_;
  const int64_t needs_;
  const double workspace_mib_;
  std::vector<double> loss_, slope_, of_row_, of_column_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> siglip_fwd(
    const Tensor& image, const Tensor& text, const Tensor& row_scale, std::optional<Tensor> column_scale,
    const Tensor& bias, std::optional<Tensor> row_ids, std::optional<Tensor> column_ids, std::optional<Tensor> share,
    bool negative_only, int64_t needs, double workspace_mib, bool bfloat16) {
  Pairs pairs(image, text, row_scale, column_scale, bias, row_ids, column_ids, share, negative_only, bfloat16);
  Siglip pass(pairs, share.has_value() ? needs : 0, workspace_mib);
  const Gradients made = pass.run();
  if (share.has_value()) {
    Tensor loss = new_empty(row_scale, {});
    output<float>(loss)[0] = static_cast<float>(pass.loss());
    return {loss, made.image, made.text, made.row_scale, made.column_scale, made.bias};
  }
  Tensor losses = new_empty(row_scale, {image.size(0)});
  for (int64_t i = 0; i < image.size(0); ++i) output<float>(losses)[i] = static_cast<float>(pass.row_loss(i));
  return {losses, made.image, made.text, made.row_scale, made.column_scale, made.bias};
}

// factor * from in the dtype of `like`, or nothing
Tensor scaled(const Tensor& from, float factor, const Tensor& like, bool needed) {
  if (!needed) return new_empty(like, {0});
  Tensor to = empty_like(from, like.scalar_type());
  for_dtype(like.scalar_type(), "siglip", [&](auto element) {
    using T = decltype(element);
    const float* source = input<float>(from);  // not in the loop: a call into torch
    T* target = output<T>(to);
    for_blocks(from.numel(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) target[i] = static_cast<T>(factor * source[i]);
    });
  });
  return to;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> siglip_bwd(
    const Tensor& grad, const Tensor& image, const Tensor& text, const Tensor& row_scale,
    std::optional<Tensor> column_scale, const Tensor& bias, std::optional<Tensor> row_ids,
    std::optional<Tensor> column_ids, std::optional<Tensor> share, bool negative_only, int64_t needs,
    double workspace_mib, bool bfloat16, const Tensor& image_grad, const Tensor& text_grad, const Tensor& row_scale_grad,
    const Tensor& column_scale_grad, const Tensor& bias_grad, bool needs_image, bool needs_text, bool needs_row_scale,
    bool needs_column_scale, bool needs_bias) {
  Gradients made{image_grad, text_grad, row_scale_grad, column_scale_grad, bias_grad};
  float factor = 1;
  if (share.has_value()) {
    factor = input<float>(torch::stable::contiguous(grad))[0];
  } else {
    Pairs pairs(image, text, row_scale, column_scale, bias, row_ids, column_ids, grad, negative_only, bfloat16);
    made = Siglip(pairs, needs_image * kImage + needs_text * kText + 4, workspace_mib).run();
  }
  return {scaled(made.image, factor, image, needs_image), scaled(made.text, factor, text, needs_text),
          scaled(made.row_scale, factor, row_scale, needs_row_scale),
          scaled(made.column_scale, factor, row_scale, needs_column_scale),
          scaled(made.bias, factor, row_scale, needs_bias)};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("siglip_fwd", TORCH_BOX(&fastloss::siglip_fwd));
  m.impl("siglip_bwd", TORCH_BOX(&fastloss::siglip_bwd));
}
