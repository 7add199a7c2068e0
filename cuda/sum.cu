// SPDX-License-Identifier: MIT
// out (rows) = the sum over tiles of partial (tiles, rows), in an order that depends on tiles alone.
//
// Memory contract. Both arrays are contiguous; partial is State, out is DTYPE; each is read or written
// once. WARPS sums take the tiles w, w + WARPS, ... and are added. With PACK = 1 a block of 32 * WARPS
// threads sums 32 rows: lane = row, and warp w has sum w; the grid is ceil(rows / 32). With more, for
// many rows, a thread has all sums of PACK neighbouring rows, a multiple of which there are, and arrays
// are aligned to as many numbers; 32 * WARPS threads a block, as many blocks as that takes.
#include "memory.cuh"
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
#if PACK > 1
    const long long row = (blockIdx.x * (32LL * WARPS) + threadIdx.x) * PACK;
    if (row >= p.rows) return;
    State sums[WARPS][PACK];
#pragma unroll
    for (int i = 0; i < WARPS * PACK; ++i) sums[i / PACK][i % PACK] = Constant<State>::zero();
    const State* partial = p.partial + row;
#pragma unroll 1
    for (long long tile = 0; tile < p.tiles; tile += WARPS, partial += WARPS * p.rows) {
        Pack<State, PACK> x[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; ++w)
            if (tile + w < p.tiles) x[w] = Pack<State, PACK>::load(partial + w * p.rows);
#pragma unroll
        for (int w = 0; w < WARPS; ++w)
#pragma unroll
            for (int v = 0; v < PACK; ++v)
                if (tile + w < p.tiles) sums[w][v] = add(sums[w][v], x[w].item[v]);
    }
    Pack<T, PACK> out;
#pragma unroll
    for (int v = 0; v < PACK; ++v) {
        State total = sums[0][v];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) total = add(total, sums[w][v]);
        out.item[v] = narrow<T>(total);
    }
    out.store(p.out + row);
#else
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
#endif
}
