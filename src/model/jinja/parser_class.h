// The parser's class, for its own source files only: parser.h is for all others. Pure; one thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"
#include "model/jinja/ast.h"
#include "model/jinja/lexer.h"

namespace elasticmoe::model::jinja {

inline constexpr int kMaxNesting = 100;  // of brackets and blocks in the source; bounds our own recursion
// Of a tree, which a long chain of operators makes deep without brackets.
inline constexpr int kMaxExprDepth = 250;

// Recursive descent over the tokens of one template, used once. Where it fails it returns "line N: ..."
// and must not be used further. parser.cc has the statements, parser_expressions.cc the operators,
// parser_operands.cc what stands between them.
class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  Expected<Template> Run() {
    Template out;
    EM_ASSIGN_OR_RETURN(out.body, ParseBlock({}));
    out.reads_content_parts = reads_content_parts_;
    return out;
  }

 private:
  using Kind = Token::Kind;

  // Tokens.
  const Token& Now() const { return tokens_[at_]; }
  const Token& Ahead() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  void Next() {
    if (at_ + 1 < tokens_.size()) ++at_;
  }
  bool IsOperator(std::string_view text) const { return Now().kind == Kind::kOperator && Now().text == text; }
  bool IsName(std::string_view text) const { return Now().kind == Kind::kName && Now().text == text; }
  bool Skip(std::string_view op) { return IsOperator(op) && (Next(), true); }
  bool SkipName(std::string_view name) { return IsName(name) && (Next(), true); }

  tl::unexpected<Error> Bad(std::string_view what) const { return BadAt(Now().line, what); }
  static tl::unexpected<Error> BadAt(int line, std::string_view what) {
    return Fail(ErrorCode::kInvalidArgument, "line {}: {}", line, what);
  }

  std::string Describe() const {
    switch (Now().kind) {
      case Kind::kEnd:
        return "the end of the template";
      case Kind::kPrintEnd:
        return "}}";
      case Kind::kBlockEnd:
        return "%}";
      case Kind::kData:
      case Kind::kPrintBegin:
      case Kind::kBlockBegin:
        return "text";
      default:
        return fmt::format("'{}'", Now().text);
    }
  }

  Status Expect(std::string_view op) {
    if (!Skip(op)) return Bad(fmt::format("expected '{}', found {}", op, Describe()));
    return {};
  }

  Status ExpectBlockEnd() {
    if (Now().kind != Kind::kBlockEnd)
      return Bad(fmt::format("expected the end of the tag, found {}", Describe()));
    Next();
    return {};
  }

  Expected<std::string> ExpectName() {
    if (Now().kind != Kind::kName) return Bad(fmt::format("expected a name, found {}", Describe()));
    std::string name = Now().text;
    Next();
    return name;
  }

  // Counts nesting while it lives.
  class Nested {
   public:
    explicit Nested(int& depth) : depth_(++depth) {}
    ~Nested() { --depth_; }
    bool TooDeep() const { return depth_ > kMaxNesting; }

   private:
    int& depth_;
  };
  tl::unexpected<Error> TooDeep() const { return Bad(fmt::format("nested deeper than {}", kMaxNesting)); }

  static ExprPtr Make(Expr::Kind kind, int line) {
    auto expr = std::make_unique<Expr>();
    expr->kind = kind;
    expr->line = line;
    return expr;
  }

  // Gives `expr` its depth, or fails where it is too deep.
  static Expected<ExprPtr> Done(ExprPtr expr) {
    for (const ExprPtr& arg : expr->args)
      if (arg) expr->depth = std::max(expr->depth, arg->depth + 1);
    for (const auto& [name, arg] : expr->named) expr->depth = std::max(expr->depth, arg->depth + 1);
    if (expr->depth > kMaxExprDepth)
      return BadAt(expr->line, fmt::format("an expression nested deeper than {}", kMaxExprDepth));
    return expr;
  }

  template <class... Exprs>
  static Expected<ExprPtr> MakeOf(Expr::Kind kind, int line, Exprs... args) {
    ExprPtr expr = Make(kind, line);
    (expr->args.push_back(std::move(args)), ...);
    return Done(std::move(expr));
  }

  Expected<Block> ParseBlock(std::initializer_list<std::string_view> ends);
  Expected<Block> ParseBody(std::initializer_list<std::string_view> ends);  // from the end of the tag on
  Expected<Block> ParseBodyTo(std::string_view end);                        // ... to behind the tag `end`
  Status ParseTag(Block& out);
  Expected<Stmt> ParseIf(int line);
  Expected<Stmt> ParseFor(int line);
  Expected<Stmt> ParseSet(int line);
  Expected<Stmt> ParseMacro(int line);
  Expected<Stmt> ParseCallBlock(int line);
  Expected<Stmt> ParseWith(int line);
  Expected<std::vector<Parameter>> ParseSignature();
  Expected<ExprPtr> ParseTarget(bool allow_attribute);
  Status CheckTarget(const Expr& target) const;

  Expected<ExprPtr> ParseExpression(bool with_if = true);
  Expected<ExprPtr> ParseTuple(bool with_if, bool in_brackets, std::string_view end_name = "");
  Expected<ExprPtr> ParseOr();
  Expected<ExprPtr> ParseAnd();
  Expected<ExprPtr> ParseNot();
  Expected<ExprPtr> ParseCompare();
  Expected<ExprPtr> ParseSum();
  Expected<ExprPtr> ParseConcat();
  Expected<ExprPtr> ParseProduct();
  Expected<ExprPtr> ParsePower();
  Expected<ExprPtr> ParseUnary(bool with_filters = true);
  Expected<ExprPtr> ParsePrimary();
  Expected<ExprPtr> ParseDict(int line);
  Expected<ExprPtr> ParsePostfix(ExprPtr expr);
  Expected<ExprPtr> ParseSubscript(ExprPtr object);
  Expected<ExprPtr> ParseFilters(ExprPtr expr, bool at_name);
  Expected<ExprPtr> ParseTest(ExprPtr expr);
  Status ParseArgs(Expr& call);
  void NoteContent(const Expr& walked);

  std::vector<Token> tokens_;
  std::size_t at_ = 0;
  int depth_ = 0;
  int loops_ = 0;                        // open for-loops of the present macro
  std::set<std::string> content_names_;  // names that were set to a message's content
  std::set<std::string> names_;          // all names read so far
  bool reads_content_parts_ = false;
};

}  // namespace elasticmoe::model::jinja
