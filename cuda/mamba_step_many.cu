// SPDX-License-Identifier: MIT
// A Mamba block's decode step, first half for many rows, on tensor cores: v = silu(conv(x)),
// (r, B, C) = x_proj v, for bfloat16. mamba_step_mixed.cu is the same for few rows.
//
// Memory contract: `Arguments` in mamba_step.cuh. Reads x, the convolution's state and x_proj, writes
// mixed; v goes to no memory. x_proj, 0.25 MB for 80 x 1536, is read once for eight rows of the batch,
// everything else once a group of outputs.
//
// Launch. A block has eight rows of the batch, TILES * 16 outputs and one of SLICES slices of the
// channels: each of its WARPS warps takes 4 * VECTOR neighbours PIECES times, a lane VECTOR of one row. The
// blocks of a tile are a cluster. Grid = tiles of rows x groups of outputs (p.tiles) x SLICES. A weight
// is a bfloat16 and v, in float32, the sum of three, so that every product is exact. Sums run over a warp's
// channels in the tensor core, then over warps, then over slices, in their order, which depends on the
// number of channels alone.
//
// Compiled for DTYPE = bfloat16, TAPS, TILES, VECTOR (4 or 8, of which the channels are a multiple), WARPS,
// PIECES and SLICES, at most 8, for sm_90 and above; before it the kernel is empty and not launched.
// Overlaps the kernel before, and lets mamba_step begin once that has ended.
#include "mamba_step.cuh"
#include "matrix_unit.cuh"

constexpr int ROWS = 8, OUTPUTS = 16 * TILES, THREADS = 32 * WARPS;
constexpr int PITCH = OUTPUTS + 4;  // no two lanes store to one bank
constexpr int SHARE = (ROWS * OUTPUTS + SLICES - 1) / SLICES;  // sums that a block finishes

using Piece = Pack<T, VECTOR>;

struct alignas(16) Shared {
    Piece w[2 * TILES][THREADS];
    float partial[WARPS][ROWS][PITCH];
    float come[SLICES][SHARE];  // from the slices, to be added up here
    unsigned long long barrier;
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher asks for another size");
extern __shared__ uint4 arena[];

#if __CUDA_ARCH__ >= 900
#define CLUSTERED __cluster_dims__(SLICES, 1, 1)
#else
#define CLUSTERED
#endif

// Three bfloat16 that add up to x (its 24 digits, eight each), beside those of y in the upper halves.
struct Parts {
    unsigned part[3];

    static __device__ __forceinline__ float rest(float x) {
        const float less = add(x, -__uint_as_float(__float_as_uint(x) & 0xffff0000u));
        return fabsf(x) < __uint_as_float(0x7f800000u) ? less : 0.0f;  // of an infinity nothing
    }

    __device__ __forceinline__ Parts(float x, float y) {
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            part[i] = (__float_as_uint(x) >> 16) | (__float_as_uint(y) & 0xffff0000u);
            x = rest(x);
            y = rest(y);
        }
    }
};

// Blocks of a cluster send each other numbers. Each first says how many bytes it waits for; no block
// sends before all have said so, and none ends before it has what it waits for.
__device__ __forceinline__ unsigned shared_place(const void* p) {
    return unsigned(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void expect(unsigned long long* barrier, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
        const unsigned at = shared_place(barrier);
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
                     : "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void all_expect() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Send x to the place `to` and the barrier of the `block`-th block of the cluster.
__device__ __forceinline__ void send(float x, const float* to, const unsigned long long* barrier,
                                     unsigned block) {
#if __CUDA_ARCH__ >= 900
    unsigned place, far_barrier;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(place)
                 : "r"(shared_place(to)), "r"(block));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(far_barrier)
                 : "r"(shared_place(barrier)), "r"(block));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                     place),
                 "r"(__float_as_uint(x)), "r"(far_barrier)
                 : "memory");
#endif
}

__device__ __forceinline__ void await_sent(unsigned long long* barrier) {
#if __CUDA_ARCH__ >= 900
    unsigned done = 0;
    while (!done)
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_place(barrier))
            : "memory");
#endif
}

// The i-th pair of a lane's channels.
__device__ __forceinline__ unsigned pair(const Piece& x, int i) {
    return unsigned(x.item[2 * i].bits) | unsigned(x.item[2 * i + 1].bits) << 16;
}

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS)
    mamba_step_many(const __grid_constant__ Arguments p) {
#if __CUDA_ARCH__ >= 900
    Shared& shared = *reinterpret_cast<Shared*>(arena);
    expect(&shared.barrier, sizeof(shared.come));
    await_previous();
    let_next_begin();  // only now: mamba_step reads, before it waits, what came before this kernel
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, eighth = lane / 4, quad = lane % 4;
    const int slice = blockIdx.x % SLICES, channels = int(p.channels);
    const unsigned place = blockIdx.x / SLICES, tile = place / unsigned(p.tiles);
    const int first = int(place - tile * unsigned(p.tiles)) * OUTPUTS;
    const int outputs = int(p.rank + 2 * p.states);
    const long long row = (long long)tile * ROWS;
    const int rows = p.batch - row < ROWS ? int(p.batch - row) : ROWS;
    const int mine = eighth < rows ? eighth : 0;
    const T* before = p.conv + row * (TAPS - 1) * channels + mine * (TAPS - 1) * channels;
    const T* now = p.xz + row * 2 * channels + mine * 2 * channels;

    float sum[TILES][4];
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][i] = 0.0f;

    // The channels of a warp's piece in the order of the lanes: any, so long as both factors have it.
#pragma unroll 1
    for (int i = 0; i < PIECES; ++i) {
        const int begin = ((slice * PIECES + i) * WARPS + warp) * 4 * VECTOR;
        if (begin >= channels) break;
        const int found = begin + quad * VECTOR;
        const bool live = found < channels;  // otherwise v is zero
        const int channel = live ? found : channels - VECTOR;
        // Weights wait in shared memory, each for the thread that asked for it: the compiler, which
        // saves registers, would ask for them where they are used, one after another.
#pragma unroll
        for (int o = 0; o < 2 * TILES; ++o) {
            const int asked = first + o * 8 + eighth, n = asked < outputs ? asked : outputs - 1;
            copy_async<int(sizeof(Piece))>(&shared.w[o][threadIdx.x],
                                           p.x_proj + n * channels + channel);
        }
        __syncwarp();  // the compiler moves no load across
        Piece seen[TAPS];
        Taps<VECTOR> taps;
        load_samples(before + channel, now + channel, channels, seen);
        taps.load(p, channel);
        __syncwarp();
        float v[VECTOR];
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) {
            v[k] = taps.output(seen, k);
            if (!live) v[k] = 0.0f;
        }
        wait();
#pragma unroll
        for (int k = 0; k < VECTOR; k += 4) {
            const Parts low(v[k], v[k + 1]), high(v[k + 2], v[k + 3]);
#pragma unroll
            for (int part = 2; part >= 0; --part)  // the small ones first
#pragma unroll
                for (int m = 0; m < TILES; ++m) {
                    const Piece &upper = shared.w[2 * m][threadIdx.x];
                    const Piece &lower = shared.w[2 * m + 1][threadIdx.x];
                    multiply<T>(sum[m], pair(upper, k / 2), pair(lower, k / 2),
                                pair(upper, k / 2 + 1), pair(lower, k / 2 + 1), low.part[part],
                                high.part[part]);
                }
        }
    }

#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            shared.partial[warp][2 * quad + i % 2][16 * m + 8 * (i / 2) + eighth] = sum[m][i];
    __syncthreads();
    all_expect();
#pragma unroll 1
    for (int i = threadIdx.x; i < SLICES * SHARE; i += THREADS) {
        const int r = i / OUTPUTS, o = i % OUTPUTS;
        float total = 0.0f;
        if (r < ROWS) {
            total = shared.partial[0][r][o];
#pragma unroll
            for (int k = 1; k < WARPS; ++k) total = add(total, shared.partial[k][r][o]);
        }
        send(total, &shared.come[slice][i % SHARE], &shared.barrier, i / SHARE);
    }
    await_sent(&shared.barrier);
#pragma unroll 1
    for (int i = threadIdx.x; i < SHARE; i += THREADS) {
        const int place = slice * SHARE + i, r = place / OUTPUTS, n = first + place % OUTPUTS;
        if (r >= rows || n >= outputs) continue;
        float total = shared.come[0][i];
#pragma unroll
        for (int k = 1; k < SLICES; ++k) total = add(total, shared.come[k][i]);
        p.mixed[(row + r) * p.pitch + column(p, n)] = total;
    }
#endif
}
