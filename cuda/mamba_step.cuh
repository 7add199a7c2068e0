// SPDX-License-Identifier: MIT
// What the kernels of a Mamba block's decode step share: their arguments and the short convolution.
#pragma once
#include "elementary.cuh"
#include "memory.cuh"
#include "numbers.cuh"

using T = DTYPE;
using State = typename StateOf<T>::type;

// Everything is contiguous. mixed holds r (rank), B and C (states each) of every row as State, at the
// columns 0, B_at and C_at of rows of `pitch` numbers; those are multiples of 16 bytes. What one row has, and each weight, are less than 2^28 numbers:
// offsets within them are 32 bits, those of rows 64.
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

// The weights of COUNT neighbouring channels, which are neighbours: TAPS a channel.
template <int COUNT>
struct Taps {
    static constexpr int BYTES = TAPS * COUNT * int(sizeof(T));
    static constexpr int EACH = BYTES % 16 == 0   ? 16 / int(sizeof(T))
                                : BYTES % 8 == 0  ? 8 / int(sizeof(T))
                                : BYTES % 4 == 0 && sizeof(T) <= 4 ? 4 / int(sizeof(T))
                                                  : 1;
    Pack<T, EACH> weight[TAPS * COUNT / EACH];
    Pack<T, COUNT> bias;

    __device__ __forceinline__ void load(const Arguments& p, int channel) {
#pragma unroll
        for (int i = 0; i < TAPS * COUNT / EACH; ++i)
            weight[i] = Pack<T, EACH>::load(p.conv_weight + channel * TAPS + i * EACH);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) bias.item[i] = narrow<T>(State(0));
        if (p.conv_bias) bias = Pack<T, COUNT>::load(p.conv_bias + channel);
    }

    // silu of the convolution's last sample of the i-th channel, made of `seen`, the oldest first
    __device__ __forceinline__ State output(const Pack<T, COUNT> (&seen)[TAPS], int i) const {
        State sum = State(0);
#pragma unroll
        for (int k = 0; k < TAPS; ++k) {
            const int at = i * TAPS + k;
            sum = fma(State(widen(seen[k].item[i])),
                      State(widen(weight[at / EACH].item[at % EACH])), sum);
        }
        sum = add(sum, State(widen(bias.item[i])));
        return mul(sum, sigmoid(sum));
    }
};

// The samples of COUNT neighbouring channels, the oldest first: `before` is their place in conv, `now`
// in xz.
template <int COUNT>
__device__ __forceinline__ void load_samples(const T* before, const T* now, int channels,
                                             Pack<T, COUNT> (&seen)[TAPS]) {
#pragma unroll
    for (int k = 0; k < TAPS - 1; ++k) seen[k] = Pack<T, COUNT>::load(before + k * channels);
    seen[TAPS - 1] = Pack<T, COUNT>::load(now);
}

// Where `mixed` has the n-th output of x_proj.
__device__ __forceinline__ int column(const Arguments& p, int n) {
    const int in_B = n - int(p.rank), in_C = in_B - int(p.states);
    return in_B < 0 ? n : in_C < 0 ? int(p.B_at) + in_B : int(p.C_at) + in_C;
}
