// Norms, what follows them, and their derivatives in one pass over memory; contracts in fewstep_cuda/norm_jvp.py.
//
// A row (LayerNorm, RMSNorm) or a group (GroupNorm) is read once for its moments and once for its outputs, from cache
// if it is small.  Outputs are made in tiles that stay in the first cache and are put where they belong, past the
// caches if they would not fit there: they are twice as many as a norm's, and fetching what is only overwritten, with
// the next row not fetched ahead, took 1.3 ms where this takes 0.7 (2 x 1024 x 1152, one thread, AVX-512).
// Bodies are plain functions: inside a lambda the same loops ran five times slower.
// Without tangents tx, ta, tc and ty are null.

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

using Index = long long;

constexpr Index FEW = 64;      // entries from which means are guessed
constexpr Index BLOCK = 2048;  // floats that are summed in float; blocks are summed in double
constexpr Index HEAD = 1024;   // the largest head
constexpr Index TILE = 256;
constexpr Index CACHED = 1 << 21;  // floats of one output, from which it passes the caches

struct Moments {
    float mean, tmean;  // of x and tx, nearly; 0 if not centred
    float r;            // 1 / sqrt(var + eps)
    float k;            // r^2 cov(x, tx): r (P tx) = r (tx - tmean) - xhat k
    float o, to;        // what is left of the means of x and tx after these are taken, times -r
};

inline float guess(const float* x, Index n) {
    n = n < FEW ? n : FEW;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Index i = 0; i < n; ++i) sum += x[i];
    return sum / n;
}

// Means of u, v, u^2, u v and v^2, where u = x - m and v = tx - tm.
template <bool CENTRED, bool DUAL>
inline void products(const float* x, const float* tx, Index n, float m, float tm, double found[5]) {
    for (int k = 0; k < 5; ++k) found[k] = 0;
    for (Index begin = 0; begin < n; begin += BLOCK) {
        const Index end = begin + BLOCK < n ? begin + BLOCK : n;
        float s = 0, ts = 0, p = 0, q = 0, r = 0;
#pragma omp simd reduction(+ : s, ts, p, q, r)
        for (Index i = begin; i < end; ++i) {
            const float u = x[i] - m;
            p += u * u;
            if (CENTRED) s += u;
            if (DUAL) {
                const float v = tx[i] - tm;
                q += u * v;
                if (CENTRED) {
                    ts += v;
                    r += v * v;
                }
            }
        }
        const float sums[5] = {s, ts, p, q, r};
        for (int k = 0; k < 5; ++k) found[k] += sums[k];
    }
    for (int k = 0; k < 5; ++k) found[k] /= n;
}

// One pass about means guessed from a few entries; a second about what it found where the guess was farther off than
// a deviation, and differences of squares would lose digits.
template <bool CENTRED, bool DUAL>
inline Moments moments(const float* x, const float* tx, Index n, double eps) {
    double left[5];
    Moments found = {0, 0, 0, 0, 0, 0};
    if (CENTRED) {
        found.mean = guess(x, n);
        if (DUAL) found.tmean = guess(tx, n);
    }
    for (int turn = 0; turn < 3; ++turn) {
        products<CENTRED, DUAL>(x, tx, n, found.mean, found.tmean, left);
        if (2 * left[0] * left[0] <= left[2] && 2 * left[1] * left[1] <= left[4]) break;
        if (turn == 2) break;
        found.mean += float(left[0]);
        found.tmean += float(left[1]);
    }
    const double var = left[2] - left[0] * left[0];
    const double r2 = 1.0 / ((var > 0 ? var : 0) + eps);
    found.r = float(__builtin_sqrt(r2));
    found.k = float(r2 * (left[3] - left[0] * left[1]));
    found.o = float(-left[0] * found.r);
    found.to = float(-left[1] * found.r);
    return found;
}

// exp to 2 ulp within float's range, without a table, so that loops around it are vectorised.
inline float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    const float shifted = x * 1.44269504f + magic;
    const float n = shifted - magic;
    const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    int bits;
    __builtin_memcpy(&bits, &shifted, 4);
    const int power = (bits << 23) + (127 << 23);
    float two;
    __builtin_memcpy(&two, &power, 4);
    return p * two;
}

inline void put(float* to, const float* tile, Index n, bool past) {
    Index i = 0;
#if defined(__SSE2__)
    if (past && (reinterpret_cast<__UINTPTR_TYPE__>(to) & 15) == 0) {
        for (; i + 16 <= n; i += 16) {  // a line of the cache at a time
            _mm_stream_ps(to + i, _mm_loadu_ps(tile + i));
            _mm_stream_ps(to + i + 4, _mm_loadu_ps(tile + i + 4));
            _mm_stream_ps(to + i + 8, _mm_loadu_ps(tile + i + 8));
            _mm_stream_ps(to + i + 12, _mm_loadu_ps(tile + i + 12));
        }
    }
#endif
#pragma omp simd
    for (Index j = i; j < n; ++j) to[j] = tile[j];
}

// What `put` wrote past the caches is there for other threads.
inline void settle() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Fetching past an array's end does no harm.
inline void fetch(const float* x, Index n) {
    for (Index i = 0; i < n; i += 16) __builtin_prefetch(x + i);
}

template <bool CENTRED, bool DUAL>
void adaln(const float* x, const float* a, const float* c, const float* tx, const float* ta, const float* tc, float* y,
           float* ty, Index batch, Index length, Index size, Index a_step, Index c_step, Index ta_step, Index tc_step,
           double eps, int threads) {
    const bool past = batch * length * size >= CACHED;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (Index row = 0; row < batch * length; ++row) {
            const Index b = row / length, at = row * size;
            const Moments m = moments<CENTRED, DUAL>(x + at, DUAL ? tx + at : nullptr, size, eps);
            for (Index start = 0; start < size; start += TILE) {
                const Index n = start + TILE < size ? TILE : size - start;
                const float *xi = x + at + start, *txi = DUAL ? tx + at + start : nullptr;
                const float *ai = a + b * a_step + start, *ci = c + b * c_step + start;
                const float *tai = DUAL ? ta + b * ta_step + start : nullptr;
                const float *tci = DUAL ? tc + b * tc_step + start : nullptr;
                float z[TILE], tz[TILE];
                if (past) fetch(xi + size, n);
                if (past && DUAL) fetch(txi + size, n);
#pragma omp simd
                for (Index i = 0; i < n; ++i) {
                    const float xhat = (xi[i] - m.mean) * m.r + m.o;
                    z[i] = xhat * ai[i] + ci[i];
                    const float txhat = DUAL ? (txi[i] - m.tmean) * m.r + (m.to - xhat * m.k) : 0;
                    if (DUAL) tz[i] = txhat * ai[i] + (xhat * tai[i] + tci[i]);
                }
                put(y + at + start, z, n, past);
                if (DUAL) put(ty + at + start, tz, n, past);
            }
        }
        settle();
    }
}

template <bool DUAL, bool SILU>
void group(const float* x, const float* a, const float* c, const float* tx, const float* ta, const float* tc, float* y,
           float* ty, Index batch, Index groups, Index channels, Index space, Index a_step, Index c_step, Index ta_step,
           Index tc_step, double eps, int threads) {
    const Index size = channels * space;
    const bool past = batch * groups * size >= CACHED;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (Index at = 0; at < batch * groups; ++at) {
            const Index b = at / groups, g = at % groups;
            const Moments m = moments<true, DUAL>(x + at * size, DUAL ? tx + at * size : nullptr, size, eps);
            for (Index k = 0; k < channels; ++k) {
                const Index which = g * channels + k;
                const float ai = a[b * a_step + which], ci = c[b * c_step + which];
                const float tai = DUAL ? ta[b * ta_step + which] : 0, tci = DUAL ? tc[b * tc_step + which] : 0;
                for (Index start = 0; start < space; start += TILE) {
                    const Index n = start + TILE < space ? TILE : space - start, from = at * size + k * space + start;
                    const float *xi = x + from, *txi = DUAL ? tx + from : nullptr;
                    float y_tile[TILE], ty_tile[TILE];
#pragma omp simd
                    for (Index i = 0; i < n; ++i) {
                        const float xhat = (xi[i] - m.mean) * m.r + m.o;
                        const float z = xhat * ai + ci;
                        float tz = 0, s = 1, slope = 1;
                        if (DUAL) tz = ((txi[i] - m.tmean) * m.r + (m.to - xhat * m.k)) * ai + (xhat * tai + tci);
                        if (SILU) s = 1.0f / (1.0f + exponential(-z));
                        if (SILU) slope = s * (1.0f + z * (1.0f - s));
                        y_tile[i] = z * s;
                        if (DUAL) ty_tile[i] = tz * slope;
                    }
                    put(y + from, y_tile, n, past);
                    if (DUAL) put(ty + from, ty_tile, n, past);
                }
            }
        }
        settle();
    }
}

// A head is written to `z` first: turning needs its pairs.  cos == null: no turning.
inline void turn(const float* z, const float* cos, const float* sin, float* y, Index size, bool interleaved) {
    if (!cos) {
#pragma omp simd
        for (Index i = 0; i < size; ++i) y[i] = z[i];
    } else if (interleaved) {
#pragma omp simd
        for (Index i = 0; i < size / 2; ++i) {
            const float u = z[2 * i], v = z[2 * i + 1];
            y[2 * i] = u * cos[2 * i] - v * sin[2 * i];
            y[2 * i + 1] = v * cos[2 * i + 1] + u * sin[2 * i + 1];
        }
    } else {
        const Index half = size / 2;
#pragma omp simd
        for (Index i = 0; i < half; ++i) {
            const float u = z[i], v = z[i + half];
            y[i] = u * cos[i] - v * sin[i];
            y[i + half] = v * cos[i + half] + u * sin[i + half];
        }
    }
}

template <bool CENTRED, bool DUAL>
void heads(const float* x, const float* a, const float* c, const float* tx, const float* ta, const float* tc,
           const float* cos, const float* sin, float* y, float* ty, const Index* shape, const Index* step,
           const Index* tstep, const Index* ystep, bool interleaved, double eps, int threads) {
    const Index heads = shape[1], length = shape[2], size = shape[3];
    const bool past = shape[0] * heads * length * size >= CACHED;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (Index row = 0; row < shape[0] * heads * length; ++row) {
            const Index n = row % length, h = row / length % heads, b = row / length / heads;
            const float* xi = x + b * step[0] + h * step[1] + n * step[2];
            const float* txi = DUAL ? tx + b * tstep[0] + h * tstep[1] + n * tstep[2] : nullptr;
            const Index to = b * ystep[0] + h * ystep[1] + n * ystep[2];
            const float *ci = cos ? cos + n * size : nullptr, *si = sin ? sin + n * size : nullptr;
            float z[HEAD], tz[HEAD], turned[HEAD];
            const Moments m = moments<CENTRED, DUAL>(xi, txi, size, eps);
            if (past) fetch(xi + step[2], size);
            if (past && DUAL) fetch(txi + tstep[2], size);
#pragma omp simd
            for (Index i = 0; i < size; ++i) {
                const float xhat = (xi[i] - m.mean) * m.r + m.o;
                z[i] = xhat * a[i] + c[i];
                if (DUAL) tz[i] = ((txi[i] - m.tmean) * m.r + (m.to - xhat * m.k)) * a[i] + (xhat * ta[i] + tc[i]);
            }
            turn(z, ci, si, turned, size, interleaved);
            put(y + to, turned, size, past);
            if (!DUAL) continue;
            turn(tz, ci, si, turned, size, interleaved);
            put(ty + to, turned, size, past);
        }
        settle();
    }
}

template <bool DUAL>
void gated(const float* x, const float* gate, const float* y, const float* tx, const float* tgate, const float* ty,
           float* out, float* tout, Index batch, Index length, Index size, Index step, Index tstep, int threads) {
    const bool past = batch * length * size >= CACHED;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (Index row = 0; row < batch * length; ++row) {
            const Index b = row / length;
            for (Index start = 0; start < size; start += TILE) {
                const Index n = start + TILE < size ? TILE : size - start, at = row * size + start;
                const float *xi = x + at, *yi = y + at, *gi = gate + b * step + start;
                const float *txi = DUAL ? tx + at : nullptr, *tyi = DUAL ? ty + at : nullptr;
                const float* tgi = DUAL ? tgate + b * tstep + start : nullptr;
                float z[TILE], tz[TILE];
#pragma omp simd
                for (Index i = 0; i < n; ++i) {
                    z[i] = xi[i] + gi[i] * yi[i];
                    if (DUAL) tz[i] = txi[i] + (tgi[i] * yi[i] + gi[i] * tyi[i]);
                }
                put(out + at, z, n, past);
                if (DUAL) put(tout + at, tz, n, past);
            }
        }
        settle();
    }
}

}  // namespace

extern "C" {

// steps: of a, c, ta, tc from one sample to the next, 0 if there is one for all.
void fs_adaln(const float* x, const float* a, const float* c, const float* tx, const float* ta, const float* tc,
              float* y, float* ty, Index batch, Index length, Index size, const Index* steps, int centred, double eps,
              int threads) {
    auto* run = tx ? (centred ? adaln<true, true> : adaln<false, true>)
                   : (centred ? adaln<true, false> : adaln<false, false>);
    run(x, a, c, tx, ta, tc, y, ty, batch, length, size, steps[0], steps[1], steps[2], steps[3], eps, threads);
}

void fs_group_norm_silu(const float* x, const float* a, const float* c, const float* tx, const float* ta,
                        const float* tc, float* y, float* ty, Index batch, Index groups, Index channels, Index space,
                        const Index* steps, int silu, double eps, int threads) {
    auto* run = silu ? (tx ? group<true, true> : group<false, true>) : (tx ? group<true, false> : group<false, false>);
    run(x, a, c, tx, ta, tc, y, ty, batch, groups, channels, space, steps[0], steps[1], steps[2], steps[3], eps,
        threads);
}

// shape: B, H, N, D.  step, tstep, ystep: of x, tx and both outputs, for B, H, N; D is dense.
void fs_qk_norm_rope(const float* x, const float* a, const float* c, const float* tx, const float* ta, const float* tc,
                     const float* cos, const float* sin, float* y, float* ty, const Index* shape, const Index* step,
                     const Index* tstep, const Index* ystep, int interleaved, int centred, double eps, int threads) {
    auto* run = tx ? (centred ? heads<true, true> : heads<false, true>)
                   : (centred ? heads<true, false> : heads<false, false>);
    run(x, a, c, tx, ta, tc, cos, sin, y, ty, shape, step, tstep, ystep, interleaved, eps, threads);
}

// steps: of gate and tgate, as above.
void fs_gated_residual(const float* x, const float* gate, const float* y, const float* tx, const float* tgate,
                       const float* ty, float* out, float* tout, Index batch, Index length, Index size,
                       const Index* steps, int threads) {
    auto* run = tx ? gated<true> : gated<false>;
    run(x, gate, y, tx, tgate, ty, out, tout, batch, length, size, steps[0], steps[1], threads);
}
}
