// The small floating-point formats that checkpoints use, one value at a time, exact: IEEE 754 half, and from
// OCP's "Microscaling Formats" and "8-bit Floating Point" specifications E4M3, E2M1 and E8M0. Pure.
#pragma once

#include <cstdint>

namespace elasticmoe::model {

float HalfToFloat(std::uint16_t half);

// Rounds to nearest even; too large becomes infinite, NaN stays NaN.
std::uint16_t FloatToHalf(float value);

// Upper half of the float32, rounded to nearest even; NaN stays NaN.
std::uint16_t FloatToBf16(float value);

// Sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, 0x7f and 0xff are NaN; the largest is 448.
float F8E4M3ToFloat(std::uint8_t bits);

// Sign, 2 bits of exponent (bias 1), 1 of mantissa, in the low 4 bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6.
float F4E2M1ToFloat(std::uint8_t bits);

// 2^(bits - 127); 0xff is NaN.
float E8M0ToFloat(std::uint8_t bits);

}  // namespace elasticmoe::model
