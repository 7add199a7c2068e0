// SPDX-License-Identifier: MIT
// A Mamba block's decode step, first half for many rows: v = silu(conv(x)), (r, B, C) = x_proj v, on
// matrix units. mamba_step_mixed.cu is the same for few rows.
//
// Memory contract: `Arguments` in mamba_step.cuh. Reads x, the convolution's state and x_proj, writes
// mixed; v stays in registers. x and the convolution's state are read once a group of TILES * 16 outputs,
// x_proj, 0.25 MB for 80 x 1536 in bfloat16, once a tile of ROWS rows of the batch.
//
// Launch. A cluster of CLUSTER blocks of WARPS warps has ROWS rows of the batch and TILES tiles of 16
// outputs; grid = groups of outputs (p.tiles) x tiles of rows x CLUSTER. A warp has 32 neighbouring
// channels out of every 32 * WARPS * CLUSTER: a lane 8 neighbours of one row, which are its part of both
// factors (the k-th column of a product is whichever channel the lanes agree on). Channels are a multiple
// of 8. The order of a sum depends on the number of channels and the device alone: first in a warp, by
// the matrix unit, then over the warps of a block, then over the blocks of a cluster, in order.
//
// Precision. A bfloat16 or float16 weight is a tf32 number; v, a float32, is the sum of two of them to
// 2^-23 of itself. Products are exact and sums of a few products float32.
//
// Compiled for DTYPE (bfloat16, float16), TAPS and TILES; sm_90 and above. Overlaps the kernel before.
#include "mamba_step.cuh"

constexpr int ROWS = 8, CLUSTER = 8, WARPS = 6, VECTOR = 8;
constexpr int PITCH = TILES * 16 + 4;  // no two lanes store to one bank
constexpr int SUMS = ROWS * PITCH;

#if __CUDA_ARCH__ >= 900
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif

// The nearest tf32 number.
__device__ __forceinline__ unsigned tf32(float x) {
    unsigned y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// c (16, 8) += a (16, 8) b (8, 8). Lane 4 g + t has a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4],
// b[t, g], b[t + 4, g], c[g, 2 t], c[g, 2 t + 1], c[g + 8, 2 t] and c[g + 8, 2 t + 1].
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                         unsigned b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// All blocks of the cluster have come here, and see what the others have written.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What another block of the cluster has in its shared memory at the same place.
__device__ __forceinline__ float of_block(const float* mine, unsigned block) {
    unsigned at = unsigned(__cvta_generic_to_shared(mine)), there;
    float x;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(block));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
    return x;
}

extern "C" __global__ void CLUSTERED __launch_bounds__(32 * WARPS)
    mamba_step_many(const __grid_constant__ Arguments p) {
#if __CUDA_ARCH__ >= 900
    __shared__ float partial[WARPS][SUMS];
    __shared__ float total[SUMS];
    overlap_previous();
    const unsigned block = blockIdx.x % CLUSTER, cluster = blockIdx.x / CLUSTER;
    const long long tile = cluster / unsigned(p.tiles), row = tile * ROWS;
    const long long first = (cluster - tile * p.tiles) * (TILES * 16);
    const long long outputs = p.rank + 2 * p.states;
    const int rows = p.batch - row < ROWS ? int(p.batch - row) : ROWS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;

    float sum[TILES][4];
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][i] = 0.0f;

#pragma unroll 1
    for (long long start = (block * WARPS + warp) * 32; start < p.channels;
         start += 32 * WARPS * CLUSTER) {
        const bool live = start + t * VECTOR < p.channels;  // others add zeros
        const long long channel = live ? start + t * VECTOR : 0;
        Pack<T, VECTOR> w[TILES][2], weight[TAPS], bias, seen[TAPS];
#pragma unroll
        for (int m = 0; m < TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const long long n = first + m * 16 + half * 8 + g;
                w[m][half] = Pack<T, VECTOR>::load(
                    p.x_proj + (n < outputs ? n : outputs - 1) * p.channels + channel);
            }
        load_weights(p, channel, weight, bias);
        float v[VECTOR];
        convolve(p, row + (g < rows ? g : 0), channel, weight, bias, seen, v);

        unsigned high[VECTOR], low[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            high[i] = live ? tf32(v[i]) : 0u;
            const float rest = add(v[i], -__uint_as_float(high[i]));
            // of an infinity nothing is left
            low[i] = live && (high[i] & 0x7f800000u) != 0x7f800000u ? tf32(rest) : 0u;
        }
#pragma unroll
        for (int i = 0; i < VECTOR; i += 2)
#pragma unroll
            for (int m = 0; m < TILES; ++m) {
                unsigned a[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float x = widen(w[m][k % 2].item[i + k / 2]);
                    a[k] = live ? __float_as_uint(x) : 0u;
                }
                multiply(sum[m], a, low[i], low[i + 1]);
                multiply(sum[m], a, high[i], high[i + 1]);
            }
    }

    // partial[warp]: (row, output), rows of PITCH
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            partial[warp][(2 * t + i % 2) * PITCH + m * 16 + i / 2 * 8 + g] = sum[m][i];
    __syncthreads();
    for (int i = threadIdx.x; i < SUMS; i += 32 * WARPS) {
        float x = partial[0][i];
#pragma unroll
        for (int k = 1; k < WARPS; ++k) x = add(x, partial[k][i]);
        total[i] = x;
    }
    cluster_barrier();
    static_assert(ROWS == CLUSTER, "a block ends the sums of one row of the batch");
    const int r = block;
    for (int i = threadIdx.x; i < TILES * 16; i += 32 * WARPS) {
        float x[CLUSTER];
#pragma unroll
        for (int k = 0; k < CLUSTER; ++k) x[k] = of_block(&total[r * PITCH + i], k);
#pragma unroll
        for (int k = 1; k < CLUSTER; ++k) x[0] = add(x[0], x[k]);
        const long long n = first + i, in_B = n - p.rank, in_C = in_B - p.states;
        const long long column = in_B < 0 ? n : in_C < 0 ? p.B_at + in_B : p.C_at + in_C;
        if (r < rows && n < outputs) p.mixed[(row + r) * p.pitch + column] = x[0];
    }
    cluster_barrier();  // nobody reads here any more
#endif
}
