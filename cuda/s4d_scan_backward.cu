// SPDX-License-Identifier: MIT
// The scan of S4D, backward: all gradients, in reverse alone.
//
// With the cotangent g_t and adjoint states
//
//     m_t = a m_{t+1} + g_t,  r_t = a r_{t+1} + m_{t+1},  du_t = Re sum_n v_n m_t + D g_t,
//     dv_n = conj sum_t u_t m_t,  da_n = conj(v_n sum_t u_t r_t),  dD = sum_t u_t g_t
//
// since the loss is linear in u and r = dm / da. What grad_last adds is the same with m_L = conj(grad_last),
// v = 1 and no g: a second sweep of the warps that find one which is not zero.
//
// Memory contract. As in s4d_scan.cu; grad_y as u, grad_last (batch, H, M) contiguous, du as y. Reads u and grad_y
// once and writes du: no state comes from memory. da and dv of a row and segment go to partial sums
// (rows * segments, H, M), dD to (rows * segments, H), which sum.cu adds up. 403 MB for 8192 channels of 4096
// steps in float32; bound by arithmetic, 14 multiply-adds a complex state and step.
//
// Launch as the forward's. Compiled for what the headers name, and BLOCKS.
#include "s4d_adjoint.cuh"

struct Adjoint {
    const Arguments& p;
    const Place& at;
    const Totals& totals;
    State a[S], v[S], m[S], r[S], da[S], dv[S];
    Real dD, all_dD;
    Direct direct;
    Output du;

    __device__ __forceinline__ Adjoint(const Arguments& p, const Place& at, const Totals& totals)
        : p(p),
          at(at),
          totals(totals),
          dD(0),
          all_dD(0),
          direct(p.D, at, p.in.size),
          du(p.du, at, p.in.size, true) {
        const Size& size = p.in.size;
        const long long shared = at.row / size.alike, index = at.row * size.segments + at.segment;
        at.read(a, p.in.a, size, shared);
        at.read(v, p.in.v, size, shared);
        clear();
        if (p.starts) {
            const long long all = size.units / size.groups;  // rows and segments
            at.read(m, p.starts, size, index);
            at.read(r, p.starts, size, all + index);
        }
#pragma unroll
        for (int i = 0; i < S; ++i) da[i] = dv[i] = Number::zero();
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < S; ++i) m[i] = r[i] = Number::zero();
    }

    __device__ __forceinline__ void enter(long long k) {
        if (k % FLUSH) return;
        totals.flush(da, 0);
        totals.flush(dv, 1);
        all_dD = add(all_dD, dD);
        dD = 0;
    }

    __device__ __forceinline__ Real step(T x, T y) {
        const Real u = widen(x), g = widen(y);
#pragma unroll
        for (int i = 0; i < S; ++i) {
            r[i] = fma(a[i], r[i], m[i]);
            m[i] = advance(a[i], m[i], g);
            dv[i] = scaled(u, m[i], dv[i]);
            da[i] = scaled(u, r[i], da[i]);
        }
        dD = fma(u, g, dD);
        return output(v, m, direct.of(g));
    }

    __device__ __forceinline__ void group(const T* x) {
        Real sums[Q];
#pragma unroll
        for (int q = 0; q < Q; ++q) sums[q] = step(x[q * W], x[TILE * W + q * W]);
        sum_lanes<Q, 1>(sums, at.lane);
        du.group(sums);
    }

    __device__ __forceinline__ void single(const T* x) {
        Real sum[1] = {step(x[0], x[TILE * W])};
        sum_lanes<1, 1>(sum, at.lane);
        du.single(sum[0]);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    s4d_scan_backward(const __grid_constant__ Arguments p) {
    Shared& shared = *reinterpret_cast<Shared*>(arena);
    const Size& size = p.in.size;
    const long long unit = unit_of();
    if (unit >= size.units) return;
    const Place at(p.in, unit);
    const long long all = size.units / size.groups, index = at.row * size.segments + at.segment;
    T* tiles = shared.tiles[threadIdx.x >> 5];
    const Totals totals{shared.totals + threadIdx.x};
    totals.clear();
    Adjoint body(p, at, totals);
    {
        Copy<true> copies[] = {{p.u, at, size, bool(size.wide & 1)}, {p.g, at, size, bool(size.wide & 2)}};
        walk<2, true>(body, tiles, copies, at, p.in.reset);
    }
    totals.take(body.da, 0);
    totals.take(body.dv, 1);
#pragma unroll
    for (int i = 0; i < S; ++i) body.dv[i] = conj(body.dv[i]);
    at.write(p.dv, body.dv, size, index);
    if (body.direct.mine) p.dD[index * size.channels + at.channel] = add(body.all_dD, body.dD);
    // the first part of da waits in place of dv; m, r and da begin again
#pragma unroll
    for (int i = 0; i < S; ++i) {
        body.dv[i] = mul(body.v[i], body.da[i]);
        body.da[i] = Number::zero();
    }
    totals.clear();
    begin_free(p, at, body.m, body.r, all, index);
    bool some = false;
#pragma unroll
    for (int i = 0; i < S; ++i) some = some || !is_zero(body.m[i]) || !is_zero(body.r[i]);
    if (__any_sync(~0u, some)) {
        Free free{at, totals, body.a, body.m, body.r, body.da, Output(p.du, at, size, true)};
        Copy<true> copies[] = {{p.u, at, size, bool(size.wide & 1)}};
        walk<1, true>(free, tiles, copies, at, p.in.reset);
        totals.take(body.da, 0);
    }
#pragma unroll
    for (int i = 0; i < S; ++i) body.da[i] = conj(add(body.dv[i], body.da[i]));
    at.write(p.da, body.da, size, index);
    fill_rest(p.du, at, size);
}
