// The activations of vectors, and their derivatives; after activations.h, simd.h and simd_types.h. No include guard: see
// simd.h.

// Sweeps are compiled for some activations each, and for the others together.
constexpr int64_t kOther = kLeakyReLU;

SSL_FAST_INLINE V exp(V x) {
  constexpr float kLog2E = 1.44269504f;
  return exp2(at_most(at_least(x * kLog2E, -126), 126));
}

SSL_FAST_INLINE V sigmoid(V u) { return 1 / (1 + exp(-u)); }

// The standard normal distribution and its density, by Chebyshev's fit of log(erfc(z) e^(z^2) / t) in t = 1 / (1 + z / 2),
// whose relative error is 1.2e-7 for every z = |u| / sqrt 2.
SSL_FAST_INLINE V normal_density(V u) { return exp(u * u * -0.5f) * 0.398942280f; }
SSL_FAST_INLINE V normal_distribution(V u) {
  constexpr float kFit[] = {0.17087277f, -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                            -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f, -1.26551223f};
  const V t = 1 / (1 + (u < 0 ? -u : u) * 0.353553391f);
  V fit = broadcast(kFit[0]);
  SSL_FAST_UNROLL
  for (int k = 1; k < 10; ++k) fit = fit * t + kFit[k];
  const V beyond = 0.5f * t * exp(fit - u * u * 0.5f);
  return u < 0 ? beyond : 1 - beyond;
}

// What is not above 0; NaN is, so that it passes both ways.
SSL_FAST_INLINE VInt positive(V u) { return ~(u <= 0); }

// Calls, not copies of this code in every sweep: their arithmetic outweighs a call.
__attribute__((noinline)) V smooth(V u, int64_t activation) {
  return u * (activation == kSiLU ? sigmoid(u) : normal_distribution(u));
}

__attribute__((noinline)) V smooth_derivative(V u, int64_t activation) {
  if (activation == kGELU) return normal_distribution(u) + u * normal_density(u);
  const V s = sigmoid(u);
  return s * (1 + u * (1 - s));
}

template <int64_t kActivation>
SSL_FAST_INLINE V activate(V u, int64_t activation) {
  if constexpr (kActivation == kIdentity) return u;
  if constexpr (kActivation == kReLU) return keep(u, positive(u));
  return activation == kLeakyReLU ? u <= 0 ? u * kNegativeSlope : u : smooth(u, activation);
}
