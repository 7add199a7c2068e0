// SPDX-License-Identifier: MIT
// One step of a Griffin block between its projections: `griffin_taps` makes v = conv(x), `griffin_gates` makes
// i, r = sigmoid(v W + bias) by heads, log a = -rate r, h = a h + sqrt(1 - a^2) i v, y = gelu(gate) h.
//
// Memory contract. taps reads x (rows, W) and conv (rows, K - 1, W) as DTYPE and the weights (W, K), and
// writes v (rows, W) as REAL and the next conv, which may be the memory of conv; it copies started (rows,
// a byte each) to met and sets next_started, which may be its memory. gates reads v, met, the gate (rows,
// W) as DTYPE, the state (rows, W) and timesteps (rows), the
// weights (heads, w, w), in by out, stored as WEIGHT, biases and rate (W), and writes y (rows, W) and
// the next state, which may be the memory of the state. Rows of x, gate, conv and state have strides;
// everything else is compact. The weights, 2 w W numbers, are read once for ROWS rows: 2 MB for
// W = 512 in one head, and all there is to move for a few rows. For many rows `griffin_close` takes the products
// from cuBLAS instead, to_i and to_r, both (rows, W) as REAL.
//
// Launch. taps and close: a thread a channel of a row. gates: a block has TILE outputs of a head and ROWS rows;
// PARTS groups of TILE threads share the sum over inputs, PIECE of which are in shared memory at a time,
// and meet in a tree. PARTS, TILE and PIECE are constants, so a row's result does not depend on others.
//
// Compiled for ENTRY (which kernel), DTYPE, REAL, WEIGHT, ROWS (1 or a multiple of 4).
#include "step_sums.cuh"

constexpr int TILE = 8, PARTS = 32, PIECE = 256, THREADS = TILE * PARTS;

struct Arguments {
    const T *x, *gate, *conv;
    const R* h;
    const unsigned char* started;
    Either weight, bias;
    const WEIGHT *to_i, *to_r;
    Either bias_i, bias_r;
    const R *rate, *timesteps;
    T *y, *next_conv;
    R *next, *v;
    unsigned char *next_started, *met;
    long long rows, width, taps, block;
    long long x_row, gate_row, conv_row, h_row, started_row, timesteps_row;
    long long state_only, start_rule, tanh;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

#if ENTRY == 0
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    griffin_taps(const __grid_constant__ Arguments p) {
    overlap_previous();
    const long long place = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (place >= p.rows * p.width) return;
    const long long row = place / p.width, e = place % p.width;
    if (e == 0) {
        p.met[row] = p.started[row * p.started_row];
        p.next_started[row] = 1;
    }
    p.v[place] = convolve(p.conv + row * p.conv_row + e,
                          p.next_conv + row * (p.taps - 1) * p.width + e, p.width,
                          p.x[row * p.x_row + e], p.weight, p.bias, e, int(p.taps));
}
#endif

__device__ __forceinline__ R error_function(float x) { return erff(x); }
__device__ __forceinline__ R error_function(double x) { return erf(x); }

__device__ __forceinline__ R gelu(R g, bool tanh) {
    if (!tanh) return mul(mul(R(0.5), g), add(R(1), error_function(mul(g, R(0.70710678118654752440)))));
    const R inner = fma(mul(R(0.044715), mul(g, g)), g, g);
    return mul(g, sigmoid(mul(R(1.5957691216057307118), inner)));  // 2 sqrt(2 / pi)
}

__device__ __forceinline__ R opened(R x) { return x == x ? sigmoid(x) : x; }

// What follows the gates' products, of one channel of a row.
__device__ __forceinline__ void advance(const Arguments& p, long long row, long long e, R to_i,
                                        R to_r) {
    const long long place = row * p.width + e;
    const R i = opened(add(to_i, p.bias_i[e])), r = opened(add(to_r, p.bias_r[e]));
    const R log_a = -mul(p.rate[e], r);
    const R timed = p.timesteps ? mul(p.timesteps[row * p.timesteps_row], log_a) : log_a;
    R rest = root(-exponential_minus_one(mul(R(2), p.state_only ? log_a : timed)));
    R before = p.h[row * p.h_row + e];
    if (p.start_rule && !p.met[row]) {
        rest = R(1);
        before = R(0);
    }
    const R h = fma(exponential(timed), before, mul(rest, mul(i, p.v[place])));
    p.next[place] = h;
    p.y[place] = stored(mul(gelu(wide(p.gate[row * p.gate_row + e]), p.tanh), h));
}

#if ENTRY == 1
extern "C" __global__ void __launch_bounds__(THREADS)
    griffin_gates(const __grid_constant__ Arguments p) {
    overlap_previous();
    alignas(16) __shared__ R seen[PIECE][ROWS];
    __shared__ R sums[PARTS][2 * ROWS][TILE];
    const long long in_head = (p.block + TILE - 1) / TILE, tiles = p.width / p.block * in_head;
    const long long first = blockIdx.x / tiles * ROWS, tile = blockIdx.x % tiles;
    const long long head = tile / in_head, column = tile % in_head * TILE;
    const int part = threadIdx.x / TILE;
    const long long j = column + threadIdx.x % TILE;
    const long long out = j < p.block ? j : p.block - 1;

    R sum_i[ROWS], sum_r[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sum_i[r] = sum_r[r] = R(0);
    for (long long start = 0; start < p.block; start += PIECE) {
        const int size = p.block - start < PIECE ? int(p.block - start) : PIECE;
        __syncthreads();
        for (int n = threadIdx.x; n < size * ROWS; n += THREADS) {
            const int r = n / size, k = n % size;
            const long long row = first + r < p.rows ? first + r : p.rows - 1;
            seen[k][r] = p.v[row * p.width + head * p.block + start + k];
        }
        __syncthreads();
        const long long from = (head * p.block + start) * p.block + out;
#pragma unroll 8
        for (int k = part; k < size; k += PARTS) {
            const R w_i = wide(p.to_i[from + k * p.block]), w_r = wide(p.to_r[from + k * p.block]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                sum_i[r] = fma(seen[k][r], w_i, sum_i[r]);
                sum_r[r] = fma(seen[k][r], w_r, sum_r[r]);
            }
        }
    }
    const int t = threadIdx.x % TILE;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        sums[part][2 * r][t] = sum_i[r];
        sums[part][2 * r + 1][t] = sum_r[r];
    }
#pragma unroll
    for (int half = PARTS / 2; half > 0; half /= 2) {
        __syncthreads();
        for (int n = threadIdx.x; n < half * 2 * ROWS * TILE; n += THREADS) {
            R* one = &sums[0][0][0] + n;
            *one = add(*one, one[half * 2 * ROWS * TILE]);
        }
    }
    __syncthreads();

    for (int n = threadIdx.x; n < ROWS * TILE; n += THREADS) {
        const long long row = first + n / TILE, inside = column + n % TILE;
        if (row >= p.rows || inside >= p.block) continue;
        advance(p, row, head * p.block + inside, sums[0][n / TILE * 2][n % TILE],
                sums[0][n / TILE * 2 + 1][n % TILE]);
    }
}
#endif

// The same where the products are made already: to_i and to_r are (rows, W), as REAL.
#if ENTRY == 2
extern "C" __global__ void __launch_bounds__(THREADS)
    griffin_close(const __grid_constant__ Arguments p) {
    overlap_previous();
    const long long place = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (place < p.rows * p.width)
        advance(p, place / p.width, place % p.width,
                reinterpret_cast<const R*>(p.to_i)[place], reinterpret_cast<const R*>(p.to_r)[place]);
}
#endif
