// Tensors on torch's stable ABI: their elements and memory order, new ones, views, operands of any strides.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace fastloss {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls `body` with a value of the C++ type of the elements (float, bf16 or fp16).
template <typename Body>
auto for_dtype(ScalarType dtype, const char* op, const Body& body) {
  switch (dtype) {
    case ScalarType::Float: return body(float{});
    case ScalarType::BFloat16: return body(BFloat16{});
    case ScalarType::Half: return body(Half{});
    default: STD_TORCH_CHECK(false, op, ": expected float32, bfloat16 or float16 tensors"); return body(float{});
  }
}

template <typename T>
const T* input(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* output(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// torch.empty_like(t, dtype=dtype): in t's memory format.
inline Tensor empty_like(const Tensor& t, ScalarType dtype) {
  using torch::stable::detail::from;
  const std::optional<ScalarType> type = dtype;
  StableIValue stack[] = {from(t),           from(type), from(std::nullopt), from(std::nullopt), from(std::nullopt),
                          from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The dimensions of a dense tensor from the slowest to the fastest in memory, those of size 1 left out; nothing when
// the elements overlap or leave gaps.
inline std::optional<std::vector<int64_t>> memory_order(const Tensor& t) {
  std::vector<int64_t> order;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) order.push_back(d);
  if (t.numel() == 0) return order;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return t.stride(a) > t.stride(b); });
  int64_t expected = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    if (t.stride(*d) != expected) return std::nullopt;
    expected *= t.size(*d);
  }
  return order;
}

// Whether the elements lie densely with the last dimension or, with `channels_last`, dimension 1 as the fastest.
inline bool is_dense(const Tensor& t, bool channels_last) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i >= 0; --i) {
    const int64_t d = !channels_last || i == 0 ? i : i == t.dim() - 1 ? 1 : i + 1;
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// A float or bool operand of any strides (broadcast ones included), read as float32 in the memory order of another
// tensor of its shape, a stretch at a time: nothing is expanded or copied as a whole.
class Operand {
 public:
  Operand(const Tensor& t, const std::vector<int64_t>& order) : data_(t.const_data_ptr()), dtype_(t.scalar_type()) {
    const bool known = dtype_ == ScalarType::Float || dtype_ == ScalarType::Double || dtype_ == ScalarType::BFloat16 ||
                       dtype_ == ScalarType::Half || dtype_ == ScalarType::Bool;
    STD_TORCH_CHECK(known, "fastloss: expected a floating-point or bool operand");
    for (int64_t d : order) {
      if (!dims_.empty() && dims_.back().stride == t.stride(d) * t.size(d))
        dims_.back() = {dims_.back().size * t.size(d), t.stride(d)};
      else
        dims_.push_back({t.size(d), t.stride(d)});
    }
    if (dims_.empty()) dims_.push_back({1, 1});
  }

  // Elements position .. position + n; in place if they lie there as they should be, else in `buffer`.
  const float* read(int64_t position, int64_t n, float* buffer) const {
    switch (dtype_) {
      case ScalarType::Double: return gather(static_cast<const double*>(data_), position, n, buffer);
      case ScalarType::BFloat16: return gather(static_cast<const BFloat16*>(data_), position, n, buffer);
      case ScalarType::Half: return gather(static_cast<const Half*>(data_), position, n, buffer);
      case ScalarType::Bool: return gather(static_cast<const uint8_t*>(data_), position, n, buffer);
      default: return gather(static_cast<const float*>(data_), position, n, buffer);
    }
  }

 private:
  struct Dim {
    int64_t size, stride;
  };

  template <typename T>
  const float* gather(const T* data, int64_t position, int64_t n, float* buffer) const {
    const int64_t rank = static_cast<int64_t>(dims_.size());
    int64_t index[64];  // as many dimensions as a tensor can have
    for (int64_t d = rank - 1, rest = position; d >= 0; --d) {
      index[d] = rest % dims_[d].size;
      rest /= dims_[d].size;
      data += index[d] * dims_[d].stride;
    }
    const Dim last = dims_.back();
    if constexpr (std::is_same_v<T, float>)
      if (last.stride == 1 && index[rank - 1] + n <= last.size) return data;
    for (int64_t done = 0; done < n;) {
      const int64_t run = std::min(n - done, last.size - index[rank - 1]);
      if (last.stride == 0)
        std::fill_n(buffer + done, run, static_cast<float>(*data));
      else if (last.stride == 1)
        for (int64_t i = 0; i < run; ++i) buffer[done + i] = static_cast<float>(data[i]);
      else
        for (int64_t i = 0; i < run; ++i) buffer[done + i] = static_cast<float>(data[i * last.stride]);
      done += run;
      if (done == n) break;
      // a run ends where the last dimension does: back to its start, and one step of the next slower one
      data -= index[rank - 1] * last.stride;
      index[rank - 1] = 0;
      for (int64_t d = rank - 2; d >= 0; --d) {
        data += dims_[d].stride;
        if (++index[d] < dims_[d].size) break;
        data -= index[d] * dims_[d].stride;
        index[d] = 0;
      }
    }
    return buffer;
  }

  const void* data_;
  ScalarType dtype_;
  std::vector<Dim> dims_;
};

// Views of a matrix, past the dispatcher: a small loss makes dozens.
inline Tensor view_of(const Tensor& t, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides, int64_t offset) {
  AtenTensorHandle to = nullptr;
  // the offset is added to that of t
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes.data(), strides.data(), offset, &to));
  return Tensor(to);
}
inline Tensor slice(const Tensor& t, int64_t dim, int64_t begin, int64_t count) {
  if (begin == 0 && count == t.size(dim)) return t;
  std::array<int64_t, 2> sizes{t.size(0), t.size(1)};
  sizes[dim] = count;
  return view_of(t, sizes, {t.stride(0), t.stride(1)}, begin * t.stride(dim));
}
inline Tensor transposed(const Tensor& t) { return view_of(t, {t.size(1), t.size(0)}, {t.stride(1), t.stride(0)}, 0); }
// The tensor itself where it is contiguous, else a contiguous copy.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// New dense float32 tensors on the CPU: a matrix, a vector, a scalar.
inline Tensor new_float32(std::array<int64_t, 2> sizes) {
  const std::array<int64_t, 2> strides{std::max<int64_t>(sizes[1], 1), 1};
  AtenTensorHandle to = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes.data(), strides.data(), aoti_torch_dtype_float32(),
                                                  aoti_torch_device_type_cpu(), 0, &to));
  return Tensor(to);
}
inline Tensor new_float32(int64_t size) {
  AtenTensorHandle to = nullptr;
  const int64_t stride = 1;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &to));
  return Tensor(to);
}
inline Tensor new_float32() {
  AtenTensorHandle to = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(0, nullptr, nullptr, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &to));
  return Tensor(to);
}

}  // namespace fastloss
