// SPDX-License-Identifier: MIT
// What a segment of time makes of a zero state: s of S4D's scan, or m and r of its backward.
//
// Memory contract. x, lengths, reset and a as in s4d_scan.cu, x read once; ends (rows, segments, H, M), twice that
// where ADJOINT, cut (rows, segments) bytes, both contiguous and written.
//
// Launch as the forward's. Compiled for what the headers name, BLOCKS, and ADJOINT: false, or true for the backward.
#include "s4d_walk.cuh"

struct Arguments {
    Common in;
    Sequence x;          // u; grad_y if ADJOINT
    State* ends;         // (rows, segments, H, M) of s, or (2, ...) of m and r
    unsigned char* cut;  // (rows, segments): whether anything is reset there
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

struct Ends {
    State a[S], m[S], r[S];
    bool cut;

    __device__ __forceinline__ Ends(const Arguments& p, const Place& at) {
        at.read(a, p.in.a, p.in.size, at.row / p.in.size.alike);
        clear();
        cut = false;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < S; ++i) m[i] = r[i] = Number::zero();
        cut = true;
    }

    __device__ __forceinline__ void enter(long long) {}

    __device__ __forceinline__ void single(const T* x) {
        const Real u = widen(*x);
#pragma unroll
        for (int i = 0; i < S; ++i) {
            if (ADJOINT) r[i] = fma(a[i], r[i], m[i]);
            m[i] = advance(a[i], m[i], u);
        }
    }

    __device__ __forceinline__ void group(const T* x) {
#pragma unroll
        for (int q = 0; q < Q; ++q) single(x + q * W);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    s4d_ends(const __grid_constant__ Arguments p) {
    alignas(16) __shared__ T arena[WARPS][STAGES * TILE * W];
    const Size& size = p.in.size;
    const long long unit = unit_of();
    if (unit >= size.units) return;
    const Place at(p.in, unit);
    const long long index = at.row * size.segments + at.segment;
    Ends body(p, at);
    Copy<ADJOINT> copies[] = {{p.x, at, size, bool(size.wide & 1)}};
    walk<1, ADJOINT>(body, arena[threadIdx.x >> 5], copies, at, p.in.reset);
    at.write(p.ends, body.m, size, index);
    if (ADJOINT) at.write(p.ends, body.r, size, size.units / size.groups + index);
    if (at.lane == 0 && at.group == 0) p.cut[index] = body.cut;
}
