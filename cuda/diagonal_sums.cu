// SPDX-License-Identifier: MIT
// Gradients of A and of a step that is constant in time, from the diagonal scan's sums over tiles.
//
// Memory contract. partial (tiles, SUMS, rows) as diagonal_scan.cu leaves it, with rows = (shared,
// each, S), read once; A, steps, dA and dsteps (shared, S), contiguous. A block adds up one number of
// these in an order that depends on tiles, `each` and the block's size alone: thread i takes the terms
// i, i + THREADS, ..., in the order of tiles, and then halves meet.
//
// Where the decay is constant in time (not VARYING) the sums are those of decay and gain, and the
// chain rule to A and the step is applied here, once.
#include "discretize.cuh"

using State = STATE_TYPE;
using Real = decltype(State{}.re);

constexpr int SUMS = SCHEME == NONE ? 1 : 2;

struct Arguments {
    const State *partial, *A;
    const Real* steps;  // null: ones
    State* dA;
    Real* dsteps;  // null: not wanted
    long long tiles, rows, channels, each;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

__device__ __forceinline__ Real inner_product(State x, State y) {
    return fma(x.re, y.re, mul(x.im, y.im));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    diagonal_sums(const __grid_constant__ Arguments p) {
    __shared__ State sums[SUMS][THREADS];
    const long long index = blockIdx.x, shared = index / p.channels;
    const long long row = shared * p.each * p.channels + (index - shared * p.channels);
    State total[SUMS];
#pragma unroll
    for (int k = 0; k < SUMS; ++k) total[k] = Constant<State>::zero();
    const long long terms = p.tiles * p.each;
    long long tile = threadIdx.x / p.each, element = threadIdx.x - tile * p.each;
    const long long tile_hop = THREADS / p.each, element_hop = THREADS - tile_hop * p.each;
#pragma unroll 4
    for (long long i = threadIdx.x; i < terms; i += THREADS) {
#pragma unroll
        for (int k = 0; k < SUMS; ++k)
            total[k] = add(total[k],
                           p.partial[(tile * SUMS + k) * p.rows + row + element * p.channels]);
        tile += tile_hop;
        element += element_hop;
        if (element >= p.each) {
            element -= p.each;
            ++tile;
        }
    }
#pragma unroll
    for (int k = 0; k < SUMS; ++k) sums[k][threadIdx.x] = total[k];
#pragma unroll
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
#pragma unroll
            for (int k = 0; k < SUMS; ++k)
                sums[k][threadIdx.x] = add(sums[k][threadIdx.x], sums[k][threadIdx.x + half]);
        }
    }
    if (threadIdx.x) return;
    State to_A = sums[0][0];
    Real to_step = SUMS > 1 ? sums[SUMS - 1][0].re : Real(0);
    if (SCHEME != NONE && !VARYING) {
        const State to_decay = sums[0][0], to_gain = sums[SUMS - 1][0];
        const Pole<State> pole(p.A[index]);
        const Real step = p.steps ? p.steps[index] : Real(1);
        const Slopes<State> slope = pole.slopes(step, step, pole.factors(step, step));
        const State through = mul(conj(slope.decay), to_decay);
        to_A = scale(through, step);
        to_step = inner_product(pole.a, through);
        if (SCHEME == MAMBA) to_step = add(to_step, to_gain.re);
        if (GAIN) {
            to_A = fma(conj(slope.gain_A), to_gain, to_A);
            to_step = add(to_step, inner_product(slope.gain_dt, to_gain));
        }
    }
    p.dA[index] = to_A;
    if (p.dsteps) p.dsteps[index] = to_step;
}
