// The operators of matching, float32, contiguous [batch, size].  Contracts: fewstep_cuda/score_difference.py and
// its neighbours; scalar mathematics: score_math.h.
//
// Memory sets the pace.  Each input is read once: a first pass writes the unscaled gap into the output while it sums
// what the normaliser is made of, a second scales the output, which a group of few samples leaves in cache.
// Sums are of CHUNK elements each, in doubles over BLOCKs of float lanes, and added in order: the same bits for any
// number of threads.  Hot loops are functions of their own: inside a lambda they ran five times slower.
#include <cmath>
#include <cstdint>
#include <vector>

#include "score_math.h"

namespace {

constexpr int64_t CHUNK = 16384;    // elements of one thread's piece of work
constexpr int64_t BLOCK = 512;      // elements that are added in float
constexpr int64_t GROUP = 1 << 18;  // elements between the passes: 1 MiB, a core's second cache

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

double add(const double* parts, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += parts[i];
  return sum;
}

// First passes: write gap[0..count), return the sum of |behind|.

double first_plain(const float* __restrict x, const float* __restrict real, const float* __restrict fake,
                   float* __restrict gap, int64_t count) {
  double sum = 0.0;
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t end = least(start + BLOCK, count);
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = start; i < end; ++i) {
      gap[i] = fake[i] - real[i];
      part += std::fabs(x[i] - real[i]);
    }
    sum += part;
  }
  return sum;
}

template <bool guided, bool shifted>
double first_raw(const float* __restrict x, const float* __restrict x_t, const float* __restrict fake,
                 const float* __restrict cond, const float* __restrict uncond, float* __restrict gap, int64_t count,
                 float p, float q, float guidance) {
  double sum = 0.0;
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t end = least(start + BLOCK, count);
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = start; i < end; ++i) {
      const FsPair pair = fs_from_raw(x[i], shifted ? x_t[i] : 0.0f, fake[i], cond[i], guided ? uncond[i] : 0.0f, p, q,
                                      guidance, guided, shifted);
      gap[i] = pair.gap;
      part += std::fabs(pair.behind);
    }
    sum += part;
  }
  return sum;
}

// Second pass: grad = gap factor power in place; returns the sum of (gap factor)^2.
double scale(float* __restrict grad, int64_t count, float factor, float power) {
  double sum = 0.0;
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t end = least(start + BLOCK, count);
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = start; i < end; ++i) {
      const float g = grad[i] * factor;
      part += g * g;
      grad[i] = g * power;
    }
    sum += part;
  }
  return sum;
}

struct Plain {
  const float *x, *real, *fake;
  double operator()(float* gap, int64_t, int64_t at, int64_t count) const {
    return first_plain(x + at, real + at, fake + at, gap + at, count);
  }
};

struct Raw {
  const float *x, *x_t, *fake, *cond, *uncond, *p, *q;
  float guidance;
  double operator()(float* gap, int64_t sample, int64_t at, int64_t count) const {
    // Where p is 0 x_t takes no part: what is not finite in it must not.
    const auto first = uncond ? (p[sample] == 0 ? first_raw<true, false> : first_raw<true, true>)
                              : (p[sample] == 0 ? first_raw<false, false> : first_raw<false, true>);
    return first(x + at, x_t + at, fake + at, cond + at, uncond ? uncond + at : nullptr, gap + at, count, p[sample],
                 q[sample], guidance);
  }
};

template <class First>
void matching(const First& first, float* grad, float* weight, float* value, int64_t batch, int64_t size, double floor,
              double share, double power, int threads) {
  const int64_t chunks = (size + CHUNK - 1) / CHUNK;
  const int64_t group = GROUP / size > 0 ? GROUP / size : 1;
  std::vector<double> sums(batch * chunks);
  std::vector<float> factors(batch);
#pragma omp parallel num_threads(threads)
  for (int64_t start = 0; start < batch; start += group) {
    const int64_t end = least(start + group, batch);
#pragma omp for schedule(static)
    for (int64_t i = start * chunks; i < end * chunks; ++i) {
      const int64_t sample = i / chunks, at = i % chunks * CHUNK;
      sums[i] = first(grad, sample, sample * size + at, least(CHUNK, size - at));
    }
#pragma omp for schedule(static)
    for (int64_t sample = start; sample < end; ++sample) {
      const double n = fs_normaliser(add(&sums[sample * chunks], chunks), size, floor);
      weight[sample] = 1.0 / n;
      factors[sample] = fs_factor(n, share);
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = start * chunks; i < end * chunks; ++i) {
      const int64_t sample = i / chunks, at = i % chunks * CHUNK;
      sums[i] = scale(grad + sample * size + at, least(CHUNK, size - at), factors[sample], power);
    }
  }
  *value = 0.5 * share * share * add(sums.data(), batch * chunks) / (static_cast<double>(batch) * size);
}

// Two terms: writes both gaps, returns both sums.

struct Sums {
  double dm, ca;
};

Sums first_two(const float* __restrict x, const float* __restrict real, const float* __restrict fake,
               const float* __restrict cond, const float* __restrict uncond, float* __restrict gap,
               float* __restrict push, int64_t count) {
  Sums sums = {0.0, 0.0};
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t end = least(start + BLOCK, count);
    float dm = 0.0f, ca = 0.0f;
#pragma omp simd reduction(+ : dm, ca)
    for (int64_t i = start; i < end; ++i) {
      gap[i] = fake[i] - real[i];
      push[i] = uncond[i] - cond[i];
      dm += std::fabs(x[i] - real[i]);
      ca += std::fabs(x[i] - cond[i]);
    }
    sums.dm += dm;
    sums.ca += ca;
  }
  return sums;
}

Sums scale_two(float* __restrict grad, const float* __restrict push, int64_t count, float dm_factor, float ca_factor,
               float power) {
  Sums sums = {0.0, 0.0};
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t end = least(start + BLOCK, count);
    float dm = 0.0f, ca = 0.0f;
#pragma omp simd reduction(+ : dm, ca)
    for (int64_t i = start; i < end; ++i) {
      const float a = grad[i] * dm_factor, b = push[i] * ca_factor;
      dm += a * a;
      ca += b * b;
      grad[i] = (a + b) * power;
    }
    sums.dm += dm;
    sums.ca += ca;
  }
  return sums;
}

// SiD: writes d = real - fake and m = (real - x) - alpha d, returns the sums of |x - real| and d m.

struct Identity {
  double behind, product;
};

Identity first_identity(const float* __restrict x, const float* __restrict real, const float* __restrict fake,
                        float* __restrict d, float* __restrict m, int64_t count, float alpha) {
  Identity sums = {0.0, 0.0};
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t end = least(start + BLOCK, count);
    float behind = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : behind, product)
    for (int64_t i = start; i < end; ++i) {
      const FsIdentity found = fs_identity(x[i], real[i], fake[i], alpha);
      d[i] = found.d;
      m[i] = found.m;
      behind += std::fabs(found.away);
      product += found.d * found.m;
    }
    sums.behind += behind;
    sums.product += product;
  }
  return sums;
}

void scale_identity(float* __restrict x, float* __restrict real, float* __restrict fake, int64_t count, float alpha,
                    float rest, float factor, float power) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const FsGrads grads = fs_identity_grads(x[i] * factor, real[i] * factor, alpha, rest, power);
    x[i] = grads.x;
    real[i] = grads.real;
    fake[i] = grads.fake;
  }
}

double squares(const float* __restrict g, int64_t count) {
  double sum = 0.0;
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t end = least(start + BLOCK, count);
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = start; i < end; ++i) part += g[i] * g[i];
    sum += part;
  }
  return sum;
}

void divide(const float* __restrict g, float* __restrict out, int64_t count, float divisor) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = g[i] / divisor;
}

}  // namespace

extern "C" {

void fs_score_difference(const float* x, const float* real, const float* fake, float* grad, float* weight,
                         float* value, int64_t batch, int64_t size, double floor, double share, double power,
                         int threads) {
  matching(Plain{x, real, fake}, grad, weight, value, batch, size, floor, share, power, threads);
}

// uncond: null where there is none.  p, q: [batch].
void fs_score_difference_from_raw(const float* x, const float* x_t, const float* fake, const float* cond,
                                  const float* uncond, const float* p, const float* q, double guidance, float* grad,
                                  float* weight, float* value, int64_t batch, int64_t size, double floor, double share,
                                  double power, int threads) {
  const Raw first = {x, x_t, fake, cond, uncond, p, q, static_cast<float>(guidance)};
  matching(first, grad, weight, value, batch, size, floor, share, power, threads);
}

// weight: [2, batch]; value: [2]; dm, ca.
void fs_score_difference_two(const float* x, const float* real, const float* fake, const float* cond,
                             const float* uncond, double strength, float* grad, float* weight, float* value,
                             int64_t batch, int64_t size, double floor, double share, double power, int threads) {
  const int64_t chunks = (size + CHUNK - 1) / CHUNK;
  const int64_t group = GROUP / size > 0 ? GROUP / size : 1;
  std::vector<Sums> sums(batch * chunks);
  std::vector<float> factors(2 * batch), push(least(group, batch) * size);
#pragma omp parallel num_threads(threads)
  for (int64_t start = 0; start < batch; start += group) {
    const int64_t end = least(start + group, batch);
#pragma omp for schedule(static)
    for (int64_t i = start * chunks; i < end * chunks; ++i) {
      const int64_t sample = i / chunks, within = i % chunks * CHUNK, at = sample * size + within;
      sums[i] = first_two(x + at, real + at, fake + at, cond + at, uncond + at, grad + at,
                          push.data() + at - start * size, least(CHUNK, size - within));
    }
#pragma omp for schedule(static)
    for (int64_t sample = start; sample < end; ++sample) {
      double dm = 0.0, ca = 0.0;
      for (int64_t i = sample * chunks; i < (sample + 1) * chunks; ++i) dm += sums[i].dm, ca += sums[i].ca;
      const double n_dm = fs_normaliser(dm, size, floor), n_ca = fs_normaliser(ca, size, floor);
      weight[sample] = 1.0 / n_dm;
      weight[batch + sample] = 1.0 / n_ca;
      factors[2 * sample] = fs_factor(n_dm, share);
      factors[2 * sample + 1] = strength * fs_factor(n_ca, share);
    }
#pragma omp for schedule(static)
    for (int64_t i = start * chunks; i < end * chunks; ++i) {
      const int64_t sample = i / chunks, within = i % chunks * CHUNK, at = sample * size + within;
      sums[i] = scale_two(grad + at, push.data() + at - start * size, least(CHUNK, size - within),
                          factors[2 * sample], factors[2 * sample + 1], power);
    }
  }
  double dm = 0.0, ca = 0.0;
  for (const Sums& part : sums) dm += part.dm, ca += part.ca;
  const double scaled = 0.5 * share * share / (static_cast<double>(batch) * size);
  value[0] = scaled * dm;
  value[1] = scaled * ca;
}

void fs_score_identity(const float* x, const float* real, const float* fake, double alpha, float* value, float* weight,
                       float* grad_x, float* grad_real, float* grad_fake, int64_t batch, int64_t size, double floor,
                       double share, double power, int threads) {
  const int64_t chunks = (size + CHUNK - 1) / CHUNK;
  const int64_t group = GROUP / size > 0 ? GROUP / size : 1;
  std::vector<Identity> sums(batch * chunks);
  std::vector<float> factors(batch);
  std::vector<double> losses(batch);
#pragma omp parallel num_threads(threads)
  for (int64_t start = 0; start < batch; start += group) {
    const int64_t end = least(start + group, batch);
#pragma omp for schedule(static)
    for (int64_t i = start * chunks; i < end * chunks; ++i) {
      const int64_t sample = i / chunks, within = i % chunks * CHUNK, at = sample * size + within;
      sums[i] = first_identity(x + at, real + at, fake + at, grad_x + at, grad_real + at, least(CHUNK, size - within),
                               alpha);
    }
#pragma omp for schedule(static)
    for (int64_t sample = start; sample < end; ++sample) {
      double behind = 0.0, product = 0.0;
      for (int64_t i = sample * chunks; i < (sample + 1) * chunks; ++i) {
        behind += sums[i].behind;
        product += sums[i].product;
      }
      const double n = fs_normaliser(behind, size, floor);
      weight[sample] = 1.0 / n;
      factors[sample] = fs_factor(n, share);
      losses[sample] = product / size / n;
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = start * chunks; i < end * chunks; ++i) {
      const int64_t sample = i / chunks, within = i % chunks * CHUNK, at = sample * size + within;
      scale_identity(grad_x + at, grad_real + at, grad_fake + at, least(CHUNK, size - within), alpha, 1.0 - alpha,
                     factors[sample], power);
    }
  }
  *value = add(losses.data(), batch) / batch;
}

// mean: 1 for the root of the mean of squares, 0 for that of their sum.
void fs_tangent_normalise(const float* g, double c, int mean, float* out, float* norm, int64_t batch, int64_t size,
                          int threads) {
  const int64_t chunks = (size + CHUNK - 1) / CHUNK;
  const int64_t group = GROUP / size > 0 ? GROUP / size : 1;
  std::vector<double> sums(batch * chunks);
  std::vector<float> divisors(batch);
#pragma omp parallel num_threads(threads)
  for (int64_t start = 0; start < batch; start += group) {
    const int64_t end = least(start + group, batch);
#pragma omp for schedule(static)
    for (int64_t i = start * chunks; i < end * chunks; ++i) {
      const int64_t sample = i / chunks, within = i % chunks * CHUNK;
      sums[i] = squares(g + sample * size + within, least(CHUNK, size - within));
    }
#pragma omp for schedule(static)
    for (int64_t sample = start; sample < end; ++sample) {
      const double square = add(&sums[sample * chunks], chunks);
      const double root = std::sqrt(mean ? square / size : square);
      norm[sample] = root + 0.0 * root;  // infinite -> NaN, as in the normaliser
      divisors[sample] = norm[sample] + c;
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = start * chunks; i < end * chunks; ++i) {
      const int64_t sample = i / chunks, within = i % chunks * CHUNK, at = sample * size + within;
      divide(g + at, out + at, least(CHUNK, size - within), divisors[sample]);
    }
  }
}

}  // extern "C"
