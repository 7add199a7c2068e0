// SPDX-License-Identifier: MIT
// y = x W^T + b for a few rows of x, for decoding: as fast as the weight can be read.
//
// Memory contract. x is (rows, inputs) and W (outputs, inputs) with neighbours in the last axis and
// any stride of the other, b (outputs) or null, y (rows, outputs) compact; all stored as DTYPE, summed
// in float32 or wider. W is read once, 4.7 MB for 3072 x 768 in bfloat16, around the L1 cache; x is read
// by every block, from the near caches.
//
// Launch. GROUP threads have OUTPUTS rows of W and hold OUTPUTS x ROWS sums. Each owns VECTOR
// neighbours out of every GROUP * VECTOR and asks for UNROLL such pieces of each row of W before it uses
// the first. VECTOR and GROUP depend on the number of inputs and the dtype alone and fix the order of a
// sum: first in a thread, then over a warp, the far half first, then over the group's warps in order.
// ROWS, OUTPUTS, THREADS, UNROLL and the width of loads change no bit.
//
// Compiled for DTYPE, VECTOR, GROUP (a power of two), OUTPUTS, ROWS, UNROLL, THREADS (a multiple of
// GROUP and of a warp), WIDE: VECTOR numbers at a time, which asks for alignment, and SETTLED: no kernel
// in flight writes the weight, of which the first pieces are asked for ahead. Overlaps the kernel before.
#include "memory.cuh"
#include "numbers.cuh"

using T = DTYPE;
using State = typename StateOf<T>::type;
using Piece = Pack<T, VECTOR>;

struct Arguments {
    const T *x, *weight, *bias;  // bias null: none
    T* y;
    long long rows, inputs, outputs;
    long long x_row, weight_row;  // strides in elements
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

constexpr int LANES = GROUP < 32 ? GROUP : 32, WARPS = GROUP / LANES, GROUPS = THREADS / GROUP;
constexpr bool EARLY = ROWS <= 2 || OUTPUTS <= 2;  // x is asked for together with the weight

__device__ __forceinline__ Piece fetch(const T* from) {
    if constexpr (WIDE) {
        return Piece::load(from);
    } else {
        Piece x;
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) x.item[v] = from[v];
        return x;
    }
}

// What no other block reads: it shall not push x out of the L1 cache.
__device__ __forceinline__ Piece fetch_once(const T* from) {
    if constexpr (WIDE && sizeof(Piece) == 16) {
        Piece x;
        uint4& w = *reinterpret_cast<uint4*>(&x.word);
        asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                     : "l"(from));
        return x;
    } else {
        return fetch(from);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    linear_step(const __grid_constant__ Arguments p) {
    let_next_begin();
    const int member = threadIdx.x % GROUP, group = threadIdx.x / GROUP;
    const long long first = (blockIdx.x * (long long)GROUPS + group) * OUTPUTS;
    const long long pieces = p.inputs / VECTOR;
    const T *weight[OUTPUTS], *x[ROWS];
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
        const long long n = first + o < p.outputs ? first + o : p.outputs - 1;
        weight[o] = p.weight + n * p.weight_row;
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) x[r] = p.x + (r < p.rows ? r : p.rows - 1) * p.x_row;

    State sum[OUTPUTS][ROWS];
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sum[o][r] = State(0);

    Piece w[UNROLL][OUTPUTS];
    const auto ask = [&](int i, long long at) {
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o) w[i][o] = fetch_once(weight[o] + at);
    };
    const auto ask_all = [&](long long start) {
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const long long at = (start + i * GROUP) * VECTOR;
            if (at < p.inputs) ask(i, at);
        }
    };
    if constexpr (SETTLED) ask_all(member);
    await_previous();

#pragma unroll 1
    for (long long start = member; start < pieces; start += UNROLL * GROUP) {
        Piece early[EARLY ? UNROLL : 1][EARLY ? ROWS : 1];
        if (SETTLED && start != member) ask_all(start);
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const long long at = (start + i * GROUP) * VECTOR;
            if (at < p.inputs) {
                if constexpr (!SETTLED) ask(i, at);
                if constexpr (EARLY) {
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) early[i][r] = fetch(x[r] + at);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const long long at = (start + i * GROUP) * VECTOR;
            if (at < p.inputs) {
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const Piece in = EARLY ? early[EARLY ? i : 0][EARLY ? r : 0] : fetch(x[r] + at);
#pragma unroll
                    for (int o = 0; o < OUTPUTS; ++o)
#pragma unroll
                        for (int v = 0; v < VECTOR; ++v)
                            sum[o][r] = fma(State(widen(in.item[v])), State(widen(w[i][o].item[v])),
                                            sum[o][r]);
                }
            }
        }
    }

#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o)
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int apart = LANES / 2; apart > 0; apart /= 2)
                sum[o][r] = add(sum[o][r], __shfl_xor_sync(~0u, sum[o][r], apart));

    __shared__ State partial[WARPS > 1 ? GROUPS : 1][WARPS][OUTPUTS * ROWS];
    if constexpr (WARPS > 1) {
        if (member % 32 == 0) {
#pragma unroll
            for (int o = 0; o < OUTPUTS; ++o)
#pragma unroll
                for (int r = 0; r < ROWS; ++r) partial[group][member / 32][o * ROWS + r] = sum[o][r];
        }
        __syncthreads();
    }
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (member != (o * ROWS + r) % GROUP || first + o >= p.outputs || r >= p.rows) continue;
            State total = sum[o][r];
            if constexpr (WARPS > 1) {
                total = partial[group][0][o * ROWS + r];
#pragma unroll
                for (int i = 1; i < WARPS; ++i) total = add(total, partial[group][i][o * ROWS + r]);
            }
            if (p.bias) total = add(total, State(widen(p.bias[first + o])));
            p.y[r * p.outputs + first + o] = narrow<T>(total);
        }
}
