// Operands: names, literals, brackets, and what follows them (members, calls, filters, tests); see
// parser_class.h.
#include <utility>

#include "model/jinja/parser_class.h"

namespace elasticmoe::model::jinja {

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

}  // namespace elasticmoe::model::jinja
