// Sigmoid loss of all pairs, as siglip.py defines it. The gradient of a pair needs nothing but its own logit, so it is
// made in the forward, block after block of a bounded workspace, and the products of a block with the embeddings follow
// at once.

#include "contrastive/norms.h"
#include "core/isa.h"
#include "core/op.h"

namespace fastloss {
namespace {

struct SigmoidSums {
  double loss, slope_sum;
};
struct SiglipKernels {
  SigmoidSums (*row)(const float* s, int64_t n, float bias, float row_weight, float* g);
};

}  // namespace
}  // namespace fastloss

#define FASTLOSS_KERNELS "contrastive/siglip_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {
namespace {

using torch::stable::new_empty;

constexpr char kOp[] = "siglip";
constexpr int64_t kImage = 1, kText = 2, kScaleAndBias = 4;  // bits of `needs`, as in save_plan.py
constexpr double kGradientBlockMiB = 64;                     // a block of the products' gradient at most
constexpr int64_t kGradientBlockColumns = 16384;             // at most

struct Inputs {
  Tensor image, text, scale, bias;
  OptionalTensor image_ids, text_ids, image_shares, text_shares, row_weight;
  bool normalize, negative_only, soft_labels;
  int64_t needs;
  double workspace_mib;
  bool has_shares() const { return image_shares.has_value() && text_shares.has_value(); }
  bool has_diagonal() const { return !negative_only && !has_shares(); }
  FASTLOSS_FIELDS(image, text, scale, bias, image_ids, text_ids, image_shares, text_shares, row_weight, normalize,
                  negative_only, soft_labels, needs, workspace_mib)
};
struct Saved {
  Tensor image_grad, text_grad, scale_grad, bias_grad;
  FASTLOSS_FIELDS(image_grad, text_grad, scale_grad, bias_grad)
};
template <typename T>
struct PerInput {
  T image, text, scale, bias;
  FASTLOSS_FIELDS(image, text, scale, bias)
};
using Grads = PerInput<Tensor>;
using Needs = PerInput<bool>;

float number(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == ScalarType::Float, kOp, ": ", name,
                  ": expected one float32 number");
  return input<float>(t)[0];
}

// Which pairs have equal ids, and the shares of these. The texts are sorted, so that no pair is looked at for it.
class SharedGroups {
 public:
  SharedGroups(const LogitMatrix& p, const Inputs& x)
      : image_shares_(p.row_operand("image_shares", x.image_shares, 0.0f)),
        text_shares_(p.column_operand("text_shares", x.text_shares, 0.0f)),
        texts_(p.columns),
        ranges_(p.rows) {
    STD_TORCH_CHECK(x.image_ids.has_value() && x.text_ids.has_value(), kOp, ": image_ids: expected them with shares");
    const std::vector<int64_t> of_images = p.row_operand<int64_t>("image_ids", x.image_ids, 0);
    const std::vector<int64_t> of_texts = p.column_operand<int64_t>("text_ids", x.text_ids, 0);
    for (int64_t j = 0; j < p.columns; ++j) texts_[j] = {of_texts[j], j};
    std::sort(texts_.begin(), texts_.end());
    const auto first_from = [&](int64_t id, int64_t j) {
      return std::lower_bound(texts_.begin(), texts_.end(), std::pair(id, j));
    };
    for (int64_t i = 0; i < p.rows; ++i)
      ranges_[i] = {first_from(of_images[i], 0), first_from(of_images[i], p.columns)};
  }

  // Calls f(j, share) for the texts of image i's group among first .. first + n, in their order.
  template <typename F>
  void each(int64_t i, int64_t first, int64_t n, F&& f) const {
    const auto [begin, end] = ranges_[i];
    if (begin == end) return;
    for (auto at = std::lower_bound(begin, end, std::pair(begin->first, first)); at != end && at->second < first + n;
         ++at)
      f(at->second, image_shares_[i] + text_shares_[at->second]);
  }

 private:
  using Texts = std::vector<std::pair<int64_t, int64_t>>;
  std::vector<float> image_shares_, text_shares_;
  Texts texts_;                                                                  // (id, index), sorted
  std::vector<std::pair<Texts::const_iterator, Texts::const_iterator>> ranges_;  // of each image
};

struct SigmoidLoss {
  LogitMatrix p;  // its bias is 0: `bias` is added to the logits of both kinds of pairs
  const float scale, bias;
  const bool has_diagonal, soft_labels;
  std::optional<SharedGroups> groups;
  std::vector<float> image_inverse_norm, text_inverse_norm;  // empty: not normalised
  std::vector<float> row_weight;                             // of loss_i in the result

  // `weights` are those of `x`, or the upstream gradient of each loss_i.
  SigmoidLoss(const Inputs& x, const OptionalTensor& weights)
      : p(kOp, x.image, x.text, {.diagonal = x.has_diagonal(), .bfloat16 = are_bfloat16(x.image, x.text)}, 0, "image",
          "text"),
        scale(number("scale", x.scale)),
        bias(number("bias", x.bias)),
        has_diagonal(x.has_diagonal()),
        soft_labels(x.soft_labels),
        row_weight(p.row_operand(x.row_weight.has_value() ? "row_weight" : "grad", weights, 1.0f)) {
    STD_TORCH_CHECK(!has_diagonal || p.rows == p.columns, kOp, ": text: expected as many as images");
    if (x.has_shares()) {
      groups.emplace(p, x);
    } else if (x.image_ids.has_value() && x.text_ids.has_value()) {
      p.row_ids = p.row_operand<int64_t>("image_ids", x.image_ids, 0);
      p.column_ids = p.column_operand<int64_t>("text_ids", x.text_ids, 0);
    }
    p.row_scale.assign(p.rows, scale);
    p.column_scale.assign(p.padded_columns, 1.0f);
    if (!x.normalize) return;
    image_inverse_norm = inverse_norms(p.query);
    text_inverse_norm = inverse_norms(p.key);
    for (int64_t i = 0; i < p.rows; ++i)
      p.row_scale[i] = static_cast<float>(static_cast<double>(scale) * image_inverse_norm[i]);
    std::copy(text_inverse_norm.begin(), text_inverse_norm.end(), p.column_scale.begin());
  }

  Embeddings images() const { return {p.query, image_inverse_norm.empty() ? nullptr : image_inverse_norm.data()}; }
  Embeddings texts() const { return {p.key, text_inverse_norm.empty() ? nullptr : text_inverse_norm.data()}; }

 private:
  static std::vector<float> inverse_norms(const Tensor& x) {
    const auto kernels = contrastive_kernels();
    const int64_t dim = x.size(1);
    const float* rows = input<float>(x);
    std::vector<float> to(x.size(0));
    each_row(x.size(0), dim, [&](int64_t i) {
      to[i] = inverse_norm(kernels.square_and_dot(rows + i * dim, rows + i * dim, dim).square);
    });
    return to;
  }
};

// Adds a b^T [a, n] to columns first .. of sum [a, all], or begins with it.
void add_product(const Tensor& a, const Tensor& b, const Tensor& sum, int64_t first, bool begins) {
  Tensor to = slice(sum, 1, first, b.size(0));
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
  const int64_t n = to.size(1), stride = to.stride(0);  // not in the loop: calls into torch
  const auto add = matmul_kernels().add;
  for_each(to.size(0), [&](int64_t d) { add(more + d * n, n, sums + d * stride); });
}

// One pass over all pairs: the losses of rows, and the gradients that `needs` asks for.
class SigmoidPass {
 public:
  SigmoidPass(SigmoidLoss& loss, int64_t needs, double workspace_mib)
      : loss_(loss),
        p_(loss.p),
        contrastive_(contrastive_kernels()),
        matmul_(matmul_kernels()),
        kernels_(FASTLOSS_PICK(siglip_kernels())),
        needs_image_(needs & kImage),
        needs_text_(needs & kText),
        needs_numbers_(needs & kScaleAndBias),
        workspace_mib_(workspace_mib),
        row_loss_(p_.rows, 0.0),
        slope_sum_(p_.rows, 0.0),
        row_scale_grad_(p_.rows, 0.0) {}

  // The gradients, all in float32, empty where they are not asked for.
  Saved run() {
    image_grad_ = new_float32({needs_image_ ? p_.rows : 0, p_.dim});
    transposed_text_grad_ = new_float32({p_.dim, needs_text_ ? p_.columns : 0});
    if (p_.empty()) {
      torch::stable::zero_(image_grad_);
      torch::stable::zero_(transposed_text_grad_);
    } else {
      add_blocks();
    }
    const int64_t numbers = needs_numbers_ ? 1 : 0;
    Saved grads{image_grad_, new_float32({needs_text_ ? p_.columns : 0, p_.dim}), new_float32(numbers),
                new_float32(numbers)};
    if (needs_numbers_) {
      output<float>(grads.bias_grad)[0] = static_cast<float>(weighted(slope_sum_));
      output<float>(grads.scale_grad)[0] = static_cast<float>(scale_grad());
    }
    if (needs_image_) loss_.images().write_grad(0, grads.image_grad, grads.image_grad);
    if (needs_text_) {
      torch::stable::copy_(grads.text_grad, transposed(transposed_text_grad_));
      loss_.texts().write_grad(0, grads.text_grad, grads.text_grad);
    }
    return grads;
  }

  double row_loss(int64_t i) const { return row_loss_[i]; }
  double loss() const { return weighted(row_loss_); }

 private:
  double weighted(const std::vector<double>& rows) const {
    double sum = 0;
    for (int64_t i = 0; i < p_.rows; ++i) sum += loss_.row_weight[i] * rows[i];
    return sum;
  }

  double scale_grad() const {
    const std::vector<float>& inverse_norm = loss_.image_inverse_norm;
    double sum = 0;
    for (int64_t i = 0; i < p_.rows; ++i) sum += row_scale_grad_[i] * (inverse_norm.empty() ? 1.0f : inverse_norm[i]);
    return sum;
  }

  void add_blocks() {
    const auto [block_rows, block_columns] =
        block_size(p_, std::min(kGradientBlockMiB, workspace_mib_ / 4), kGradientBlockColumns);
    const Tensor block = new_empty(p_.query_factor, {needs_text_ ? block_rows : 0, block_columns});
    const Tensor panel = new_empty(p_.query_factor, {needs_image_ ? block_rows : 0, kTerms});
    const int64_t terms = p_.in_bfloat16() ? block_rows : kTerms;  // products in bfloat16 cut their sums themselves
    for_pieces(p_.rows, block_rows, [&, block_columns = block_columns](int64_t begin, int64_t m) {
      for_pieces(p_.columns, block_columns, [&](int64_t first, int64_t n) {
        for_pieces(n, kTerms, [&](int64_t column, int64_t columns) {
          add_columns(begin, m, first + column, columns, column, panel, block);
        });
        for_pieces(needs_text_ ? m : 0, terms, [&](int64_t row, int64_t rows) {
          const Tensor h = slice(slice(block, 0, row, rows), 1, 0, n);
          const Tensor images = slice(p_.query_factor, 0, begin + row, rows);
          add_product(transposed(images), transposed(h), transposed_text_grad_, first, begin + row == 0);
        });
      });
    });
  }

  // Rows begin .. and n <= kTerms columns first ..: their losses, H in `panel`, which is multiplied by the texts at
  // once, and H from column `offset` of `block` on.
  void add_columns(int64_t begin, int64_t m, int64_t first, int64_t n, int64_t offset, const Tensor& panel,
                   const Tensor& block) {
    const Tensor texts = slice(p_.key_factor, 0, first, n), raw = p_.products(begin, m, first, n);
    const float* all_raw = input<float>(raw);
    const int64_t raw_stride = raw.stride(0), panel_stride = panel.size(1), block_stride = block.size(1);
    for_each(blocks_of(m, kTileRows), [&](int64_t g) {
      for (int64_t r = g * kTileRows; r < std::min((g + 1) * kTileRows, m); ++r) {
        alignas(64) float h[kTerms];
        add_row(all_raw + r * raw_stride, begin + r, first, n, needs_any() ? h : nullptr);
        if (needs_image_) put(h, n, panel, r * panel_stride);
        if (needs_text_) put(h, n, block, r * block_stride + offset);
      }
    });
    if (!needs_image_) return;
    add_product(slice(slice(panel, 0, 0, m), 1, 0, n), transposed(texts), slice(image_grad_, 0, begin, m), 0,
                first == 0);
  }

  // Writes part of a row of H to a factor of products, from this element on.
  void put(const float* h, int64_t n, const Tensor& to, int64_t offset) const {
    if (p_.in_bfloat16())
      matmul_.narrow(h, n, output<BFloat16>(to) + offset);
    else
      std::copy_n(h, n, output<float>(to) + offset);
  }

  // Row i, n columns from `first` on: their losses and, where it is not null, H in `to`.
  void add_row(const float* raw, int64_t i, int64_t first, int64_t n, float* to) {
    alignas(64) float s[kTerms], g[kTerms];
    p_.logits(contrastive_, raw, i, first, n, false, s);
    if (loss_.groups)
      loss_.groups->each(i, first, n,
                         [&](int64_t j, float) { s[j - first] = -std::numeric_limits<float>::infinity(); });
    SigmoidSums sums = kernels_.row(s, n, loss_.bias, loss_.row_weight[i], to ? g : nullptr);
    const auto add_positive = [&](int64_t column, double share, double rest) {
      const int64_t j = column - first;
      const double x = -(static_cast<double>(raw[j]) * p_.row_scale[i] * p_.column_scale[column] + loss_.bias);
      const double e = std::exp(-std::abs(x)), slope = (x < 0 ? e : 1.0) / (1.0 + e), both = share + rest;
      sums.loss += both * ((x > 0 ? x : 0.0) + std::log1p(e)) - (rest == 0 ? 0.0 : rest * x);
      sums.slope_sum += rest - both * slope;
      if (to) g[j] = static_cast<float>((rest - both * slope) * loss_.row_weight[i]);
    };
    if (loss_.has_diagonal && i >= first && i < first + n) add_positive(i, 1, 0);
    if (loss_.groups)
      loss_.groups->each(i, first, n,
                         [&](int64_t j, double share) { add_positive(j, share, loss_.soft_labels ? 1 - share : 0.0); });
    row_loss_[i] += sums.loss;
    slope_sum_[i] += sums.slope_sum;
    if (to)
      row_scale_grad_[i] +=
          contrastive_.grad_raw(raw, g, n, p_.row_scale[i], &p_.column_scale[first], nullptr, nullptr, to);
  }

  bool needs_any() const { return needs_image_ || needs_text_ || needs_numbers_; }

  const SigmoidLoss& loss_;
  LogitMatrix& p_;
  const ContrastiveKernels contrastive_;
  const MatmulKernels matmul_;
  const SiglipKernels kernels_;
  const bool needs_image_, needs_text_, needs_numbers_;
  const double workspace_mib_;
  Tensor image_grad_, transposed_text_grad_;
  std::vector<double> row_loss_, slope_sum_, row_scale_grad_;
};

std::tuple<Tensor, Saved> siglip_fwd(const Inputs& x) {
  SigmoidLoss loss(x, x.row_weight);
  const bool reduced = x.row_weight.has_value();
  SigmoidPass pass(loss, reduced ? x.needs : 0, x.workspace_mib);
  const Saved saved = pass.run();
  const Tensor out = reduced ? new_float32() : new_float32(loss.p.rows);
  if (reduced) output<float>(out)[0] = static_cast<float>(pass.loss());
  for (int64_t i = 0; i < (reduced ? 0 : loss.p.rows); ++i)
    output<float>(out)[i] = static_cast<float>(pass.row_loss(i));
  return {out, saved};
}

Grads siglip_bwd(const Tensor& grad, const Inputs& x, const Saved& saved, const Needs& needs) {
  Saved grads = saved;
  float weight = 1;
  if (x.row_weight.has_value()) {
    weight = input<float>(as_contiguous(grad))[0];
  } else {
    SigmoidLoss loss(x, grad);
    const int64_t bits = needs.image * kImage + needs.text * kText + (needs.scale || needs.bias) * kScaleAndBias;
    grads = SigmoidPass(loss, bits, x.workspace_mib).run();
  }
  const auto rows = [&](const Tensor& from, const Tensor& like, bool needed) {
    return needed ? scaled_rows(from, [&](int64_t) { return weight; }, like) : new_empty(like, {0});
  };
  const auto number = [&](const Tensor& from, bool needed) {
    const Tensor to = new_float32(needed ? 1 : 0);
    if (needed) output<float>(to)[0] = weight * input<float>(from)[0];
    return to;
  };
  return {rows(grads.image_grad, x.image, needs.image), rows(grads.text_grad, x.text, needs.text),
          number(grads.scale_grad, needs.scale), number(grads.bias_grad, needs.bias)};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("siglip_fwd", FASTLOSS_BOX(&fastloss::siglip_fwd));
  m.impl("siglip_bwd", FASTLOSS_BOX(&fastloss::siglip_bwd));
}
