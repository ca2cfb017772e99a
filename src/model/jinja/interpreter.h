// Runs a parsed template on variables. Bounded: see Context. Pure.
#pragma once

#include <cstdint>
#include <string>

#include "base/error.h"
#include "base/json.h"
#include "model/jinja/ast.h"

namespace elasticmoe::model::jinja {

// kInvalidArgument: the template's own words where it calls raise_exception, else "line N: what went wrong";
// kResourceExhausted where it takes too long or prints too much.
Expected<std::string> Run(const Template& source, const Json& variables, std::int64_t now_unix_s);

}  // namespace elasticmoe::model::jinja
