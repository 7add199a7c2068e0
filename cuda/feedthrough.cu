// SPDX-License-Identifier: MIT
// The gradients of y = D x + ..., one D a channel: dx += D g in place, dD = the sum over rows of g x.
//
// Memory contract. x, g, dx (rows, H) and D (shared, H) are contiguous, rows = shared * each; dx is read
// and written, the others read, each once. Sums are `partial` (blocks of an `each`, shared, H), State,
// added up by sum.cu. PACK neighbouring channels are one access of 16 bytes: then H is a multiple of
// PACK and pointers are aligned so.
//
// Launch. A block of THREADS threads takes `height` rows of one `each`, as wide as H up to THREADS
// accesses; grid (blocks of an `each`) * shared. What a block adds up, and in which order, depends on
// the shape alone.
#include "memory.cuh"
#include "numbers.cuh"

using T = DTYPE;
using State = typename StateOf<T>::type;
using Items = Pack<T, PACK>;

struct Arguments {
    const T *x, *g, *D;
    T* dx;
    State* partial;
    long long each, channels, height, blocks, shared;  // blocks of an `each`
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

// Left to itself the compiler spills on these two for one more block on a multiprocessor.
#if __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890
#define LIMITS __launch_bounds__(THREADS, 2)
#else
#define LIMITS __launch_bounds__(THREADS)
#endif

extern "C" __global__ void LIMITS
    feedthrough_backward(const __grid_constant__ Arguments p) {
    __shared__ State sums[THREADS][PACK];
    const long long share = blockIdx.x / p.blocks, block = blockIdx.x - share * p.blocks;
    const int packs = int(p.channels / PACK), wide = min(packs, THREADS);
    const int abreast = THREADS / wide, lane = threadIdx.x % wide, line = threadIdx.x / wide;
    const long long first = block * p.height, last = min(first + p.height, p.each);
#pragma unroll 1
    for (int c = lane; c - lane < packs; c += wide) {  // the same number of rounds for all threads
        const bool there = c < packs && line < abreast;
        State sum[PACK], d[PACK];
#pragma unroll
        for (int v = 0; v < PACK; ++v) sum[v] = d[v] = Constant<State>::zero();
        if (there) {
            const Items D = Items::load(p.D + share * p.channels + c * PACK);
#pragma unroll
            for (int v = 0; v < PACK; ++v) d[v] = widen(D.item[v]);
#pragma unroll 4
            for (long long row = first + line; row < last; row += abreast) {
                const long long at = (share * p.each + row) * p.channels + c * PACK;
                const Items x = Items::load(p.x + at), g = Items::load(p.g + at);
                Items dx = Items::load(p.dx + at);
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    const State slope = widen(g.item[v]);
                    sum[v] = fma(slope, State(widen(x.item[v])), sum[v]);
                    dx.item[v] = narrow<T>(fma(slope, d[v], State(widen(dx.item[v]))));
                }
                dx.store(p.dx + at);
            }
        }
#pragma unroll
        for (int v = 0; v < PACK; ++v) sums[threadIdx.x][v] = sum[v];
        __syncthreads();
        if (there && line == 0) {
#pragma unroll
            for (int v = 0; v < PACK; ++v) {
                State total = sum[v];
                for (int k = 1; k < abreast; ++k) total = add(total, sums[k * wide + lane][v]);
                p.partial[(block * p.shared + share) * p.channels + c * PACK + v] = total;
            }
        }
        __syncthreads();
    }
}
