// Elementary functions on the policy's vectors. Each is within a few units in the last place of fp32 over the
// whole range where its result is normal; coefficients are minimax fits in relative error, the bound beside
// each. Included inside a target's namespace, after the policy.

using Float = Vec::Float;

// x -> e^x. Range reduction by ln 2 in two parts, then a polynomial of degree 6 (2e-9).
KT_INLINE Float exp_f(Float x) {
  x = Vec::clamp_above(Vec::clamp_below(x, Vec::set(-104.0f)), Vec::set(89.0f));  // beyond: 0 and infinity
  const Float n = Vec::round(Vec::mul(x, Vec::set(1.44269504f)));
  Float r = Vec::fma(n, Vec::set(-0.693359375f), x);
  r = Vec::fma(n, Vec::set(2.12194440e-4f), r);
  Float p = Vec::set(0.0013836807f);
  p = Vec::fma(p, r, Vec::set(0.0083748456f));
  p = Vec::fma(p, r, Vec::set(0.041668229f));
  p = Vec::fma(p, r, Vec::set(0.16666420f));
  p = Vec::fma(p, r, Vec::set(0.49999991f));
  p = Vec::fma(p, r, Vec::set(1.0f));
  p = Vec::fma(p, r, Vec::set(1.0f));
  return Vec::scale(p, n);
}

KT_INLINE Float sigmoid(const Float& x) {
  const Float one = Vec::set(1.0f);
  return Vec::div(one, Vec::add(one, exp_f(Vec::sub(Vec::set(0.0f), x))));
}

// tanh x: x + x^3 P(x^2) near zero (6e-9), else 1 - 2 / (e^2|x| + 1) with the sign of x.
KT_INLINE Float tanh_f(const Float& x) {
  const Float z = Vec::mul(x, x), size = Vec::abs(x), one = Vec::set(1.0f);
  Float p = Vec::set(0.0022699391f);
  p = Vec::fma(p, z, Vec::set(-0.0083236611f));
  p = Vec::fma(p, z, Vec::set(0.021762690f));
  p = Vec::fma(p, z, Vec::set(-0.053958494f));
  p = Vec::fma(p, z, Vec::set(0.13333300f));
  p = Vec::fma(p, z, Vec::set(-0.33333334f));
  const Float near = Vec::fma(Vec::mul(x, z), p, x);
  const Float far = Vec::sub(one, Vec::div(Vec::set(2.0f), Vec::add(exp_f(Vec::add(size, size)), one)));
  const Float signed_far = Vec::select(Vec::less(x, Vec::set(0.0f)), Vec::sub(Vec::set(0.0f), far), far);
  return Vec::select(Vec::less(size, Vec::set(0.625f)), near, signed_far);
}

// The normal distribution function, Phi(x) = erfc(-x / sqrt 2) / 2. erfc is e^(-z^2) t P(t) with
// t = 1 / (1 + z / 2) for z >= 0 (1.1e-7), so that the far tail keeps its relative accuracy.
KT_INLINE Float normal_cdf(const Float& x) {
  const Float z = Vec::mul(Vec::abs(x), Vec::set(0.70710678f)), one = Vec::set(1.0f);
  const Float t = Vec::div(one, Vec::fma(z, Vec::set(0.5f), one));
  Float p = Vec::set(-0.017129241f);
  p = Vec::fma(p, t, Vec::set(0.025077662f));
  p = Vec::fma(p, t, Vec::set(0.10865416f));
  p = Vec::fma(p, t, Vec::set(-0.28302598f));
  p = Vec::fma(p, t, Vec::set(0.13417162f));
  p = Vec::fma(p, t, Vec::set(0.036660206f));
  p = Vec::fma(p, t, Vec::set(0.18551141f));
  p = Vec::fma(p, t, Vec::set(0.24583852f));
  p = Vec::fma(p, t, Vec::set(0.28214777f));
  p = Vec::fma(p, t, Vec::set(0.28209376f));
  const Float minus_square = Vec::mul(Vec::mul(x, x), Vec::set(-0.5f));
  const Float tail = Vec::mul(Vec::mul(Vec::set(0.5f), Vec::mul(t, p)), exp_f(minus_square));
  return Vec::select(Vec::less(x, Vec::set(0.0f)), tail, Vec::sub(one, tail));
}
