// SPDX-License-Identifier: MIT
// What a lane of the selective scan's backward makes of its elements: the steps of states before the walk over
// them, and the gradients of u, dt, z, decay_dt, D, bias and timesteps from the sums of that walk.
#pragma once
#include "selective_backward_elements.cuh"

// softplus(x), and its derivative
__device__ __forceinline__ float softplus_and_slope(float x, float& slope) {
    const float e = exponential_within(fmaxf(-fabsf(x), -104.0f));
    slope = mul(inverse(add(1.0f, e)), x < 0 ? e : 1.0f);
    return add(x < 0 ? 0.0f : x, log1p_unit(e));
}
__device__ __forceinline__ double softplus_and_slope(double x, double& slope) {
    slope = sigmoid(x);
    return softplus(x);
}

// Where the softplus' slope at a lane's elements is kept.
__device__ __forceinline__ Real* slopes_of(Shared& shared, int j, int slot, const Elements& mine) {
    if constexpr (IN_PLACE)
        return reinterpret_cast<Real*>(shared.own.dt[slot] + mine.slot);
    else
        return shared.slope[SOFTPLUS ? j : 0] + (SOFTPLUS ? mine.slot : 0);
}

// u, dt, and what else the steps of a lane's elements come from.
struct Loaded {
    Real u[V], dt[V], decay[V];
    Real tau;

    __device__ __forceinline__ void load(const Shared& shared, int j, int slot, const Elements& mine) {
        load_widened(u, shared.own.u[slot] + mine.slot);
        load_widened(dt, shared.own.dt[slot] + mine.slot);
        if (DECAY == 2) load_widened(decay, shared.own.decay[slot] + mine.slot);
        tau = TIMED && mine.works() ? shared.tau[TIMED ? j * SUB + mine.row : 0] : Real(1);
    }
    __device__ __forceinline__ Real own(int v, const Shared& shared, const Elements& mine) const {
        return DECAY == 2   ? decay[v]
               : DECAY == 1 ? shared.parameters[DECAY == 1 ? 2 : 0][mine.channel + v]
                            : Real(0);
    }
};

// Write the steps of SUB steps of time, of which `count` exist.
__device__ __forceinline__ void prepare(Shared& shared, int j, int slot, const Loaded& x,
                                        const Elements& mine, int count) {
    if (!mine.works()) return;
    Real slope[V], bias[V], dd[V], di[V], taken[V];
    load_elements(bias, static_cast<const Real*>(shared.parameters[1] + mine.channel));
    const bool exists = mine.row < count;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        Deltas d;
        d.raw = add(x.dt[v], bias[v]);
        d.delta = SOFTPLUS ? softplus_and_slope(d.raw, slope[v]) : d.raw;
        finish_deltas(d, x.own(v, shared, mine), x.tau);
        const Step found = step_of(d, x.u[v], exists);
        dd[v] = found.dd, di[v] = found.di(), taken[v] = found.x;
    }
    const int to = j * SUB * W + mine.in_warp;
    if (SOFTPLUS) store_elements(slopes_of(shared, j, slot, mine), slope);
    store_elements(shared.dd[mine.warp] + to, dd);
    store_elements(shared.x[mine.warp] + to, taken);
    if (SEPARATE_DI) store_elements(shared.di[SEPARATE_DI ? mine.warp : 0] + (SEPARATE_DI ? to : 0), di);
}

// Write the gradient before the gate, and what y is multiplied by for dz.
__device__ __forceinline__ void gate(Shared& shared, int j, const Elements& mine) {
    if (!mine.works()) return;
    Real g[V], z[V], to_z[V];
    load_widened(g, shared.own.gy[j % 2] + mine.slot);
    if (GATE) {
        load_widened(z, shared.own.z[GATE ? j % 2 : 0] + (GATE ? mine.slot : 0));
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const Real s = sigmoid(z[v]);
            to_z[v] = mul(g[v], mul(s, fma(z[v], add(Real(1), -s), Real(1))));
            g[v] = mul(g[v], mul(z[v], s));
        }
        store_elements(shared.to_z + (GATE ? mine.slot : 0), to_z);
    }
    store_elements(shared.gy[mine.warp] + mine.in_warp, g);
}

// What a lane adds up over a chunk of its elements; `Shared::over_time` over all of time.
struct Sums {
    Real D[V], bias[V], own[V];
};

// The gradients of SUB steps' elements, of which `left` exist: `row` is the first of them among all batch
// elements', `channel` the block's. Returns the lane's share of the gradient of the timestep.
__device__ __forceinline__ Real finish(Shared& shared, const Arguments& p, int j, int slot,
                                       const Elements& mine, Sums& over, bool even, long long left,
                                       long long row, long long channel) {
    if (!mine.works() || mine.row >= left) return Real(0);
    Real dd[V], of_u[V], of_di[V], y[V], gy[V], to_z[V], slope[V], D[V];
    Real step[V];
    Loaded x;
    const Real* sums = shared.sums[mine.warp] + mine.in_warp;
    load_elements(dd, sums);
    if (GAIN) load_elements(of_di, sums + FOR_DI * PLANE);
    load_elements(of_u, sums + FOR_U * PLANE);
    if (GATE) load_elements(y, sums + FOR_Y * PLANE);
    load_elements(gy, static_cast<const Real*>(shared.gy[mine.warp] + mine.in_warp));
    if (GATE) load_elements(to_z, static_cast<const Real*>(shared.to_z + (GATE ? mine.slot : 0)));
    if (SOFTPLUS) load_elements(slope, static_cast<const Real*>(slopes_of(shared, j, slot, mine)));
    load_elements(step, static_cast<const Real*>(shared.dd[mine.warp] + j * SUB * W + mine.in_warp));
    load_elements(D, static_cast<const Real*>(shared.parameters[0] + mine.channel));
    x.load(shared, j, slot, mine);
    Real du[V], ddt[V], ddecay[V], dz[V], g_tau = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const Real u = x.u[v];
        Deltas d;
        if (TIMED || SPLIT_STEPS)
            d = deltas(x.dt[v], shared.parameters[1][mine.channel + v], x.own(v, shared, mine), x.tau);
        else
            d.dd = d.di = step[v];
        Real g_dd = Pole<State>::unscale(dd[v]), g_di, g_u;
        if (GAIN) {
            g_di = of_di[v];
            g_u = of_u[v];
        } else {
            g_di = SCHEME == MAMBA ? mul(of_u[v], u) : Real(0);
            g_u = SCHEME == MAMBA ? mul(of_u[v], d.di) : of_u[v];
        }
        du[v] = fma(D[v], gy[v], g_u);
        over.D[v] = fma(gy[v], u, over.D[v]);
        if (GATE) dz[v] = mul(to_z[v], fma(D[v], u, COMPLEX<State> ? mul(Real(2), y[v]) : y[v]));
        if (TIMED) {
            g_tau = fma(g_dd, d.own, g_tau);
            g_dd = mul(x.tau, g_dd);
            if (!STATE_ONLY) {
                g_tau = fma(g_di, d.delta, g_tau);
                g_di = mul(x.tau, g_di);
            }
        }
        if (DECAY == 0) g_di = add(g_di, g_dd);
        if (DECAY == 1) over.own[v] = add(over.own[v], g_dd);
        ddecay[v] = g_dd;
        ddt[v] = SOFTPLUS ? mul(g_di, slope[v]) : g_di;
        over.bias[v] = add(over.bias[v], ddt[v]);
    }
    row += mine.row, channel += mine.channel;
    const long long to = row * p.in.size.width + channel, apart = to + row * p.gap;
    write_elements(p.du + to, du, even, mine.live);
    if (GATE) write_elements(p.dz + apart, dz, even, mine.live);
    if (DECAY == 2) write_elements(p.ddecay + to, ddecay, even, mine.live);
    write_elements(p.ddt + apart, ddt, even, mine.live);
    return g_tau;
}
