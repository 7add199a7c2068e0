// SPDX-License-Identifier: MIT
// Where the largest number of each row is: the first of several, and the first NaN if there is one.
//
// Memory contract. x is (rows, count) of DTYPE with neighbours in a row, `row` elements from one row to
// the next; index (rows) is 64-bit. x is read once, 0.1 MB for a row of 50280 in bfloat16.
//
// Launch. A block has a row; each of its THREADS threads asks for UNROLL pieces of VECTOR neighbours,
// THREADS pieces apart, before it looks at the first. count is a multiple of VECTOR and every row begins at
// a multiple of the size of a piece. Overlaps the kernel before.
#include "memory.cuh"
#include "numbers.cuh"

using T = DTYPE;
using State = typename StateOf<T>::type;
using Piece = Pack<T, VECTOR>;

struct Arguments {
    const T* x;
    long long* index;
    long long rows, count, row;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

constexpr int WARPS = THREADS / 32;

struct Best {
    State value;
    long long index;

    __device__ __forceinline__ void meet(State x, long long i) {
        const bool mine_is_nan = value != value, nan = x != x;
        const bool larger = nan ? !mine_is_nan : x > value;
        const bool equal = nan ? mine_is_nan : x == value;
        if (larger || (equal && i < index)) value = x, index = i;
    }

    __device__ __forceinline__ void meet_warp() {
#pragma unroll
        for (int apart = 16; apart > 0; apart /= 2) {
            const State x = __shfl_xor_sync(~0u, value, apart);
            const long long i = __shfl_xor_sync(~0u, index, apart);
            meet(x, i);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    argmax(const __grid_constant__ Arguments p) {
    __shared__ State values[WARPS];
    __shared__ long long indices[WARPS];
    overlap_previous();
    const T* x = p.x + blockIdx.x * p.row;
    const long long pieces = p.count / VECTOR;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Best best = {-State(__uint_as_float(0x7f800000u)), p.count};  // no number yet
#pragma unroll 1
    for (long long start = threadIdx.x; start < pieces; start += UNROLL * THREADS) {
        Piece piece[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
            if (start + u * THREADS < pieces)
                piece[u] = Piece::load(x + (start + u * THREADS) * VECTOR);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            if (start + u * THREADS >= pieces) break;
            // A thread's indices grow, so most pieces have nothing to say.
            State top = widen(piece[u].item[0]);
            bool nan = top != top;
#pragma unroll
            for (int v = 1; v < VECTOR; ++v) {
                const State x = widen(piece[u].item[v]);
                nan = nan || x != x;
                top = fmax(top, x);
            }
            if (!nan && !(top > best.value) && best.index < p.count) continue;
#pragma unroll
            for (int v = 0; v < VECTOR; ++v)
                best.meet(widen(piece[u].item[v]), (start + u * THREADS) * VECTOR + v);
        }
    }
    best.meet_warp();
    if (lane == 0) values[warp] = best.value, indices[warp] = best.index;
    __syncthreads();
    if (warp > 0) return;
    best = {values[lane % WARPS], indices[lane % WARPS]};
    best.meet_warp();
    if (lane == 0) p.index[blockIdx.x] = best.index;
}
