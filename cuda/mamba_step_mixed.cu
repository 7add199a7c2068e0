// SPDX-License-Identifier: MIT
// A Mamba block's decode step, first half: v = silu(conv(x)), (r, B, C) = x_proj v.
//
// Memory contract: `Arguments` in mamba_step.cuh. Reads x, the convolution's state and x_proj, writes
// mixed; v is made anew by every block that needs it and goes to no memory. x_proj, 0.25 MB for 80 x 1536
// in bfloat16, is read once a tile of ROWS rows, the rest once a tile of OUTPUTS outputs, from the near
// caches.
//
// Launch. A block has OUTPUTS rows of x_proj and ROWS rows of the batch; grid = tiles of outputs
// (p.tiles) x tiles of rows. Each thread owns VECTOR neighbouring channels out of every blockDim.x *
// VECTOR. VECTOR and blockDim.x, at most 256, depend on the number of channels and the dtype alone and
// fix the order of a sum: first in a thread, then over a warp, the far half first, then over the warps
// in order. OUTPUTS and ROWS change no bit.
//
// Compiled for DTYPE, TAPS, VECTOR, OUTPUTS and ROWS (powers of two, their product at most 32). Overlaps
// the kernel before, and lets mamba_step begin once that has ended.
#include "mamba_step.cuh"

constexpr int SUMS = OUTPUTS * ROWS, SHARE = 32 / SUMS, WARPS = 8;

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    mamba_step_mixed(const __grid_constant__ Arguments p) {
    await_previous();
    let_next_begin();  // only now: mamba_step reads, before it waits, what came before this kernel
    const unsigned tile = blockIdx.x / unsigned(p.tiles);
    const long long row = (long long)tile * ROWS;
    const int channels = int(p.channels), outputs = int(p.rank + 2 * p.states);
    const int first = int(blockIdx.x - tile * unsigned(p.tiles)) * OUTPUTS;
    const int rows = p.batch - row < ROWS ? int(p.batch - row) : ROWS;
    const T* before = p.conv + row * (TAPS - 1) * channels;
    const T* now = p.xz + row * 2 * channels;

    State sum[SUMS];
#pragma unroll
    for (int i = 0; i < SUMS; ++i) sum[i] = State(0);

#pragma unroll 1
    for (int channel = threadIdx.x * VECTOR; channel < channels; channel += blockDim.x * VECTOR) {
        Pack<T, VECTOR> w[OUTPUTS];
        Taps<VECTOR> taps;
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o) {
            const int n = first + o < outputs ? first + o : outputs - 1;
            w[o] = Pack<T, VECTOR>::load(p.x_proj + n * channels + channel);
        }
        taps.load(p, channel);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int at = r < rows ? r : 0;
            Pack<T, VECTOR> seen[TAPS];
            load_samples(before + at * (TAPS - 1) * channels + channel,
                         now + at * 2 * channels + channel, channels, seen);
            State v[VECTOR];
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) v[i] = taps.output(seen, i);
#pragma unroll
            for (int o = 0; o < OUTPUTS; ++o)
#pragma unroll
                for (int i = 0; i < VECTOR; ++i)
                    sum[o * ROWS + r] = fma(State(widen(w[o].item[i])), v[i], sum[o * ROWS + r]);
        }
    }

    // Sum over lanes; while a lane holds several sums it gives half of them away.
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int apart = 16, held = SUMS; apart > 0; apart /= 2) {
        if (held > 1) {
            held /= 2;
            const bool upper = lane & apart;
#pragma unroll
            for (int i = 0; i < SUMS / 2; ++i) {
                if (i >= held) break;
                const State keep = upper ? sum[i + held] : sum[i];
                const State give = upper ? sum[i] : sum[i + held];
                sum[i] = add(keep, __shfl_xor_sync(~0u, give, apart));
            }
        } else {
            sum[0] = add(sum[0], __shfl_xor_sync(~0u, sum[0], apart));
        }
    }
    __shared__ State partial[WARPS][SUMS];
    if (lane % SHARE == 0) partial[warp][lane / SHARE] = sum[0];
    __syncthreads();
    if (threadIdx.x >= SUMS) return;
    const int r = threadIdx.x % ROWS;
    const int n = first + threadIdx.x / ROWS;
    if (r >= rows || n >= outputs) return;
    State total = partial[0][threadIdx.x];
    for (int i = 1; i < blockDim.x / 32; ++i) total = add(total, partial[i][threadIdx.x]);
    p.mixed[(row + r) * p.pitch + column(p, n)] = total;
}
