// SPDX-License-Identifier: MIT
// The elements of sequences that a lane of the selective scan's backward reads and writes: V neighbouring
// channels of one of SUB steps.
#pragma once
#include "selective_backward.cuh"

template <class X, class Y>
struct Same {
    static constexpr bool value = false;
};
template <class X>
struct Same<X, X> {
    static constexpr bool value = true;
};

template <class X>  // of V numbers in one access
constexpr int ACROSS = V * int(sizeof(X)) <= 16 ? V : 16 / int(sizeof(X));

template <class X>
__device__ __forceinline__ void load_elements(X (&x)[V], const X* p) {
#pragma unroll
    for (int v = 0; v < V; v += ACROSS<X>) {
        const Pack<X, ACROSS<X>> y = Pack<X, ACROSS<X>>::load(p + v);
#pragma unroll
        for (int i = 0; i < ACROSS<X>; ++i) x[v + i] = y.item[i];
    }
}

template <class X>
__device__ __forceinline__ void load_widened(Real (&x)[V], const X* p) {
    constexpr bool PAIRS = Same<X, bfloat16>::value && V % 2 == 0;
    if constexpr (PAIRS) {  // a shift and a mask
        constexpr int WORDS_ACROSS = ACROSS<X> / 2;
#pragma unroll
        for (int v = 0; v < V; v += ACROSS<X>) {
            const auto y = Pack<unsigned, WORDS_ACROSS>::load(reinterpret_cast<const unsigned*>(p + v));
#pragma unroll
            for (int i = 0; i < WORDS_ACROSS; ++i) {
                x[v + 2 * i] = __uint_as_float(y.item[i] << 16);
                x[v + 2 * i + 1] = __uint_as_float(y.item[i] & 0xffff0000u);
            }
        }
    } else {
        X narrow_x[V];
        load_elements(narrow_x, p);
#pragma unroll
        for (int v = 0; v < V; ++v) x[v] = widen(narrow_x[v]);
    }
}

template <class X>
__device__ __forceinline__ void store_elements(X* p, const X (&x)[V]) {
#pragma unroll
    for (int v = 0; v < V; v += ACROSS<X>) {
        Pack<X, ACROSS<X>> y;
#pragma unroll
        for (int i = 0; i < ACROSS<X>; ++i) y.item[i] = x[v + i];
        y.store(p + v);
    }
}

// Do lanes' elements stand at multiples of V in a compact sequence?
__device__ __forceinline__ bool in_whole_elements(const Size& size) {
    return V == 1 || (size.width % V == 0 && size.piece % V == 0);
}

// Into a compact sequence (batch, L, E); p stands at the lane's first element.
__device__ __forceinline__ void write_elements(T* p, const Real (&x)[V], bool even, int live) {
    T y[V];
#pragma unroll
    for (int v = 0; v < V; ++v) y[v] = narrow<T>(x[v]);
    if (even && live >= V) {
#pragma unroll
        for (int v = 0; v < V; v += ACROSS<T>) {
            Pack<T, ACROSS<T>> z;
#pragma unroll
            for (int i = 0; i < ACROSS<T>; ++i) z.item[i] = y[v + i];
            z.put(p + v);
        }
    } else {
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (v < live) p[v] = y[v];
    }
}

struct Elements {
    int row;            // of SUB steps; there are none from SUB on
    int warp, in_warp;  // where the first stands in arrays of a warp's SUB steps
    int channel;        // of the block: the first
    int live;           // channels of V that exist
    int slot;           // where the first stands in `Own`

    __device__ __forceinline__ Elements(const Place& at, const Lane& me) {
        row = me.lane / Q;
        warp = me.warp;
        in_warp = me.lane * V;
        channel = me.warp * W + me.lane % Q * V;
        live = at.live - channel;
        slot = threadIdx.x * V;
    }
    __device__ __forceinline__ bool works() const { return Q * SUB == 32 || row < SUB; }
};

// One of u, dt, z, decay_dt, gy, from a lane's element of the segment's first SUB steps on.
struct Sequence {
    const T* start;
    long long time, column;

    __device__ __forceinline__ Sequence(const Strided& x, const Place& at, const Elements& mine)
        : start(start_of(x, at) + mine.channel * x.row + (at.first + mine.row) * x.time),
          time(x.time), column(x.row) {}

    // Start to copy the elements of the SUB steps from `first` on, if there are any.
    __device__ __forceinline__ void copy(T* to, long long first, int live, bool whole) const {
        const T* from = start + first * time;
        if (whole) {
#pragma unroll
            for (int v = 0; v < V; v += ACROSS<T>) copy_async<ACROSS<T> * sizeof(T)>(to + v, from + v);
        } else {
#pragma unroll 1
            for (int v = 0; v < V && v < live; ++v) copy_async<sizeof(T)>(to + v, from + v * column);
        }
    }
};

struct Sequences {
    Sequence u, dt, decay, gy, z;
    int live;
    bool whole;  // 16 bytes at a time

    __device__ __forceinline__ Sequences(const Arguments& p, const Place& at, const Elements& mine)
        : u(p.in.u, at, mine), dt(p.in.dt, at, mine), decay(p.in.decay_dt, at, mine),
          gy(p.gy, at, mine), z(p.in.z, at, mine), live(mine.works() ? mine.live : 0) {
        constexpr long long BITS = WIDE_u | WIDE_dt | WIDE_gy | (GATE ? WIDE_z : 0) |
                                   (DECAY == 2 ? WIDE_decay : 0);
        whole = live >= V && (V == 1 || (p.in.size.wide & BITS) == BITS);
    }
    // What the steps are made from.
    __device__ __forceinline__ void copy_steps(Own& to, int slot, const Elements& mine,
                                               long long first, long long length) const {
        if (first + mine.row >= length) return;
        u.copy(to.u[slot] + mine.slot, first, live, whole);
        dt.copy(to.dt[slot] + mine.slot, first, live, whole);
        if (DECAY == 2) decay.copy(to.decay[slot] + mine.slot, first, live, whole);
    }
    // Those that the output's gradient needs.
    __device__ __forceinline__ void copy_outputs(Own& to, int slot, const Elements& mine,
                                                 long long first, long long length) const {
        if (first + mine.row >= length) return;
        gy.copy(to.gy[slot] + mine.slot, first, live, whole);
        if (GATE) z.copy(to.z[slot] + mine.slot, first, live, whole);
    }
};
