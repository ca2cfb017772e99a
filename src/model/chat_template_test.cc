#include "model/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "base/file.h"
#include "model/tokenizer/unicode.h"

namespace elasticmoe::model {
namespace {

using testing::HasSubstr;

constexpr std::int64_t kNow = 1'768'478'400;  // 2026-01-15 12:00:00 UTC, as in the goldens

Json Load(const std::string& path) {
  const auto text = ReadFile(std::string(ELASTICMOE_TESTDATA "/templates/") + path);
  EXPECT_TRUE(text) << text.error().message;
  return ParseJson(*text).value();
}

std::string Source(const std::string& name) {
  return ReadFile(std::string(ELASTICMOE_TESTDATA "/templates/") + name + ".jinja").value();
}

// Parsed and rendered; the error's text after "error: ".
std::string Render(std::string_view source, const Json& variables = Json::object()) {
  const auto parsed = ChatTemplate::Parse(source);
  if (!parsed) return "error: " + parsed.error().message;
  const auto text = parsed->Render(variables, kNow);
  return text ? *text : "error: " + text.error().message;
}

class Goldens : public testing::TestWithParam<const char*> {};

TEST_P(Goldens, EqualJinja2OnEveryConversation) {
  const std::string name = GetParam();
  const Json golden = Load("golden/" + name + ".json");
  const Json tools = Load("tools.json");
  const auto parsed = ChatTemplate::Parse(Source(name));
  ASSERT_TRUE(parsed) << parsed.error().message;
  ASSERT_EQ(golden["cases"].size(), 17u);
  for (const Json& one : golden["cases"]) {
    SCOPED_TRACE(one["id"]);
    const Json& input = one["input"];
    Json variables = input["kwargs"];
    variables["messages"] = input["messages"];
    variables["tools"] = input["tools"].get<bool>() ? tools : Json();
    variables["documents"] = nullptr;
    variables["add_generation_prompt"] = input["add_generation_prompt"];
    variables["eos_token"] = golden["eos_token"];
    if (!golden["bos_token"].is_null()) variables["bos_token"] = golden["bos_token"];
    const auto text = parsed->Render(variables, kNow);
    if (one.contains("error")) {
      ASSERT_FALSE(text) << *text;
      const auto expected = one["error"].get<std::string>();
      // Where the template raises, its words are the message.
      if (expected.starts_with("TemplateError: ")) {
        EXPECT_EQ(text.error().message, expected.substr(15));
      }
    } else {
      ASSERT_TRUE(text) << text.error().message;
      EXPECT_EQ(*text, one["text"].get<std::string>());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Goldens,
                         testing::Values("demo", "memory-mixtral", "memory-olmoe", "npm-deepseek_v3",
                                         "npm-llama3", "npm-qwen3"),
                         [](const auto& info) {
                           std::string name = info.param;
                           for (char& c : name)
                             if (c == '-') c = '_';
                           return name;
                         });

// Every feature of the language on its own (tools/render_templates.py made the answers).
TEST(Snippets, EqualJinja2) {
  const Json snippets = Load("snippets.json");
  ASSERT_GE(snippets["cases"].size(), 270u);
  for (const Json& one : snippets["cases"]) {
    const auto source = one["template"].get<std::string>();
    const std::string text = Render(source, snippets["variables"]);
    if (one.contains("error"))
      EXPECT_THAT(text, testing::StartsWith("error: ")) << source << "\nwhere Jinja2 has: " << one["error"];
    else
      EXPECT_EQ(text, one["text"].get<std::string>()) << source;
  }
}

TEST(Errors, NameTheLineAndWhatIsWrong) {
  const std::string reading = "error: reading the chat template: ";
  EXPECT_EQ(Render("a\n{{ x | nope }}"), reading + "line 2: unknown filter 'nope'");
  EXPECT_EQ(Render("\n\n{{ x is nope }}"), reading + "line 3: unknown test 'nope'");
  EXPECT_THAT(Render("{% include 'x' %}"), HasSubstr("line 1: unknown tag 'include' (supported: if, for"));
  EXPECT_EQ(Render("{% if x %}\n"), reading + "line 1: {% endif %} is missing");
  EXPECT_EQ(Render("a\nb\n{{ 1 + none }}"),
            "error: line 3: unsupported operand type(s) for +: 'int' and 'NoneType'");
  EXPECT_EQ(Render("{% for i in [1] %}\n{{ i }}\n{{ i.x.y }}{% endfor %}"),
            "error: line 3: 'int object' has no attribute 'x'");
  EXPECT_EQ(Render("{{ raise_exception('only this') }}"), "error: only this");
  EXPECT_THAT(Render("\xFF"), HasSubstr("not UTF-8"));
}

// Each would run for hours or fill the memory, or overflow the stack, in a renderer without bounds.
TEST(Limits, StopWhatNeverEnds) {
  for (const char* source : {
           "{% for i in range(10**9) %}x{% endfor %}",
           "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
           "{{ 'x' * 10**9 }}",
           "{{ [0] * 10**12 }}",
           "{{ 10 ** 10 ** 10 }}",
           "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
           "{% set ns = namespace(s=[1]) %}{% for i in range(64) %}{% set ns.s = [ns.s, ns.s] %}{% endfor "
           "%}{{ ns.s }}",
           "{% set ns = namespace(s=[1]) %}{% for i in range(64) %}{% set ns.s = [ns.s, ns.s] %}{% endfor "
           "%}{{ ns.s|tojson }}",
           "{% set ns = namespace(s=[1], t=[1]) %}{% for i in range(64) %}{% set ns.s = [ns.s, ns.s] %}{% "
           "set ns.t = [ns.t, ns.t] %}{% endfor %}{{ ns.s == ns.t }}",
           "{% set ns = namespace(s=[]) %}{% for i in range(99999) %}{% set ns.s = [ns.s] %}{% endfor %}",
           "{% set ns = namespace(s='abc') %}{% for i in range(99999) %}{% set ns.s = [ns.s].index %}{% set "
           "ns.t = {'a': ns.s}.get %}{% set ns.s = ns.t %}{% endfor %}",
           "{% set ns = namespace() %}{% for i in range(99999) %}{% set ns.s = namespace(p=ns.s) %}{% endfor "
           "%}",
           "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
           "{% macro m() %}{% call m() %}x{% endcall %}{% endmacro %}{{ m() }}",
           "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
           "{% set s = 'x' * 8000000 %}{{ s }}{{ s }}",
           "{{ ('x' * 4000).replace('x', 'y' * 16000) }}",
           "{{ 'a'.center(10**9) }}",
           "{{ '%99999999d' % 1 }}",
           "{{ ('\n' * 100000)|indent(999, blank=true) }}",
           "{{ [1]|tojson(indent=10**6) }}",
           "{{ (['x' * 100000] * 1000)|join }}",
           "{{ ('x' * 100000).join(['a'] * 1000) }}",
       }) {
    EXPECT_THAT(Render(source), testing::StartsWith("error: ")) << source;
  }
}

TEST(Limits, StopSourcesThatNestTooDeep) {
  const auto repeat = [](const std::string& text, int times) {
    std::string out;
    for (int i = 0; i < times; ++i) out += text;
    return out;
  };
  for (const char* open : {"(", "[", "{'a':", "-", "not ", "x[", "x(", "1 if ", "x|default("})
    EXPECT_THAT(Render("{{ " + repeat(open, 100'000)), testing::StartsWith("error: ")) << open;
  EXPECT_THAT(Render("{{ 1" + repeat("+1", 100'000) + " }}"), HasSubstr("nested deeper than"));
  EXPECT_THAT(Render("{{ x" + repeat(".a", 100'000) + " }}"), HasSubstr("nested deeper than"));
  EXPECT_THAT(Render("{{ x" + repeat("|d", 100'000) + " }}"), HasSubstr("nested deeper than"));
  EXPECT_THAT(Render(repeat("{% if x %}", 100'000)), HasSubstr("nested deeper than"));
  EXPECT_EQ(Render("{{ 1" + repeat("+1", 200) + " }}"), "201");
}

TEST(Values, ThatHoldThemselvesAreFreed) {
  // Under the address sanitizer a leak would fail this.
  EXPECT_EQ(Render("{% set ns = namespace() %}{% set ns.me = ns %}{% set ns.l = [ns] %}"
                   "{% macro m() %}{% endmacro %}{% set ns.m = m %}"
                   "{% for i in [ns] %}{% set ns.loop = loop %}{% set ns.c = loop.cycle %}{% endfor %}ok"),
            "ok");
}

TEST(Values, BadUtf8InVariablesIsRepaired) {
  EXPECT_EQ(Render("{{ a }}{{ a|length }}{{ a[1:] }}", {{"a", "x\xFFy"}}), "x\uFFFDy3\uFFFDy");
}

TEST(ChatTemplateTest, VariablesMustBeAnObject) {
  EXPECT_FALSE(ChatTemplate::Parse("x")->Render(Json::array(), kNow));
}

TEST(ChatTemplateTest, TellsWhetherItWalksOverContent) {
  const auto reads = [](std::string_view source) { return ChatTemplate::Parse(source)->ReadsContentParts(); };
  EXPECT_FALSE(reads(Source("npm-qwen3")));
  EXPECT_FALSE(reads(Source("demo")));
  EXPECT_TRUE(
      reads("{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"));
  EXPECT_TRUE(reads("{% for m in messages %}{% for part in m['content'] | list %}{% endfor %}{% endfor %}"));
  EXPECT_TRUE(
      reads("{% for m in messages %}{% set c = m.content %}{% for part in c %}{% endfor %}{% endfor %}"));
  EXPECT_FALSE(reads("{% for m in messages %}{% set c = m.content %}{{ c }}{% endfor %}"));
}

}  // namespace
}  // namespace elasticmoe::model
