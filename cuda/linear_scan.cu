// SPDX-License-Identifier: MIT
// The linear scan h_i = a_i h_{i-1} + b_i and its gradients, any length, any number of rows.
//
// Memory contract. A row is one channel of one batch element; rows = batch * S. Inputs a, b (and a,
// h, grad_h backward) are (batch, L, S) with any strides, in elements; batch is split in (outer,
// inner). `time` strides are signed and the pointers stand at the first step *in the order of
// running*, so that no kernel knows of `reverse`. Outputs are contiguous (batch, L, S) and
// (batch, S), given by pointer and a signed time stride. Every input element is read once and every
// output element written once: 3 arrays forward (2 where a is constant in time), 5 backward (3);
// between blocks travel two states a tile and row, under 3 % of that. Nothing is recomputed from
// global memory. States are at least float32.
//
// Launch. Blocks of up to 32 * WARPS threads over tiles as in tiles.cuh. A tile's inputs are copied to
// dynamic shared memory (a and b, or a, h and grad_h: STEPS * warps * ROWS numbers each, or ROWS for a
// constant a) and passed twice there. A block has fewer warps where fewer hold the whole length, or
// where shared memory is short.
//
// An input may be copied 16 bytes at a time (its bit in `wide`) if its row stride is 1, S and its
// strides are multiples of 16 bytes and its pointer is aligned so; PACK > 1 asks the same for
// PACK numbers of all inputs.
//
// Compiled for one DTYPE, FORWARD or BACKWARD, and VARYING true or false (a constant in time).
#include "tiles.cuh"

#ifdef FORWARD
struct Arguments {
    Strided a, b;
    Initial h0;
    Bits reset;
    T* h;
    long long h_time;
    State* last;
    Exchange exchange;
    Size size;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

struct Forward {
    const Arguments& p;

    __device__ __forceinline__ void fetch(T* to, const Tile& at) const {
        const Size& size = p.size;
        const int tile = at.steps;
        const long long group = at.group, first = (long long)at.time * tile;
        ::fetch(to, p.b, size.wide & 2, tile, group, first, size.length, size);
        to += tile * ROWS;
        if (VARYING)
            ::fetch(to, p.a, size.wide & 1, tile, group, first, size.length, size);
        else
            ::fetch(to, p.a, size.wide & 1, 1, group, 0, 1, size);
    }

    template <class Entered>
    __device__ __forceinline__ void compute(const T* from, const Tile& at, Entered entered) const {
        const Part part = part_of(at, p.size);
        const unsigned reset = bits_of(p.reset, part.at, part.first, part.count);
        const int tile = at.steps, count = part.count;
        const T* b = from + at.warp * STEPS * ROWS + at.lane * PACK;
        const T* a = VARYING ? b + tile * ROWS : from + tile * ROWS + at.lane * PACK;
        constexpr int A = VARYING ? ROWS : 0;

        State s[PACK], end[PACK];
        Product<State> product[PACK];
#pragma unroll
        for (int v = 0; v < PACK; ++v) {
            product[v] = Product<State>::one();
            end[v] = Number::zero();
        }
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            const Items c = Items::load(a + j * A), x = Items::load(b + j * ROWS);
            if (j < count) {
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    if (reset >> j & 1) end[v] = Number::zero();
                    product[v].times(widen(c.item[v]));
                    end[v] = fma(widen(c.item[v]), end[v], widen(x.item[v]));
                }
            }
        }
        leave_map(product, end, reset, at);
        enter(s, p.exchange, p.size, at, p.h0, part.at);
        entered();

        T* h = p.h + part.offset(p.size, p.h_time);
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            const Items c = Items::load(a + j * A), x = Items::load(b + j * ROWS);
            if (j < count) {
                Items y;
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    if (reset >> j & 1) s[v] = Number::zero();
                    s[v] = fma(widen(c.item[v]), s[v], widen(x.item[v]));
                    y.item[v] = narrow<T>(s[v]);
                }
                if (part.live) y.store(h);
                h += p.h_time;
            }
        }
        if (part.live && part.is_last()) {
#pragma unroll
            for (int v = 0; v < PACK; ++v) p.last[part.row + v] = s[v];
        }
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    linear_scan(const __grid_constant__ Arguments p) {
    draw_tiles(p.size, p.exchange.ticket, Forward{p});
}
#endif

#ifdef BACKWARD
// The adjoint runs the other way: lam_i = s_{i-1} + g_i, s_i = conj(a_i) lam_i (zero where reset);
// db = lam, da_i = lam_i conj(what step i received), which is h of the *next* step of this order.
struct Arguments {
    Strided a, h, g;
    Initial h0, g_last;
    Bits reset;
    T *da, *db;
    long long time;  // stride of da and db
    State *dh0, *partial;
    Exchange exchange;
    Size size;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

struct Backward {
    const Arguments& p;

    __device__ __forceinline__ void fetch(T* to, const Tile& at) const {
        const Size& size = p.size;
        const int tile = at.steps;
        const long long group = at.group, first = (long long)at.time * tile;
        ::fetch(to, p.g, size.wide & 4, tile, group, first, size.length, size);
        to += tile * ROWS;
        ::fetch(to, p.h, size.wide & 2, tile, group, first + 1, size.length, size);
        to += tile * ROWS;
        if (VARYING)
            ::fetch(to, p.a, size.wide & 1, tile, group, first, size.length, size);
        else
            ::fetch(to, p.a, size.wide & 1, 1, group, 0, 1, size);
    }

    template <class Entered>
    __device__ __forceinline__ void compute(const T* from, const Tile& at, Entered entered) const {
        const Part part = part_of(at, p.size);
        const unsigned reset = bits_of(p.reset, part.at, part.first, part.count);
        const int tile = at.steps, count = part.count;
        const T* g = from + at.warp * STEPS * ROWS + at.lane * PACK;
        const T* h = g + tile * ROWS;
        const T* a = VARYING ? h + tile * ROWS : from + 2 * tile * ROWS + at.lane * PACK;
        constexpr int A = VARYING ? ROWS : 0;

        State s[PACK], end[PACK];
        Product<State> product[PACK];
#pragma unroll
        for (int v = 0; v < PACK; ++v) {
            product[v] = Product<State>::one();
            end[v] = Number::zero();
        }
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            const Items c = Items::load(a + j * A), x = Items::load(g + j * ROWS);
            if (j < count) {
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    const State w = conj(widen(c.item[v]));
                    product[v].times(w);
                    end[v] = mul(w, add(end[v], widen(x.item[v])));
                    if (reset >> j & 1) end[v] = Number::zero();
                }
            }
        }
        leave_map(product, end, reset, at);
        enter(s, p.exchange, p.size, at, p.g_last, part.at);
        entered();

        State sum[PACK], h0[PACK];
#pragma unroll
        for (int v = 0; v < PACK; ++v) sum[v] = h0[v] = Number::zero();
        if (part.is_last()) read(h0, p.h0, part.at);
        const long long offset = part.offset(p.size, p.time);
        T *da = p.da + offset, *db = p.db + offset;
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            const Items c = Items::load(a + j * A), x = Items::load(g + j * ROWS);
            const Items y = Items::load(h + j * ROWS);
            if (j < count) {
                Items to_a, to_b;
                const bool cut = reset >> j & 1;
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    const State lam = add(s[v], widen(x.item[v]));
                    to_b.item[v] = narrow<T>(lam);
                    const State received = j + 1 == part.left ? h0[v] : State(widen(y.item[v]));
                    const State gradient = cut ? Number::zero() : mul(lam, conj(received));
                    if (VARYING)
                        to_a.item[v] = narrow<T>(gradient);
                    else
                        sum[v] = add(sum[v], gradient);
                    s[v] = cut ? Number::zero() : mul(conj(widen(c.item[v])), lam);
                }
                if (part.live) {
                    to_b.store(db);
                    if (VARYING) to_a.store(da);
                }
                da += p.time;
                db += p.time;
            }
        }
        if (part.live && part.is_last()) {
#pragma unroll
            for (int v = 0; v < PACK; ++v) p.dh0[part.row + v] = s[v];
        }
        if (!VARYING) {  // each warp's sum, then the tile's in the order of the warps
#pragma unroll
            for (int v = 0; v < PACK; ++v) window_ends[at.warp][at.lane * PACK + v] = sum[v];
            __syncthreads();
            if (at.warp == 0 && part.live) {
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    State total = window_ends[0][at.lane * PACK + v];
                    for (int w = 1; w < blockDim.x >> 5; ++w)
                        total = add(total, window_ends[w][at.lane * PACK + v]);
                    if (p.size.tiles > 1)
                        p.partial[at.time * p.size.rows + part.row + v] = total;
                    else
                        p.da[part.row + v] = narrow<T>(total);
                }
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    linear_scan_backward(const __grid_constant__ Arguments p) {
    draw_tiles(p.size, p.exchange.ticket, Backward{p});
}
#endif
