// SPDX-License-Identifier: MIT
// The selective scan, backward: all gradients in one pass from the end of time.
//
// With gy the gradient before the gate, lam_t = gy_t conj(C_t) + conj(decay_{t+1}) lam_{t+1} (2 gy for
// complex states), and from lam_t, h_{t-1}: the gradients of decay and gain, chained through
// discretize.cuh to A, dt, decay_dt and timesteps; those of u, B, C, D, z follow directly.
//
// Memory contract. Inputs as in selective_scan.cu, with the states `kept` before every 32nd step and
// gy, g_last. du, ddt, dz, ddecay (batch, L, E) contiguous; g_last (batch, segments, E, pitch) is the
// adjoint after each segment of time; dh0 (batch, E, pitch); dA (batch, segments, E, pitch), dD, dbias, down
// (batch, segments, E): to be summed over segments and the batch elements of one A. dB, dC: (blocks of a batch element,
// batch, L, states), to be summed over the blocks of a group, or where the matrix is constant
// (batch, segments, E, states); dtau (blocks, batch, L). u and dt are read twice (the second time from the L2 cache), the
// rest once. No atomics: every sum has a fixed order.
//
// Launch as the forward's. Chunks of 32 steps from the last to the first; a chunk's u, dt, B, C are
// copied to shared memory while the later chunk is computed. From the kept state the chunk is run
// through once to get the state before each SUB steps; then, from the last SUB steps to the first, these
// are run again with all states (and decays) in registers, and backwards. dB_t and dC_t are summed over
// the channels of a warp by exchanging halves, then over the warps in shared memory.
#include "selective.cuh"

constexpr int SUB = 8;
constexpr int SUBS = CHUNK / SUB;
constexpr int ELEMENTS = (SUB + EVERY - 1) / EVERY;  // of SUB steps, that a lane prepares and finishes
constexpr int WORDS = sizeof(State) / sizeof(Real);
constexpr int MATRICES = int(B_VARIES) + int(C_VARIES);
constexpr int ROW = MATRICES * N * WORDS;  // numbers of dB_t and dC_t
constexpr int NUMBERS = MATRICES * S * WORDS;  // of them, that a lane has
constexpr int VALUES = 4;  // sums over states: for dd, for di, for u (or both of these), y

struct Arguments {
    Inputs in;
    Strided gy;
    const State *g_last, *kept;
    T *du, *ddt, *dz, *ddecay;
    State *dB, *dC, *dA, *dh0;
    Real *dD, *dbias, *down, *dtau;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

struct Stage {
    alignas(16) T u[CHUNK * CHANNELS];
    alignas(16) T dt[CHUNK * CHANNELS];
    alignas(16) T decay[DECAY == 2 ? CHUNK * CHANNELS : 1];
    alignas(16) Matrix B[B_VARIES ? CHUNK * N : 1];
    alignas(16) Matrix C[C_VARIES ? CHUNK * N : 1];
    alignas(16) Real tau[TIMED ? CHUNK : 1];
};

// The inputs of SUB steps as they stand in memory, for their elements.
struct Raw {
    alignas(16) T u[SUB * CHANNELS];
    alignas(16) T dt[SUB * CHANNELS];
    alignas(16) T gy[SUB * CHANNELS];
    alignas(16) T z[GATE ? SUB * CHANNELS : 1];
    alignas(16) T decay[DECAY == 2 ? SUB * CHANNELS : 1];
};

struct Shared {
    Stage stage;  // the chunk to come
    Raw raw[2];   // SUB steps that are computed, and those that come
    alignas(16) State B[B_VARIES ? CHUNK * N : 1];
    alignas(16) State C[C_VARIES ? CHUNK * N : 1];
    alignas(16) Real tau[TIMED ? CHUNK : 1];
    alignas(16) Step steps[WARPS][CHUNK * W];
    alignas(16) Real gy[WARPS][SUB * W];
    alignas(16) Real sums[WARPS][SUB * W * VALUES];
    alignas(16) State starts[SUBS][PACK * S][THREADS];
    alignas(16) Real rows[MATRICES ? WARPS * SUB * ROW : 1];
    alignas(16) Real dtau[TIMED ? WARPS * SUB : 1];
    alignas(16) State totals[1 + int(!B_VARIES) + int(!C_VARIES)][PACK * S][THREADS];  // A, B, C
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the launcher gives too little shared memory");

extern __shared__ uint4 arena[];

// What a lane adds up over all of time of its elements; of its states over a chunk, `Shared::totals` over
// all of time.
struct Totals {
    State A[PACK][S], B[PACK][S], C[PACK][S];
    Sum<Real> D, bias, own;
};

template <class R>
__device__ __forceinline__ void put_words(R* to, R x) {
    to[0] = x;
}
template <class R>
__device__ __forceinline__ void put_words(R* to, Complex<R> x) {
    to[0] = x.re;
    to[1] = x.im;
}

// One step backwards: the sums over a lane's states for each channel, and its share of dB_t and dC_t.
__device__ __forceinline__ void back(const Pole<State> (&pole)[PACK][S], State (&carry)[PACK][S],
                                     const Row<B_VARIES>& B, const Row<C_VARIES>& C,
                                     const State (&h)[PACK][S], const State (&before)[PACK][S],
                                     const State (&decay)[PACK][S], const Step* steps,
                                     const Real* gy, bool cut, Totals& totals,
                                     Real (&sums)[PACK * VALUES],
                                     Real (&row)[NUMBERS ? NUMBERS : 1]) {
    State dB[S], dC[S];
#pragma unroll
    for (int c = 0; c < PACK; ++c) {
        const Step step = steps[c];
        const Real g = COMPLEX<State> ? mul(Real(2), gy[c]) : gy[c];
        State w[S], of_B[S], gain_dt[S], gain[S];  // the last two only where GAIN
#pragma unroll
        for (int s = 0; s < S; ++s) {
            const State b = B.at(c, s), lam = scale_add(conj(C.at(c, s)), g, carry[c][s]);
            const State received = cut ? Number::zero() : before[c][s];
            State through, to_B;
            if constexpr (GAIN) {
                const Factors<State> f = pole[c][s].factors(step.dd, step.di());
                const Slopes<State> slope = pole[c][s].slopes(step.dd, step.di(), f);
                through = mul(lam, conj(f.decay));
                w[s] = mul(mul(lam, conj(received)), conj(slope.decay));
                of_B[s] = mul(lam, conj(b));
                gain_dt[s] = conj(slope.gain_dt);
                gain[s] = conj(f.gain);
                totals.A[c][s] = add(scale_add(w[s], step.dd, totals.A[c][s]),
                                     mul(scale(of_B[s], step.x), conj(slope.gain_A)));
                to_B = mul(lam, gain[s]);
            } else {
                through = mul(lam, conj(decay[c][s]));
                w[s] = mul(through, conj(received));
                of_B[s] = lam;
                totals.A[c][s] = scale_add(w[s], step.dd, totals.A[c][s]);
                to_B = lam;
            }
            carry[c][s] = cut ? Number::zero() : through;
            if (!B_VARIES)
                totals.B[c][s] = scale_add(to_B, step.x, totals.B[c][s]);
            else
                dB[s] = c ? scale_add(to_B, step.x, dB[s]) : scale(to_B, step.x);
            const State to_C = conj(h[c][s]);
            if (!C_VARIES)
                totals.C[c][s] = scale_add(to_C, g, totals.C[c][s]);
            else
                dC[s] = c ? scale_add(to_C, g, dC[s]) : scale(to_C, g);
        }
        sums[c * VALUES] = sum_states<0, S>(
            [&](int s, Real sum) { return pole[c][s].add_times_conj(w[s], sum); });
        sums[c * VALUES + 1] = !GAIN ? Real(0) : sum_states<0, S>([&](int s, Real sum) {
            return real_fma(scale(of_B[s], step.x), gain_dt[s], sum);
        });
        sums[c * VALUES + 2] = sum_states<0, S>([&](int s, Real sum) {
            return real_fma(of_B[s], GAIN ? gain[s] : conj(B.at(c, s)), sum);
        });
        sums[c * VALUES + 3] = GATE ? dot(C, h[c], c) : Real(0);
    }
#pragma unroll
    for (int s = 0; s < S; ++s) {
        if (B_VARIES) put_words(row + s * WORDS, dB[s]);
        if (C_VARIES) put_words(row + (int(B_VARIES) * S + s) * WORDS, dC[s]);
    }
}

// What a lane takes from shared memory for one step backwards.
struct Taken {
    Row<B_VARIES> B;
    Row<C_VARIES> C;
    Step steps[PACK];
    Real gy[PACK];

    __device__ __forceinline__ void load(const Shared& shared, const Step* at_lane,
                                         const Real* gys, const Lane& me, int first, int i) {
        const int t = first + i;
        load_row(B, shared.B + t * N + me.first);
        load_row(C, shared.C + t * N + me.first);
#pragma unroll
        for (int c = 0; c < PACK; ++c) {
            steps[c] = at_lane[t * W + c];
            gy[c] = gys[i * W + me.lane / LANES * PACK + c];
        }
    }
};

template <bool WHOLE>
__device__ __forceinline__ void fetch_elements(Raw& to, const Copies& copies,
                                               const Copies::Sequence& gy, long long gy_row,
                                               long long first) {
    const Inputs& in = copies.in;
    const int live = copies.at.live;
    copies.run<SUB, WHOLE>(to.u, copies.u, in.u.row, live, first);
    copies.run<SUB, WHOLE>(to.dt, copies.dt, in.dt.row, live, first);
    copies.run<SUB, WHOLE>(to.gy, gy, gy_row, live, first);
    if (GATE) copies.run<SUB, WHOLE>(to.z, copies.z, in.z.row, live, first);
    if (DECAY == 2) copies.run<SUB, WHOLE>(to.decay, copies.decay, in.decay_dt.row, live, first);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    selective_scan_backward(const __grid_constant__ Arguments p) {
    Shared& shared = *reinterpret_cast<Shared*>(arena);
    const Inputs& in = p.in;
    const Size& size = in.size;
    const Place at = locate(size);
    const Lane me = lane_of(size, at);
    const long long length = at.length, chunks = (length + CHUNK - 1) / CHUNK;  // of the segment
    const long long kept = at.batch * ((size.length + CHUNK - 1) / CHUNK) + at.first / CHUNK;
    clear<THREADS>(shared.stage);
    clear<THREADS>(shared.raw);
    __syncthreads();

    Pole<State> pole[PACK][S];
    State carry[PACK][S];
    Row<B_VARIES> B;
    Row<C_VARIES> C;
    load_states(carry, in.A + states_at(size, at.shared, at, me), size, me);
#pragma unroll
    for (int c = 0; c < PACK; ++c)
#pragma unroll
        for (int s = 0; s < S; ++s) pole[c][s] = Pole<State>(carry[c][s]);
    load_states(carry, p.g_last + states_at(size, at.row, at, me), size, me);
    load_constant(B, in.B, at, me);
    load_constant(C, in.C, at, me);

    const Column mine(in, at, me);
    const long long blocks = size.width / size.piece * size.parts, batches = gridDim.x / (blocks * size.segments);
    Totals totals;
    for (State(&total)[PACK * S][THREADS] : shared.totals)
#pragma unroll
        for (int i = 0; i < PACK * S; ++i) total[i][threadIdx.x] = Number::zero();
#pragma unroll
    for (int c = 0; c < PACK; ++c)
#pragma unroll
        for (int s = 0; s < S; ++s)
            totals.A[c][s] = totals.B[c][s] = totals.C[c][s] = Number::zero();

    const Copies copies(in, at);
    const Copies::Sequence copy_gy = copies.sequence(p.gy);
    const auto fetch_raw = [&](int sub, long long first) {
        Raw& to = shared.raw[sub % 2];
        constexpr long long BITS = WIDE_u | WIDE_dt | WIDE_gy | (GATE ? WIDE_z : 0) |
                                   (DECAY == 2 ? WIDE_decay : 0);
        if (ALIGNABLE && copies.whole<SUB>(first, BITS))
            fetch_elements<ALIGNABLE>(to, copies, copy_gy, p.gy.row, first);
        else
            fetch_elements<false>(to, copies, copy_gy, p.gy.row, first);
    };
    const auto fetch = [&](long long first) {
        copies.times<CHUNK>(shared.stage.tau, first);
        if (ALIGNABLE && copies.whole<CHUNK>(first, WIDE_ALL))
            copies.all<CHUNK, ALIGNABLE>(shared.stage, first);
        else
            copies.all<CHUNK, false>(shared.stage, first);
    };
    fetch((chunks - 1) * CHUNK);
    commit();
    {
        const int sub = int((length - 1) % CHUNK) / SUB;
        fetch_raw(sub, (chunks - 1) * CHUNK + sub * SUB);
        commit();
    }
    Real* const row_to = reinterpret_cast<Real*>(B_VARIES ? p.dB : p.dC);
#pragma unroll 1
    for (long long chunk = chunks - 1; chunk >= 0; --chunk) {
        const long long first = chunk * CHUNK;
        const int count = length - first < CHUNK ? int(length - first) : CHUNK;
        State h[PACK][S];
        load_states(h, p.kept + states_at(size, kept + chunk, at, me), size, me);
        const unsigned cleared = RESET ? resets(in.reset, at, first) : 0;
        wait_for<0>();
        __syncthreads();
        const Stage& stage = shared.stage;
        for (int i = threadIdx.x; i < CHUNK * N; i += THREADS) {
            if (B_VARIES) shared.B[i] = widen_matrix(stage.B[i]);
            if (C_VARIES) shared.C[i] = widen_matrix(stage.C[i]);
        }
        if (TIMED && threadIdx.x < CHUNK) shared.tau[threadIdx.x] = stage.tau[threadIdx.x];
        Step* steps = shared.steps[me.warp];
        if (count == CHUNK)
            mine.prepare<CHUNK, true>(steps, stage, me.lane, count);
        else
            mine.prepare<CHUNK, false>(steps, stage, me.lane, count);
        __syncthreads();
        if (chunk > 0) fetch(first - CHUNK);
        commit();

        const Step* at_lane = steps + me.lane / LANES * PACK;
        // the state before each SUB steps
#pragma unroll 1
        for (int j = 0; j < SUBS; ++j) {
#pragma unroll
            for (int i = 0; i < PACK * S; ++i) shared.starts[j][i][threadIdx.x] = h[i / S][i % S];
            if (j == SUBS - 1) break;
#pragma unroll
            for (int i = 0; i < SUB; ++i) {
                const int t = j * SUB + i;
                load_row(B, shared.B + t * N + me.first);
                State decay[PACK][S];
                advance(h, decay, pole, B, at_lane + t * W, RESET && cleared >> t & 1);
            }
        }
#pragma unroll 1
        for (int j = SUBS - 1; j >= 0; --j) {
            if (j * SUB >= count) continue;
            const Raw& raw = shared.raw[j % 2];
            if (j > 0 || chunk > 0) fetch_raw(j + SUBS - 1, first + (j - 1) * SUB);
            commit();
            State start[PACK][S], hs[SUB][PACK][S], decays[SUB][PACK][S];
#pragma unroll
            for (int i = 0; i < PACK * S; ++i)
                h[i / S][i % S] = start[i / S][i % S] = shared.starts[j][i][threadIdx.x];
#pragma unroll
            for (int i = 0; i < SUB; ++i) {
                const int t = j * SUB + i;
                load_row(B, shared.B + t * N + me.first);
                advance(h, decays[i], pole, B, at_lane + t * W, RESET && cleared >> t & 1);
#pragma unroll
                for (int c = 0; c < PACK; ++c)
#pragma unroll
                    for (int s = 0; s < S; ++s) hs[i][c][s] = h[c][s];
            }
            Real* gys = shared.gy[me.warp];
            const int from = mine.row * CHANNELS + mine.channel;
            Real gated[ELEMENTS];
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e) {
                const int i = from + e * EVERY * CHANNELS;
                if (SUB % EVERY && e * EVERY + mine.row >= SUB) break;
                const Real g = widen(raw.gy[i]), z = GATE ? Real(widen(raw.z[i])) : Real(1);
                gated[e] = GATE ? mul(g, mul(z, sigmoid(z))) : g;
            }
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e)
                if (SUB % EVERY == 0 || e * EVERY + mine.row < SUB) gys[me.lane + e * 32] = gated[e];
            __syncwarp();
            // what a step takes is loaded a step ahead, before the stores that it must not pass
            Taken next;
            next.load(shared, at_lane, gys, me, j * SUB, SUB - 1);
#pragma unroll
            for (int i = SUB - 1; i >= 0; --i) {
                const int t = j * SUB + i;
                const Taken taken = next;
                if (i) next.load(shared, at_lane, gys, me, j * SUB, i - 1);
                Real sums[PACK * VALUES], row[NUMBERS ? NUMBERS : 1];
                back(pole, carry, B_VARIES ? taken.B : B, C_VARIES ? taken.C : C, hs[i],
                     i ? hs[i ? i - 1 : 0] : start, decays[i], taken.steps, taken.gy,
                     RESET && cleared >> t & 1, totals, sums, row);
                int base = 0;
                sum_lanes<1, LANES>(sums, me.lane, base);
                if (me.lane % LANES < PACK * VALUES) {
                    Real* to = shared.sums[me.warp] + (i * W + me.lane / LANES * PACK) * VALUES;
#pragma unroll
                    for (int v = 0; v < left_of(PACK * VALUES, LANES); ++v) to[base + v] = sums[v];
                }
                if (MATRICES) {
                    constexpr int EACH = S * WORDS;
                    base = 0;
                    sum_lanes<LANES, 32>(row, me.lane, base);
                    if (me.lane / LANES < NUMBERS) {
                        Real* to = shared.rows + (me.warp * SUB + i) * ROW + me.first * WORDS;
#pragma unroll
                        for (int v = 0; v < left_of(NUMBERS, 32 / LANES); ++v) {
                            const int k = base + v;
                            to[k / EACH * (N * WORDS) + k % EACH] = row[v];
                        }
                    }
                }
            }
            __syncthreads();
            const long long left = length - first - j * SUB;  // steps from the first of these on
            if (MATRICES) {
                const long long row_at =
                    ((at.part * batches + at.batch) * size.length + at.first + first + j * SUB) *
                    size.states * WORDS;
#pragma unroll
                for (int l = 0; l < (SUB * ROW + THREADS - 1) / THREADS; ++l) {
                    const int i = l * THREADS + threadIdx.x, t = i / ROW, k = i % ROW;
                    if ((SUB * ROW) % THREADS && i >= SUB * ROW) break;
                    const Real sum =
                        tree<WARPS>([&](int w) { return shared.rows[w * SUB * ROW + i]; });
                    const int n = k % (N * WORDS);
                    Real* to = MATRICES == 2 && k >= N * WORDS ? reinterpret_cast<Real*>(p.dC) : row_to;
                    if (t < left && n < size.states * WORDS)
                        to[row_at + t * size.states * WORDS + n] = sum;
                }
            }
            const long long at_element =
                (at.batch * size.length + at.first + first + j * SUB + mine.row) * size.width +
                at.channel + mine.channel;
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e) {
                const int i = from + e * EVERY * CHANNELS, t = e * EVERY + mine.row;
                const long long to = at_element + e * EVERY * size.width;
                const bool is_there = mine.exists && t < left && (SUB % EVERY == 0 || t < SUB);
                Real g_tau = 0;
                if (is_there) {
                    const int own = me.lane + e * 32;
                    const Real* sums = shared.sums[me.warp] + own * VALUES;
                    const Real u = widen(raw.u[i]), gy = gys[own];
                    const Real tau = TIMED ? shared.tau[j * SUB + t] : Real(1);
                    const Real decay = DECAY == 2 ? Real(widen(raw.decay[i])) : mine.own;
                    Deltas d;
                    d.raw = add(widen(raw.dt[i]), mine.bias);
                    if (TIMED || SPLIT_STEPS)
                        d = deltas(widen(raw.dt[i]), mine.bias, decay, tau);
                    else
                        d.dd = d.di = steps[j * SUB * W + own].dd;
                    Real g_dd = Pole<State>::unscale(sums[0]), g_di, g_u;
                    if (GAIN) {
                        g_di = sums[1];
                        g_u = sums[2];
                    } else {
                        g_di = SCHEME == MAMBA ? mul(sums[2], u) : Real(0);
                        g_u = SCHEME == MAMBA ? mul(sums[2], d.di) : sums[2];
                    }
                    p.du[to] = narrow<T>(fma(mine.D, gy, g_u));
                    totals.D.chunk = fma(gy, u, totals.D.chunk);
                    if (GATE) {
                        const Real z = widen(raw.z[i]), s = sigmoid(z);
                        const Real y =
                            fma(mine.D, u, COMPLEX<State> ? mul(Real(2), sums[3]) : sums[3]);
                        const Real slope = mul(s, fma(z, add(Real(1), -s), Real(1)));
                        p.dz[to] = narrow<T>(mul(mul(Real(widen(raw.gy[i])), y), slope));
                    }
                    if (TIMED) {
                        g_tau = mul(g_dd, d.own);
                        g_dd = mul(tau, g_dd);
                        if (!STATE_ONLY) {
                            g_tau = fma(g_di, d.delta, g_tau);
                            g_di = mul(tau, g_di);
                        }
                    }
                    if (DECAY == 0) g_di = add(g_di, g_dd);
                    if (DECAY == 1) totals.own.chunk = add(totals.own.chunk, g_dd);
                    if (DECAY == 2) p.ddecay[to] = narrow<T>(g_dd);
                    if (SOFTPLUS) g_di = mul(g_di, sigmoid(d.raw));
                    p.ddt[to] = narrow<T>(g_di);
                    totals.bias.chunk = add(totals.bias.chunk, g_di);
                }
                if (TIMED) {
#pragma unroll
                    for (int mask = 1; mask < W; mask *= 2)
                        g_tau = add(g_tau, __shfl_xor_sync(~0u, g_tau, mask));
                    if (mine.channel == me.warp * W && t < SUB)
                        shared.dtau[me.warp * SUB + t] = g_tau;
                }
            }
            wait_for<0>();  // for the elements of the SUB steps before these
            __syncthreads();
            if (TIMED && threadIdx.x < SUB && j * SUB + threadIdx.x < count) {
                p.dtau[(at.part * batches + at.batch) * size.length + at.first + first + j * SUB +
                       threadIdx.x] =
                    tree<WARPS>([&](int w) { return shared.dtau[w * SUB + threadIdx.x]; });
            }
        }
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
        totals.D.close();
        totals.bias.close();
        totals.own.close();
    }

    const long long states = states_at(size, at.row, at, me);
    if (at.first == 0) store_states(p.dh0 + states_at(size, at.batch, at, me), carry, size, me);
    const auto total = [&](int which, State* to, long long pitch) {
#pragma unroll
        for (int i = 0; i < PACK * S; ++i)
            if (i / S < me.channels && i % S < me.live)
                to[i / S * pitch + i % S] = shared.totals[which][i][threadIdx.x];
    };
    total(0, p.dA + states, size.pitch);
    const long long constant =
        (at.row * size.width + at.channel + me.channel) * size.states + me.first;
    if (!B_VARIES) total(1, p.dB + constant, size.states);
    if (!C_VARIES) total(1 + int(!B_VARIES), p.dC + constant, size.states);
    Real sums[3] = {totals.D.total, totals.bias.total, totals.own.total};
#pragma unroll
    for (int v = 0; v < 3; ++v)
#pragma unroll
        for (int mask = W; mask < 32; mask *= 2)
            sums[v] = add(sums[v], __shfl_xor_sync(~0u, sums[v], mask));
    if (me.lane < W && mine.exists) {
        const long long to = at.row * size.width + at.channel + mine.channel;
        if (p.dD) p.dD[to] = sums[0];
        if (p.dbias) p.dbias[to] = sums[1];
        if (DECAY == 1) p.down[to] = sums[2];
    }
}
