// Cuts a template into tokens: text between tags with the white space rules of trim_blocks and lstrip_blocks
// already applied, and the words inside of tags. Pure.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "model/jinja/value.h"

namespace elasticmoe::model::jinja {

struct Token {
  enum class Kind {
    kData,
    kPrintBegin,
    kPrintEnd,
    kBlockBegin,
    kBlockEnd,
    kName,
    kText,
    kNumber,
    kOperator,
    kEnd
  };
  Kind kind;
  int line = 1;
  std::string text;  // of data, names, operators; decoded for kText
  Value number;
};

// kInvalidArgument "line N: ..." where no token can be read. The last token is kEnd.
Expected<std::vector<Token>> Tokenize(std::string_view source);

}  // namespace elasticmoe::model::jinja
