// SPDX-License-Identifier: MIT
// How the backward of the selective scan (selective_scan_backward.cu) lays out its work: arguments, who
// prepares and finishes what, and what of it lies in shared memory.
//
// Compiled for what selective.cuh names, ROW_SLOTS and SHARED_BYTES.
#pragma once
#include "selective.cuh"

constexpr int SUB = 8;
constexpr int SUBS = CHUNK / SUB;
constexpr int WORDS = sizeof(State) / sizeof(Real);
constexpr int MATRICES = int(B_VARIES) + int(C_VARIES);
constexpr int ROW = MATRICES * N * WORDS;  // numbers of dB_t and dC_t
constexpr int REST = MATRICES * WORDS;     // of them, of one state
constexpr int ROW_STEPS = ROW_SLOTS * SUB;
static_assert(ROW_SLOTS == 1 || ROW_SLOTS == 2 || ROW_SLOTS == SUBS, "slots of SUB steps take turns");

// Sums over states, of each step and channel: for dd, di, u (or both of these), y.
constexpr int FOR_DI = 1, FOR_U = 1 + int(GAIN), FOR_Y = 2 + int(GAIN);
constexpr int VALUES = 2 + int(GAIN) + int(GATE);
constexpr int PLANE = SUB * W + 8;

// A lane prepares and finishes elements of V neighbouring channels of one of SUB steps, Q lanes those of a
// step.
constexpr int Q = W < 4 ? W : 4;
constexpr int V = W / Q;
constexpr int SLOT = THREADS * V;  // elements of SUB steps

// Gains are kept where registers are left, and found again where not.
constexpr bool KEPT_GAIN = GAIN && PACK * S * sizeof(State) <= 16;
constexpr bool SEPARATE_DI = GAIN && SPLIT_STEPS;  // it is dd otherwise

struct Arguments {
    Inputs in;
    Strided gy;
    const State *g_last, *kept;
    T *du, *ddt, *dz, *ddecay;
    State *dB, *dC, *dA, *dh0;
    Real *dD, *dbias, *down, *dtau;
    long long gap;  // between rows of ddt and of dz, beyond the width
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

// Where dt is needed once, the softplus' slope takes its place.
constexpr bool IN_PLACE = SOFTPLUS && sizeof(T) == sizeof(Real) && !TIMED && !SPLIT_STEPS;

// What lanes copy for themselves. Of u, dt, decay: the chunk that is computed and, as its SUB steps are
// done, the one to come, whose first SUB steps take turns with the other's (slots 0 and 4).
struct Own {
    alignas(16) T u[SUBS + 1][SLOT];
    alignas(16) T dt[SUBS + 1][SLOT];
    alignas(16) T decay[DECAY == 2 ? SUBS + 1 : 1][DECAY == 2 ? SLOT : 1];
    alignas(16) T gy[2][SLOT];
    alignas(16) T z[2][GATE ? SLOT : 1];
};

struct Coming {  // of the chunk to come
    alignas(16) Matrix B[B_VARIES ? CHUNK * N : 1];
    alignas(16) Matrix C[C_VARIES ? CHUNK * N : 1];
    alignas(16) Real tau[TIMED ? CHUNK : 1];
};

struct Shared {
    Own own;
    Coming coming;
    alignas(16) State B[B_VARIES ? CHUNK * N : 1];
    alignas(16) State C[C_VARIES ? CHUNK * N : 1];
    alignas(16) Real tau[TIMED ? CHUNK : 1];
    alignas(16) Real dd[WARPS][CHUNK * W];
    alignas(16) Real x[WARPS][CHUNK * W];
    alignas(16) Real di[SEPARATE_DI ? WARPS : 1][SEPARATE_DI ? CHUNK * W : 1];
    alignas(16) Real gy[WARPS][SUB * W];      // before the gate
    alignas(16) Real to_z[GATE ? SLOT : 1];   // what y is multiplied by for dz
    alignas(16) Real slope[SOFTPLUS && !IN_PLACE ? SUBS : 1][SOFTPLUS && !IN_PLACE ? SLOT : 1];
    alignas(16) Real sums[WARPS][VALUES * PLANE];
    alignas(16) State starts[SUBS][PACK * S][THREADS];  // before SUB steps
    alignas(16) Real rows[MATRICES ? WARPS * ROW_STEPS * ROW : 1];
    alignas(16) Real dtau[TIMED ? WARPS * ROW_STEPS : 1];
    alignas(16) State totals[1 + int(!B_VARIES) + int(!C_VARIES)][PACK * S][THREADS];  // A, B, C
    alignas(16) Real over_time[2 + int(DECAY == 1)][SLOT];                             // D, bias, decay
    alignas(16) Real parameters[2 + int(DECAY == 1)][CHANNELS];                        // D, bias, decay
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the launcher gives too little shared memory");

extern __shared__ uint4 arena[];
