// SPDX-License-Identifier: MIT
// The sweep of grad_last alone, after s4d_chunks_backward: adds to du and da.
//
// Memory contract. As in s4d_scan_backward.cu; du and the partial sums da are read and written where grad_last, or
// what it begins a segment with, is not zero.
//
// Launch as the forward's. Compiled for what the headers name, and BLOCKS.
#include "s4d_adjoint.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    s4d_scan_free(const __grid_constant__ Arguments p) {
    Shared& shared = *reinterpret_cast<Shared*>(arena);
    const Size& size = p.in.size;
    const long long unit = unit_of();
    if (unit >= size.units) return;
    const Place at(p.in, unit);
    const long long all = size.units / size.groups, index = at.row * size.segments + at.segment;
    State a[S], m[S], r[S], da[S];
    begin_free(p, at, m, r, all, index);
    bool some = false;
#pragma unroll
    for (int i = 0; i < S; ++i) some = some || !is_zero(m[i]) || !is_zero(r[i]);
    if (!__any_sync(~0u, some)) return;
    const Totals totals{shared.totals + threadIdx.x};
    totals.clear();
    at.read(a, p.in.a, size, at.row / size.alike);
#pragma unroll
    for (int i = 0; i < S; ++i) da[i] = Number::zero();
    {
        Free free{at, totals, a, m, r, da, Output(p.du, at, size, true)};
        Copy<true> copies[] = {{p.u, at, size, bool(size.wide & 1)}};
        walk<1, true>(free, shared.tiles[threadIdx.x >> 5], copies, at, p.in.reset);
    }
    totals.take(da, 0);
    State before[S];
    at.read(before, p.da, size, index);
#pragma unroll
    for (int i = 0; i < S; ++i) before[i] = add(before[i], conj(da[i]));
    at.write(p.da, before, size, index);
}
