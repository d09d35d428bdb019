// What one element and one sample contribute to the operators of matching, for g++ and nvcc alike.
// Formulas and their sources: fewstep_cuda/score_difference.py, score_difference_two.py, score_identity.py.
#pragma once

#ifdef __CUDACC__
#define FS_HD __host__ __device__ __forceinline__
#else
#define FS_HD inline __attribute__((always_inline))
#endif

// behind = x - real, of which the normaliser is made; gap = fake - real, which it divides.
struct FsPair {
  float behind, gap;
};

// From what the networks answered.  guided: uncond takes part; shifted: x_t does (p is not 0).
FS_HD FsPair fs_from_raw(float x, float x_t, float fake, float cond, float uncond, float p, float q, float guidance,
                         bool guided, bool shifted) {
  const float real = guided ? uncond + guidance * (cond - uncond) : cond;
  const float behind = x - q * real;
  // x_t cancels in the gap before anything is rounded.
  return {shifted ? behind - p * x_t : behind, q * (fake - real)};
}

// SiD's d = real - fake and m = away - alpha d; away = real - x, of which the normaliser is made.
struct FsIdentity {
  float away, d, m;
};

FS_HD FsIdentity fs_identity(float x, float real, float fake, float alpha) {
  const float away = real - x, d = real - fake;
  return {away, d, away - alpha * d};
}

struct FsGrads {
  float x, real, fake;
};

// By each, from d and m by the factor below.  rest: 1 - alpha.
FS_HD FsGrads fs_identity_grads(float d, float m, float alpha, float rest, float power) {
  return {-d * power, (m + rest * d) * power, (alpha * d - m) * power};
}

// Of one sample, from the sum of |behind| over its `size` elements.  NaN stays NaN, as no comparison holds for it;
// infinity becomes NaN: dividing by it would make the gradient a silent zero.
FS_HD double fs_normaliser(double sum, double size, double floor) {
  const double mean = sum / size;
  const double n = mean < floor ? floor : mean;
  return n + 0.0 * n;
}

// 1 / (n numel) as factor * power, numel = share / power with a power of two: then a product with power is exact, and
// gap * factor neither under- nor overflows where gap / n does not.
FS_HD float fs_factor(double n, double share) { return static_cast<float>(1.0 / (n * share)); }
