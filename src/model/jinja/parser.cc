// Statements, blocks and the way in; see parser_class.h.
#include "model/jinja/parser.h"

#include <algorithm>
#include <utility>

#include "model/jinja/lexer.h"
#include "model/jinja/parser_class.h"

namespace elasticmoe::model::jinja {
namespace {

// Is `expr` the content of something: x.content or x['content']?
bool IsContent(const Expr& expr) {
  if (expr.kind == Expr::Kind::kAttribute) return expr.name == "content";
  return expr.kind == Expr::Kind::kItem && expr.args[1]->value.AsText() &&
         *expr.args[1]->value.AsText() == "content";
}

}  // namespace

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

Expected<Template> Parse(std::string_view source) {
  EM_ASSIGN_OR_RETURN(std::vector<Token> tokens, Tokenize(source));
  return Parser(std::move(tokens)).Run();
}

}  // namespace elasticmoe::model::jinja
