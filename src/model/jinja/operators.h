// Arithmetic and comparison as in Python.
#pragma once

#include "model/jinja/ast.h"
#include "model/jinja/value.h"

namespace elasticmoe::model::jinja {

Expected<Value> Binary(Context& context, Op op, const Value& left, const Value& right);
Expected<bool> Compare(Context& context, Op op, const Value& left, const Value& right);
Expected<bool> Equals(Context& context, const Value& left, const Value& right);
Expected<bool> Less(Context& context, const Value& left, const Value& right);
Expected<Value> Negate(const Value& value, bool negative);

}  // namespace elasticmoe::model::jinja
