#include "core/weight_format.h"

namespace elasticmoe::core {

std::string_view NameOf(WeightFormat format) {
  switch (format) {
    case WeightFormat::kBf16:
      return "bf16";
    case WeightFormat::kInt8:
      return "int8";
    case WeightFormat::kInt4:
      return "int4";
  }
  return "";
}

Expected<WeightFormat> WeightFormatOf(std::string_view name) {
  for (const WeightFormat format : {WeightFormat::kBf16, WeightFormat::kInt8, WeightFormat::kInt4})
    if (NameOf(format) == name) return format;
  return Fail(ErrorCode::kInvalidArgument, "choosing weights: format={} is unknown; use bf16, int8 or int4",
              name);
}

}  // namespace elasticmoe::core
