// The op cuda_probe: out = 2 x of a dense float32 tensor. No loss uses it. It shows that the library of CUDA kernels is
// compiled for this GPU, linked against this torch, loaded, and runs on torch's current stream.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace fastloss {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;

__global__ void double_elements(const float* __restrict__ x /* [count] */, float* __restrict__ out /* [count] */,
                                int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) out[i] = 2 * x[i];
}

Tensor cuda_probe(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float && x.is_contiguous(),
                  "cuda_probe: expected a contiguous float32 tensor");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &stream));
  const auto blocks = static_cast<unsigned>((x.numel() + kThreads - 1) / kThreads);
  double_elements<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()), x.numel());
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "cuda_probe: ", cudaGetErrorString(error));
  return out;
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_FRAGMENT(fastloss, m) { m.def("cuda_probe(Tensor x) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(fastloss, CUDA, m) { m.impl("cuda_probe", TORCH_BOX(&fastloss::cuda_probe)); }
