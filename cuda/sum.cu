// SPDX-License-Identifier: MIT
// out (rows) = the sum over tiles of partial (tiles, rows), in an order that depends on tiles alone.
//
// Memory contract. Both arrays are contiguous; partial is State, out is DTYPE; each is read or written
// once. A block of 32 * WARPS threads sums 32 rows: lane = row, and warp w takes the tiles w,
// w + WARPS, ...; the grid is ceil(rows / 32).
#include "numbers.cuh"

using T = DTYPE;
using State = typename StateOf<T>::type;

struct Arguments {
    const State* partial;
    T* out;
    long long tiles, rows;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    sum_partials(const __grid_constant__ Arguments p) {
    __shared__ State sums[WARPS][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const long long row = blockIdx.x * 32LL + lane;
    State total = Constant<State>::zero();
    if (row < p.rows) {
#pragma unroll 8
        for (long long tile = warp; tile < p.tiles; tile += WARPS)
            total = add(total, p.partial[tile * p.rows + row]);
    }
    sums[warp][lane] = total;
    __syncthreads();
    if (warp == 0 && row < p.rows) {
        for (int w = 1; w < WARPS; ++w) total = add(total, sums[w][lane]);
        p.out[row] = narrow<T>(total);
    }
}
