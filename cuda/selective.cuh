// SPDX-License-Identifier: MIT
// What the forward and the backward of the selective scan share: arguments, who computes what, and the
// sums over states and channels.
//
// A block is WARPS warps and computes CHANNELS = WARPS * PACK * 32 / LANES channels of one batch element.
// PACK neighbouring channels lie on LANES neighbouring lanes, each with PER_LANE states of all of them: what a
// lane reads of B_t and C_t serves PACK channels. Channels of one block share B_t and C_t: blocks never
// straddle a group.
//
// Compile-time choices: DTYPE of sequences; STATE (float32, float64, complex64, complex128); SCHEME
// (discretize.cuh); PER_LANE, PACK, LANES, WARPS; SOFTPLUS, GATE, RESET, TIMED, STATE_ONLY (timesteps),
// B_VARIES, C_VARIES: true or false; DECAY: 0 none, 1 constant, 2 varying step of its own for the decay; STAGES
// of loads.
#pragma once
#ifndef ADJOINT
#define ADJOINT false
#endif
constexpr bool SPLIT_STEPS = DECAY != 0 || (TIMED && STATE_ONLY);
#define SPLIT SPLIT_STEPS
#include "discretize.cuh"
#include "pipeline.cuh"

using T = DTYPE;
using Real = typename StateOf<T>::type;
using State = STATE;

template <class X>
constexpr bool COMPLEX = false;
template <class R>
constexpr bool COMPLEX<Complex<R>> = true;

template <bool first, class X, class Y>
struct Choose {
    using type = X;
};
template <class X, class Y>
struct Choose<false, X, Y> {
    using type = Y;
};

// B and C are stored as the sequences are; in the dtype of the states where these are complex.
using Matrix = typename Choose<COMPLEX<State>, State, T>::type;
constexpr bool WIDEN = sizeof(Matrix) != sizeof(State);

constexpr int W = PACK * 32 / LANES;  // channels of a warp
constexpr int CHANNELS = WARPS * W;
constexpr int THREADS = 32 * WARPS;
constexpr int S = PER_LANE;
constexpr int N = S * LANES;  // states that are computed; the last ones may not exist
constexpr int CHUNK = 32;     // steps between kept states
using Number = Constant<State>;

// A sequence; null if absent. What is constant in time (decay_dt, B, C) is Real or State, not T.
struct Strided {
    const T* data;
    long long outer, inner, time, row;
};

struct Grouped {  // B or C; states are neighbours
    const Matrix* data;
    long long outer, inner, time, group, per_group;  // per_group: channels of a group
};

struct Times {
    const Real* data;
    long long outer, inner, time;
};

struct Bits {
    const unsigned char* data;
    long long outer, inner, time;
};

struct Size {
    long long length, width, states, pitch;  // pitch: states of a channel in memory, >= states
    long long inner, per_shared;             // batch = (outer, inner); batch elements of one A
    long long piece, parts;                  // channels that share B and C, and blocks of a piece
    long long segment, segments;             // steps of a piece of time that a block computes, and how many
    long long wide, vector;                  // bits: inputs copied 16 bytes at a time; states likewise
};

// A (.., width, pitch); h0 (batch, segments, width, pitch): the state before each segment.
struct Inputs {
    Strided u, dt, z, decay_dt;
    Grouped B, C;
    Times timesteps;
    Bits reset;
    const State* A;
    const Real *D, *bias;
    const State* h0;
    Size size;
};

// ------------------------------------------------------------------------------ who computes what

struct Place {
    long long batch, outer, inner, shared, channel;  // channel: the block's first
    int live;                                        // channels of the block that exist
    long long part;                                  // of the batch element's blocks
    long long row;                                   // batch * segments + segment
    long long first, length;                         // the segment's first step, and its steps
    bool last;                                       // is it the last segment?
};

__device__ __forceinline__ Place locate(const Size& size) {
    const unsigned pieces = unsigned(size.width / size.piece), parts = unsigned(size.parts);
    const unsigned blocks = pieces * parts, row = blockIdx.x / blocks;
    const unsigned at = blockIdx.x - row * blocks, piece = at / parts;
    const unsigned batch = row / unsigned(size.segments), segment = row - batch * unsigned(size.segments);
    const long long offset = (long long)(at - piece * parts) * CHANNELS;
    Place p;
    p.batch = batch;
    p.row = row;
    p.outer = batch / size.inner;
    p.inner = batch - p.outer * size.inner;
    p.shared = batch / size.per_shared;
    p.channel = piece * size.piece + offset;
    const long long left = size.piece - offset;
    p.live = left < CHANNELS ? int(left) : CHANNELS;
    p.part = at;
    p.first = segment * size.segment;
    p.last = segment + 1 == size.segments;
    p.length = p.last ? size.length - p.first : size.segment;
    return p;
}

struct Lane {
    int warp, lane;
    int channel;  // of the block: the first of those whose states this lane has
    int first;    // state
    int live;     // of its S states
    int channels; // of its PACK channels
};

__device__ __forceinline__ Lane lane_of(const Size& size, const Place& at) {
    Lane x;
    x.warp = threadIdx.x >> 5;
    x.lane = threadIdx.x & 31;
    x.channel = x.warp * W + x.lane / LANES * PACK;
    x.first = x.lane % LANES * S;
    const long long left = size.states - x.first;
    x.live = left <= 0 ? 0 : left < S ? int(left) : S;
    x.channels = at.live - x.channel;
    return x;
}

template <class X>
__device__ __forceinline__ const X* start_of(const X* data, long long outer, long long inner,
                                             const Place& at) {
    return data + at.outer * outer + at.inner * inner;
}

__device__ __forceinline__ const T* start_of(const Strided& x, const Place& at) {
    return start_of(x.data, x.outer, x.inner, at) + at.channel * x.row;
}

__device__ __forceinline__ const Matrix* start_of(const Grouped& x, const Place& at,
                                                  long long channel) {
    return start_of(x.data, x.outer, x.inner, at) + channel / x.per_group * x.group;
}

// Where the states of a lane stand in an array (rows, width, pitch).
__device__ __forceinline__ long long states_at(const Size& size, long long row, const Place& at,
                                               const Lane& lane) {
    return (row * size.width + at.channel + lane.channel) * size.pitch + lane.first;
}

constexpr int PIECE = sizeof(State) < 16 ? 16 / int(sizeof(State)) : 1;  // of states in 16 bytes
constexpr int VECTOR = PIECE < S ? PIECE : S;

// The states of a lane; p stands at its first, null for zeros.
__device__ __forceinline__ void load_states(State (&h)[PACK][S], const State* p, const Size& size,
                                            const Lane& me) {
#pragma unroll
    for (int c = 0; c < PACK; ++c) {
#pragma unroll
        for (int s = 0; s < S; ++s) h[c][s] = Number::zero();
        if (!p || c >= me.channels) continue;
        const State* from = p + c * size.pitch;
        if (size.vector && me.live == S) {
#pragma unroll
            for (int s = 0; s < S; s += VECTOR) {
                const Pack<State, VECTOR> x = Pack<State, VECTOR>::load(from + s);
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) h[c][s + v] = x.item[v];
            }
        } else {
#pragma unroll
            for (int s = 0; s < S; ++s)
                if (s < me.live) h[c][s] = from[s];
        }
    }
}

__device__ __forceinline__ void store_states(State* p, const State (&h)[PACK][S], const Size& size,
                                             const Lane& me) {
#pragma unroll
    for (int c = 0; c < PACK; ++c) {
        if (c >= me.channels) continue;
        State* to = p + c * size.pitch;
        if (size.vector && me.live == S) {
#pragma unroll
            for (int s = 0; s < S; s += VECTOR) {
                Pack<State, VECTOR> x;
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) x.item[v] = h[c][s + v];
                x.store(to + s);
            }
        } else {
#pragma unroll
            for (int s = 0; s < S; ++s)
                if (s < me.live) to[s] = h[c][s];
        }
    }
}

// B or C as a lane holds it: one row for all of its channels, or, constant in time, one for each.
template <bool VARIES>
struct Row {
    State value[VARIES ? 1 : PACK][S];
    __device__ __forceinline__ const State& at(int c, int s) const { return value[VARIES ? 0 : c][s]; }
};

__device__ __forceinline__ State widen_matrix(Matrix x) { return widen(x); }

// COUNT numbers of B or C in shared memory, as states, by all threads of the block.
template <int COUNT>
__device__ __forceinline__ void widen_rows(State* to, const Matrix* from) {
    static_assert(COUNT % PIECE == 0, "pieces of 16 bytes of states");
#pragma unroll
    for (int l = 0; l < (COUNT / PIECE + THREADS - 1) / THREADS; ++l) {
        const int i = (l * THREADS + threadIdx.x) * PIECE;
        if ((COUNT / PIECE) % THREADS && i >= COUNT) break;
        const Pack<Matrix, PIECE> x = Pack<Matrix, PIECE>::load(from + i);
        Pack<State, PIECE> y;
#pragma unroll
        for (int v = 0; v < PIECE; ++v) y.item[v] = widen_matrix(x.item[v]);
        y.store(to + i);
    }
}

// A varying one, from its row in shared memory.
__device__ __forceinline__ void load_row(Row<true>& x, const State* row) {
#pragma unroll
    for (int s = 0; s < S; s += VECTOR) {
        const Pack<State, VECTOR> p = Pack<State, VECTOR>::load(row + s);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) x.value[0][s + v] = p.item[v];
    }
}
__device__ __forceinline__ void load_row(Row<false>&, const State*) {}

// A constant one, from global memory.
__device__ __forceinline__ void load_constant(Row<false>& x, const Grouped& m, const Place& at,
                                              const Lane& me) {
#pragma unroll
    for (int c = 0; c < PACK; ++c) {
        const long long group = (at.channel + me.channel + c) / m.per_group;
        const State* row = reinterpret_cast<const State*>(m.data) + at.outer * m.outer +
                           at.inner * m.inner + group * m.group + me.first;
#pragma unroll
        for (int s = 0; s < S; ++s)
            x.value[c][s] = c < me.channels && s < me.live ? row[s] : Number::zero();
    }
}
__device__ __forceinline__ void load_constant(Row<true>&, const Grouped&, const Place&,
                                              const Lane&) {}

__device__ __forceinline__ Real constant_decay(const Strided& x, const Place& at, int channel) {
    return start_of(reinterpret_cast<const Real*>(x.data), x.outer, x.inner, at)
        [(at.channel + channel) * x.row];
}

// ------------------------------------------------------------------------------ steps of time

// What the recurrence takes at one step of one channel: x is what B is multiplied by (but for a gain of
// each state's own).
struct alignas(2 * sizeof(Real)) Plain {
    Real dd, x;
    __device__ __forceinline__ Real di() const { return dd; }
    __device__ __forceinline__ void set_di(Real) {}
};
struct alignas(sizeof(Real) < 8 ? 16 : 8) Split {
    Real dd, x, step, unused;
    __device__ __forceinline__ Real di() const { return step; }
    __device__ __forceinline__ void set_di(Real di) { step = di, unused = Real(0); }
};
using Step = typename Choose<GAIN && SPLIT_STEPS, Split, Plain>::type;

// The steps from what stands in memory. `decay` is used where DECAY, `tau` where TIMED.
struct Deltas {
    Real raw, delta, own, dd, di;  // own: the decay's step before tau
};

// Everything after `raw` and `delta`.
__device__ __forceinline__ void finish_deltas(Deltas& d, Real decay, Real tau) {
    d.own = DECAY ? decay : d.delta;
    d.dd = TIMED ? mul(tau, d.own) : d.own;
    d.di = TIMED && !STATE_ONLY ? mul(tau, d.delta) : d.delta;
}

__device__ __forceinline__ Deltas deltas(Real dt, Real bias, Real decay, Real tau) {
    Deltas d;
    d.raw = add(dt, bias);
    d.delta = SOFTPLUS ? softplus(d.raw) : d.raw;
    finish_deltas(d, decay, tau);
    return d;
}

__device__ __forceinline__ Step step_of(const Deltas& d, Real u, bool exists) {
    Step s;
    s.dd = exists ? d.dd : Real(0);
    s.x = exists ? (SCHEME == MAMBA ? mul(d.di, u) : u) : Real(0);
    s.set_di(exists ? d.di : Real(0));
    return s;
}

// gain B x
__device__ __forceinline__ State drive(const Factors<State>& f, State B, Real x) {
    return GAIN ? mul(f.gain, scale(B, x)) : scale(B, x);
}

// One step of a lane's states.
__device__ __forceinline__ void advance(State (&h)[PACK][S], Factors<State> (&factors)[PACK][S],
                                        const Pole<State> (&pole)[PACK][S],
                                        const Row<B_VARIES>& B, const Step* steps, bool cut) {
#pragma unroll
    for (int c = 0; c < PACK; ++c) {
        const Step step = steps[c];
#pragma unroll
        for (int s = 0; s < S; ++s) {
            const Factors<State> f = pole[c][s].factors(step.dd, step.di());
            if (cut) h[c][s] = Number::zero();
            h[c][s] = fma(f.decay, h[c][s], drive(f, B.at(c, s), step.x));
            factors[c][s] = f;
        }
    }
}

// Bit t: the state is cleared before step first + t of the segment (from its end where ADJOINT).
__device__ __forceinline__ unsigned resets(const Bits& reset, const Place& at, long long first) {
    const long long t = first + (threadIdx.x & 31);
    const unsigned char* p = start_of(reset.data, reset.outer, reset.inner, at);
    const long long step = at.first + (ADJOINT ? at.length - 1 - t : t);
    return __ballot_sync(~0u, t < at.length && p[step * reset.time] != 0);
}

// ------------------------------------------------------------------------------ sums

// y + Re(x z)
template <class R>
__device__ __forceinline__ R real_fma(R x, R z, R y) {
    return fma(x, z, y);
}
template <class R>
__device__ __forceinline__ R real_fma(Complex<R> x, Complex<R> z, R y) {
    return fma(x.re, z.re, fma(-x.im, z.im, y));
}

// The sum over a lane's states of what term(s, sum) adds to sum: pairs, then a tree, so that the order is the
// same however states lie on lanes (if there are two or more on each).
template <int FROM, int COUNT, class Term>
__device__ __forceinline__ Real sum_states(Term term) {
    if constexpr (COUNT > 2)
        return add(sum_states<FROM, COUNT / 2>(term),
                   sum_states<FROM + COUNT / 2, COUNT / 2>(term));
    else if constexpr (COUNT == 2)
        return term(FROM + 1, term(FROM, Real(0)));
    else
        return term(FROM, Real(0));
}

// Re sum_s C_s h_s
__device__ __forceinline__ Real dot(const Row<C_VARIES>& C, const State (&h)[S], int c) {
    return sum_states<0, S>([&](int s, Real y) { return real_fma(C.at(c, s), h[s], y); });
}

// Sum each of COUNT numbers over the lanes that differ in the bits FROM, 2 FROM, ... below END; numbers are
// handed out while they last: afterwards this lane holds `left` sums in v[0 ...], of the numbers from
// `base` on. Lanes that differ in the other bits hold copies.
template <int FROM, int END, int COUNT, int KEEP = COUNT>
__device__ __forceinline__ void sum_lanes(Real (&v)[COUNT], int lane, int& base) {
    if constexpr (FROM < END) {
        if constexpr (KEEP > 1) {
            constexpr int HALF = KEEP / 2;
            const bool upper = lane & FROM;
#pragma unroll
            for (int i = 0; i < HALF; ++i) {
                const Real send = upper ? v[i] : v[i + HALF];
                const Real keep = upper ? v[i + HALF] : v[i];
                v[i] = add(keep, __shfl_xor_sync(~0u, send, FROM));
            }
            base += upper ? HALF : 0;
            sum_lanes<2 * FROM, END, COUNT, HALF>(v, lane, base);
        } else {
            v[0] = add(v[0], __shfl_xor_sync(~0u, v[0], FROM));
            sum_lanes<2 * FROM, END, COUNT, 1>(v, lane, base);
        }
    }
}

// The sum of COUNT numbers x(0), x(1), ... as a tree over neighbours, as `sum_lanes` goes on with it.
template <int COUNT, int FROM = 0, class X>
__device__ __forceinline__ Real tree(X x) {
    if constexpr (COUNT == 1)
        return x(FROM);
    else
        return add(tree<COUNT / 2, FROM>(x), tree<COUNT / 2, FROM + COUNT / 2>(x));
}

// How many sums `sum_lanes` leaves on a lane.
constexpr int left_of(int count, int lanes) { return count > lanes ? count / lanes : 1; }

// A sum over time: over a chunk first, so that many steps lose no digits.
template <class X>
struct Sum {
    X total, chunk;
    __device__ __forceinline__ Sum() : total(Constant<X>::zero()), chunk(Constant<X>::zero()) {}
    __device__ __forceinline__ void close() {
        total = add(total, chunk);
        chunk = Constant<X>::zero();
    }
};

// ------------------------------------------------------------------------------ inputs to shared memory

// What a thread copies of each input.
struct Copies {
    using Sequence = TileCopy<CHANNELS, THREADS, T>;
    using Rows = TileCopy<N, THREADS, Matrix>;
    const Inputs& in;
    const Place& at;
    Sequence u, dt, z, decay;
    Rows B, C;
    const Real* tau;

    __device__ __forceinline__ Copies(const Inputs& inputs, const Place& place)
        : in(inputs), at(place),
          u(sequence(in.u)), dt(sequence(in.dt)), z(sequence(in.z)), decay(sequence(in.decay_dt)),
          B(begin(start_of(in.B, at, at.channel), in.B.time), direction(in.B.time)),
          C(begin(start_of(in.C, at, at.channel), in.C.time), direction(in.C.time)),
          tau(begin(start_of(in.timesteps.data, in.timesteps.outer, in.timesteps.inner, at),
                    in.timesteps.time)) {}

    // ADJOINT runs from the segment's last step to its first.
    static __device__ __forceinline__ long long direction(long long time) {
        return ADJOINT ? -time : time;
    }
    template <class X>
    __device__ __forceinline__ const X* begin(const X* data, long long time) const {
        return data + (at.first + (ADJOINT ? at.length - 1 : 0)) * time;
    }
    __device__ __forceinline__ Sequence sequence(const Strided& x) const {
        return Sequence(begin(start_of(x, at), x.time), direction(x.time));
    }

    // Are the rows of these inputs (bits of size.wide) aligned, and do STEPS of them exist?
    template <int STEPS>
    __device__ __forceinline__ bool whole(long long first, long long bits) const {
        return at.length - first >= STEPS && (in.size.wide & bits) == bits;
    }

    // Start to copy the STEPS steps from `first` on.
    template <int STEPS, bool WHOLE, class Copy, class X>
    __device__ __forceinline__ void run(X* to, const Copy& copy, long long column, int columns,
                                        long long first) const {
        if (WHOLE)
            copy.template run<STEPS>(to, first, columns);
        else
            copy_tile<STEPS, Copy::WIDTH, THREADS>(to, copy.start + first * copy.row, copy.row,
                                                   column, at.length - first, columns);
    }

    template <int STEPS, bool WHOLE, class Stage>
    __device__ __forceinline__ void all(Stage& to, long long first) const {
        run<STEPS, WHOLE>(to.u, u, in.u.row, at.live, first);
        run<STEPS, WHOLE>(to.dt, dt, in.dt.row, at.live, first);
        if (DECAY == 2) run<STEPS, WHOLE>(to.decay, decay, in.decay_dt.row, at.live, first);
        if (B_VARIES) run<STEPS, WHOLE>(to.B, B, 1, int(in.size.states), first);
        if (C_VARIES) run<STEPS, WHOLE>(to.C, C, 1, int(in.size.states), first);
    }

    template <int STEPS>
    __device__ __forceinline__ void times(Real* to, long long first) const {
        const long long time = direction(in.timesteps.time);
        if (TIMED)
            copy_tile<STEPS, 1, THREADS>(to, tau + first * time, time, 1, at.length - first, 1);
    }
};

// Bits of size.wide.
constexpr long long WIDE_u = 1, WIDE_dt = 2, WIDE_z = 4, WIDE_decay = 8, WIDE_B = 16, WIDE_C = 32,
                    WIDE_gy = 64;
constexpr bool ALIGNABLE = Copies::Sequence::POSSIBLE && (Copies::Rows::POSSIBLE || !(B_VARIES || C_VARIES));
constexpr long long WIDE_ALL = WIDE_u | WIDE_dt | (DECAY == 2 ? WIDE_decay : 0) |
                               (B_VARIES ? WIDE_B : 0) | (C_VARIES ? WIDE_C : 0);

template <int STEPS, bool WHOLE, class Stage>
__device__ __forceinline__ void fetch_of(Stage& to, const Copies& copies, long long first) {
    copies.template all<STEPS, WHOLE>(to, first);
    if (GATE)
        copies.template run<STEPS, WHOLE>(to.z, copies.z, copies.in.z.row, copies.at.live, first);
}

// Start to copy a tile of STEPS steps from `first` on, z among them.
template <int STEPS, class Stage>
__device__ __forceinline__ void fetch(Stage& to, const Copies& copies, long long first) {
    copies.template times<STEPS>(to.tau, first);
    if (ALIGNABLE && copies.template whole<STEPS>(first, WIDE_ALL | (GATE ? WIDE_z : 0)))
        fetch_of<STEPS, ALIGNABLE>(to, copies, first);
    else
        fetch_of<STEPS, false>(to, copies, first);
}

// ------------------------------------------------------------------------------ elements

// Every lane prepares and finishes elements of one channel: steps e * EVERY + row of a tile.
static_assert(W <= 32, "a lane's elements are of one channel");
constexpr int EVERY = 32 / W;

struct Column {
    int channel;  // of the block
    int row;      // the lane's first step
    bool exists;
    Real bias, D, own;  // own: a constant step of the decay

    __device__ __forceinline__ Column(const Inputs& in, const Place& at, const Lane& me) {
        const int column = me.lane % W;
        channel = me.warp * W + column;
        row = me.lane / W;
        exists = channel < at.live;
        const long long parameter = at.shared * in.size.width + at.channel + channel;
        bias = exists && in.bias ? in.bias[parameter] : Real(0);
        D = exists && in.D ? in.D[parameter] : Real(0);
        own = DECAY == 1 && exists ? constant_decay(in.decay_dt, at, channel) : Real(0);
    }

    // Write the steps of STEPS steps of time, of which `count` exist, for this warp. A channel that does
    // not exist has states of A = 0 and no input: it stays at zero whatever its steps are.
    template <int STEPS, bool ALL, class Stage>
    __device__ __forceinline__ void prepare(Step* steps, const Stage& stage, int lane,
                                            int count) const {
        constexpr int COUNT = (STEPS + EVERY - 1) / EVERY;
        const int from = row * CHANNELS + channel;
        T u[COUNT], dt[COUNT], decay[COUNT];
        Real tau[COUNT];
        // all loads before the first store, which might be of the same memory for all the compiler knows
#pragma unroll
        for (int e = 0; e < COUNT; ++e) {
            const int t = e * EVERY + row, i = from + e * EVERY * CHANNELS;
            if (STEPS % EVERY && t >= STEPS) break;
            u[e] = stage.u[i];
            dt[e] = stage.dt[i];
            if (DECAY == 2) decay[e] = stage.decay[i];
            if (TIMED) tau[e] = stage.tau[t];
        }
        Step found[COUNT];
#pragma unroll
        for (int e = 0; e < COUNT; ++e) {
            const int t = e * EVERY + row;
            const Deltas d = deltas(widen(dt[e]), bias, DECAY == 2 ? Real(widen(decay[e])) : own,
                                    TIMED ? tau[e] : Real(1));
            found[e] = step_of(d, widen(u[e]), ALL || t < count);
        }
#pragma unroll
        for (int e = 0; e < COUNT; ++e) {
            if (STEPS % EVERY && e * EVERY + row >= STEPS) break;
            steps[lane + e * 32] = found[e];
        }
    }
};
