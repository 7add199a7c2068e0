// SPDX-License-Identifier: MIT
// What the kernels of single steps share: numbers stored in either of two dtypes, sums over lanes.
//
// Compiled for DTYPE, the activations' T, and REAL, the type R of states, sums and most parameters.
#pragma once
#include "elementary.cuh"
#include "memory.cuh"
#include "numbers.cuh"

using T = DTYPE;
using R = REAL;

__device__ __forceinline__ R wide(float x) { return x; }
__device__ __forceinline__ R wide(double x) { return R(x); }
__device__ __forceinline__ R wide(bfloat16 x) { return widen(x); }
__device__ __forceinline__ R wide(float16 x) { return widen(x); }

__device__ __forceinline__ T stored(R x) { return narrow<T>(typename StateOf<T>::type(x)); }

// Parameters, each stored as T or as R.
struct Either {
    const void* data;  // null: not given
    long long is_wide;

    __device__ __forceinline__ R operator[](long long i) const {
        return is_wide ? static_cast<const R*>(data)[i] : wide(static_cast<const T*>(data)[i]);
    }
};

// Sum N numbers (a power of two, at most SHARE) over SHARE neighbouring lanes, the far half first. Of
// the N the lane l has number l / (SHARE / N) afterwards, in x[0].
template <int SHARE, int N>
__device__ __forceinline__ void sum_over_lanes(R (&x)[N]) {
    const int lane = threadIdx.x % SHARE;
    int held = N;
#pragma unroll
    for (int apart = SHARE / 2; apart > 0; apart /= 2) {
        if (held > 1) {
            held /= 2;
            const bool upper = lane & apart;
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                if (i >= held) break;
                const R keep = upper ? x[i + held] : x[i], give = upper ? x[i] : x[i + held];
                x[i] = add(keep, __shfl_xor_sync(~0u, give, apart));
            }
        } else {
            x[0] = add(x[0], __shfl_xor_sync(~0u, x[0], apart));
        }
    }
}

// Sum a number over a block of COUNT full warps; every thread gets the sum.
template <int COUNT>
__device__ __forceinline__ R sum_over_block(R x) {
    R one[1] = {x};
    sum_over_lanes<32>(one);
    if (COUNT == 1) return __shfl_sync(~0u, one[0], 0);
    __shared__ R partial[COUNT];
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = one[0];
    __syncthreads();
    R sum = partial[0];
#pragma unroll
    for (int w = 1; w < COUNT; ++w) sum = add(sum, partial[w]);
    return sum;
}

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }
__device__ __forceinline__ R silu(R x) { return mul(x, sigmoid(x)); }

// The newest sample of a causal convolution of one channel, and the shift of its TAPS - 1 last inputs:
// past, of this row and channel, has its taps `apart` elements from each other, and so has next, which
// may be the same memory. A null next keeps nothing.
__device__ __forceinline__ R convolve(const T* past, T* next, long long apart, T newest,
                                      const Either& weight, const Either& bias, long long channel,
                                      int taps) {
    R sum = R(0);
#pragma unroll 4
    for (int k = 0; k + 1 < taps; ++k)
        sum = fma(wide(past[k * apart]), weight[channel * taps + k], sum);
    sum = fma(wide(newest), weight[channel * taps + taps - 1], sum);
    if (next) {
        for (int k = 0; k + 2 < taps; ++k) next[k * apart] = past[(k + 1) * apart];
        if (taps > 1) next[(taps - 2) * apart] = newest;
    }
    return bias.data ? add(sum, bias[channel]) : sum;
}
