// What a model writes, in every format: whole, and cut at any place, comes out the same.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/check.h"
#include "server/output_parser.h"

namespace {

using namespace elasticmoe::server;

std::string Read(const OutputFormat& format, bool open, std::string_view text, std::size_t cut) {
  static const elasticmoe::Json tools = *elasticmoe::ParseJson(
      R"([{"type":"function","function":{"name":"f","parameters":{"properties":{"a":{"type":"string"}}}}}])");
  const auto parser = MakeOutputParser(format, {.open_reasoning = open, .tools = tools});
  std::string reasoning, content, calls;
  const auto take = [&](const OutputParser::Output& part) {
    reasoning += part.reasoning;
    content += part.content;
    for (const ToolCall& call : part.calls) calls += call.name + '\0' + call.arguments + '\0';
  };
  take(parser->Add(text.substr(0, cut)));
  take(parser->Add(text.substr(cut)));
  take(parser->Finish());
  return reasoning + '\1' + content + '\1' + calls;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 3) return 0;
  constexpr std::string_view kTools[] = {"hermes", "qwen3_coder", "glm", "mistral", "deepseek", "harmony"};
  const auto format = ChooseOutputFormat(data[0] % 2 == 0 ? "think" : "none",
                                         kTools[data[0] / 2 % std::size(kTools)], "", "");
  const bool open = data[1] % 2 == 1;
  const std::string_view text(reinterpret_cast<const char*>(data) + 3, size - 3);
  const std::size_t cut = text.empty() ? 0 : data[2] * text.size() / 256;
  EM_CHECK(Read(*format, open, text, cut) == Read(*format, open, text, text.size()), "cut={}", cut);
  return 0;
}
