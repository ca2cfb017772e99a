// Expressions from the conditional down to the sign, by precedence: a function a level; see parser_class.h.
#include <optional>
#include <utility>

#include "model/jinja/parser_class.h"

namespace elasticmoe::model::jinja {

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

}  // namespace elasticmoe::model::jinja
