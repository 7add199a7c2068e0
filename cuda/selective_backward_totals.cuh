// SPDX-License-Identifier: MIT
// The sums over time in the backward of the selective scan, in two levels: a lane's of a chunk in registers,
// those of all its chunks in shared memory.
#pragma once
#include "selective_backward_chain.cuh"
#include "selective_backward_step.cuh"

// Add what a chunk gave to the sums over all of time, and clear it.
__device__ __forceinline__ void add_up(Shared& shared, Totals& totals, Sums& over, const Elements& mine) {
    const auto close = [&](int which, State(&x)[PACK][S]) {
#pragma unroll
        for (int i = 0; i < PACK * S; ++i) {
            State& total = shared.totals[which][i][threadIdx.x];
            total = add(total, x[i / S][i % S]);
            x[i / S][i % S] = Number::zero();
        }
    };
    close(0, totals.A);
    if (!B_VARIES) close(1, totals.B);
    if (!C_VARIES) close(1 + int(!B_VARIES), totals.C);
    const auto close_elements = [&](Real* total, Real(&x)[V]) {
        Real sum[V];
        load_elements(sum, static_cast<const Real*>(total));
#pragma unroll
        for (int v = 0; v < V; ++v) {
            sum[v] = add(sum[v], x[v]);
            x[v] = Real(0);
        }
        store_elements(total, sum);
    };
    close_elements(shared.over_time[0] + mine.slot, over.D);
    close_elements(shared.over_time[1] + mine.slot, over.bias);
    if (DECAY == 1) close_elements(shared.over_time[DECAY == 1 ? 2 : 0] + mine.slot, over.own);
}

// Write what was added up over the segment's time, and the gradient of the state before it.
__device__ __forceinline__ void write_totals(const Shared& shared, const Arguments& p, const Place& at,
                                             const Lane& me, const Elements& mine,
                                             const State (&carry)[PACK][S]) {
    const Size& size = p.in.size;
    const long long states = states_at(size, at.row, at, me);
    if (at.first == 0) store_states(p.dh0 + states_at(size, at.batch, at, me), carry, size, me);
    const auto total = [&](int which, State* to, long long pitch) {
#pragma unroll
        for (int i = 0; i < PACK * S; ++i) {
            if (i / S < me.channels && i % S < me.live)
                to[i / S * pitch + i % S] = shared.totals[which][i][threadIdx.x];
        }
    };
    total(0, p.dA + states, size.pitch);
    const long long constant =
        (at.row * size.width + at.channel + me.channel) * size.states + me.first;
    if (!B_VARIES) total(1, p.dB + constant, size.states);
    if (!C_VARIES) total(1 + int(!B_VARIES), p.dC + constant, size.states);
    const long long channel = at.row * size.width + at.channel + mine.channel;
#pragma unroll
    for (int which = 0; which < 2 + int(DECAY == 1); ++which)
#pragma unroll
        for (int v = 0; v < V; ++v) {
            Real sum = shared.over_time[which][mine.slot + v];
#pragma unroll
            for (int mask = Q; mask < 32; mask *= 2)
                sum = add(sum, __shfl_xor_sync(~0u, sum, mask));
            Real* to = which == 0 ? p.dD : which == 1 ? p.dbias : p.down;
            if (to && mine.row == 0 && v < mine.live) to[channel + v] = sum;
        }
}
