// Attention and its tangent in one pass over the keys, float32: see fewstep_cuda/attention_jvp.py for the contract.
//
// A task is a block of query rows of one head.  For each block of keys it computes the scores transposed, S^T and tS^T
// [key][row], so that rows lie in the lanes of a vector: maxima and sums over keys need no shuffles, keys are read as
// they lie in memory, and only the few queries are transposed.  Then, with P = exp(S - m) and H = P (tS - mu),
//   l += P 1,  O += P v,  G += H v + P tv      (all rescaled when the maximum m grows)
//   o = O / l,  to = G / l
// H is taken about the mean so far, mu, which the tangent allows, and G moves with it: G -= (mu' - mu) O.  Taken about
// 0, as G / l - mu o, it would cancel where tS is large.  What rounding leaves of H's own mean, r / l, comes off last.
// Both steps are the same product: s += a x, t += b x + a y, with (a, b, x, y) = (k, tk, q, tq) or (P, H, v, tv).

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, WIDE = 3;            // vectors of rows that are worked on at a time
constexpr int HEIGHT[WIDE + 1] = {0, 8, 6, 4};  // by width; 2 width height accumulators leave room in 32 registers
constexpr int ROWS = 48;
#elif defined(__AVX2__)
constexpr int LANES = 8, WIDE = 2;
constexpr int HEIGHT[WIDE + 1] = {0, 4, 2};  // of 16 registers
constexpr int ROWS = 32;
#else
constexpr int LANES = 4, WIDE = 2;
constexpr int HEIGHT[WIDE + 1] = {0, 4, 2};
constexpr int ROWS = 32;
#endif
constexpr int KEYS = 64;  // in a block: the probabilities of one, twice 12 kB, stay in the first cache

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Loose*>(to) = value; }
inline Vector all(float value) { return value - Vector{}; }

// Relative error 1e-7 for x <= 0; 0 below -87.3, where float32's normal numbers end.
inline Vector exponential(Vector x) {
  const Vector magic = all(12582912.0f);  // 1.5 2^23: adding it rounds to an integer, in the low bits
  const Vector shifted = x * 1.44269504088896341f + magic;
  const Vector n = shifted - magic;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vector e = (Vector)((Integers)p + ((Integers)shifted << 23));
  return x < -87.3f ? Vector{} : e;
}

struct Operand {  // [B, H, length, size], the last dimension contiguous; strides in elements
  float* data;
  int64_t sample, head, row;
  float* at(int64_t b, int64_t h, int64_t n) const { return data + b * sample + h * head + n * row; }
};

struct Job {  // filled by attention_jvp.py, in this order
  Operand q, k, v, tq, tk, tv, o, to;
  float *lse, *mu;                       // [B, Hq, N]
  const void* mask;                      // null, or [B, Hq, N, M] by its strides
  int64_t additive;                      // mask: 0 = bool, 1 = float
  int64_t ms, mh, mn, mm;                // strides of the mask
  int64_t samples, heads, groups, n, m;  // B, Hq, Hk, N, M
  int64_t d, dv, causal;
};

// s[r][c] += a_r x_c and t[r][c] += b_r x_c + a_r y_c over the steps; `use` then takes them.
template <int R, int C, bool B, bool Y, class Use>
inline __attribute__((always_inline)) void product(
    const float* __restrict a, int64_t a_row, int64_t a_step, const float* __restrict b, int64_t b_row,
    int64_t b_step, const float* __restrict x, int64_t x_step, const float* __restrict y, int64_t y_step, int steps,
    const Use& use) {
  Vector s[R][C] = {}, t[R][C] = {};
  for (int step = 0; step < steps; ++step) {
    Vector xs[C], ys[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      xs[c] = load(x + c * LANES);
      if (Y) ys[c] = load(y + c * LANES);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector ar = all(a[r * a_row]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        s[r][c] += ar * xs[c];
        if (Y) t[r][c] += ar * ys[c];
      }
      if (B) {
        const Vector br = all(b[r * b_row]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) t[r][c] += br * xs[c];
      }
    }
    a += a_step;
    if (B) b += b_step;
    x += x_step;
    if (Y) y += y_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) use(r, c, s[r][c], t[r][c]);
  }
}

struct Scores {  // where a product of keys and queries goes
  float *s, *t;
  void operator()(int r, int c, Vector value, Vector moved) const {
    store(s + r * ROWS + c * LANES, value);
    if (t) store(t + r * ROWS + c * LANES, moved);
  }
};

struct Sums {  // where a product of probabilities and values goes: onto what is there, about the new mean and rescaled
  float *o, *g;
  int64_t row;
  const float *scale, *step;  // null: nothing is there yet
  void operator()(int r, int c, Vector value, Vector moved) const {
    float *to = o + r * row + c * LANES, *tg = g + r * row + c * LANES;
    if (g) store(tg, scale ? (load(tg) - step[r] * load(to)) * scale[r] + moved : moved);
    store(to, scale ? load(to) * scale[r] + value : value);
  }
};

template <int R, int C, bool B, bool Y>
void scores(const float* k, int64_t k_row, const float* tk, int64_t tk_row, const float* q, const float* tq, int steps,
            Scores to) {
  product<R, C, B, Y>(k, k_row, 1, tk, tk_row, 1, q, ROWS, tq, ROWS, steps, to);
}

template <int C, bool B, bool Y>
void scores_of(int keys, const float* k, int64_t k_row, const float* tk, int64_t tk_row, const float* q,
               const float* tq, int steps, Scores to) {
  constexpr int R = HEIGHT[C];
  for (int j = 0; j < keys;) {
    const float *kj = k + j * k_row, *tkj = B ? tk + j * tk_row : nullptr;
    const Scores here{to.s + j * ROWS, B || Y ? to.t + j * ROWS : nullptr};
    const int left = keys - j;
    if (left >= R) {
      scores<R, C, B, Y>(kj, k_row, tkj, tk_row, q, tq, steps, here), j += R;
    } else if (left >= 2) {
      scores<2, C, B, Y>(kj, k_row, tkj, tk_row, q, tq, steps, here), j += 2;
    } else {
      scores<1, C, B, Y>(kj, k_row, tkj, tk_row, q, tq, steps, here), j += 1;
    }
  }
}

template <int R, int C, bool B, bool Y>
void sums(const float* p, const float* h, const float* v, int64_t v_row, const float* tv, int64_t tv_row, int keys,
          Sums to) {
  product<R, C, B, Y>(p, 1, ROWS, h, 1, ROWS, v, v_row, tv, tv_row, keys, to);
}

template <int C, bool B, bool Y>
void sums_of(int rows, const float* p, const float* h, const float* v, int64_t v_row, const float* tv, int64_t tv_row,
             int keys, Sums to) {
  constexpr int R = HEIGHT[C];
  for (int i = 0; i < rows;) {
    const float* hi = B ? h + i : nullptr;
    const Sums here{to.o + i * to.row, B || Y ? to.g + i * to.row : nullptr, to.row, to.scale ? to.scale + i : nullptr,
                    to.step + i};
    const int left = rows - i;
    if (left >= R) {
      sums<R, C, B, Y>(p + i, hi, v, v_row, tv, tv_row, keys, here), i += R;
    } else if (left >= 2) {
      sums<2, C, B, Y>(p + i, hi, v, v_row, tv, tv_row, keys, here), i += 2;
    } else {
      sums<1, C, B, Y>(p + i, hi, v, v_row, tv, tv_row, keys, here), i += 1;
    }
  }
}

// Calls f<C> for as many vectors as there are, at most WIDE at a time.
#define BY_WIDTH(count, f)                              \
  for (int at = 0; at < (count);) {                     \
    const int left = (count) - at;                      \
    if (WIDE >= 3 && left >= 3) f(WIDE), at += WIDE;    \
    else if (left >= 2) f(2), at += 2;                  \
    else f(1), at += 1;                                 \
  }

struct Scratch {
  float *q, *tq;         // [D][ROWS], scaled
  float *p, *h;          // [KEYS][ROWS]
  float *v, *tv;         // [KEYS][width], where the values do not fill vectors
  float *o, *g;          // [ROWS][width]
  float *m, *l, *r, *a, *mu, *step;  // [ROWS]
  int width;             // Dv in whole vectors
};

int64_t scratch_floats(const Job& job, int width) {
  return 2 * job.d * ROWS + 2 * KEYS * ROWS + 2 * KEYS * width + 2 * ROWS * width + 6 * ROWS;
}

Scratch parted(float* from, const Job& job, int width) {
  Scratch s;
  s.width = width;
  s.q = from, from += job.d * ROWS;
  s.tq = from, from += job.d * ROWS;
  s.p = from, from += KEYS * ROWS;
  s.h = from, from += KEYS * ROWS;
  s.v = from, from += KEYS * width;
  s.tv = from, from += KEYS * width;
  s.o = from, from += ROWS * width;
  s.g = from, from += ROWS * width;
  s.m = from, from += ROWS;
  s.l = from, from += ROWS;
  s.r = from, from += ROWS;
  s.a = from, from += ROWS;
  s.mu = from, from += ROWS;
  s.step = from;
  return s;
}

void transposed(const float* from, int64_t row, int count, int width, int64_t size, float scale, float* to) {
  for (int64_t d = 0; d < size; ++d) {
    for (int i = 0; i < count; ++i) to[d * ROWS + i] = scale * from[i * row + d];
    for (int i = count; i < width; ++i) to[d * ROWS + i] = 0;
  }
}

const float* padded(const float* from, int64_t* row, int count, int64_t size, int width, float* to) {
  if (size == width || !from) return from;
  for (int j = 0; j < count; ++j) {
    std::memcpy(to + j * width, from + j * *row, size * sizeof(float));
    for (int d = static_cast<int>(size); d < width; ++d) to[j * width + d] = 0;
  }
  *row = width;
  return to;
}

void masked(const Job& job, int64_t b, int64_t h, int64_t first, int count, int64_t key, int keys, float* s) {
  const int64_t base = b * job.ms + h * job.mh + first * job.mn + key * job.mm;
  if (job.mask && job.additive) {
    const float* mask = static_cast<const float*>(job.mask) + base;
    for (int j = 0; j < keys; ++j)
      for (int i = 0; i < count; ++i) s[j * ROWS + i] += mask[i * job.mn + j * job.mm];
  } else if (job.mask) {
    const unsigned char* mask = static_cast<const unsigned char*>(job.mask) + base;
    for (int j = 0; j < keys; ++j) {
      if (job.mn == 0) {  // padding: one answer for all rows
        if (!mask[j * job.mm])
          for (int i = 0; i < count; ++i) s[j * ROWS + i] = -INFINITY;
        continue;
      }
      for (int i = 0; i < count; ++i) s[j * ROWS + i] = mask[i * job.mn + j * job.mm] ? s[j * ROWS + i] : -INFINITY;
    }
  }
  if (job.causal)
    for (int j = 0; j < keys; ++j)
      for (int64_t i = 0; i < key + j - first && i < count; ++i) s[j * ROWS + i] = -INFINITY;
}

// S -> P and tS -> H in place; m, l, r, mu move on; a: what the sums so far are worth; step: of mu.
void probabilities(int vectors, int keys, bool moved, const Scratch& w) {
  for (int c = 0; c < vectors; ++c) {
    const int at = c * LANES;
    const Vector before = load(w.m + at);
    Vector top = before;
    for (int j = 0; j < keys; ++j) {
      const Vector s = load(w.p + j * ROWS + at);
      top = s > top ? s : top;
    }
    const Vector base = top == -INFINITY ? Vector{} : top;  // no key yet: exp(-inf - 0) = 0
    const Vector worth = exponential(before - base);
    const Vector mu = load(w.mu + at), l_before = load(w.l + at), r_before = load(w.r + at);
    Vector l = {}, r = {};
    for (int j = 0; j < keys; ++j) {
      float* pj = w.p + j * ROWS + at;
      const Vector p = exponential(load(pj) - base);
      store(pj, p);
      l += p;
      // Where P is 0 the score's tangent must not matter, were it infinite.
      if (moved) r += p == 0.0f ? Vector{} : p * (load(w.h + j * ROWS + at) - mu);
    }
    l += l_before * worth;
    store(w.m + at, top);
    store(w.a + at, worth);
    store(w.l + at, l);
    if (!moved) continue;
    const Vector step = l == 0.0f ? Vector{} : (r + r_before * worth) / l, centre = mu + step;
    r = (r_before - step * l_before) * worth;
    for (int j = 0; j < keys; ++j) {
      float* hj = w.h + j * ROWS + at;
      const Vector p = load(w.p + j * ROWS + at), h = p == 0.0f ? Vector{} : p * (load(hj) - centre);
      store(hj, h);
      r += h;
    }
    store(w.r + at, r);
    store(w.mu + at, centre);
    store(w.step + at, step);
  }
}

void finished(const Job& job, int64_t b, int64_t h, int64_t first, int count, bool moved, const Scratch& w) {
  const int64_t statistics = (b * job.heads + h) * job.n + first;
  for (int i = 0; i < count; ++i) {
    const float l = w.l[i], inverse = l == 0 ? 0 : 1 / l, rest = w.r[i] * inverse;
    job.lse[statistics + i] = l == 0 ? INFINITY : w.m[i] + std::log(l);
    float* o = job.o.at(b, h, first + i);
    const float* sum = w.o + i * w.width;
    for (int64_t d = 0; d < job.dv; ++d) o[d] = sum[d] * inverse;
    if (!moved) continue;
    job.mu[statistics + i] = w.mu[i] + rest;
    float* to = job.to.at(b, h, first + i);
    const float* g = w.g + i * w.width;
    for (int64_t d = 0; d < job.dv; ++d) to[d] = g[d] * inverse - rest * (sum[d] * inverse);
  }
}

template <bool TQ, bool TK, bool TV>
void rows(const Job& job, float scale, int64_t b, int64_t h, int64_t first, int count, const Scratch& w) {
  constexpr bool MOVED = TQ || TK;  // the scores do
  const int vectors = (count + LANES - 1) / LANES, size = static_cast<int>(job.d);
  const int64_t group = h / (job.heads / job.groups);
  transposed(job.q.at(b, h, first), job.q.row, count, vectors * LANES, job.d, scale, w.q);
  if (TQ) transposed(job.tq.at(b, h, first), job.tq.row, count, vectors * LANES, job.d, scale, w.tq);
  for (int i = 0; i < ROWS; ++i) w.m[i] = -INFINITY, w.l[i] = w.r[i] = w.mu[i] = w.step[i] = 0;
  const int64_t end = job.causal && first + count < job.m ? first + count : job.m;
  for (int64_t key = 0; key < end; key += KEYS) {
    const int keys = static_cast<int>(end - key < KEYS ? end - key : KEYS);
    const float *k = job.k.at(b, group, key), *tk = TK ? job.tk.at(b, group, key) : nullptr;
#define SCORES(C)                                                                                              \
  scores_of<C, TK, TQ>(keys, k, job.k.row, tk, job.tk.row, w.q + at * LANES, TQ ? w.tq + at * LANES : nullptr, \
                       size, Scores{w.p + at * LANES, w.h + at * LANES})
    BY_WIDTH(vectors, SCORES)
    if (job.mask || (job.causal && key + keys - 1 > first)) masked(job, b, h, first, count, key, keys, w.p);
    probabilities(vectors, keys, MOVED, w);
    int64_t v_row = job.v.row, tv_row = job.tv.row;
    const float* v = padded(job.v.at(b, group, key), &v_row, keys, job.dv, w.width, w.v);
    const float* tv = padded(TV ? job.tv.at(b, group, key) : nullptr, &tv_row, keys, job.dv, w.width, w.tv);
#define SUMS(C)                                                                                     \
  sums_of<C, MOVED, TV>(count, w.p, w.h, v + at * LANES, v_row, TV ? tv + at * LANES : nullptr, tv_row, keys, \
                        Sums{w.o + at * LANES, w.g + at * LANES, w.width, key ? w.a : nullptr, w.step})
    BY_WIDTH(w.width / LANES, SUMS)
  }
  finished(job, b, h, first, count, MOVED || TV, w);
}

typedef void (*Rows)(const Job&, float, int64_t, int64_t, int64_t, int, const Scratch&);

Rows chosen(const Job& job) {
  static const Rows known[8] = {
      rows<false, false, false>, rows<true, false, false>, rows<false, true, false>, rows<true, true, false>,
      rows<false, false, true>,  rows<true, false, true>,  rows<false, true, true>,  rows<true, true, true>};
  return known[(job.tq.data ? 1 : 0) + (job.tk.data ? 2 : 0) + (job.tv.data ? 4 : 0)];
}

}  // namespace

// 0, or 1 if there was no memory.
extern "C" int fewstep_attention_jvp(const Job* given, float scale, int threads) {
  const Job job = *given;
  const Rows run = chosen(job);
  const int width = static_cast<int>((job.dv + LANES - 1) / LANES * LANES);
  const int64_t most = (job.n + ROWS - 1) / ROWS;  // blocks of a head, of about one height
  const int64_t height = ((job.n + most - 1) / most + LANES - 1) / LANES * LANES;
  const int64_t blocks = (job.n + height - 1) / height, tasks = job.samples * job.heads * blocks;
  // Waking threads costs some microseconds, the time of about a million multiplications.
  const bool alone = static_cast<double>(job.samples * job.heads) * job.n * job.m * (job.d + job.dv) < 5e5;
  int failed = 0;
#pragma omp parallel num_threads(alone ? 1 : threads)
  {
    float* memory = static_cast<float*>(std::aligned_alloc(64, (scratch_floats(job, width) * 4 + 63) / 64 * 64));
    const Scratch scratch = parted(memory, job, width);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      if (!memory) {
#pragma omp atomic write
        failed = 1;
        continue;
      }
      const int64_t first = task % blocks * height, head = task / blocks;
      const int count = static_cast<int>(job.n - first < height ? job.n - first : height);
      run(job, scale, head / job.heads, head % job.heads, first, count, scratch);
    }
    std::free(memory);
  }
  return failed;
}
