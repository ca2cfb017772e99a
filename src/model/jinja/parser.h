// From tokens to a template. Pure.
#pragma once

#include <string_view>

#include "base/error.h"
#include "model/jinja/ast.h"

namespace elasticmoe::model::jinja {

// kInvalidArgument "line N: ..." where `source` is no template or uses a tag, filter or test that we have
// not.
Expected<Template> Parse(std::string_view source);

}  // namespace elasticmoe::model::jinja
