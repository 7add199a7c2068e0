// SPDX-License-Identifier: MIT
// The scan of S4D, s_t = a s_{t-1} + u_t from zero, y_t = Re sum_n v_n s_{t,n} + D u_t.
//
// Memory contract. u is (batch, L, H) with any strides, batch split in (outer, inner); reset (batch, L) bool
// with any strides; lengths (batch) int64, a and v (shared, H, M), D (shared, H) contiguous; y (batch, L, H), last
// (batch, H, M), kept (batch, ceil(L / chunk), H, M) contiguous, starts (batch, segments, H, M) likewise.
// Strides in time may be negative, and y goes the same way (`onward`): pointers stand at the first
// step in the order of the forward. A row stops after lengths[row] steps; y is zero from there on. Reads u and
// writes y (and kept, the state before every `chunk` steps, where asked for): no state comes from memory. 268 MB
// for 8192 channels of 4096 steps in float32; bound by arithmetic, 6 multiply-adds a complex state and step.
//
// Launch. As s4d_walk.cuh says, WARPS a block. Where time is in segments, s4d_ends.cu finds what each makes of a
// zero state and s4d_starts.cu what state each begins with.
//
// Compiled for what the headers name, and BLOCKS.
#include "s4d_outputs.cuh"

struct Arguments {
    Common in;
    Sequence u;
    const Real* D;        // null: zeros
    const State* starts;  // null: zeros
    T* y;
    State *last, *kept;  // kept may be null
    long long chunk;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

struct Forward {
    const Arguments& p;
    const Place& at;
    State a[S], v[S], s[S];
    Direct direct;
    Output y;
    long long chunks;

    __device__ __forceinline__ Forward(const Arguments& p, const Place& at)
        : p(p), at(at), direct(p.D, at, p.in.size), y(p.y, at, p.in.size, false) {
        const Size& size = p.in.size;
        const long long shared = at.row / size.alike;
        at.read(a, p.in.a, size, shared);
        at.read(v, p.in.v, size, shared);
        clear();
        if (p.starts) at.read(s, p.starts, size, at.row * size.segments + at.segment);
        chunks = p.kept ? (size.length + p.chunk - 1) / p.chunk : 0;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < S; ++i) s[i] = Number::zero();
    }

    __device__ __forceinline__ void keep(long long chunk) {
        at.write(p.kept, s, p.in.size, at.row * chunks + chunk);
    }

    __device__ __forceinline__ void enter(long long k) {
        if (chunks && (at.first + k) % p.chunk == 0) keep((at.first + k) / p.chunk);
    }

    __device__ __forceinline__ Real step(T x) {
        const Real u = widen(x);
#pragma unroll
        for (int i = 0; i < S; ++i) s[i] = advance(a[i], s[i], u);
        return output(v, s, direct.of(u));
    }

    __device__ __forceinline__ void group(const T* x) {
        Real sums[Q];
#pragma unroll
        for (int q = 0; q < Q; ++q) sums[q] = step(x[q * W]);
        sum_lanes<Q, 1>(sums, at.lane);
        y.group(sums);
    }

    __device__ __forceinline__ void single(const T* x) {
        Real sum[1] = {step(*x)};
        sum_lanes<1, 1>(sum, at.lane);
        y.single(sum[0]);
    }

    __device__ __forceinline__ void finish() {
        const Size& size = p.in.size;
        fill_rest(p.y, at, size);
        if (!at.is_last(size)) return;
        at.write(p.last, s, size, at.row);
        if (chunks)
            for (long long c = (at.end + p.chunk - 1) / p.chunk; c < chunks; ++c) keep(c);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    s4d_scan(const __grid_constant__ Arguments p) {
    alignas(16) __shared__ T arena[WARPS][STAGES * TILE * W];
    const Size& size = p.in.size;
    const long long unit = unit_of();
    if (unit >= size.units) return;
    const Place at(p.in, unit);
    Forward body(p, at);
    Copy<false> copies[] = {{p.u, at, size, bool(size.wide & 1)}};
    walk<1, false>(body, arena[threadIdx.x >> 5], copies, at, p.in.reset);
    body.finish();
}
