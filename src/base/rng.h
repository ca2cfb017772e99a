// Deterministic randomness: a stateless mixer for "the n-th number of this seed" and a small generator
// for tests and the simulator. Never seeded from a clock. Pure.
#pragma once

#include <cstdint>

namespace elasticmoe {

// Finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection whose output bits all depend on all input
// bits.
constexpr std::uint64_t Mix64(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// The same value for the same (seed, counter), whatever was drawn before.
constexpr std::uint64_t RandomAt(std::uint64_t seed, std::uint64_t counter) {
  return Mix64(Mix64(seed) ^ Mix64(counter + 0x632be59bd9b4e019ULL));
}

// Uniform in [0, 1) with 53 bits.
constexpr double UniformAt(std::uint64_t seed, std::uint64_t counter) {
  return static_cast<double>(RandomAt(seed, counter) >> 11) * 0x1.0p-53;
}

class Rng {
 public:
  explicit constexpr Rng(std::uint64_t seed) : seed_(seed) {}
  constexpr std::uint64_t Next() { return RandomAt(seed_, counter_++); }
  constexpr double Uniform() { return static_cast<double>(Next() >> 11) * 0x1.0p-53; }
  // Uniform in [0, n). REQUIRES: n > 0.
  constexpr std::uint64_t Below(std::uint64_t n) { return Next() % n; }

 private:
  std::uint64_t seed_;
  std::uint64_t counter_ = 0;
};

}  // namespace elasticmoe
