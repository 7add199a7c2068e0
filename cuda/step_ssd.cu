// SPDX-License-Identifier: MIT
// One step of a Mamba-2 block between its projections: `ssd_update` makes (x, B, C) = silu(conv(xBC)),
// delta = dt_scale clamp(softplus(r + dt_bias)), h = exp(delta A) h + delta B x and C h + D x; `ssd_close`
// gates and norms that, and shifts the convolution's inputs.
//
// Memory contract. parts (rows, E + mixed + heads), (z, xBC, r) a row, conv (rows, K - 1, mixed) and y
// (rows, E) are DTYPE, the state (rows, heads, P, N), made (rows, E) and the parameters A, D and dt_bias
// (heads) REAL; mixed = E + 2 G N. Rows of parts, conv and state have strides in elements; everything
// else is compact. update reads parts, conv and the state and writes the next state, which may be the
// memory of the state, and made; close reads made, z, xBC and conv and writes y and the next conv,
// which may be the memory of conv. The state is read once and written once, 2 x 33.5 MB for 64 rows of
// E = 1024 channels with N = 128 states; B and C are convolved anew by every block.
//
// Launch. update: a block has `piece` of the P channels of a head of a row, and a warp AT_ONCE of these
// at a time; lanes share the sum over n in packs of VECTOR states, which depends on N and the dtype
// alone, and meet from the far ones to the near. close: a block a group of a row, and the group's share
// of the convolution's inputs; its sum of squares is over WARPS warps in order. Dynamic shared memory of
// update: (2 N + piece) numbers.
//
// Compiled for ENTRY (which kernel), DTYPE, REAL and VECTOR.
#include "step_sums.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS, AT_ONCE = 4;

struct Arguments {
    const T *parts, *conv;
    const R* h;
    Either weight, bias;
    const R *dt_bias, *A, *D, *timesteps;
    Either norm;
    T *y, *next_conv;
    R *next, *made;
    double low, high, dt_scale, eps;
    long long rows, heads, size, states, groups, taps, piece;
    long long parts_row, conv_row, h_row, timesteps_row;
    long long state_only, norm_first;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

extern __shared__ double scratch[];

#if ENTRY == 0
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    ssd_update(const __grid_constant__ Arguments p) {
    overlap_previous();
    const long long width = p.heads * p.size, each = p.groups * p.states, mixed = width + 2 * each;
    const long long pieces = p.size / p.piece;
    const long long head = blockIdx.x / pieces % p.heads, row = blockIdx.x / pieces / p.heads;
    const long long first = head * p.size + blockIdx.x % pieces * p.piece;  // of the channels
    const long long group = head / (p.heads / p.groups);
    R* B = reinterpret_cast<R*>(scratch);
    R *C = B + p.states, *x = C + p.states;
    const T *parts = p.parts + row * p.parts_row + width, *conv = p.conv + row * p.conv_row;
    for (long long n = threadIdx.x; n < 2 * p.states + p.piece; n += THREADS) {
        long long channel = first + n - 2 * p.states;
        if (n < p.states) channel = width + group * p.states + n;
        else if (n < 2 * p.states) channel = width + each + group * p.states + n - p.states;
        B[n] = silu(convolve(conv + channel, nullptr, mixed, parts[channel], p.weight, p.bias, channel,
                             int(p.taps)));
    }
    R delta = softplus(add(wide(parts[mixed + head]), p.dt_bias[head]));
    delta = delta < R(p.low) ? R(p.low) : delta;
    delta = mul(R(p.dt_scale), delta > R(p.high) ? R(p.high) : delta);
    R decay = delta;
    if (p.timesteps) {
        decay = mul(p.timesteps[row * p.timesteps_row], delta);
        if (!p.state_only) delta = decay;
    }
    const R a = exponential(mul(decay, p.A[head]));
    const R direct = p.D[head];
    __syncthreads();

    using States = Pack<R, VECTOR>;
    const int lane = threadIdx.x % 32;
    const R* before = p.h + row * p.h_row + first * p.states;
    R* after = p.next + (row * width + first) * p.states;
    for (long long c = threadIdx.x / 32 * AT_ONCE; c < p.piece; c += WARPS * AT_ONCE) {
        long long from[AT_ONCE];
        R drive[AT_ONCE], sum[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const long long channel = c + i < p.piece ? c + i : c;
            from[i] = channel * p.states;
            drive[i] = mul(delta, x[channel]);
            sum[i] = R(0);
        }
        for (long long n = lane * VECTOR; n < p.states; n += 32 * VECTOR) {
            States h[AT_ONCE];
            R in[VECTOR], out[VECTOR];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) h[i] = States::load(before + from[i] + n);
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) {
                in[v] = B[n + v];
                out[v] = C[n + v];
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) {
                    h[i].item[v] = fma(a, h[i].item[v], mul(drive[i], in[v]));
                    sum[i] = fma(h[i].item[v], out[v], sum[i]);
                }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                if (c + i < p.piece) h[i].put(after + from[i] + n);
        }
        sum_over_lanes<32>(sum);
        const long long channel = c + lane / (32 / AT_ONCE);
        if (lane % (32 / AT_ONCE) == 0 && channel < p.piece)
            p.made[row * width + first + channel] = fma(direct, x[channel], sum[0]);
    }
}
#endif

#if ENTRY == 1
extern "C" __global__ void __launch_bounds__(THREADS)
    ssd_close(const __grid_constant__ Arguments p) {
    overlap_previous();
    const long long width = p.heads * p.size, mixed = width + 2 * p.groups * p.states;
    const long long row = blockIdx.x / p.groups, group = blockIdx.x % p.groups;
    const long long size = width / p.groups, start = group * size;
    const T *z = p.parts + row * p.parts_row + start, *newest = p.parts + row * p.parts_row + width;
    const R* made = p.made + row * width + start;
    T* y = p.y + row * width + start;
    const bool gated = !p.norm.data || !p.norm_first;
    if (!p.norm.data) {
        for (long long e = threadIdx.x; e < size; e += THREADS)
            y[e] = stored(mul(made[e], silu(wide(z[e]))));
    } else {
        R sum = R(0);
        for (long long e = threadIdx.x; e < size; e += THREADS) {
            const R value = gated ? mul(made[e], silu(wide(z[e]))) : made[e];
            sum = fma(value, value, sum);
        }
        sum = sum_over_block<WARPS>(sum);
        const R factor = R(1) / root(add(sum / R(size), R(p.eps)));
        for (long long e = threadIdx.x; e < size; e += THREADS) {
            const R opening = silu(wide(z[e]));
            const R value = gated ? mul(made[e], opening) : made[e];
            const R normed = mul(mul(value, factor), p.norm[start + e]);
            y[e] = stored(gated ? normed : mul(normed, opening));
        }
    }
    const T* past = p.conv + row * p.conv_row;
    T* next = p.next_conv + row * (p.taps - 1) * mixed;
    for (long long c = group * THREADS + threadIdx.x; c < mixed; c += p.groups * THREADS) {
        for (long long k = 0; k + 2 < p.taps; ++k) next[k * mixed + c] = past[(k + 1) * mixed + c];
        if (p.taps > 1) next[(p.taps - 2) * mixed + c] = newest[c];
    }
}
#endif
