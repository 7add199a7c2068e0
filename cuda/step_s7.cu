// SPDX-License-Identifier: MIT
// One step of S7 whose matrices are made from the input: (a, B, C, d, beta) = made, a += base,
// h = (1 - 1 / (a^2 + 1/2)) h + B^T v + beta, y = C h + d v.
//
// Memory contract. made (rows, 2 N + 2 H N + H) is the matrix product weight v; it, the state (rows, N),
// base (N) and y (rows, H) are REAL, v (rows, H) is DTYPE. Rows of v, made and the state have strides in
// elements; the next state (rows, N), which may be the memory of the state, and y are compact. What is
// made is read once, 66 KB a row for H = 512, N = 16.
//
// Launch. A block a row. Of the sum over channels every thread has the states n = thread mod N of each
// THREADS / N-th channel, as many as fit, and they meet in a tree; a sum over states is that of LANES
// lanes. Dynamic shared memory: (N + THREADS) numbers.
//
// Compiled for DTYPE, REAL and LANES (a power of two, from N on, at most 32).
#include "step_sums.cuh"

constexpr int THREADS = 512;

struct Arguments {
    const T* v;
    const R *h, *made, *base;
    R *y, *next;
    long long rows, width, states;
    long long v_row, h_row, made_row;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

extern __shared__ double scratch[];

extern "C" __global__ void __launch_bounds__(THREADS)
    s7_step(const __grid_constant__ Arguments p) {
    overlap_previous();
    R *after = reinterpret_cast<R*>(scratch), *sums = after + p.states;
    const long long row = blockIdx.x, N = p.states, H = p.width;
    const T* v = p.v + row * p.v_row;
    const R *a = p.made + row * p.made_row, *B = a + N, *C = B + H * N, *d = C + H * N, *beta = d + H;
    const int wide_states = N < THREADS ? int(N) : THREADS;  // states at a time
    const int parts = THREADS / wide_states;                 // threads that share a state
    const int part = threadIdx.x / wide_states, within = threadIdx.x % wide_states;
    for (long long start = 0; start < N; start += wide_states) {
        const long long n = start + within;
        R sum = R(0);
        if (part < parts && n < N) {
#pragma unroll 8
            for (long long i = part; i < H; i += parts) sum = fma(B[i * N + n], wide(v[i]), sum);
        }
        sums[threadIdx.x] = sum;
        int half = 1;
        while (half < parts) half *= 2;
        for (half /= 2; half > 0; half /= 2) {
            __syncthreads();
            if (part < half && part + half < parts)
                sums[threadIdx.x] = add(sums[threadIdx.x], sums[threadIdx.x + half * wide_states]);
        }
        if (part == 0 && n < N) {
            const R raw = add(a[n], p.base[n]);
            const R decay = add(R(1), -(R(1) / fma(raw, raw, R(0.5))));
            const R drive = add(sums[threadIdx.x], beta[n]);
            after[n] = fma(decay, p.h[row * p.h_row + n], drive);
            p.next[row * N + n] = after[n];
        }
        __syncthreads();
    }
    const int lane = threadIdx.x % LANES;
    const long long rounds = (H + THREADS / LANES - 1) / (THREADS / LANES);
#pragma unroll 4
    for (long long k = 0; k < rounds; ++k) {
        const long long found = k * (THREADS / LANES) + threadIdx.x / LANES, i = found < H ? found : H - 1;
        R sum[1] = {R(0)};
        for (long long n = lane; n < N; n += LANES) sum[0] = fma(C[i * N + n], after[n], sum[0]);
        sum_over_lanes<LANES>(sum);
        if (lane == 0 && found < H) p.y[row * H + i] = fma(d[i], wide(v[i]), sum[0]);
    }
}
