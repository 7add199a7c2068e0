// SPDX-License-Identifier: MIT
// The RG-LRU's gates and recurrence, and their gradients, any length, any number of rows:
//
//     i = sigmoid(input_gate + input_bias), r = sigmoid(recurrent_gate + recurrent_bias)
//     log a = -rate tau r, m = sqrt(1 - a^2), h_t = a h_{t-1} + m i x
//
// Memory contract. Rows, strides and directions are those of linear_scan.cu: x, input_gate,
// recurrent_gate (and h, grad_h backward) are (batch, L, W) with any strides; rate, the biases, h0 and
// grad_last (batch, W), State, with any strides; timesteps (State), reset and mask (bool)
// (batch, L). Outputs are contiguous. Forward reads three arrays and writes one (1074 MB for 16384
// rows of 4096 steps in float32); gates, decays and drives exist in shared memory alone. Backward
// reads five arrays and writes three (2147 MB), recomputing gates and decays twice from the logits,
// and writes the sums over a tile's steps of the gradients of rate and biases, (tiles, 3, rows), which
// sum.cu adds up in the order of time. Where there are timesteps it writes the products whose sum over
// W is their gradient, (batch, L, W) State.
//
// Launch. As linear_scan.cu: tiles of tiles.cuh. Dynamic shared memory holds a tile of every input, and
// forward of decay and drive: in place of two inputs where T is State, else behind them.
//
// Compiled for one DTYPE, FORWARD or BACKWARD. `state_only`: the root takes the decay at tau = 1.
// `start_rule`: m = 1 where reset, and at the first step if h0 is null.
#include "elementary.cuh"
#include "tiles.cuh"

using States = Pack<State, PACK>;

struct Times {
    const State* data;  // null: ones
    long long outer, inner, time;

    __device__ __forceinline__ const State* from(const Row& at, long long first) const {
        return data + at.outer * outer + at.inner * inner + first * time;
    }
};

struct Gates {
    Initial rate, input_bias, recurrent_bias;  // null: no bias
    Times timesteps;
    Bits reset, mask;  // null: nothing reset, nothing masked
    long long state_only, start_rule;
};

// 1 / sqrt(v) may become 2000 and no more in a gradient: m at least this.
constexpr State LEAST_ROOT = State(5e-4);

__device__ __forceinline__ float root(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ double root(double x) { return __dsqrt_rn(x); }

struct Decay {
    State a, m;  // e^x and sqrt(1 - e^2x), neither with cancellation near x = 0

    explicit __device__ __forceinline__ Decay(State x) {
        const State near = exponential_minus_one_near_zero(x), far = exponential(x);
        const bool small = x > State(-0.5) && x < State(0.5);
        const State less = small ? near : add(far, State(-1));
        a = small ? add(State(1), near) : far;
        m = root(mul(-less, add(State(1), a)));
    }
};

// What one lane knows of its rows and steps besides the inputs.
struct Lane {
    State minus_rate[PACK], input_bias[PACK], recurrent_bias[PACK];
    unsigned reset, keep, starts;
    const State* tau;
    long long tau_time;
    bool state_only;

    // `opening`: the first step of the row, if it is one of the lane's; as the bits of reset.
    __device__ __forceinline__ Lane(const Gates& p, const Part& part, unsigned opening) {
        read(minus_rate, p.rate, part.at);
#pragma unroll
        for (int v = 0; v < PACK; ++v) minus_rate[v] = -minus_rate[v];
        read(input_bias, p.input_bias, part.at);
        read(recurrent_bias, p.recurrent_bias, part.at);
        reset = bits_of(p.reset, part.at, part.first, part.count);
        keep = p.mask.data ? bits_of(p.mask, part.at, part.first, part.count)
                           : part.count ? ~0u >> (32 - part.count) : 0;  // what is not there: padding
        starts = p.start_rule ? reset | opening : 0;
        tau = p.timesteps.data ? p.timesteps.from(part.at, part.first) : nullptr;
        tau_time = p.timesteps.time;
        state_only = p.state_only;
    }

    __device__ __forceinline__ State elapsed(int j, int count) const {
        return tau && j < count ? tau[j * tau_time] : State(1);
    }
};

#ifdef FORWARD
struct Arguments {
    Strided x, input_gate, recurrent_gate;
    Gates gates;
    Initial h0;
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
        const long long first = (long long)at.time * at.steps;
        const int one = at.steps * ROWS;
        ::fetch(to, p.x, size.wide & 1, at.steps, at.group, first, size.length, size);
        ::fetch(to + one, p.input_gate, size.wide & 2, at.steps, at.group, first, size.length, size);
        ::fetch(to + 2 * one, p.recurrent_gate, size.wide & 4, at.steps, at.group, first,
                size.length, size);
    }

    template <class Entered>
    __device__ __forceinline__ void compute(T* arena, const Tile& at, Entered entered) const {
        const Part part = part_of(at, p.size);
        const int count = part.count, one = at.steps * ROWS;
        const Lane lane(p.gates, part, !p.h0.data && part.first == 0);
        const int mine = at.warp * STEPS * ROWS + at.lane * PACK;
        const T *x = arena + mine, *input = x + one, *recurrent = input + one;
        // Where a number and a state are of one size, decay and drive take the place of the gates.
        constexpr bool IN_PLACE = sizeof(T) == sizeof(State);
        State* decay = reinterpret_cast<State*>(arena + (IN_PLACE ? one : 3 * one)) + mine;
        State* drive = decay + one;

        State s[PACK], end[PACK];
        Product<State> product[PACK];
#pragma unroll
        for (int v = 0; v < PACK; ++v) {
            product[v] = Product<State>::one();
            end[v] = Number::zero();
        }
#pragma unroll UNROLL
        for (int j = 0; j < STEPS; ++j) {
            const Items to_i = Items::load(input + j * ROWS);
            const Items to_r = Items::load(recurrent + j * ROWS);
            const Items u = Items::load(x + j * ROWS);
            const State tau = lane.elapsed(j, count);
            States a, b;
#pragma unroll
            for (int v = 0; v < PACK; ++v) {
                const State i = sigmoid(add(widen(to_i.item[v]), lane.input_bias[v]));
                const State r = sigmoid(add(widen(to_r.item[v]), lane.recurrent_bias[v]));
                const State log_a = mul(lane.minus_rate[v], r);
                const Decay timed(mul(tau, log_a));
                State m = timed.m;
                if (lane.state_only) m = Decay(log_a).m;
                if (lane.starts >> j & 1) m = State(1);
                const bool keep = lane.keep >> j & 1;
                a.item[v] = keep ? timed.a : State(1);
                b.item[v] = keep ? mul(m, mul(i, State(widen(u.item[v])))) : State(0);
                if (lane.reset >> j & 1) end[v] = Number::zero();
                product[v].times(a.item[v]);
                end[v] = fma(a.item[v], end[v], b.item[v]);
            }
            a.store(decay + j * ROWS);
            b.store(drive + j * ROWS);
        }
        leave_map(product, end, lane.reset, at);
        enter(s, p.exchange, p.size, at, p.h0, part.at);
        entered();

        T* h = p.h + part.offset(p.size, p.h_time);
#pragma unroll 8
        for (int j = 0; j < STEPS; ++j) {
            const States a = States::load(decay + j * ROWS), b = States::load(drive + j * ROWS);
            if (j < count) {
                Items y;
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    if (lane.reset >> j & 1) s[v] = Number::zero();
                    s[v] = fma(a.item[v], s[v], b.item[v]);
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
    rg_lru(const __grid_constant__ Arguments p) {
    draw_tiles(p.size, p.exchange.ticket, Forward{p});
}
#endif

#ifdef BACKWARD
// The adjoint runs the other way: lam_t = s_{t+1} + g_t, s_t = a_t lam_t (zero where reset). With the
// state h' that the step received, which is h of the *next* step of this order,
//
//     d log a = lam h' a - lam i x a^2 / max(m, 5e-4), d r = -rate d log a, d rate = -sum r d log a
//     d i = lam m x, d x = lam m i
struct Arguments {
    Strided x, input_gate, recurrent_gate, h, g;
    Gates gates;
    Initial h0, g_last;
    T *dx, *d_input, *d_recurrent;
    long long time;  // stride of these three and of d_tau
    State *d_tau, *dh0, *partial;
    Exchange exchange;
    Size size;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");
static_assert(2 * WARPS <= WINDOW, "three sums of each warp use the window");

template <class Number>
__device__ __forceinline__ State widen_if(bool there, Number x) {
    return there ? State(widen(x)) : State(0);
}

struct Backward {
    const Arguments& p;

    __device__ __forceinline__ void fetch(T* to, const Tile& at) const {
        const Size& size = p.size;
        const long long first = (long long)at.time * at.steps;
        const int one = at.steps * ROWS;
        ::fetch(to, p.x, size.wide & 1, at.steps, at.group, first, size.length, size);
        ::fetch(to + one, p.input_gate, size.wide & 2, at.steps, at.group, first, size.length, size);
        ::fetch(to + 2 * one, p.recurrent_gate, size.wide & 4, at.steps, at.group, first,
                size.length, size);
        ::fetch(to + 3 * one, p.h, size.wide & 8, at.steps, at.group, first + 1, size.length, size);
        ::fetch(to + 4 * one, p.g, size.wide & 16, at.steps, at.group, first, size.length, size);
    }

    template <class Entered>
    __device__ __forceinline__ void compute(const T* arena, const Tile& at, Entered entered) const {
        const Part part = part_of(at, p.size);
        const int count = part.count, one = at.steps * ROWS;
        const Lane lane(p.gates, part, !p.h0.data && part.is_last() ? 1u << (count - 1) : 0);
        const T* x = arena + at.warp * STEPS * ROWS + at.lane * PACK;
        const T *input = x + one, *recurrent = input + one, *h = recurrent + one, *g = h + one;

        State s[PACK], end[PACK];
        Product<State> product[PACK];
#pragma unroll
        for (int v = 0; v < PACK; ++v) {
            product[v] = Product<State>::one();
            end[v] = Number::zero();
        }
#pragma unroll UNROLL
        for (int j = 0; j < STEPS; ++j) {
            const Items to_r = Items::load(recurrent + j * ROWS), y = Items::load(g + j * ROWS);
            const State tau = lane.elapsed(j, count);
            const bool there = j < count;
            const bool keep = lane.keep >> j & 1;
#pragma unroll
            for (int v = 0; v < PACK; ++v) {
                const State r = sigmoid(add(widen_if(there, to_r.item[v]), lane.recurrent_bias[v]));
                const Decay timed(mul(tau, mul(lane.minus_rate[v], r)));
                const State a = keep ? timed.a : State(1);
                product[v].times(a);
                end[v] = mul(a, add(end[v], widen_if(there, y.item[v])));
                if (lane.reset >> j & 1) end[v] = Number::zero();
            }
        }
        leave_map(product, end, lane.reset, at);
        enter(s, p.exchange, p.size, at, p.g_last, part.at);
        entered();

        State h0[PACK], d_rate[PACK], d_input_bias[PACK], d_recurrent_bias[PACK];
#pragma unroll
        for (int v = 0; v < PACK; ++v)
            h0[v] = d_rate[v] = d_input_bias[v] = d_recurrent_bias[v] = Number::zero();
        if (part.is_last()) read(h0, p.h0, part.at);
        long long to = part.offset(p.size, p.time);
#pragma unroll UNROLL
        for (int j = 0; j < STEPS; ++j) {
            const Items to_i = Items::load(input + j * ROWS);
            const Items to_r = Items::load(recurrent + j * ROWS);
            const Items u = Items::load(x + j * ROWS), y = Items::load(g + j * ROWS);
            const Items earlier = Items::load(h + j * ROWS);
            const State tau = lane.elapsed(j, count);
            const bool there = j < count;
            const bool cut = lane.reset >> j & 1, keep = lane.keep >> j & 1;
            const bool start = lane.starts >> j & 1;
            Items dx, di, dr;
            States dtau;
#pragma unroll
            for (int v = 0; v < PACK; ++v) {
                const State i = sigmoid(add(widen_if(there, to_i.item[v]), lane.input_bias[v]));
                const State r = sigmoid(add(widen_if(there, to_r.item[v]), lane.recurrent_bias[v]));
                const State log_a = mul(lane.minus_rate[v], r);
                const Decay timed(mul(tau, log_a));
                State a_gain = timed.a, m = timed.m;
                if (lane.state_only) {
                    const Decay untimed(log_a);
                    a_gain = untimed.a;
                    m = untimed.m;
                }
                const State slope = mul(mul(a_gain, a_gain), inverse(m > LEAST_ROOT ? m : LEAST_ROOT));
                const State lam = add(s[v], widen_if(there, y.item[v]));
                const State driven = keep ? lam : State(0);  // what b's gradient is
                const State received = j + 1 == part.left ? h0[v] : widen_if(there, earlier.item[v]);
                const State gain = start ? State(1) : m;
                const State moved = mul(mul(driven, widen_if(there, u.item[v])), i);
                State d_log = start ? State(0) : mul(-moved, slope);
                const State d_timed = cut ? State(0) : mul(mul(driven, received), timed.a);
                if (lane.tau) {
                    const State through = lane.state_only ? d_timed : add(d_timed, d_log);
                    dtau.item[v] = mul(through, log_a);
                    d_log = lane.state_only ? fma(through, tau, d_log) : mul(through, tau);
                } else {
                    d_log = add(d_log, d_timed);
                }
                d_rate[v] = fma(-d_log, r, d_rate[v]);
                const State d_recurrent =
                    mul(mul(mul(d_log, lane.minus_rate[v]), r), add(State(1), -r));
                const State d_input = mul(mul(moved, gain), add(State(1), -i));
                d_recurrent_bias[v] = add(d_recurrent_bias[v], d_recurrent);
                d_input_bias[v] = add(d_input_bias[v], d_input);
                dx.item[v] = narrow<T>(mul(mul(driven, gain), i));
                di.item[v] = narrow<T>(d_input);
                dr.item[v] = narrow<T>(d_recurrent);
                s[v] = cut ? Number::zero() : mul(keep ? timed.a : State(1), lam);
            }
            if (part.live && there) {
                dx.store(p.dx + to);
                di.store(p.d_input + to);
                dr.store(p.d_recurrent + to);
                if (lane.tau) dtau.store(p.d_tau + to);
            }
            to += p.time;
        }
        if (part.live && part.is_last()) {
#pragma unroll
            for (int v = 0; v < PACK; ++v) p.dh0[part.row + v] = s[v];
        }
        // each warp's sums, then the tile's in the order of the warps
#pragma unroll
        for (int v = 0; v < PACK; ++v) {
            const int r = at.lane * PACK + v;
            window_products[at.warp][r] = d_rate[v];
            window_ends[at.warp][r] = d_input_bias[v];
            window_ends[WARPS + at.warp][r] = d_recurrent_bias[v];
        }
        __syncthreads();
        for (int k = at.warp; k < 3 && part.live; k += blockDim.x >> 5) {
            const State(*from)[ROWS] = k == 0 ? window_products : window_ends + (k - 1) * WARPS;
#pragma unroll
            for (int v = 0; v < PACK; ++v) {
                State total = from[0][at.lane * PACK + v];
                for (int w = 1; w < blockDim.x >> 5; ++w)
                    total = add(total, from[w][at.lane * PACK + v]);
                p.partial[(at.time * 3LL + k) * p.size.rows + part.row + v] = total;
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    rg_lru_backward(const __grid_constant__ Arguments p) {
    draw_tiles(p.size, p.exchange.ticket, Backward{p});
}
#endif
