// SPDX-License-Identifier: MIT
// One step of a lane's states, with time and backwards, in the backward of the selective scan.
#pragma once
#include "selective_backward.cuh"

// What a lane adds up over a chunk of its states; `Shared::totals` over all of time.
struct Totals {
    State A[PACK][S], B[PACK][S], C[PACK][S];
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
                                     const Factors<State> (&factors)[PACK][S], const Step* steps,
                                     const Real* gy, bool cut, Totals& totals,
                                     Real (&sums)[PACK * VALUES], Real (&row)[REST ? S * REST : 1]) {
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
                const Factors<State> f =
                    KEPT_GAIN ? factors[c][s] : pole[c][s].factors(step.dd, step.di());
                const Slopes<State> slope = pole[c][s].slopes(step.dd, step.di(), f);
                through = mul(lam, conj(f.decay));
                w[s] = SCHEME == ZOH ? mul(through, conj(received))  // the slope is the decay
                                     : mul(mul(lam, conj(received)), conj(slope.decay));
                of_B[s] = mul(lam, conj(b));
                gain_dt[s] = conj(slope.gain_dt);
                gain[s] = conj(f.gain);
                totals.A[c][s] = add(scale_add(w[s], step.dd, totals.A[c][s]),
                                     mul(scale(of_B[s], step.x), conj(slope.gain_A)));
                to_B = mul(lam, gain[s]);
            } else {
                through = mul(lam, conj(factors[c][s].decay));
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
        Real* sum = sums + c * VALUES;
        sum[0] = sum_states<0, S>(
            [&](int s, Real y) { return pole[c][s].add_times_conj(w[s], y); });
        if (GAIN)
            sum[FOR_DI] = sum_states<0, S>([&](int s, Real y) {
                return real_fma(scale(of_B[s], step.x), gain_dt[s], y);
            });
        sum[FOR_U] = sum_states<0, S>([&](int s, Real y) {
            return real_fma(of_B[s], GAIN ? gain[s] : conj(B.at(c, s)), y);
        });
        if (GATE) sum[FOR_Y] = dot(C, h[c], c);
    }
#pragma unroll
    for (int s = 0; s < S; ++s) {
        if (B_VARIES) put_words(row + s * REST, dB[s]);
        if (C_VARIES) put_words(row + s * REST + int(B_VARIES) * WORDS, dC[s]);
    }
}

// The steps of a lane's channels; the pointers stand at a step of time.
struct Steps {
    const Real *dd, *x, *di;

    __device__ __forceinline__ Steps(const Shared& shared, const Lane& me) {
        const int at = me.lane / LANES * PACK;
        dd = shared.dd[me.warp] + at;
        x = shared.x[me.warp] + at;
        di = shared.di[SEPARATE_DI ? me.warp : 0] + (SEPARATE_DI ? at : 0);
    }
    __device__ __forceinline__ Steps from(int t) const {
        Steps y = *this;
        y.dd += t * W, y.x += t * W, y.di += SEPARATE_DI ? t * W : 0;
        return y;
    }
    __device__ __forceinline__ void load_times(Step (&step)[PACK], int t) const {
        const Pack<Real, PACK> a = Pack<Real, PACK>::load(dd + t * W);
        Pack<Real, PACK> b = a;
        if (SEPARATE_DI) b = Pack<Real, PACK>::load(di + t * W);
#pragma unroll
        for (int c = 0; c < PACK; ++c) {
            step[c].dd = a.item[c];
            step[c].set_di(b.item[c]);
        }
    }
    __device__ __forceinline__ void load_inputs(Step (&step)[PACK], int t) const {
        const Pack<Real, PACK> a = Pack<Real, PACK>::load(x + t * W);
#pragma unroll
        for (int c = 0; c < PACK; ++c) step[c].x = a.item[c];
    }
    __device__ __forceinline__ void load(Step (&step)[PACK], int t) const {
        load_times(step, t);
        load_inputs(step, t);
    }
};

// One step of a lane's states with factors that are known.
__device__ __forceinline__ void follow(State (&h)[PACK][S], const Factors<State> (&f)[PACK][S],
                                       const Row<B_VARIES>& B, const Step* steps, bool cut) {
#pragma unroll
    for (int c = 0; c < PACK; ++c)
#pragma unroll
        for (int s = 0; s < S; ++s) {
            if (cut) h[c][s] = Number::zero();
            h[c][s] = fma(f[c][s].decay, h[c][s], drive(f[c][s], B.at(c, s), steps[c].x));
        }
}

__device__ __forceinline__ void find_factors(Factors<State> (&f)[PACK][S], const Pole<State> (&pole)[PACK][S],
                                             const Step* steps) {
#pragma unroll
    for (int c = 0; c < PACK; ++c)
#pragma unroll
        for (int s = 0; s < S; ++s) f[c][s] = pole[c][s].factors(steps[c].dd, steps[c].di());
}

// What a lane takes from shared memory for one step backwards.
struct Taken {
    Row<B_VARIES> B;
    Row<C_VARIES> C;
    Step steps[PACK];
    Real gy[PACK];

    // All stand at the lane's numbers of the first step.
    __device__ __forceinline__ void load(const State* Bs, const State* Cs, const Steps& at_lane,
                                         const Real* gys, int i) {
        load_row(B, Bs + i * N);
        load_row(C, Cs + i * N);
        at_lane.load(steps, i);
        const Pack<Real, PACK> g = Pack<Real, PACK>::load(gys + i * W);
#pragma unroll
        for (int c = 0; c < PACK; ++c) gy[c] = g.item[c];
    }
};
