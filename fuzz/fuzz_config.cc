// config.json of strangers: family, spec and the list of tensors, whose sizes must be right for any spec that
// is let in.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "model/family.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace elasticmoe;
  const auto config = ParseJson(std::string_view(reinterpret_cast<const char*>(data), size));
  if (!config) return 0;
  const auto family = model::FamilyOf(*config);
  if (!family) return 0;
  const auto spec = (*family)->Spec(*config);
  if (!spec) return 0;
  std::int64_t parameters = 0;
  for (const model::TensorName& tensor : (*family)->Tensors(*spec)) {
    std::int64_t count = 1;
    for (const std::int64_t n : tensor.shape) {
      EM_CHECK(n > 0, "{}", tensor.name);
      EM_CHECK(!__builtin_mul_overflow(count, n, &count), "{}", tensor.name);
    }
    EM_CHECK(!__builtin_add_overflow(parameters, count, &parameters), "{}", tensor.name);
  }
  // What was read can be written and read again.
  const Json written = (*family)->Config(*spec);
  const auto again = (*family)->Spec(written);
  EM_CHECK(again.has_value(), "{}", again ? "" : again.error().message);
  EM_CHECK((*family)->Config(*again) == written, "{}", DumpJson(written));
  return 0;
}
