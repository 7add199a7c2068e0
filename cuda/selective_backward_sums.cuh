// SPDX-License-Identifier: MIT
// The sums over lanes and warps in the backward of the selective scan: over the states of a channel, and of
// dB_t and dC_t over the channels of a block.
#pragma once
#include "selective_backward.cuh"

// ------------------------------------------------------------------------------ sums over lanes

// Sum KEEP numbers v over the lanes that differ in the bits FROM ... of a lane's LANES, halves of them at a
// time; of an odd number both lanes keep the one in the middle. `at` says where each is to be put.
template <int FROM, int KEEP, class Put>
__device__ __forceinline__ void sum_values(Real* v, int* at, int lane, Put put) {
    if constexpr (FROM < LANES) {
        const bool upper = lane & FROM;
        constexpr int HALF = KEEP / 2, LEFT = (KEEP + 1) / 2;
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            const Real send = upper ? v[i] : v[i + LEFT], keep = upper ? v[i + LEFT] : v[i];
            v[i] = add(keep, __shfl_xor_sync(~0u, send, FROM));
            at[i] = upper ? at[i + LEFT] : at[i];
        }
        if constexpr (KEEP % 2) {
            v[HALF] = add(v[HALF], __shfl_xor_sync(~0u, v[HALF], FROM));
            at[HALF] = upper ? -1 : at[HALF];
        }
        sum_values<2 * FROM, LEFT>(v, at, lane, put);
    } else {
#pragma unroll
        for (int i = 0; i < KEEP; ++i)
            if (at[i] >= 0) put(at[i], v[i]);
    }
}

// Where number r of a state stands behind the state's first in a row (matrix, state, word).
constexpr int beside(int r) { return r / WORDS * (N * WORDS) + r % WORDS; }

// Sum the shares of dB_t and dC_t, v[s * REST + r] for s < SS, r < RR, over the channels of a warp, likewise.
template <int STAGE, int SS, int RR, class Put>
__device__ __forceinline__ void sum_rows(Real* v, int lane, int state, int at, bool owner, Put put) {
    constexpr int FROM = LANES << STAGE;
    if constexpr (FROM < 32) {
        const bool upper = lane & FROM;
        if constexpr (RR > 1) {
            constexpr int HALF = RR / 2;
#pragma unroll
            for (int s = 0; s < SS; ++s)
#pragma unroll
                for (int r = 0; r < HALF; ++r) {
                    Real &low = v[s * REST + r], high = v[s * REST + r + HALF];
                    const Real send = upper ? low : high, keep = upper ? high : low;
                    low = add(keep, __shfl_xor_sync(~0u, send, FROM));
                }
            sum_rows<STAGE + 1, SS, HALF>(v, lane, state, at + (upper ? beside(HALF) : 0), owner, put);
        } else if constexpr (SS > 1) {
#pragma unroll
            for (int s = 0; s < SS / 2; ++s) {
                Real &low = v[s * REST], high = v[(s + SS / 2) * REST];
                const Real send = upper ? low : high, keep = upper ? high : low;
                low = add(keep, __shfl_xor_sync(~0u, send, FROM));
            }
            sum_rows<STAGE + 1, SS / 2, 1>(v, lane, state + (upper ? SS / 2 : 0), at, owner, put);
        } else {
            v[0] = add(v[0], __shfl_xor_sync(~0u, v[0], FROM));
            sum_rows<STAGE + 1, 1, 1>(v, lane, state, at, owner && !upper, put);
        }
    } else {
        if (owner)
#pragma unroll
            for (int s = 0; s < SS; ++s)
#pragma unroll
                for (int r = 0; r < RR; ++r) put(s + state, at + beside(r), v[s * REST + r]);
    }
}

// ------------------------------------------------------------------------------ sums over warps

// Sum over warps the rows of `steps` steps from the segment's step `first` on, and write what exists.
template <int STEPS>
__device__ __forceinline__ void write_rows(const Shared& shared, const Arguments& p, const Place& at,
                                           long long first, long long length, long long row_at,
                                           int slot) {
    constexpr int WIDE = 16 / int(sizeof(Real)) < N * WORDS ? 16 / int(sizeof(Real)) : N * WORDS;
    const long long width = p.in.size.states * WORDS;  // of a row in memory
    const long long left = length - first;
    if (MATRICES) {
        const bool aligned = width % WIDE == 0;
        Real* const to = reinterpret_cast<Real*>(B_VARIES ? p.dB : p.dC);
#pragma unroll
        for (int l = 0; l < (STEPS * ROW / WIDE + THREADS - 1) / THREADS; ++l) {
            const int i = (l * THREADS + threadIdx.x) * WIDE, t = i / ROW, k = i % ROW, n = k % (N * WORDS);
            if ((STEPS * ROW / WIDE) % THREADS && i >= STEPS * ROW) break;
            const Real* from = shared.rows + slot * SUB * ROW + i;
            Pack<Real, WIDE> warp[WARPS], sum;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) warp[w] = Pack<Real, WIDE>::load(from + w * ROW_STEPS * ROW);
#pragma unroll
            for (int v = 0; v < WIDE; ++v) sum.item[v] = tree<WARPS>([&](int w) { return warp[w].item[v]; });
            if (t >= left) continue;
            Real* x = (MATRICES == 2 && k >= N * WORDS ? reinterpret_cast<Real*>(p.dC) : to) +
                      (row_at + first + t) * width + n;
            if (aligned) {
                if (n < width) sum.store(x);
            } else {
#pragma unroll
                for (int v = 0; v < WIDE; ++v)
                    if (n + v < width) x[v] = sum.item[v];
            }
        }
    }
    if (TIMED)
        for (int t = threadIdx.x; t < STEPS && t < left; t += THREADS)
            p.dtau[row_at + first + t] = tree<WARPS>(
                [&](int w) { return shared.dtau[w * ROW_STEPS + slot * SUB + t]; });
}
