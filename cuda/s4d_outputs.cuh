// SPDX-License-Identifier: MIT
// Sums over the states of a channel, and what becomes of them: y of the forward, du of the backward.
//
// States are summed in one order whatever LANES is, so that a row's results depend on L, H, M, dtype and
// device alone; they are added four in a row, beginning with D u, then in pairs.
#pragma once
#include "s4d_walk.cuh"

constexpr int HELD = Q > LANES ? Q / LANES : 1;  // sums of steps that a lane has after the exchange
constexpr int NEXT_TO = S < 4 ? S : 4;   // states that are added one after the other
static_assert(S % NEXT_TO == 0, "");

// ------------------------------------------------------------------------------ sums over states

// Sum over the lanes of a channel: neighbours first. While there is more than one number, every exchange halves
// them; a lane keeps the steps from first_of(lane) on.
template <int N, int OFFSET, int MOST>
__device__ __forceinline__ void sum_lanes(Real (&x)[MOST], int lane) {
    if constexpr (OFFSET < LANES) {
        if constexpr (N > 1) {
            const bool upper = lane & OFFSET;
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                const Real keep = upper ? x[i + N / 2] : x[i], give = upper ? x[i] : x[i + N / 2];
                x[i] = add(keep, __shfl_xor_sync(~0u, give, OFFSET));
            }
            sum_lanes<N / 2, 2 * OFFSET>(x, lane);
        } else {
            x[0] = add(x[0], __shfl_xor_sync(~0u, x[0], OFFSET));
            sum_lanes<1, 2 * OFFSET>(x, lane);
        }
    }
}

__device__ __forceinline__ int first_of(int part) {
    int first = 0;
#pragma unroll
    for (int offset = 1, n = Q / 2; offset < LANES && n > 0; offset *= 2, n /= 2)
        if (part & offset) first += n;
    return first;
}

__device__ __forceinline__ Real sum_tree(Real (&x)[S / NEXT_TO]) {
#pragma unroll
    for (int n = S / NEXT_TO / 2; n > 0; n /= 2)
#pragma unroll
        for (int i = 0; i < n; ++i) x[i] = add(x[2 * i], x[2 * i + 1]);
    return x[0];
}

// The direct path: the first lane of a channel adds D u to its states' part.
struct Direct {
    Real D;
    bool mine;

    __device__ __forceinline__ Direct(const Real* data, const Place& at, const Size& size) {
        mine = data && at.part == 0 && at.live;
        D = mine ? data[at.row / size.alike * size.channels + at.channel] : Real(0);
    }

    __device__ __forceinline__ Real of(Real u) const { return mine ? mul(D, u) : Real(0); }
};

// first + Re sum_n v_n s_n of the lane's states.
__device__ __forceinline__ Real output(const State (&v)[S], const State (&s)[S], Real first) {
    Real sums[S / NEXT_TO];
#pragma unroll
    for (int i = 0; i < S; ++i) {
        Real& sum = sums[i / NEXT_TO];
        if (i == 0)
            sum = real_part(v[i], s[i], first);
        else
            sum = i % NEXT_TO ? real_part(v[i], s[i], sum) : real_part(v[i], s[i]);
    }
    return sum_tree(sums);
}

// Where a lane writes y or du: the steps that it holds of a group, and of single ones if it is the first.
struct Output {
    T* to;
    long long time;
    bool writes, first;

    __device__ __forceinline__ Output(T* data, const Place& at, const Size& size, bool reverse) {
        const long long start = reverse ? at.first + at.count - 1 : at.first;
        time = reverse ? -size.onward : size.onward;
        to = data + at.row * size.length * size.channels + start * size.onward + at.channel +
             first_of(at.part) * time;
        writes = at.live && at.part < Q;
        first = at.live && at.part == 0;
    }

    __device__ __forceinline__ void group(const Real (&x)[Q]) {
        if (writes) {
            T* p = to;
#pragma unroll
            for (int i = 0; i < HELD; ++i, p += time) *p = narrow<T>(x[i]);
        }
        to += Q * time;
    }

    __device__ __forceinline__ void single(Real x) {
        if (first) *to = narrow<T>(x);
        to += time;
    }
};

// Zeros for the steps of the segment that do not count.
__device__ __forceinline__ void fill_rest(T* data, const Place& at, const Size& size) {
    if (!at.live) return;
    const long long begin = at.first + at.count, after = at.after(size);
#pragma unroll 1
    for (long long t = begin + at.part; t < after; t += LANES)
        data[at.row * size.length * size.channels + t * size.onward + at.channel] =
            narrow<T>(Real(0));
}
