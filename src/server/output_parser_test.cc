// What models of each family write, as their chat templates show it, cut at every byte.
#include "server/output_parser.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

namespace elasticmoe::server {
namespace {

using testing::HasSubstr;

struct Outcome {
  std::string reasoning;
  std::string content;
  std::vector<std::string> calls;  // "name arguments"
  bool operator==(const Outcome&) const = default;
};
void PrintTo(const Outcome& outcome, std::ostream* out) {
  *out << "reasoning=" << outcome.reasoning << "| content=" << outcome.content << "| calls:";
  for (const std::string& call : outcome.calls) *out << " " << call << ";";
}

const Json& Tools() {
  static const Json tools = *ParseJson(
      R"([{"type":"function","function":{"name":"weather","parameters":{"type":"object","properties":{
          "city":{"type":"string"},"days":{"type":"integer"}}}}}])");
  return tools;
}

OutputFormat Format(std::string_view reasoning, std::string_view tools) {
  const auto format = ChooseOutputFormat(reasoning, tools, "", "");
  EXPECT_TRUE(format) << format.error().message;
  return *format;
}

class Fed {
 public:
  Fed(const OutputFormat& format, const OutputParserOptions& options)
      : parser_(MakeOutputParser(format, options)) {}
  void Add(std::string_view text) { Take(parser_->Add(text)); }
  Outcome Finish() {
    Take(parser_->Finish());
    EXPECT_EQ(parser_->CallCount(), static_cast<int>(outcome_.calls.size()));
    return outcome_;
  }

 private:
  void Take(const OutputParser::Output& part) {
    outcome_.reasoning += part.reasoning;
    outcome_.content += part.content;
    for (const ToolCall& call : part.calls) outcome_.calls.push_back(call.name + " " + call.arguments);
  }
  std::unique_ptr<OutputParser> parser_;
  Outcome outcome_;
};

// The outcome of the whole text, which has to be that of every way to cut it in two, and of single bytes.
Outcome Parse(const OutputFormat& format, std::string_view text,
              OutputParserOptions options = {.tools = Tools()}) {
  Fed whole(format, options), bytes(format, options);
  whole.Add(text);
  for (const char& byte : text) bytes.Add({&byte, 1});
  const Outcome outcome = whole.Finish();
  EXPECT_EQ(outcome, bytes.Finish()) << text;
  for (std::size_t cut = 0; cut <= text.size(); ++cut) {
    Fed halves(format, options);
    halves.Add(text.substr(0, cut));
    halves.Add(text.substr(cut));
    EXPECT_EQ(outcome, halves.Finish()) << text << " cut at " << cut;
  }
  return outcome;
}

TEST(Reasoning, IsWhatLiesBetweenTheTags) {
  const OutputFormat format = Format("think", "none");
  EXPECT_EQ(Parse(format, "<think>\nTwo and two.\n\nFour.\n</think>\n\nIt is 4.\n"),
            (Outcome{"Two and two.\n\nFour.", "It is 4.\n", {}}));
  EXPECT_EQ(Parse(format, "\n<think>\n\n</think>\n\nHello"), (Outcome{"", "Hello", {}}));
  EXPECT_EQ(Parse(format, "Hello <think>this</think> is text"),
            (Outcome{"", "Hello <think>this</think> is text", {}}));
  EXPECT_EQ(Parse(format, " \n <thin"), (Outcome{"", " \n <thin", {}}));
  EXPECT_EQ(Parse(format, "<think>cut off </thi"), (Outcome{"cut off </thi", "", {}}));
  EXPECT_EQ(Parse(format, ""), (Outcome{}));
}

TEST(Reasoning, GoesOnWhereThePromptBeganIt) {
  const OutputFormat format = Format("deepseek_r1", "none");
  EXPECT_EQ(Parse(format, "I see.\n</think>\nYes.", {.open_reasoning = true}),
            (Outcome{"I see.", "Yes.", {}}));
  EXPECT_EQ(Parse(format, "<think>\nI see.</think>Yes.", {.open_reasoning = true}),
            (Outcome{"I see.", "Yes.", {}}));
  EXPECT_EQ(Parse(format, "never ends", {.open_reasoning = true}), (Outcome{"never ends", "", {}}));
  EXPECT_EQ(Parse(format, "  </think>x", {.open_reasoning = true}), (Outcome{"", "x", {}}));
  EXPECT_TRUE(OpensReasoning(format, "<|im_start|>assistant\n<think>\n"));
  EXPECT_FALSE(OpensReasoning(format, "<think>\n\n</think>\n\n"));
  EXPECT_FALSE(OpensReasoning(format, "\n"));
  EXPECT_FALSE(OpensReasoning(Format("none", "none"), "<think>"));
}

TEST(Reasoning, IsFollowedByCalls) {
  EXPECT_EQ(
      Parse(Format("qwen3", "hermes"),
            "<think>\nI need the weather.\n</think>\n\nLet me look.\n<tool_call>\n{\"name\": \"weather\", "
            "\"arguments\": {\"city\": \"Paris\"}}\n</tool_call>"),
      (Outcome{"I need the weather.", "Let me look.", {R"(weather {"city":"Paris"})"}}));
}

TEST(ToolCalls, OfQwenCoder) {
  const OutputFormat format = Format("none", "qwen3_coder");
  EXPECT_EQ(
      Parse(
          format,
          "Sure.\n<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>\n3\n"
          "</parameter>\n</function>\n</tool_call>\n"),
      (Outcome{"", "Sure.", {R"(weather {"city":"12","days":3})"}}));
  EXPECT_EQ(
      Parse(format,
            "<tool_call><function=f><parameter=a>{\"x\":1}<parameter=b>two\nlines</function></tool_call>"),
      (Outcome{"", "", {R"(f {"a":{"x":1},"b":"two\nlines"})"}}));
  EXPECT_EQ(Parse(format, "<tool_call><function=f></function></tool_call>"), (Outcome{"", "", {"f {}"}}));
  EXPECT_EQ(Parse(format, "<tool_call>nothing</tool_call>"),
            (Outcome{"", "<tool_call>nothing</tool_call>", {}}));
}

TEST(ToolCalls, OfGlm) {
  const OutputFormat format = Format("glm45", "glm45");
  EXPECT_EQ(
      Parse(format,
            "<think>Hm.</think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>10115</arg_value>\n"
            "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>time\n</tool_call>"),
      (Outcome{"Hm.", "", {R"(weather {"city":"10115","days":3})", "time {}"}}));
  EXPECT_EQ(Parse(format, "<tool_call>f<arg_key>a</arg_key></tool_call>"),
            (Outcome{"", "<tool_call>f<arg_key>a</arg_key></tool_call>", {}}));
}

TEST(ToolCalls, OfMistral) {
  const OutputFormat format = Format("none", "mistral");
  EXPECT_EQ(Parse(format,
                  R"([TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "time"}])"),
            (Outcome{"", "", {R"(weather {"city":"Paris"})", "time {}"}}));
  EXPECT_EQ(
      Parse(format,
            R"(One moment. [TOOL_CALLS]weather[ARGS]{"city": "a[b]"}[TOOL_CALLS]time[CALL_ID]9[ARGS]{})"),
      (Outcome{"", "One moment.", {R"(weather {"city":"a[b]"})", "time {}"}}));
  EXPECT_EQ(Parse(format, "[TOOL_CALLS] none"), (Outcome{"", "[TOOL_CALLS] none", {}}));
  EXPECT_EQ(Parse(format, "[TOOL_CALLS][{\"name\":\"a\"},3]"),
            (Outcome{"", "[TOOL_CALLS][{\"name\":\"a\"},3]", {}}));
  EXPECT_EQ(
      Parse(format, "[TOOL_CALLS][{\"name\":\"a\"},{\"name\":\"b\"}]", {.tools = Tools(), .parallel = false}),
      (Outcome{"", "", {"a {}"}}));
}

TEST(ToolCalls, OfDeepseek) {
  const OutputFormat format = Format("deepseek_r1", "deepseek_v3");
  EXPECT_EQ(Parse(format,
                  "Looking.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```"
                  "json\n{\"city\": "
                  "\"Paris\"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```"
                  "json\n{}\n```"
                  "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
            (Outcome{"", "Looking.", {R"(weather {"city":"Paris"})", "time {}"}}));
  EXPECT_EQ(Parse(format,
                  "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Paris\"}"
                  "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
            (Outcome{"", "", {R"(weather {"city":"Paris"})"}}));
  EXPECT_EQ(Parse(format, "<｜tool▁call▁begin｜>weather{}<｜tool▁call▁end｜>"),
            (Outcome{"", "<｜tool▁call▁begin｜>weather{}<｜tool▁call▁end｜>", {}}));
}

TEST(Harmony, ChannelsAreReasoningContentAndCalls) {
  const OutputFormat format = Format("harmony", "auto");
  EXPECT_EQ(Parse(format,
                  "<|channel|>analysis<|message|>The user "
                  "asks.<|end|><|start|>assistant<|channel|>final<|message|>Hello!"
                  "<|return|>"),
            (Outcome{"The user asks.", "Hello!", {}}));
  EXPECT_EQ(Parse(format,
                  "<|channel|>analysis<|message|>Need it.<|end|><|start|>assistant<|channel|>commentary "
                  "to=functions.weather <|constrain|>json<|message|>{\"city\": \"Paris\"}"),
            (Outcome{"Need it.", "", {R"(weather {"city":"Paris"})"}}));
  EXPECT_EQ(Parse(format,
                  "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant to=functions.time"
                  "<|channel|>commentary json<|message|>{}<|call|><|start|>assistant<|channel|>commentary "
                  "to=functions.weather<|message|><|call|>"),
            (Outcome{"", "Let me look.", {"time {}", "weather {}"}}));
  EXPECT_EQ(Parse(format, "<|channel|>commentary to=python<|message|>1+1<|call|>"), (Outcome{"1+1", "", {}}));
}

TEST(Harmony, WhatFollowsNoFormatIsContent) {
  const OutputFormat format = Format("gpt_oss", "openai");
  EXPECT_EQ(Parse(format, "Just text."), (Outcome{"", "Just text.", {}}));
  EXPECT_EQ(Parse(format, "as it is"), (Outcome{"", "as it is", {}}));
  EXPECT_EQ(Parse(format, "assistant"), (Outcome{"", "assistant", {}}));
  EXPECT_EQ(Parse(format, "<|channel|>final<|message|>no end <|en"), (Outcome{"", "no end <|en", {}}));
  EXPECT_EQ(Parse(format, "<|channel|>final"), (Outcome{"", "", {}}));
  EXPECT_EQ(Parse(format, "<|channel|>commentary to=functions.f<|message|>{\"cut"),
            (Outcome{"", "{\"cut", {}}));
  EXPECT_EQ(Parse(format, "text<|channel|>final<|message|> more"), (Outcome{"", "text more", {}}));
}

TEST(OutputFormats, AreChosenByTemplateAndFamily) {
  const auto chosen = [](std::string_view family, std::string_view source) {
    const auto format = ChooseOutputFormat("auto", "auto", family, source);
    return fmt::format("{} {}", NameOf(format->reasoning), NameOfTools(*format));
  };
  EXPECT_EQ(chosen("qwen3_moe", "{{ '<think>' }} <tool_call>"), "think hermes");
  EXPECT_EQ(chosen("qwen3_moe", "<tool_call>\n<function=example>"), "none qwen3_coder");
  EXPECT_EQ(chosen("glm4_moe", "</think> <tool_call> <arg_key>"), "think glm");
  EXPECT_EQ(chosen("mixtral", "[INST]"), "none mistral");
  EXPECT_EQ(chosen("deepseek_v3", "<｜tool▁calls▁begin｜> </think>"), "think deepseek");
  EXPECT_EQ(chosen("gpt_oss", ""), "harmony harmony");
  EXPECT_EQ(chosen("olmoe", ""), "none hermes");
}

TEST(OutputFormats, UnknownNamesAreRefusedWithTheKnownOnes) {
  EXPECT_THAT(ChooseOutputFormat("maybe", "auto", "", "").error().message,
              HasSubstr("--reasoning-parser: maybe is none of auto, none, think"));
  EXPECT_THAT(ChooseOutputFormat("auto", "maybe", "", "").error().message,
              HasSubstr("--tool-call-parser: maybe is none of auto, hermes"));
}

TEST(OutputFormats, SpecialTokensAreKeptWhereTagsAreSpecial) {
  EXPECT_FALSE(Format("think", "hermes").NeedsSpecialTokens(true));
  EXPECT_TRUE(Format("none", "mistral").NeedsSpecialTokens(true));
  EXPECT_FALSE(Format("none", "mistral").NeedsSpecialTokens(false));
  EXPECT_TRUE(Format("harmony", "none").NeedsSpecialTokens(false));
  EXPECT_EQ(MakeOutputParser(Format("none", "hermes"), {}), nullptr);
  EXPECT_EQ(MakeOutputParser(Format("none", "none"), {.tools = Tools()}), nullptr);
}

}  // namespace
}  // namespace elasticmoe::server
