// SPDX-License-Identifier: MIT
// What both kernels of a Mamba block's decode step share: their arguments and the short convolution.
#pragma once
#include "elementary.cuh"
#include "memory.cuh"
#include "numbers.cuh"

using T = DTYPE;
using State = typename StateOf<T>::type;

// Everything is contiguous. mixed holds r (rank), B and C (states each) of every row as State, at the
// columns 0, B_at and C_at of rows of `pitch` numbers; those are multiples of 16 bytes.
struct Arguments {
    const T *xz, *conv;                           // (batch, 2 E), (batch, TAPS - 1, E)
    const T *conv_weight, *conv_bias;             // (E, TAPS), (E) or null
    const T *x_proj, *dt_proj;                    // (rank + 2 states, E), (E, rank)
    const State *dt_bias, *A, *D;                 // (E), (E, states), (E)
    const State *decay_dt, *timesteps;            // (E) or null, (batch) or null
    const State* h;                               // (batch, E, states)
    State* mixed;                                 // (batch, pitch)
    T *y, *tail;                                  // (batch, E), (batch, TAPS - 1, E), maybe conv itself
    State* next;                                  // (batch, E, states), maybe h itself
    long long batch, channels, states, rank, B_at, C_at, pitch;
    long long tiles;                              // that one row's work is divided into
    long long state_only;
    double dt_scale;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

// v: silu of the convolution's last sample for COUNT neighbouring channels from `channel` on; seen: the
// samples it is made of, oldest first.
template <int COUNT>
__device__ __forceinline__ void convolve(const Arguments& p, long long row, long long channel,
                                         const Pack<T, COUNT> (&weight)[TAPS],
                                         const Pack<T, COUNT>& bias, Pack<T, COUNT> (&seen)[TAPS],
                                         State (&v)[COUNT]) {
    const T* before = p.conv + row * (TAPS - 1) * p.channels + channel;
#pragma unroll
    for (int k = 0; k < TAPS - 1; ++k) seen[k] = Pack<T, COUNT>::load(before + k * p.channels);
    seen[TAPS - 1] = Pack<T, COUNT>::load(p.xz + row * 2 * p.channels + channel);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        State sum = State(0);
#pragma unroll
        for (int k = 0; k < TAPS; ++k) {
            const int at = i * TAPS + k;  // weights of a channel are neighbours
            sum = fma(State(widen(seen[k].item[i])),
                      State(widen(weight[at / COUNT].item[at % COUNT])), sum);
        }
        if (p.conv_bias) sum = add(sum, State(widen(bias.item[i])));
        v[i] = mul(sum, sigmoid(sum));
    }
}

template <int COUNT>
__device__ __forceinline__ void load_weights(const Arguments& p, long long channel,
                                             Pack<T, COUNT> (&weight)[TAPS], Pack<T, COUNT>& bias) {
#pragma unroll
    for (int k = 0; k < TAPS; ++k)
        weight[k] = Pack<T, COUNT>::load(p.conv_weight + channel * TAPS + k * COUNT);
    if (p.conv_bias) bias = Pack<T, COUNT>::load(p.conv_bias + channel);
}
