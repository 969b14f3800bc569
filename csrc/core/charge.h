// The rounding errors of one back-substitution step through an affine map, per unit of |coefficient|
// (docs/soundness.md, "Back-substitution").
#pragma once

#include "core/interval.h"

namespace pycert {

// Factors of one layer. All are upper bounds; `up` also makes a computed sum of `terms` products, with a few roundings
// behind it, an upper bound of the real one.
template <typename T>
struct ChargeFactors {
  T up;
  T own;      // gamma_{m+4}: our product of coefficients, and theirs with the slopes
  T centre;   // centred walks: rounding of the centre of z, twice u
  T exact;    // centred walks: the centre's own sum, in double
  T two_u;    // one product and the bias of the network's sum
  T partial;  // gamma_{terms+6}: how far a computed |W a| may be off, per unit of |W| a
};

// What is known of one element of z = W a + b, |a| <= s elementwise.
template <typename T>
struct ChargeElement {
  T absolute;    // |W| s
  T signed_sum;  // W s
  T bias;        // |b|
  T radius;      // centred walks: |W| |a - centre|
  T centre;      // centred walks: centre of z
};

//   ours       own |W| s, or own |W| |a - centre| in a centred walk
//   network's  g (|W| s + |b|), g = gamma of its chain; and where a >= 0 every partial sum lies in [-W- a, W+ a], so
//              that u (|W| s + n max(W+ s, W- s)) holds too, with max(W+ s, W- s) = (|W| s + |W s|) / 2
//   lost       what underflow takes
template <bool kCentred, bool kNonnegative, typename T>
PYCERT_HD inline T charge_of(const ChargeElement<T>& z, const ChargeFactors<T>& f, T network, T lost) {
  const T total = (z.absolute + z.bias) * f.up;
  T charge = total * f.own;
  if constexpr (kCentred) charge = z.radius * f.own * f.up + std::abs(z.centre) * f.centre + total * f.exact;
  T theirs = total * network;
  if constexpr (kNonnegative) {
    const T largest = (total + (std::abs(z.signed_sum) + z.bias) * f.up + total * f.partial) / 2;
    const T tight = total * f.two_u + largest * network;
    theirs = tight < theirs ? tight : theirs;
  }
  return charge + theirs + lost;
}

// Largest |value| of [lower, upper] as charges take it. An execution that flushes a value below kTiny is off by as
// much, which a charge of kUnit times this covers; zero stays zero.
template <typename T>
PYCERT_HD inline T size_of(T lower, T upper) {
  constexpr T kFlushed = kTiny<T> / kUnit<T>;
  const T low = std::abs(lower), high = std::abs(upper), largest = low > high ? low : high;
  return largest != T(0) && largest < kFlushed ? kFlushed : largest;
}

// Upper bound of a sum of `count` squares; those of doubles may underflow.
template <typename T>
PYCERT_HD inline double squares_up(double sum, int64_t count) {
  return sum * (1 + double(count + 8) * 0x1p-52) + (sizeof(T) == 8 ? double(count) * 0x1p-1020 : 0);
}

// gamma of the network's chain, times `longest`.
template <typename T>
PYCERT_HD inline T chain_charge(double terms, double longest) {
  const double chain = terms * double(kUnit<T>);
  return round_up<T>(chain / (1 - chain) * longest);
}

}  // namespace pycert
