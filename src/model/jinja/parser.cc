#include "model/jinja/parser.h"

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <set>
#include <utility>

#include "model/jinja/lexer.h"

namespace elasticmoe::model::jinja {
namespace {

constexpr int kMaxNesting = 100;    // of brackets and blocks in the source; bounds our own recursion
constexpr int kMaxExprDepth = 250;  // of a tree, which a long chain of operators makes deep without brackets

using Kind = Token::Kind;

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

// Is `expr` the content of something: x.content or x['content']?
bool IsContent(const Expr& expr) {
  if (expr.kind == Expr::Kind::kAttribute) return expr.name == "content";
  return expr.kind == Expr::Kind::kItem && expr.args[1]->value.AsText() &&
         *expr.args[1]->value.AsText() == "content";
}

void Parser::NoteContent(const Expr& walked) {
  const Expr* expr = &walked;
  while (expr->kind == Expr::Kind::kFilter && expr->args[0]) expr = expr->args[0].get();
  if (IsContent(*expr) || (expr->kind == Expr::Kind::kName && content_names_.contains(expr->name)))
    reads_content_parts_ = true;
}

Expected<Block> Parser::ParseBlock(std::initializer_list<std::string_view> ends) {
  const Nested nested(depth_);
  if (nested.TooDeep()) return TooDeep();
  Block out;
  while (Now().kind != Kind::kEnd) {
    const int line = Now().line;
    if (Now().kind == Kind::kData) {
      Stmt stmt{.kind = Stmt::Kind::kText, .line = line, .text = Now().text};
      out.push_back(std::move(stmt));
      Next();
    } else if (Now().kind == Kind::kPrintBegin) {
      Next();
      Stmt stmt{.kind = Stmt::Kind::kPrint, .line = line};
      EM_ASSIGN_OR_RETURN(stmt.expr, ParseTuple(true, false));
      if (Now().kind != Kind::kPrintEnd) return Bad(fmt::format("expected }}}}, found {}", Describe()));
      Next();
      out.push_back(std::move(stmt));
    } else {
      Next();  // {%
      if (Now().kind == Kind::kName && std::ranges::find(ends, Now().text) != ends.end()) return out;
      EM_RETURN_IF_ERROR(ParseTag(out));
      EM_RETURN_IF_ERROR(ExpectBlockEnd());
    }
  }
  if (ends.size() > 0) return Bad(fmt::format("{{% {} %}} is missing", *(ends.end() - 1)));
  return out;
}

Expected<Block> Parser::ParseBody(std::initializer_list<std::string_view> ends) {
  Skip(":");
  EM_RETURN_IF_ERROR(ExpectBlockEnd());
  return ParseBlock(ends);
}

Expected<Block> Parser::ParseBodyTo(std::string_view end) {
  EM_ASSIGN_OR_RETURN(Block body, ParseBody({end}));
  Next();
  return body;
}

Status Parser::ParseTag(Block& out) {
  const int line = Now().line;
  EM_ASSIGN_OR_RETURN(const std::string tag, ExpectName());
  const auto add = [&](Expected<Stmt> stmt) -> Status {
    if (!stmt) return tl::unexpected(std::move(stmt.error()));
    out.push_back(*std::move(stmt));
    return {};
  };
  if (tag == "if") return add(ParseIf(line));
  if (tag == "for") return add(ParseFor(line));
  if (tag == "set") return add(ParseSet(line));
  if (tag == "macro") return add(ParseMacro(line));
  if (tag == "call") return add(ParseCallBlock(line));
  if (tag == "with") return add(ParseWith(line));
  if (tag == "generation") {
    Stmt stmt{.kind = Stmt::Kind::kScope, .line = line};
    EM_ASSIGN_OR_RETURN(stmt.body, ParseBodyTo("endgeneration"));
    return add(std::move(stmt));
  }
  if (tag == "filter") {
    Stmt stmt{.kind = Stmt::Kind::kFilterBlock, .line = line};
    EM_ASSIGN_OR_RETURN(stmt.expr, ParseFilters(nullptr, true));
    EM_ASSIGN_OR_RETURN(stmt.body, ParseBodyTo("endfilter"));
    return add(std::move(stmt));
  }
  if (tag == "print") {
    for (bool first = true; Now().kind != Kind::kBlockEnd; first = false) {
      if (!first) EM_RETURN_IF_ERROR(Expect(","));
      Stmt stmt{.kind = Stmt::Kind::kPrint, .line = line};
      EM_ASSIGN_OR_RETURN(stmt.expr, ParseExpression());
      out.push_back(std::move(stmt));
    }
    return {};
  }
  if (tag == "break" || tag == "continue") {
    if (loops_ == 0) return BadAt(line, fmt::format("{{% {} %}} outside of a loop", tag));
    return add(Stmt{.kind = tag == "break" ? Stmt::Kind::kBreak : Stmt::Kind::kContinue, .line = line});
  }
  return BadAt(
      line, fmt::format("unknown tag '{}' (supported: if, for, set, macro, call, filter, with, generation, "
                        "print, break, continue, raw)",
                        tag));
}

Expected<Stmt> Parser::ParseIf(int line) {
  Stmt stmt{.kind = Stmt::Kind::kIf, .line = line};
  while (true) {
    Stmt::Branch branch;
    EM_ASSIGN_OR_RETURN(branch.condition, ParseTuple(false, false));
    EM_ASSIGN_OR_RETURN(branch.body, ParseBody({"elif", "else", "endif"}));
    stmt.branches.push_back(std::move(branch));
    if (!SkipName("elif")) break;
  }
  if (SkipName("else")) {
    Stmt::Branch branch;
    EM_ASSIGN_OR_RETURN(branch.body, ParseBody({"endif"}));
    stmt.branches.push_back(std::move(branch));
  }
  Next();  // endif
  return stmt;
}

Expected<Stmt> Parser::ParseFor(int line) {
  Stmt stmt{.kind = Stmt::Kind::kFor, .line = line};
  EM_ASSIGN_OR_RETURN(stmt.target, ParseTarget(false));
  if (!SkipName("in")) return Bad(fmt::format("expected 'in', found {}", Describe()));
  EM_ASSIGN_OR_RETURN(stmt.expr, ParseTuple(false, false, "recursive"));
  NoteContent(*stmt.expr);
  if (SkipName("if")) {
    EM_ASSIGN_OR_RETURN(stmt.condition, ParseExpression());
  }
  stmt.recursive = SkipName("recursive");
  ++loops_;
  EM_ASSIGN_OR_RETURN(stmt.body, ParseBody({"else", "endfor"}));
  --loops_;
  if (SkipName("else")) {
    EM_ASSIGN_OR_RETURN(stmt.otherwise, ParseBody({"endfor"}));
  }
  Next();  // endfor
  return stmt;
}

Expected<Stmt> Parser::ParseSet(int line) {
  Stmt stmt{.kind = Stmt::Kind::kSet, .line = line};
  EM_ASSIGN_OR_RETURN(stmt.target, ParseTarget(true));
  if (Skip("=")) {
    EM_ASSIGN_OR_RETURN(stmt.expr, ParseTuple(true, false));
    const Expr& value = *stmt.expr;
    // Also `content = message.content if ... else ...`.
    const bool content = IsContent(value) || (value.kind == Expr::Kind::kIf && IsContent(*value.args[1]));
    if (content && stmt.target->kind == Expr::Kind::kName) content_names_.insert(stmt.target->name);
    return stmt;
  }
  stmt.kind = Stmt::Kind::kSetBlock;
  if (IsOperator("|")) {
    EM_ASSIGN_OR_RETURN(stmt.expr, ParseFilters(nullptr, false));
  }
  EM_ASSIGN_OR_RETURN(stmt.body, ParseBodyTo("endset"));
  return stmt;
}

Expected<std::vector<Parameter>> Parser::ParseSignature() {
  std::vector<Parameter> out;
  EM_RETURN_IF_ERROR(Expect("("));
  while (!IsOperator(")")) {
    if (!out.empty()) EM_RETURN_IF_ERROR(Expect(","));
    Parameter parameter;
    EM_ASSIGN_OR_RETURN(parameter.name, ExpectName());
    if (Skip("=")) {
      EM_ASSIGN_OR_RETURN(parameter.otherwise, ParseExpression());
    } else if (!out.empty() && out.back().otherwise) {
      return Bad("a parameter without default follows one with default");
    }
    out.push_back(std::move(parameter));
  }
  Next();
  return out;
}

Expected<Stmt> Parser::ParseMacro(int line) {
  Stmt stmt{.kind = Stmt::Kind::kMacro, .line = line};
  EM_ASSIGN_OR_RETURN(stmt.text, ExpectName());
  EM_ASSIGN_OR_RETURN(stmt.parameters, ParseSignature());
  const int loops = std::exchange(loops_, 0);
  std::set<std::string> names = std::exchange(names_, {});
  EM_ASSIGN_OR_RETURN(stmt.body, ParseBodyTo("endmacro"));
  stmt.takes_rest = names_.contains("varargs") || names_.contains("kwargs");
  names_.merge(names);
  loops_ = loops;
  return stmt;
}

Expected<Stmt> Parser::ParseCallBlock(int line) {
  Stmt stmt{.kind = Stmt::Kind::kCall, .line = line};
  if (IsOperator("(")) {
    EM_ASSIGN_OR_RETURN(stmt.parameters, ParseSignature());
  }
  EM_ASSIGN_OR_RETURN(stmt.expr, ParseExpression());
  if (stmt.expr->kind != Expr::Kind::kCall) return BadAt(line, "a call block needs a call");
  const int loops = std::exchange(loops_, 0);
  EM_ASSIGN_OR_RETURN(stmt.body, ParseBodyTo("endcall"));
  loops_ = loops;
  return stmt;
}

Expected<Stmt> Parser::ParseWith(int line) {
  Stmt stmt{.kind = Stmt::Kind::kWith, .line = line};
  while (Now().kind != Kind::kBlockEnd) {
    if (!stmt.with.empty()) EM_RETURN_IF_ERROR(Expect(","));
    EM_ASSIGN_OR_RETURN(ExprPtr target, ParseTarget(false));
    EM_RETURN_IF_ERROR(Expect("="));
    EM_ASSIGN_OR_RETURN(ExprPtr value, ParseExpression());
    stmt.with.emplace_back(std::move(target), std::move(value));
  }
  EM_ASSIGN_OR_RETURN(stmt.body, ParseBodyTo("endwith"));
  return stmt;
}

// A name, names with commas between them, or (where allowed) namespace.name.
Expected<ExprPtr> Parser::ParseTarget(bool allow_attribute) {
  const int line = Now().line;
  if (allow_attribute && Now().kind == Kind::kName && Ahead().kind == Kind::kOperator &&
      Ahead().text == ".") {
    ExprPtr name = Make(Expr::Kind::kName, line);
    name->name = Now().text;
    Next();
    Next();
    ExprPtr target = Make(Expr::Kind::kAttribute, line);
    EM_ASSIGN_OR_RETURN(target->name, ExpectName());
    target->args.push_back(std::move(name));
    return Done(std::move(target));
  }
  std::vector<ExprPtr> parts;
  bool tuple = false;
  while (true) {
    EM_ASSIGN_OR_RETURN(ExprPtr part, ParsePrimary());
    EM_RETURN_IF_ERROR(CheckTarget(*part));
    parts.push_back(std::move(part));
    if (!Skip(",")) break;
    tuple = true;
    if (IsName("in") || IsOperator("=") || Now().kind == Kind::kBlockEnd) break;
  }
  if (!tuple) return std::move(parts[0]);
  ExprPtr target = Make(Expr::Kind::kTuple, line);
  target->args = std::move(parts);
  return Done(std::move(target));
}

Status Parser::CheckTarget(const Expr& target) const {
  if (target.kind == Expr::Kind::kName) return {};
  if (target.kind != Expr::Kind::kTuple) return BadAt(target.line, "only names can be assigned to");
  for (const ExprPtr& part : target.args) EM_RETURN_IF_ERROR(CheckTarget(*part));
  return {};
}

Expected<ExprPtr> Parser::ParseExpression(bool with_if) {
  const Nested nested(depth_);
  if (nested.TooDeep()) return TooDeep();
  const int line = Now().line;
  EM_ASSIGN_OR_RETURN(ExprPtr expr, ParseOr());
  while (with_if && SkipName("if")) {
    EM_ASSIGN_OR_RETURN(ExprPtr condition, ParseOr());
    ExprPtr otherwise;
    if (SkipName("else")) {
      EM_ASSIGN_OR_RETURN(otherwise, ParseExpression());
    }
    EM_ASSIGN_OR_RETURN(
        expr, MakeOf(Expr::Kind::kIf, line, std::move(condition), std::move(expr), std::move(otherwise)));
  }
  return expr;
}

// Expressions with commas between them are a tuple; `end_name` is a word that ends it.
Expected<ExprPtr> Parser::ParseTuple(bool with_if, bool in_brackets, std::string_view end_name) {
  const int line = Now().line;
  std::vector<ExprPtr> items;
  bool tuple = false;
  while (true) {
    const bool at_end = Now().kind == Kind::kPrintEnd || Now().kind == Kind::kBlockEnd || IsOperator(")") ||
                        (!end_name.empty() && IsName(end_name));
    if (at_end) break;
    EM_ASSIGN_OR_RETURN(ExprPtr item, ParseExpression(with_if));
    items.push_back(std::move(item));
    if (!Skip(",")) break;
    tuple = true;
  }
  if (!tuple && !items.empty()) return std::move(items[0]);
  if (!tuple && !in_brackets) return Bad(fmt::format("expected an expression, found {}", Describe()));
  ExprPtr expr = Make(Expr::Kind::kTuple, line);
  expr->args = std::move(items);
  return Done(std::move(expr));
}

Expected<ExprPtr> Parser::ParseOr() {
  EM_ASSIGN_OR_RETURN(ExprPtr left, ParseAnd());
  while (IsName("or")) {
    const int line = Now().line;
    Next();
    EM_ASSIGN_OR_RETURN(ExprPtr right, ParseAnd());
    EM_ASSIGN_OR_RETURN(left, MakeOf(Expr::Kind::kOr, line, std::move(left), std::move(right)));
  }
  return left;
}

Expected<ExprPtr> Parser::ParseAnd() {
  EM_ASSIGN_OR_RETURN(ExprPtr left, ParseNot());
  while (IsName("and")) {
    const int line = Now().line;
    Next();
    EM_ASSIGN_OR_RETURN(ExprPtr right, ParseNot());
    EM_ASSIGN_OR_RETURN(left, MakeOf(Expr::Kind::kAnd, line, std::move(left), std::move(right)));
  }
  return left;
}

Expected<ExprPtr> Parser::ParseNot() {
  if (!IsName("not")) return ParseCompare();
  const Nested nested(depth_);
  if (nested.TooDeep()) return TooDeep();
  const int line = Now().line;
  Next();
  EM_ASSIGN_OR_RETURN(ExprPtr expr, ParseNot());
  return MakeOf(Expr::Kind::kNot, line, std::move(expr));
}

Expected<ExprPtr> Parser::ParseCompare() {
  constexpr std::pair<std::string_view, Op> kOps[] = {{"==", Op::kEqual},     {"!=", Op::kNotEqual},
                                                      {"<=", Op::kLessEqual}, {">=", Op::kGreaterEqual},
                                                      {"<", Op::kLess},       {">", Op::kGreater}};
  const int line = Now().line;
  EM_ASSIGN_OR_RETURN(ExprPtr first, ParseSum());
  ExprPtr expr;
  while (true) {
    std::optional<Op> op;
    for (const auto& [text, known] : kOps)
      if (IsOperator(text)) op = known;
    if (IsName("in")) op = Op::kIn;
    if (IsName("not") && Ahead().kind == Kind::kName && Ahead().text == "in") {
      op = Op::kNotIn;
      Next();
    }
    if (!op) break;
    Next();
    if (!expr) {
      expr = Make(Expr::Kind::kCompare, line);
      expr->args.push_back(std::move(first));
    }
    EM_ASSIGN_OR_RETURN(ExprPtr operand, ParseSum());
    expr->ops.push_back(*op);
    expr->args.push_back(std::move(operand));
  }
  return expr ? Done(std::move(expr)) : std::move(first);
}

Expected<ExprPtr> Parser::ParseSum() {
  EM_ASSIGN_OR_RETURN(ExprPtr left, ParseConcat());
  while (IsOperator("+") || IsOperator("-")) {
    const int line = Now().line;
    const Op op = IsOperator("+") ? Op::kAdd : Op::kSub;
    Next();
    EM_ASSIGN_OR_RETURN(ExprPtr right, ParseConcat());
    EM_ASSIGN_OR_RETURN(left, MakeOf(Expr::Kind::kBinary, line, std::move(left), std::move(right)));
    left->ops.push_back(op);
  }
  return left;
}

Expected<ExprPtr> Parser::ParseConcat() {
  const int line = Now().line;
  EM_ASSIGN_OR_RETURN(ExprPtr first, ParseProduct());
  if (!IsOperator("~")) return first;
  ExprPtr expr = Make(Expr::Kind::kConcat, line);
  expr->args.push_back(std::move(first));
  while (Skip("~")) {
    EM_ASSIGN_OR_RETURN(ExprPtr next, ParseProduct());
    expr->args.push_back(std::move(next));
  }
  return Done(std::move(expr));
}

Expected<ExprPtr> Parser::ParseProduct() {
  constexpr std::pair<std::string_view, Op> kOps[] = {
      {"*", Op::kMul}, {"/", Op::kDiv}, {"//", Op::kFloorDiv}, {"%", Op::kMod}};
  EM_ASSIGN_OR_RETURN(ExprPtr left, ParsePower());
  while (true) {
    std::optional<Op> op;
    for (const auto& [text, known] : kOps)
      if (IsOperator(text)) op = known;
    if (!op) return left;
    const int line = Now().line;
    Next();
    EM_ASSIGN_OR_RETURN(ExprPtr right, ParsePower());
    EM_ASSIGN_OR_RETURN(left, MakeOf(Expr::Kind::kBinary, line, std::move(left), std::move(right)));
    left->ops.push_back(*op);
  }
}

Expected<ExprPtr> Parser::ParsePower() {
  EM_ASSIGN_OR_RETURN(ExprPtr left, ParseUnary());
  while (IsOperator("**")) {
    const int line = Now().line;
    Next();
    EM_ASSIGN_OR_RETURN(ExprPtr right, ParseUnary());
    EM_ASSIGN_OR_RETURN(left, MakeOf(Expr::Kind::kBinary, line, std::move(left), std::move(right)));
    left->ops.push_back(Op::kPow);
  }
  return left;
}

Expected<ExprPtr> Parser::ParseUnary(bool with_filters) {
  const Nested nested(depth_);
  if (nested.TooDeep()) return TooDeep();
  const int line = Now().line;
  ExprPtr expr;
  if (IsOperator("-") || IsOperator("+")) {
    const auto kind = IsOperator("-") ? Expr::Kind::kNegate : Expr::Kind::kPlus;
    Next();
    EM_ASSIGN_OR_RETURN(ExprPtr inner, ParseUnary(false));
    EM_ASSIGN_OR_RETURN(expr, MakeOf(kind, line, std::move(inner)));
  } else {
    EM_ASSIGN_OR_RETURN(expr, ParsePrimary());
  }
  EM_ASSIGN_OR_RETURN(expr, ParsePostfix(std::move(expr)));
  if (!with_filters) return expr;
  while (true) {
    if (IsOperator("|")) {
      EM_ASSIGN_OR_RETURN(expr, ParseFilters(std::move(expr), false));
    } else if (IsName("is")) {
      EM_ASSIGN_OR_RETURN(expr, ParseTest(std::move(expr)));
    } else if (IsOperator("(")) {
      EM_ASSIGN_OR_RETURN(expr, ParsePostfix(std::move(expr)));
    } else {
      return expr;
    }
  }
}

Expected<ExprPtr> Parser::ParsePrimary() {
  const Nested nested(depth_);
  if (nested.TooDeep()) return TooDeep();
  const int line = Now().line;
  if (Now().kind == Kind::kName) {
    const std::string name = Now().text;
    Next();
    ExprPtr expr = Make(Expr::Kind::kConst, line);
    if (name == "true" || name == "True" || name == "false" || name == "False") {
      expr->value = Value(name == "true" || name == "True");
    } else if (name != "none" && name != "None") {
      expr->kind = Expr::Kind::kName;
      expr->name = name;
      names_.insert(name);
    }
    return expr;
  }
  if (Now().kind == Kind::kText) {
    std::string text;
    for (; Now().kind == Kind::kText; Next()) text += Now().text;
    ExprPtr expr = Make(Expr::Kind::kConst, line);
    expr->value = Value(std::move(text));
    return expr;
  }
  if (Now().kind == Kind::kNumber) {
    ExprPtr expr = Make(Expr::Kind::kConst, line);
    expr->value = Now().number;
    Next();
    return expr;
  }
  if (Skip("(")) {
    EM_ASSIGN_OR_RETURN(ExprPtr expr, ParseTuple(true, true));
    EM_RETURN_IF_ERROR(Expect(")"));
    return expr;
  }
  if (Skip("[")) {
    ExprPtr expr = Make(Expr::Kind::kList, line);
    while (!IsOperator("]")) {
      if (!expr->args.empty()) EM_RETURN_IF_ERROR(Expect(","));
      if (IsOperator("]")) break;
      EM_ASSIGN_OR_RETURN(ExprPtr item, ParseExpression());
      expr->args.push_back(std::move(item));
    }
    Next();
    return Done(std::move(expr));
  }
  if (Skip("{")) return ParseDict(line);
  return Bad(fmt::format("unexpected {}", Describe()));
}

Expected<ExprPtr> Parser::ParseDict(int line) {
  ExprPtr expr = Make(Expr::Kind::kDict, line);
  while (!IsOperator("}")) {
    if (!expr->args.empty()) EM_RETURN_IF_ERROR(Expect(","));
    if (IsOperator("}")) break;
    EM_ASSIGN_OR_RETURN(ExprPtr key, ParseExpression());
    EM_RETURN_IF_ERROR(Expect(":"));
    EM_ASSIGN_OR_RETURN(ExprPtr value, ParseExpression());
    expr->args.push_back(std::move(key));
    expr->args.push_back(std::move(value));
  }
  Next();
  return Done(std::move(expr));
}

Expected<ExprPtr> Parser::ParsePostfix(ExprPtr expr) {
  while (true) {
    const int line = Now().line;
    if (Skip(".")) {
      if (Now().kind == Kind::kNumber && Now().number.AsInt()) {
        ExprPtr index = Make(Expr::Kind::kConst, line);
        index->value = Now().number;
        Next();
        EM_ASSIGN_OR_RETURN(expr, MakeOf(Expr::Kind::kItem, line, std::move(expr), std::move(index)));
        continue;
      }
      EM_ASSIGN_OR_RETURN(std::string name, ExpectName());
      EM_ASSIGN_OR_RETURN(expr, MakeOf(Expr::Kind::kAttribute, line, std::move(expr)));
      expr->name = std::move(name);
    } else if (Skip("[")) {
      EM_ASSIGN_OR_RETURN(expr, ParseSubscript(std::move(expr)));
    } else if (IsOperator("(")) {
      ExprPtr call = Make(Expr::Kind::kCall, line);
      call->args.push_back(std::move(expr));
      EM_RETURN_IF_ERROR(ParseArgs(*call));
      EM_ASSIGN_OR_RETURN(expr, Done(std::move(call)));
    } else {
      return expr;
    }
  }
}

// x[key], x[a, b], x[start:stop:step]; the opening bracket is read.
Expected<ExprPtr> Parser::ParseSubscript(ExprPtr object) {
  const int line = Now().line;
  ExprPtr parts[3];
  bool slice = false;
  for (int i = 0; i < 3; ++i) {
    if (!IsOperator(":") && !IsOperator("]")) {
      EM_ASSIGN_OR_RETURN(parts[i], ParseExpression());
    }
    if (i == 2 || !Skip(":")) break;
    slice = true;
  }
  if (slice) {
    EM_RETURN_IF_ERROR(Expect("]"));
    return MakeOf(Expr::Kind::kSlice, line, std::move(object), std::move(parts[0]), std::move(parts[1]),
                  std::move(parts[2]));
  }
  if (!parts[0]) return Bad(fmt::format("expected an expression, found {}", Describe()));
  if (IsOperator(",")) {
    ExprPtr tuple = Make(Expr::Kind::kTuple, line);
    tuple->args.push_back(std::move(parts[0]));
    while (Skip(",") && !IsOperator("]")) {
      EM_ASSIGN_OR_RETURN(ExprPtr item, ParseExpression());
      tuple->args.push_back(std::move(item));
    }
    EM_ASSIGN_OR_RETURN(parts[0], Done(std::move(tuple)));
  }
  EM_RETURN_IF_ERROR(Expect("]"));
  return MakeOf(Expr::Kind::kItem, line, std::move(object), std::move(parts[0]));
}

Status Parser::ParseArgs(Expr& call) {
  EM_RETURN_IF_ERROR(Expect("("));
  for (bool first = true; !IsOperator(")"); first = false) {
    if (!first) EM_RETURN_IF_ERROR(Expect(","));
    if (IsOperator(")")) break;
    if (IsOperator("*") || IsOperator("**")) return Bad("arguments by * and ** are not supported");
    if (Now().kind == Kind::kName && Ahead().kind == Kind::kOperator && Ahead().text == "=") {
      std::string name = Now().text;
      Next();
      Next();
      EM_ASSIGN_OR_RETURN(ExprPtr value, ParseExpression());
      for (const auto& [known, other] : call.named)
        if (known == name) return Bad(fmt::format("argument '{}' comes twice", name));
      call.named.emplace_back(std::move(name), std::move(value));
    } else {
      if (!call.named.empty()) return Bad("an argument without name follows one with name");
      EM_ASSIGN_OR_RETURN(ExprPtr value, ParseExpression());
      call.args.push_back(std::move(value));
    }
  }
  Next();
  return {};
}

// One filter after another; `at_name`: the first comes without its bar.
Expected<ExprPtr> Parser::ParseFilters(ExprPtr expr, bool at_name) {
  while (IsOperator("|") || at_name) {
    if (!at_name) Next();
    at_name = false;
    ExprPtr filter = Make(Expr::Kind::kFilter, Now().line);
    EM_ASSIGN_OR_RETURN(filter->name, ExpectName());
    filter->filter = FindFilter(filter->name);
    if (filter->filter == nullptr)
      return BadAt(filter->line, fmt::format("unknown filter '{}'", filter->name));
    filter->args.push_back(std::move(expr));
    if (IsOperator("(")) EM_RETURN_IF_ERROR(ParseArgs(*filter));
    EM_ASSIGN_OR_RETURN(expr, Done(std::move(filter)));
  }
  return expr;
}

Expected<ExprPtr> Parser::ParseTest(ExprPtr expr) {
  const int line = Now().line;
  Next();  // is
  const bool negated = SkipName("not");
  ExprPtr test = Make(Expr::Kind::kTest, line);
  EM_ASSIGN_OR_RETURN(test->name, ExpectName());
  test->test = FindTest(test->name);
  if (test->test == nullptr) return BadAt(line, fmt::format("unknown test '{}'", test->name));
  test->args.push_back(std::move(expr));
  const bool starts_argument = Now().kind == Kind::kText || Now().kind == Kind::kNumber || IsOperator("[") ||
                               IsOperator("{") || Now().kind == Kind::kName;
  if (IsOperator("(")) {
    EM_RETURN_IF_ERROR(ParseArgs(*test));
  } else if (starts_argument && !IsName("else") && !IsName("or") && !IsName("and")) {
    if (IsName("is")) return Bad("tests cannot be chained");
    // What may follow a test inside of a larger expression is no argument either.
    if (!IsName("if") && !IsName("in") && !IsName("not") && !IsName("recursive")) {
      EM_ASSIGN_OR_RETURN(ExprPtr arg, ParsePrimary());
      EM_ASSIGN_OR_RETURN(arg, ParsePostfix(std::move(arg)));
      test->args.push_back(std::move(arg));
    }
  }
  EM_ASSIGN_OR_RETURN(ExprPtr done, Done(std::move(test)));
  if (!negated) return done;
  return MakeOf(Expr::Kind::kNot, line, std::move(done));
}

}  // namespace

Expected<Template> Parse(std::string_view source) {
  EM_ASSIGN_OR_RETURN(std::vector<Token> tokens, Tokenize(source));
  return Parser(std::move(tokens)).Run();
}

}  // namespace elasticmoe::model::jinja
