// The operators of matching on a GPU: contiguous [batch, size], inputs of one dtype, outputs float32.  Contracts:
// fewstep_cuda/score_difference.py; scalar mathematics: ../cpu/score_math.h, which the C++ kernels' tests cover.
//
// Two kernels: the first leaves the unscaled gap in the output and one partial sum a block in a buffer, the second adds
// a sample's partial sums, by every block in the same order, and scales.  No atomics: deterministic.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../cpu/score_math.h"

namespace {

constexpr int THREADS = 256;
constexpr int64_t SPAN = 4096;  // elements of a block; fewstep_cuda/cuda/score_difference.py has it too

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(__half value) { return __half2float(value); }
__device__ __forceinline__ float widened(__nv_bfloat16 value) { return __bfloat162float(value); }

// The sum over a block's threads, told to all of them.
template <typename Number>
__device__ Number added(Number value) {
  __shared__ Number warps[THREADS / 32];
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  __syncthreads();  // the last call's numbers have been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  Number sum = 0;
  for (int warp = 0; warp < THREADS / 32; ++warp) sum += warps[warp];
  return sum;
}

// Of a sample's partial sums, in double: as many as there are blocks.
__device__ double total(const float* partial, int64_t blocks) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < blocks; i += THREADS) sum += partial[i];
  return added(sum);
}

struct Place {
  int64_t sample, block, blocks, from, to;  // the block's elements in the whole array
};

__device__ Place place(int64_t size) {
  const int64_t sample = blockIdx.y, block = blockIdx.x, start = block * SPAN;
  const int64_t end = start + SPAN < size ? start + SPAN : size;
  return {sample, block, gridDim.x, sample * size + start, sample * size + end};
}

template <typename In>
__global__ void __launch_bounds__(THREADS)
    first_plain(const In* __restrict__ x, const In* __restrict__ real, const In* __restrict__ fake,
                float* __restrict__ gap, float* __restrict__ partial, int64_t size) {
  const Place at = place(size);
  float sum = 0.0f;
  for (int64_t i = at.from + threadIdx.x; i < at.to; i += THREADS) {
    const float r = widened(real[i]);
    gap[i] = widened(fake[i]) - r;
    sum += fabsf(widened(x[i]) - r);
  }
  sum = added(sum);
  if (threadIdx.x == 0) partial[at.sample * at.blocks + at.block] = sum;
}

template <typename In>
__global__ void __launch_bounds__(THREADS)
    first_raw(const In* __restrict__ x, const In* __restrict__ x_t, const In* __restrict__ fake,
              const In* __restrict__ cond, const In* __restrict__ uncond, const float* __restrict__ p,
              const float* __restrict__ q, float guidance, float* __restrict__ gap, float* __restrict__ partial,
              int64_t size) {
  const Place at = place(size);
  const float a = p[at.sample], b = q[at.sample];
  const bool guided = uncond != nullptr, shifted = a != 0.0f;
  float sum = 0.0f;
  for (int64_t i = at.from + threadIdx.x; i < at.to; i += THREADS) {
    const FsPair pair =
        fs_from_raw(widened(x[i]), shifted ? widened(x_t[i]) : 0.0f, widened(fake[i]), widened(cond[i]),
                    guided ? widened(uncond[i]) : 0.0f, a, b, guidance, guided, shifted);
    gap[i] = pair.gap;
    sum += fabsf(pair.behind);
  }
  sum = added(sum);
  if (threadIdx.x == 0) partial[at.sample * at.blocks + at.block] = sum;
}

template <typename In>
__global__ void __launch_bounds__(THREADS)
    squares(const In* __restrict__ g, float* __restrict__ partial, int64_t size) {
  const Place at = place(size);
  float sum = 0.0f;
  for (int64_t i = at.from + threadIdx.x; i < at.to; i += THREADS) {
    const float value = widened(g[i]);
    sum += value * value;
  }
  sum = added(sum);
  if (threadIdx.x == 0) partial[at.sample * at.blocks + at.block] = sum;
}

__global__ void __launch_bounds__(THREADS)
    scale(float* __restrict__ grad, const float* __restrict__ partial, float* __restrict__ weight,
          float* __restrict__ value, int64_t size, double floor, double share, float power, float half) {
  const Place at = place(size);
  const double n = fs_normaliser(total(partial + at.sample * at.blocks, at.blocks), size, floor);
  const float factor = fs_factor(n, share);
  float sum = 0.0f;
  for (int64_t i = at.from + threadIdx.x; i < at.to; i += THREADS) {
    const float g = grad[i] * factor;
    sum += g * g;
    grad[i] = g * power;
  }
  sum = added(sum);
  if (threadIdx.x == 0) {
    value[at.sample * at.blocks + at.block] = half * sum;
    if (at.block == 0) weight[at.sample] = static_cast<float>(1.0 / n);
  }
}

template <typename In>
__global__ void __launch_bounds__(THREADS)
    divide(const In* __restrict__ g, float* __restrict__ out, const float* __restrict__ partial,
           float* __restrict__ norm, int64_t size, double count, float c) {
  const Place at = place(size);
  const double square = total(partial + at.sample * at.blocks, at.blocks);
  const float root = static_cast<float>(sqrt(square / count));
  const float size_of = root + 0.0f * root;  // infinite -> NaN, as in the normaliser
  for (int64_t i = at.from + threadIdx.x; i < at.to; i += THREADS) out[i] = widened(g[i]) / (size_of + c);
  if (threadIdx.x == 0 && at.block == 0) norm[at.sample] = size_of;
}

dim3 grid(int64_t batch, int64_t size) { return dim3((size + SPAN - 1) / SPAN, batch); }

template <typename In>
void matching(const void* x, const void* real, const void* fake, float* gap, float* partial, int64_t batch,
              int64_t size, cudaStream_t stream) {
  first_plain<<<grid(batch, size), THREADS, 0, stream>>>(static_cast<const In*>(x), static_cast<const In*>(real),
                                                         static_cast<const In*>(fake), gap, partial, size);
}

template <typename In>
void matching_raw(const void* x, const void* x_t, const void* fake, const void* cond, const void* uncond,
                  const float* p, const float* q, float guidance, float* gap, float* partial, int64_t batch,
                  int64_t size, cudaStream_t stream) {
  first_raw<<<grid(batch, size), THREADS, 0, stream>>>(
      static_cast<const In*>(x), static_cast<const In*>(x_t), static_cast<const In*>(fake),
      static_cast<const In*>(cond), static_cast<const In*>(uncond), p, q, guidance, gap, partial, size);
}

template <typename In>
void normalise(const void* g, float* out, float* partial, float* norm, int64_t batch, int64_t size, double count,
               float c, cudaStream_t stream) {
  const In* given = static_cast<const In*>(g);
  squares<<<grid(batch, size), THREADS, 0, stream>>>(given, partial, size);
  divide<<<grid(batch, size), THREADS, 0, stream>>>(given, out, partial, norm, size, count, c);
}

// What went wrong since the last call, in words; null if nothing.
const char* problem() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

// kind: 0 float, 1 half, 2 bfloat16.  partial, value: a number for each block.  Each answers null or what went wrong.
extern "C" {

const char* fs_score_difference(int kind, const void* x, const void* real, const void* fake, float* gap,
                                float* partial, int64_t batch, int64_t size, cudaStream_t stream) {
  const auto run = kind == 0 ? matching<float> : kind == 1 ? matching<__half> : matching<__nv_bfloat16>;
  run(x, real, fake, gap, partial, batch, size, stream);
  return problem();
}

const char* fs_score_difference_from_raw(int kind, const void* x, const void* x_t, const void* fake, const void* cond,
                                         const void* uncond, const float* p, const float* q, double guidance,
                                         float* gap, float* partial, int64_t batch, int64_t size,
                                         cudaStream_t stream) {
  const auto run = kind == 0 ? matching_raw<float> : kind == 1 ? matching_raw<__half> : matching_raw<__nv_bfloat16>;
  run(x, x_t, fake, cond, uncond, p, q, guidance, gap, partial, batch, size, stream);
  return problem();
}

const char* fs_scale(float* grad, const float* partial, float* weight, float* value, int64_t batch, int64_t size,
                     double floor, double share, double power, double half, cudaStream_t stream) {
  scale<<<grid(batch, size), THREADS, 0, stream>>>(grad, partial, weight, value, size, floor, share, power, half);
  return problem();
}

const char* fs_tangent_normalise(int kind, const void* g, float* out, float* partial, float* norm, int64_t batch,
                                 int64_t size, double count, double c, cudaStream_t stream) {
  const auto run = kind == 0 ? normalise<float> : kind == 1 ? normalise<__half> : normalise<__nv_bfloat16>;
  run(g, out, partial, norm, batch, size, count, c, stream);
  return problem();
}

}  // extern "C"
