// The operators of matching on a GPU: contiguous [batch, size], inputs of one dtype, outputs float32.  Contracts:
// fewstep_cuda/score_difference.py and its neighbours; scalar mathematics: ../cpu/score_math.h, which the C++ kernels'
// tests cover.
//
// Two kernels: the first leaves one partial sum a block in a buffer, the second adds a sample's partial sums, by every
// block in the same order, and scales the unscaled gap: what the first left in the output or, where an operator has
// more than one, what it reads again.  No atomics: deterministic.
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

struct Place {
  int64_t sample, block, blocks, from, to;  // the block's elements in the whole array

  // Which of [terms, samples] a term of this sample is.
  __device__ int64_t line(int term) const { return term * static_cast<int64_t>(gridDim.y) + sample; }
};

__device__ Place place(int64_t size) {
  const int64_t sample = blockIdx.y, block = blockIdx.x, start = block * SPAN;
  const int64_t end = start + SPAN < size ? start + SPAN : size;
  return {sample, block, gridDim.x, sample * size + start, sample * size + end};
}

// The block's sum of a term, into a buffer [terms, samples, blocks].
__device__ void put(float* buffer, const Place& at, int term, float value) {
  const float sum = added(value);
  if (threadIdx.x == 0) buffer[at.line(term) * at.blocks + at.block] = sum;
}

// The sum of a term's numbers of this sample, in double.
__device__ double total(const float* buffer, const Place& at, int term) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < at.blocks; i += THREADS) sum += buffer[at.line(term) * at.blocks + i];
  return added(sum);
}

// 1 / (n share) of this sample; its weight, 1 / n, is written.
__device__ float factor(const float* partial, float* weight, const Place& at, int term, int64_t size, double floor,
                        double share) {
  const double n = fs_normaliser(total(partial, at, term), size, floor);
  if (threadIdx.x == 0 && at.block == 0) weight[at.line(term)] = static_cast<float>(1.0 / n);
  return fs_factor(n, share);
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
  put(partial, at, 0, sum);
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
  put(partial, at, 0, sum);
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
  put(partial, at, 0, sum);
}

__global__ void __launch_bounds__(THREADS)
    scale(float* __restrict__ grad, const float* __restrict__ partial, float* __restrict__ weight,
          float* __restrict__ value, int64_t size, double floor, double share, float power, float half) {
  const Place at = place(size);
  const float by = factor(partial, weight, at, 0, size, floor, share);
  float sum = 0.0f;
  for (int64_t i = at.from + threadIdx.x; i < at.to; i += THREADS) {
    const float g = grad[i] * by;
    sum += g * g;
    grad[i] = g * power;
  }
  put(value, at, 0, half * sum);
}

// Sums of |x - real| and, where there are two terms, of |x - cond|.
template <typename In, bool two>
__global__ void __launch_bounds__(THREADS)
    apart(const In* __restrict__ x, const In* __restrict__ real, const In* __restrict__ cond,
          float* __restrict__ partial, int64_t size) {
  const Place at = place(size);
  float dm = 0.0f, ca = 0.0f;
  for (int64_t i = at.from + threadIdx.x; i < at.to; i += THREADS) {
    dm += fabsf(widened(x[i]) - widened(real[i]));
    if (two) ca += fabsf(widened(x[i]) - widened(cond[i]));
  }
  put(partial, at, 0, dm);
  if (two) put(partial, at, 1, ca);
}

template <typename In>
__global__ void __launch_bounds__(THREADS)
    scale_two(const In* __restrict__ real, const In* __restrict__ fake, const In* __restrict__ cond,
              const In* __restrict__ uncond, float strength, float* __restrict__ grad,
              const float* __restrict__ partial, float* __restrict__ weight, float* __restrict__ value, int64_t size,
              double floor, double share, float power, float half) {
  const Place at = place(size);
  const float dm_by = factor(partial, weight, at, 0, size, floor, share);
  const float ca_by = strength * factor(partial, weight, at, 1, size, floor, share);
  float dm = 0.0f, ca = 0.0f;
  for (int64_t i = at.from + threadIdx.x; i < at.to; i += THREADS) {
    const float a = (widened(fake[i]) - widened(real[i])) * dm_by;
    const float b = (widened(uncond[i]) - widened(cond[i])) * ca_by;
    dm += a * a;
    ca += b * b;
    grad[i] = (a + b) * power;
  }
  put(value, at, 0, half * dm);
  put(value, at, 1, half * ca);
}

template <typename In>
__global__ void __launch_bounds__(THREADS)
    scale_identity(const In* __restrict__ x, const In* __restrict__ real, const In* __restrict__ fake, float alpha,
                   float rest, float* __restrict__ grad_x, float* __restrict__ grad_real,
                   float* __restrict__ grad_fake, const float* __restrict__ partial, float* __restrict__ weight,
                   float* __restrict__ value, int64_t size, double floor, double share, float power) {
  const Place at = place(size);
  const float by = factor(partial, weight, at, 0, size, floor, share);
  float sum = 0.0f;
  for (int64_t i = at.from + threadIdx.x; i < at.to; i += THREADS) {
    const FsIdentity found = fs_identity(widened(x[i]), widened(real[i]), widened(fake[i]), alpha);
    const float d = found.d * by;  // before it meets m: their product alone may leave float
    sum += d * found.m;
    const FsGrads grads = fs_identity_grads(d, found.m * by, alpha, rest, power);
    grad_x[i] = grads.x;
    grad_real[i] = grads.real;
    grad_fake[i] = grads.fake;
  }
  put(value, at, 0, power * sum);
}

template <typename In>
__global__ void __launch_bounds__(THREADS)
    divide(const In* __restrict__ g, float* __restrict__ out, const float* __restrict__ partial,
           float* __restrict__ norm, int64_t size, double count, float c) {
  const Place at = place(size);
  const double square = total(partial, at, 0);
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
void matching_two(const void* x, const void* real, const void* fake, const void* cond, const void* uncond,
                  float strength, float* grad, float* partial, float* weight, float* value, int64_t batch,
                  int64_t size, double floor, double share, float power, float half, cudaStream_t stream) {
  const In *r = static_cast<const In*>(real), *c = static_cast<const In*>(cond);
  apart<In, true><<<grid(batch, size), THREADS, 0, stream>>>(static_cast<const In*>(x), r, c, partial, size);
  scale_two<<<grid(batch, size), THREADS, 0, stream>>>(r, static_cast<const In*>(fake), c,
                                                       static_cast<const In*>(uncond), strength, grad, partial, weight,
                                                       value, size, floor, share, power, half);
}

template <typename In>
void identity(const void* x, const void* real, const void* fake, double alpha, float* grad_x, float* grad_real,
              float* grad_fake, float* partial, float* weight, float* value, int64_t batch, int64_t size, double floor,
              double share, float power, cudaStream_t stream) {
  const In *from = static_cast<const In*>(x), *r = static_cast<const In*>(real);
  apart<In, false><<<grid(batch, size), THREADS, 0, stream>>>(from, r, nullptr, partial, size);
  scale_identity<<<grid(batch, size), THREADS, 0, stream>>>(from, r, static_cast<const In*>(fake), alpha, 1.0 - alpha,
                                                            grad_x, grad_real, grad_fake, partial, weight, value, size,
                                                            floor, share, power);
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

// kind: 0 float, 1 half, 2 bfloat16.  partial, value: [terms, batch, blocks]; weight: [terms, batch].  Each answers
// null or what went wrong.
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

const char* fs_score_difference_two(int kind, const void* x, const void* real, const void* fake, const void* cond,
                                    const void* uncond, double strength, float* grad, float* partial, float* weight,
                                    float* value, int64_t batch, int64_t size, double floor, double share,
                                    double power, double half, cudaStream_t stream) {
  const auto run = kind == 0 ? matching_two<float> : kind == 1 ? matching_two<__half> : matching_two<__nv_bfloat16>;
  run(x, real, fake, cond, uncond, strength, grad, partial, weight, value, batch, size, floor, share, power, half,
      stream);
  return problem();
}

const char* fs_score_identity(int kind, const void* x, const void* real, const void* fake, double alpha,
                              float* grad_x, float* grad_real, float* grad_fake, float* partial, float* weight,
                              float* value, int64_t batch, int64_t size, double floor, double share, double power,
                              cudaStream_t stream) {
  const auto run = kind == 0 ? identity<float> : kind == 1 ? identity<__half> : identity<__nv_bfloat16>;
  run(x, real, fake, alpha, grad_x, grad_real, grad_fake, partial, weight, value, batch, size, floor, share, power,
      stream);
  return problem();
}

const char* fs_tangent_normalise(int kind, const void* g, float* out, float* partial, float* norm, int64_t batch,
                                 int64_t size, double count, double c, cudaStream_t stream) {
  const auto run = kind == 0 ? normalise<float> : kind == 1 ? normalise<__half> : normalise<__nv_bfloat16>;
  run(g, out, partial, norm, batch, size, count, c, stream);
  return problem();
}

}  // extern "C"
