// SPDX-License-Identifier: MIT
// What the backward of S4D's scan (s4d_scan_backward.cu) and its sweep of grad_last alone (s4d_scan_free.cu)
// share: arguments, sums over time, and that sweep.
//
// With the loss linear in u, what grad_last adds is what the backward finds for m_L = conj(grad_last), v = 1
// and no g.
#pragma once
#include "s4d_outputs.cuh"

struct Arguments {
    Common in;
    Sequence u, g;
    const Real* D;                 // null: no direct path
    const State *g_last, *starts;  // starts (4, rows, segments, H, M): m, r, and those of g_last; null: one segment
    T* du;
    State *da, *dv;  // partial
    Real* dD;        // partial; null as D is
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

// Sums over many steps, in two levels: registers, and every FLUSH steps shared memory.
constexpr int FLUSH = 128;

struct Totals {
    State* mine;  // (2 S, THREADS), at this thread

    __device__ __forceinline__ void clear() const {
#pragma unroll
        for (int i = 0; i < 2 * S; ++i) mine[i * THREADS] = Number::zero();
    }

    __device__ __forceinline__ void flush(State (&x)[S], int which) const {
        State* to = mine + which * S * THREADS;
#pragma unroll
        for (int i = 0; i < S; ++i) {
            to[i * THREADS] = add(to[i * THREADS], x[i]);
            x[i] = Number::zero();
        }
    }

    __device__ __forceinline__ void take(State (&x)[S], int which) const {
        flush(x, which);
#pragma unroll
        for (int i = 0; i < S; ++i) x[i] = mine[(which * S + i) * THREADS];
    }
};

// What the gradient of the last state adds: e_t = a e_{t+1} is added to du.
struct Free {
    const Place& at;
    const Totals& totals;
    const State (&a)[S];
    State (&e)[S], (&r)[S], (&da)[S];
    Output du;

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < S; ++i) e[i] = r[i] = Number::zero();
    }

    __device__ __forceinline__ void enter(long long k) {
        if (k % FLUSH == 0) totals.flush(da, 0);
    }

    __device__ __forceinline__ Real step(T x) {
        const Real u = widen(x);
        Real sums[S / NEXT_TO];
#pragma unroll
        for (int i = 0; i < S; ++i) {
            const State one = Number::one();
            Real& sum = sums[i / NEXT_TO];
            sum = i % NEXT_TO ? add(sum, real_part(one, e[i])) : real_part(one, e[i]);
            da[i] = scaled(u, r[i], da[i]);
            r[i] = fma(a[i], r[i], e[i]);
            e[i] = mul(a[i], e[i]);
        }
        return sum_tree(sums);
    }

    __device__ __forceinline__ void group(const T* x) {
        Real sums[Q];
#pragma unroll
        for (int q = 0; q < Q; ++q) sums[q] = step(x[q * W]);
        sum_lanes<Q, 1>(sums, at.lane);
        if (du.writes) {
            const T* p = du.to;
#pragma unroll
            for (int i = 0; i < HELD; ++i, p += du.time) sums[i] = add(sums[i], Real(widen(*p)));
        }
        du.group(sums);
    }

    __device__ __forceinline__ void single(const T* x) {
        Real sum[1] = {step(*x)};
        sum_lanes<1, 1>(sum, at.lane);
        if (du.first) sum[0] = add(sum[0], Real(widen(*du.to)));
        du.single(sum[0]);
    }
};

struct Shared {
    alignas(16) T tiles[WARPS][STAGES * 2 * TILE * W];
    alignas(16) State totals[2 * S * THREADS];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher gives another amount of shared memory");

extern __shared__ uint4 arena[];

// What the sweep of g_last begins with.
__device__ __forceinline__ void begin_free(const Arguments& p, const Place& at, State (&m)[S], State (&r)[S],
                                           long long all, long long index) {
    const Size& size = p.in.size;
    if (p.starts) {
        at.read(m, p.starts, size, 2 * all + index);
        at.read(r, p.starts, size, 3 * all + index);
        return;
    }
    at.read(m, p.g_last, size, at.row);
#pragma unroll
    for (int i = 0; i < S; ++i) {
        m[i] = conj(m[i]);
        r[i] = Number::zero();
    }
}
