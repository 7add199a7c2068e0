// SPDX-License-Identifier: MIT
// The scan of a diagonal complex state on real halves, h_t = decay_t h_{t-1} + gain_t x_t, and its
// gradients; decay and gain are formed here from A, the step and the elapsed time.
//
// Memory contract. A row is one channel of one batch element; rows = batch * S. x, h and grad_h are
// (batch, L, 2S), the real parts of a step's S numbers before their imaginary parts, `half` elements
// apart, with any strides; dt (batch, L, S), timesteps, reset and mask (batch, L), A and steps one
// number a row; batch is split in (outer, inner). `time` strides are signed and the pointers stand at
// the first step in the order of running, which may fall in time in either kernel. h, dx (batch, L, 2S), ddt (batch, L, S), last and dh0
// (batch, S) are contiguous. Everything as long as the sequence is read once and written once: x and
// h, and dt where given; backward x (where the step is in the gain), h, grad_h and dx, and dt and ddt;
// between blocks travel two states a tile and row. Gradients of A and steps are `partial` (tiles, SUMS,
// rows), added up by diagonal_sums.cu: of a decay constant in time they are those of decay and gain,
// else those of A and of the step. That of timesteps is summed over the channels of a group of rows:
// (batch, L, pieces), where piece p of a batch element is its p-th group.
//
// Launch as linear_scan.cu's. Dynamic shared memory holds the tile's inputs, and where the decay
// varies decay and drive in their places (forward), or 33 numbers a step for timesteps (backward).
//
// Compiled for one DTYPE and its STATE_TYPE, FORWARD or BACKWARD, a SCHEME, VARYING (dt or timesteps
// are given) and SPLIT (timesteps are in the decay alone).
#include "discretize.cuh"
#include "tiles.cuh"

static_assert(PACK == 1, "a lane has one channel");
static_assert((STEPS & (STEPS - 1)) == 0, "powers of a constant decay are squared");

using Real = decltype(State{}.re);
using RealStrided = StridedOf<Real>;

constexpr bool SCALED = SCHEME == MAMBA || GAIN;  // the step is in the gain
constexpr int SUMS = SCHEME == NONE ? 1 : 2;

struct Reals {  // of each row
    const Real* data;
    long long outer, inner, row;
};

struct Times {  // of each step
    const Real* data;
    long long outer, inner, time;
};

struct Model {
    Initial A;
    Reals steps;     // null: ones
    RealStrided dt;  // null: `steps` instead
    Times timesteps;  // null: ones
    Bits reset, mask;
};

struct Halves {  // x.data: the real parts
    Strided x;
    long long half;

    __device__ __forceinline__ void fetch(T* to, bool wide, const Tile& at, long long first,
                                          const Size& size) const {
        Strided im = x;
        im.data += half;
        ::fetch(to, x, wide, at.steps, at.group, first, size.length, size);
        ::fetch(to + at.steps * ROWS, im, wide, at.steps, at.group, first, size.length, size);
    }
};

__device__ __forceinline__ State pair_at(const T* re, int one) {
    return {widen(re[0]), widen(re[one])};
}

__device__ __forceinline__ State drive(State gain, State x) {
    if (SCHEME == NONE || SCHEME == DIRAC) return x;
    return SCHEME == MAMBA ? scale(x, gain.re) : mul(gain, x);
}

// Re(conj(x) y)
__device__ __forceinline__ Real inner_product(State x, State y) {
    return fma(x.re, y.re, mul(x.im, y.im));
}

__device__ __forceinline__ Product<State> power_of(State a, int n) {  // a^n, 0 <= n <= STEPS
    Product<State> result = Product<State>::one(), square = result;
    square.times(a);
    if (n == STEPS) {
#pragma unroll
        for (int k = 1; k < STEPS; k *= 2) square.times(square);
        return square;
    }
#pragma unroll 1
    for (; n; n >>= 1) {
        if (n & 1) result.times(square);
        square.times(square);
    }
    return result;
}

struct Elapsed {
    Real d, tau, dd, di;  // the step, its factor, the times of decay and of gain
};

// What one lane knows of its row and steps besides the sequences.
struct Lane {
    Pole<State> pole;
    Real step;
    unsigned reset, keep;
    const Real* tau;
    long long tau_time;

    static __device__ __forceinline__ State eigenvalue(const Model& m, const Row& at) {
        return m.A.data[at.outer * m.A.outer + at.inner * m.A.inner + at.channel * m.A.row];
    }

    __device__ __forceinline__ Lane(const Model& m, const Part& part)
        : pole(eigenvalue(m, part.at)) {
        const Row& at = part.at;
        const Real* p = m.steps.data + at.outer * m.steps.outer + at.inner * m.steps.inner +
                        at.channel * m.steps.row;
        step = m.steps.data ? *p : Real(1);
        reset = bits_of(m.reset, at, part.first, part.count);
        keep = m.mask.data ? bits_of(m.mask, at, part.first, part.count)
                           : part.count ? ~0u >> (32 - part.count) : 0;  // what is not there: padding
        tau_time = m.timesteps.time;
        tau = nullptr;
        if (m.timesteps.data)
            tau = m.timesteps.data + at.outer * m.timesteps.outer + at.inner * m.timesteps.inner +
                  part.first * tau_time;
    }

    __device__ __forceinline__ Elapsed elapsed(int j, int count, const Real* dt) const {
        Elapsed x;
        x.d = dt ? *dt : step;
        x.tau = tau && j < count ? tau[j * tau_time] : Real(1);
        x.dd = mul(x.tau, x.d);
        x.di = SPLIT ? x.d : x.dd;
        return x;
    }

    __device__ __forceinline__ Factors<State> factors(Real dd, Real di) const {
        if (SCHEME == NONE) return {pole.a, Number::one()};
        Factors<State> f = pole.factors(dd, di);
        if (SCHEME == MAMBA) f.gain = {di, Real(0)};
        return f;
    }
};

// The index of step t of a contiguous (batch, L, width) array, from a pointer at the first step run.
__device__ __forceinline__ long long offset_of(const Part& part, const Size& size, long long width,
                                               long long time) {
    return part.at.batch * size.length * width + part.first * time + part.at.channel;
}

#ifdef FORWARD
struct Arguments {
    Halves x;
    Model model;
    Initial h0;
    T* h;
    State* last;
    long long direction;  // of h in time, 1 or -1
    Exchange exchange;
    Size size;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

struct Forward {
    const Arguments& p;

    __device__ __forceinline__ void fetch(T* to, const Tile& at) const {
        const Size& size = p.size;
        const long long first = (long long)at.time * at.steps;
        const int one = at.steps * ROWS;
        p.x.fetch(to, size.wide & 1, at, first, size);
        if (VARYING && p.model.dt.data)
            ::fetch(reinterpret_cast<Real*>(to + 2 * one), p.model.dt, size.wide & 2, at.steps,
                    at.group, first, size.length, size);
    }

    template <class Entered>
    __device__ __forceinline__ void compute(T* arena, const Tile& at, Entered entered) const {
        const Part part = part_of(at, p.size);
        const int count = part.count, one = at.steps * ROWS;
        const Lane lane(p.model, part);
        const int mine = at.warp * STEPS * ROWS + at.lane;
        const T* x = arena + mine;
        // Decay and drive of a step take the places of dt and, where they are as wide, of x.
        constexpr bool IN_PLACE = sizeof(T) == sizeof(Real);
        Real* decay = reinterpret_cast<Real*>(arena + 2 * one) + mine;
        Real* driven = IN_PLACE ? reinterpret_cast<Real*>(arena) + mine : decay + 2 * one;
        const Factors<State> fixed = lane.factors(lane.step, lane.step);

        State s[PACK], end[PACK] = {Number::zero()};
        Product<State> product[PACK] = {Product<State>::one()};
        if (VARYING) {
            const bool given = p.model.dt.data;
#pragma unroll 4
            for (int j = 0; j < STEPS; ++j) {
                Real* to = decay + j * ROWS;
                const Elapsed time = lane.elapsed(j, count, given ? to : nullptr);
                const Factors<State> f = lane.factors(time.dd, time.di);
                const bool keep = lane.keep >> j & 1;
                const State a = keep ? f.decay : Number::one();
                const State b = keep ? drive(f.gain, pair_at(x + j * ROWS, one)) : Number::zero();
                if (lane.reset >> j & 1) end[0] = Number::zero();
                product[0].times(a);
                end[0] = fma(a, end[0], b);
                to[0] = a.re;
                to[one] = a.im;
                driven[j * ROWS] = b.re;
                driven[j * ROWS + one] = b.im;
            }
        } else {
            product[0] = power_of(fixed.decay, __popc(lane.keep));
#pragma unroll
            for (int j = 0; j < STEPS; ++j) {
                const State b = drive(fixed.gain, pair_at(x + j * ROWS, one));
                if (lane.reset >> j & 1) end[0] = Number::zero();
                if (lane.keep >> j & 1) end[0] = fma(fixed.decay, end[0], b);
            }
        }
        leave_map(product, end, lane.reset, at);
        enter(s, p.exchange, p.size, at, p.h0, part.at);
        entered();

        const long long width = 2 * p.size.channels, time = p.direction * width;
        T* h = p.h + offset_of(part, p.size, width, time);
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            if (j >= count) break;
            if (lane.reset >> j & 1) s[0] = Number::zero();
            if (VARYING) {
                const State a = {decay[j * ROWS], decay[j * ROWS + one]};
                const State b = {driven[j * ROWS], driven[j * ROWS + one]};
                s[0] = fma(a, s[0], b);
            } else {
                const State b = drive(fixed.gain, pair_at(x + j * ROWS, one));
                if (lane.keep >> j & 1) s[0] = fma(fixed.decay, s[0], b);
            }
            if (part.live) {
                h[0] = narrow<T>(s[0].re);
                h[p.size.channels] = narrow<T>(s[0].im);
            }
            h += time;
        }
        if (part.live && part.is_last()) p.last[part.row] = s[0];
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    diagonal_scan(const __grid_constant__ Arguments p) {
    draw_tiles(p.size, p.exchange.ticket, Forward{p});
}
#endif

#ifdef BACKWARD
// The adjoint runs the other way: lam_t = s_{t+1} + g_t, s_t = conj(decay_t) lam_t (zero where reset).
// With the state h' that the step received, which is h of the *next* step of this order, the gradients
// of decay and gain are lam conj(h') and lam conj(x), and dx = conj(gain) lam.
struct Arguments {
    Halves x, h, g;
    Model model;
    Initial h0, g_last;
    T* dx;
    Real *ddt, *d_tau;  // null: not wanted
    long long pieces;     // of d_tau
    long long direction;  // of what is written, in time: 1 or -1
    State *dh0, *partial;
    Exchange exchange;
    Size size;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

constexpr int PITCH = ROWS + 1;  // numbers a step of d_tau: reads down a column meet no bank twice

struct Backward {
    const Arguments& p;

    __device__ __forceinline__ void fetch(T* to, const Tile& at) const {
        const Size& size = p.size;
        const long long first = (long long)at.time * at.steps;
        const int one = at.steps * ROWS;
        p.g.fetch(to, size.wide & 8, at, first, size);
        p.h.fetch(to + 2 * one, size.wide & 4, at, first + 1, size);
        if (SCALED) p.x.fetch(to + 4 * one, size.wide & 1, at, first, size);
        if (VARYING && p.model.dt.data)
            ::fetch(reinterpret_cast<Real*>(to + (SCALED ? 6 : 4) * one), p.model.dt, size.wide & 2,
                    at.steps, at.group, first, size.length, size);
    }

    template <class Entered>
    __device__ __forceinline__ void compute(const T* arena, const Tile& at, Entered entered) const {
        const Part part = part_of(at, p.size);
        const int count = part.count, one = at.steps * ROWS;
        const Lane lane(p.model, part);
        const int mine = at.warp * STEPS * ROWS + at.lane;
        const T *g = arena + mine, *h = g + 2 * one, *x = h + 2 * one;
        const Real* steps = reinterpret_cast<const Real*>(arena + (SCALED ? 6 : 4) * one);
        const Real* dt = VARYING && p.model.dt.data ? steps + mine : nullptr;
        Real* taus = const_cast<Real*>(steps) + one;  // (steps of the tile, PITCH)
        const Factors<State> fixed = lane.factors(lane.step, lane.step);

        State s[PACK], end[PACK] = {Number::zero()};
        Product<State> product[PACK] = {Product<State>::one()};
        if (!VARYING) product[0] = power_of(conj(fixed.decay), __popc(lane.keep));
#pragma unroll UNROLL
        for (int j = 0; j < STEPS; ++j) {
            const bool keep = lane.keep >> j & 1;
            State w = conj(fixed.decay);
            if (VARYING) {
                const Elapsed time = lane.elapsed(j, count, dt ? dt + j * ROWS : nullptr);
                w = conj(lane.factors(time.dd, time.di).decay);
            }
            w = keep ? w : Number::one();
            if (VARYING) product[0].times(w);
            const State y = pair_at(g + j * ROWS, one);
            if (j < count) end[0] = mul(w, add(end[0], y));
            if (lane.reset >> j & 1) end[0] = Number::zero();
        }
        leave_map(product, end, lane.reset, at);
        enter(s, p.exchange, p.size, at, p.g_last, part.at);
        entered();

        State sum[2] = {Number::zero(), Number::zero()}, h0[PACK] = {Number::zero()};
        if (part.is_last()) read(h0, p.h0, part.at);
        const long long width = 2 * p.size.channels, time = p.direction * width;
        const long long ddt_time = p.direction * p.size.channels;
        T* dx = p.dx + offset_of(part, p.size, width, time);
        Real* ddt = p.ddt + offset_of(part, p.size, p.size.channels, ddt_time);
#pragma unroll UNROLL
        for (int j = 0; j < STEPS; ++j) {
            const bool keep = lane.keep >> j & 1, cut = lane.reset >> j & 1, there = j < count;
            const State y = pair_at(g + j * ROWS, one);
            const State lam = there ? add(s[0], y) : Number::zero();
            const State earlier = j + 1 == part.left ? h0[0] : pair_at(h + j * ROWS, one);
            const State to_decay = keep && !cut ? mul(lam, conj(earlier)) : Number::zero();
            State to_gain = Number::zero();
            if (SCALED && keep) to_gain = mul(lam, conj(pair_at(x + j * ROWS, one)));
            Factors<State> f = fixed;
            if (VARYING) {
                const Elapsed time = lane.elapsed(j, count, dt ? dt + j * ROWS : nullptr);
                f = lane.factors(time.dd, time.di);
                const Slopes<State> slope = lane.pole.slopes(time.dd, time.di, f);
                const State through = mul(conj(slope.decay), to_decay);
                State to_A = scale(through, time.dd);
                const Real d_dd = inner_product(lane.pole.a, through);
                Real d_di = SCHEME == MAMBA ? to_gain.re : Real(0);
                if (GAIN) {
                    to_A = fma(conj(slope.gain_A), to_gain, to_A);
                    d_di = inner_product(slope.gain_dt, to_gain);
                }
                const Real d_timed = SPLIT ? d_dd : add(d_dd, d_di);
                const Real d_step = SPLIT ? fma(time.tau, d_dd, d_di) : mul(time.tau, d_timed);
                if (keep) {
                    sum[0] = add(sum[0], to_A);
                    sum[1].re = add(sum[1].re, d_step);
                }
                if (p.d_tau)
                    taus[(at.warp * STEPS + j) * PITCH + at.lane] =
                        keep ? mul(time.d, d_timed) : Real(0);
                if (p.ddt && part.live && there) *ddt = keep ? d_step : Real(0);
                ddt += ddt_time;
            } else {
                sum[0] = add(sum[0], to_decay);
                if (SCALED) sum[1] = add(sum[1], to_gain);
            }
            if (part.live && there) {
                const State to_x = keep ? drive(conj(f.gain), lam) : Number::zero();
                dx[0] = narrow<T>(to_x.re);
                dx[p.size.channels] = narrow<T>(to_x.im);
            }
            dx += time;
            if (there) s[0] = cut ? Number::zero() : keep ? mul(conj(f.decay), lam) : lam;
        }
        if (part.live && part.is_last()) p.dh0[part.row] = s[0];

        // each warp's sums, then the tile's in the order of the warps
        window_ends[at.warp][at.lane] = sum[0];
        if (SUMS > 1) window_products[at.warp][at.lane] = sum[1];
        __syncthreads();
        for (int k = at.warp; k < SUMS && part.live; k += blockDim.x >> 5) {
            const State(*from)[ROWS] = k == 0 ? window_ends : window_products;
            State total = from[0][at.lane];
            for (int w = 1; w < blockDim.x >> 5; ++w) total = add(total, from[w][at.lane]);
            p.partial[((long long)at.time * SUMS + k) * p.size.rows + part.row] = total;
        }
        if (VARYING && p.d_tau) add_up_times(taus, at);
    }

    // Sum d_tau of each step over the rows of a batch element that this group of rows has.
    __device__ __forceinline__ void add_up_times(const Real* taus, const Tile& at) const {
        const Size& size = p.size;
        const long long channels = size.channels, first = (long long)at.time * at.steps;
        const long long behind = min(at.group + ROWS, size.rows);
        const long long batch = quotient(at.group, channels);
        const int batches = int(quotient(behind - 1, channels) - batch) + 1;
        for (int i = threadIdx.x; i < at.steps * batches; i += blockDim.x) {
            const int step = i % at.steps;
            if (first + step >= size.length) continue;
            const long long element = batch + i / at.steps, start = element * channels;
            const int from = int(max(start - at.group, 0LL));
            const int to = int(min(start + channels, behind) - at.group);
            Real total = taus[step * PITCH + from];
            for (int r = from + 1; r < to; ++r) total = add(total, taus[step * PITCH + r]);
            const long long piece = at.group / ROWS - start / ROWS;
            p.d_tau[(element * size.length + p.direction * (first + step)) * p.pieces + piece] = total;
        }
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    diagonal_scan_backward(const __grid_constant__ Arguments p) {
    draw_tiles(p.size, p.exchange.ticket, Backward{p});
}
#endif
