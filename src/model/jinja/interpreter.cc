#include "model/jinja/interpreter.h"

#include <map>
#include <utility>

#include "model/jinja/builtins.h"
#include "model/jinja/operators.h"

namespace elasticmoe::model::jinja {
namespace {

constexpr int kMaxCallDepth = 800;  // of nested Eval and Exec; a frame takes up to 2 KiB under sanitizers
constexpr std::size_t kMaxOutputBytes = 8 << 20;

struct Scope {
  std::map<std::string_view, Value> names;  // they point into the template or the variables
  std::shared_ptr<Scope> parent;
};
using ScopePtr = std::shared_ptr<Scope>;

enum class Flow { kNext, kBreak, kContinue };

class Interpreter;

// A macro, or the body of a call block. Its scope is the one it was defined in, which it does not keep alive:
// the scope holds the macro.
class Macro : public Callable {
 public:
  Macro(const Stmt& statement, bool is_caller, const ScopePtr& scope)
      : statement_(statement), is_caller_(is_caller), scope_(scope) {}
  Expected<Value> Call(Context& context, Args args) const override;

 private:
  const Stmt& statement_;
  const bool is_caller_;
  const std::weak_ptr<Scope> scope_;
};

class Interpreter : public Context {
 public:
  explicit Interpreter(std::int64_t now_unix_s) : Context(now_unix_s) {}

  Expected<std::string> RunAll(const Template& source, const Json& variables) {
    scope_ = std::make_shared<Scope>();
    for (const auto& [name, json] : variables.items()) {
      EM_ASSIGN_OR_RETURN(Value value, FromJson(json));
      scope_->names[name] = std::move(value);
    }
    const auto flow = Exec(source.body);
    scope_.reset();
    ClearNamespaces();
    if (flow) return std::move(out_);
    Error error = flow.error();
    if (!WasRaised()) error.message = fmt::format("line {}: {}", error_line_, error.message);
    return tl::unexpected(std::move(error));
  }

  Expected<Value> CallMacro(const Stmt& macro, bool is_caller, const ScopePtr& defined_in, Args args);
  Expected<Value> CallLoop(const Stmt& loop, int depth0, const Args& args);

 private:
  // Counts nesting of calls while it lives.
  class Frame {
   public:
    explicit Frame(int& depth) : depth_(++depth) {}
    ~Frame() { --depth_; }
    bool TooDeep() const { return depth_ > kMaxCallDepth; }

   private:
    int& depth_;
  };
  // A new innermost scope while it lives.
  class InScope {
   public:
    InScope(Interpreter& interpreter, ScopePtr parent)
        : interpreter_(interpreter), before_(interpreter.scope_) {
      interpreter.scope_ = std::make_shared<Scope>();
      interpreter.scope_->parent = std::move(parent);
    }
    ~InScope() { interpreter_.scope_ = std::move(before_); }

   private:
    Interpreter& interpreter_;
    ScopePtr before_;
  };

  tl::unexpected<Error> TooDeep() {
    return Fail(ErrorCode::kResourceExhausted, "calls nested deeper than {}", kMaxCallDepth);
  }

  // The innermost line that fails is the one to name.
  template <class T>
  Expected<T> At(int line, Expected<T> result) {
    if (!result && error_line_ == 0) error_line_ = line;
    return result;
  }

  Status Print(std::string_view text) {
    if (text.size() > kMaxOutputBytes - out_.size())
      return Fail(ErrorCode::kResourceExhausted, "the template prints more than {} bytes", kMaxOutputBytes);
    out_ += text;
    return {};
  }

  Value Lookup(const std::string& name) const {
    for (const Scope* scope = scope_.get(); scope != nullptr; scope = scope->parent.get())
      if (const auto at = scope->names.find(name); at != scope->names.end()) return at->second;
    if (auto function = FindFunction(name)) return Value(std::move(function));
    return MakeUndefined(fmt::format("'{}' is undefined", name));
  }

  Expected<Value> Eval(const Expr& expr);
  Expected<Value> EvalInner(const Expr& expr);
  Expected<Value> EvalCall(const Expr& expr);
  Expected<Value> EvalSlice(const Expr& expr);
  Expected<Value> ApplyFilter(const Expr& filter, Value input);
  Expected<Value> ApplyFilters(const Expr* filters, Value input);
  Expected<Args> EvalArgs(const Expr& expr);
  Expected<std::vector<Value>> EvalList(const Expr& expr);

  Expected<Flow> Exec(const Block& block);
  Expected<Flow> ExecOne(const Stmt& stmt);
  Expected<Flow> ExecIf(const Stmt& stmt);
  Expected<Flow> ExecFor(const Stmt& stmt, const Value& over, int depth0);
  Expected<Flow> ExecWith(const Stmt& stmt);
  Status ExecCall(const Stmt& stmt);
  Status Assign(const Expr& target, Value value);
  // What `block` prints, in a scope of its own.
  Expected<Value> Capture(const Block& block);

  ScopePtr scope_;
  std::string out_;
  int depth_ = 0;
  int error_line_ = 0;
};

Expected<Value> Macro::Call(Context& context, Args args) const {
  const ScopePtr scope = scope_.lock();
  if (!scope) return TypeError("a macro is called outside of the block that defined it");
  return static_cast<Interpreter&>(context).CallMacro(statement_, is_caller_, scope, std::move(args));
}

Expected<Value> Interpreter::Eval(const Expr& expr) {
  const Frame frame(depth_);
  if (frame.TooDeep()) return At<Value>(expr.line, TooDeep());
  if (auto spent = Spend(1); !spent) return At<Value>(expr.line, tl::unexpected(spent.error()));
  return At(expr.line, EvalInner(expr));
}

Expected<std::vector<Value>> Interpreter::EvalList(const Expr& expr) {
  std::vector<Value> items;
  items.reserve(expr.args.size());
  for (const ExprPtr& arg : expr.args) {
    EM_ASSIGN_OR_RETURN(Value item, Eval(*arg));
    items.push_back(std::move(item));
  }
  return items;
}

Expected<Value> Interpreter::EvalInner(const Expr& expr) {
  const auto arg = [&](std::size_t i) { return Eval(*expr.args[i]); };
  switch (expr.kind) {
    case Expr::Kind::kConst:
      return expr.value;
    case Expr::Kind::kName:
      return Lookup(expr.name);
    case Expr::Kind::kList:
    case Expr::Kind::kTuple: {
      EM_ASSIGN_OR_RETURN(std::vector<Value> items, EvalList(expr));
      return MakeList(std::move(items), expr.kind == Expr::Kind::kTuple);
    }
    case Expr::Kind::kDict: {
      Dict dict;
      for (std::size_t i = 0; i + 1 < expr.args.size(); i += 2) {
        EM_ASSIGN_OR_RETURN(Value key, arg(i));
        EM_ASSIGN_OR_RETURN(Value value, arg(i + 1));
        EM_RETURN_IF_ERROR(dict.Set(std::move(key), std::move(value)));
      }
      return MakeDict(std::move(dict));
    }
    case Expr::Kind::kNot: {
      EM_ASSIGN_OR_RETURN(const Value value, arg(0));
      return Value(!Truth(value));
    }
    case Expr::Kind::kNegate:
    case Expr::Kind::kPlus: {
      EM_ASSIGN_OR_RETURN(const Value value, arg(0));
      return Negate(value, expr.kind == Expr::Kind::kNegate);
    }
    case Expr::Kind::kAnd:
    case Expr::Kind::kOr: {
      EM_ASSIGN_OR_RETURN(Value value, arg(0));
      if (Truth(value) == (expr.kind == Expr::Kind::kOr)) return value;
      return arg(1);
    }
    case Expr::Kind::kBinary: {
      EM_ASSIGN_OR_RETURN(const Value left, arg(0));
      EM_ASSIGN_OR_RETURN(const Value right, arg(1));
      return Binary(*this, expr.ops[0], left, right);
    }
    case Expr::Kind::kCompare: {
      EM_ASSIGN_OR_RETURN(Value left, arg(0));
      for (std::size_t i = 0; i < expr.ops.size(); ++i) {
        EM_ASSIGN_OR_RETURN(Value right, arg(i + 1));
        EM_ASSIGN_OR_RETURN(const bool holds, Compare(*this, expr.ops[i], left, right));
        if (!holds) return Value(false);
        left = std::move(right);
      }
      return Value(true);
    }
    case Expr::Kind::kConcat: {
      std::string text;
      for (std::size_t i = 0; i < expr.args.size(); ++i) {
        EM_ASSIGN_OR_RETURN(const Value part, arg(i));
        EM_ASSIGN_OR_RETURN(const std::string part_text, ToText(*this, part));
        text += part_text;
      }
      return MakeText(std::move(text));
    }
    case Expr::Kind::kIf: {
      EM_ASSIGN_OR_RETURN(const Value condition, arg(0));
      if (Truth(condition)) return arg(1);
      if (expr.args[2]) return arg(2);
      return MakeUndefined("the inline if-expression evaluated to false and no else section was defined.");
    }
    case Expr::Kind::kAttribute: {
      EM_ASSIGN_OR_RETURN(const Value object, arg(0));
      return GetAttribute(*this, object, expr.name);
    }
    case Expr::Kind::kItem: {
      EM_ASSIGN_OR_RETURN(const Value object, arg(0));
      EM_ASSIGN_OR_RETURN(const Value key, arg(1));
      return GetItem(*this, object, key);
    }
    case Expr::Kind::kSlice:
      return EvalSlice(expr);
    case Expr::Kind::kCall:
      return EvalCall(expr);
    case Expr::Kind::kFilter: {
      EM_ASSIGN_OR_RETURN(Value input, arg(0));
      return ApplyFilter(expr, std::move(input));
    }
    case Expr::Kind::kTest: {
      EM_ASSIGN_OR_RETURN(const Value input, arg(0));
      EM_ASSIGN_OR_RETURN(const Args args, EvalArgs(expr));
      EM_ASSIGN_OR_RETURN(const bool holds, expr.test(*this, input, args));
      return Value(holds);
    }
  }
  return Value();
}

Expected<Value> Interpreter::EvalSlice(const Expr& expr) {
  EM_ASSIGN_OR_RETURN(const Value object, Eval(*expr.args[0]));
  SliceBounds bounds;
  std::optional<std::int64_t>* slots[3] = {&bounds.start, &bounds.stop, &bounds.step};
  for (std::size_t i = 0; i < 3; ++i) {
    if (!expr.args[i + 1]) continue;
    EM_ASSIGN_OR_RETURN(const Value bound, Eval(*expr.args[i + 1]));
    if (bound.IsNone()) continue;
    *slots[i] = bound.Integer();
    if (!*slots[i]) return TypeError("slice indices must be integers or None");
  }
  // Jinja2 folds a literal by the rules of literal[key], where a key that does not fit is no error.
  if (expr.args[0]->kind == Expr::Kind::kConst && !object.AsText())
    return MakeUndefined(fmt::format("'{}' object cannot be sliced", TypeName(object)));
  return GetSlice(*this, object, bounds);
}

// The arguments behind args[0], which is what is called.
Expected<Args> Interpreter::EvalArgs(const Expr& expr) {
  Args args;
  for (std::size_t i = 1; i < expr.args.size(); ++i) {
    EM_ASSIGN_OR_RETURN(Value value, Eval(*expr.args[i]));
    args.positional.push_back(std::move(value));
  }
  for (const auto& [name, one] : expr.named) {
    EM_ASSIGN_OR_RETURN(Value value, Eval(*one));
    args.named.emplace_back(name, std::move(value));
  }
  return args;
}

Expected<Value> Interpreter::EvalCall(const Expr& expr) {
  EM_ASSIGN_OR_RETURN(const Value callee, Eval(*expr.args[0]));
  EM_ASSIGN_OR_RETURN(Args args, EvalArgs(expr));
  if (const Callable* callable = callee.AsCallable()) return callable->Call(*this, std::move(args));
  if (const Loop* loop = callee.AsLoop()) {
    if (loop->statement == nullptr) return TypeError("the loop must be marked with 'recursive' to be called");
    return CallLoop(*static_cast<const Stmt*>(loop->statement), loop->depth0 + 1, args);
  }
  if (const auto* undefined = callee.AsUndefined()) return TypeError(*undefined->why);
  return TypeError(fmt::format("'{}' object is not callable", TypeName(callee)));
}

Expected<Value> Interpreter::ApplyFilter(const Expr& filter, Value input) {
  EM_ASSIGN_OR_RETURN(const Args args, EvalArgs(filter));
  return At(filter.line, filter.filter(*this, input, args));
}

// A chain of filters whose innermost input is `input` (of a block).
Expected<Value> Interpreter::ApplyFilters(const Expr* filters, Value input) {
  if (filters == nullptr) return input;
  EM_ASSIGN_OR_RETURN(Value inner, ApplyFilters(filters->args[0].get(), std::move(input)));
  return ApplyFilter(*filters, std::move(inner));
}

Expected<Flow> Interpreter::Exec(const Block& block) {
  const Frame frame(depth_);
  if (frame.TooDeep()) return TooDeep();
  for (const Stmt& stmt : block) {
    if (auto spent = Spend(1); !spent) return At<Flow>(stmt.line, tl::unexpected(spent.error()));
    EM_ASSIGN_OR_RETURN(const Flow flow, At(stmt.line, ExecOne(stmt)));
    if (flow != Flow::kNext) return flow;
  }
  return Flow::kNext;
}

Expected<Flow> Interpreter::ExecOne(const Stmt& stmt) {
  switch (stmt.kind) {
    case Stmt::Kind::kText:
      EM_RETURN_IF_ERROR(Print(stmt.text));
      break;
    case Stmt::Kind::kPrint: {
      EM_ASSIGN_OR_RETURN(const Value value, Eval(*stmt.expr));
      EM_ASSIGN_OR_RETURN(const std::string text, ToText(*this, value));
      EM_RETURN_IF_ERROR(Print(text));
      break;
    }
    case Stmt::Kind::kIf:
      return ExecIf(stmt);
    case Stmt::Kind::kFor: {
      EM_ASSIGN_OR_RETURN(const Value over, Eval(*stmt.expr));
      return ExecFor(stmt, over, 0);
    }
    case Stmt::Kind::kSet: {
      EM_ASSIGN_OR_RETURN(Value value, Eval(*stmt.expr));
      EM_RETURN_IF_ERROR(Assign(*stmt.target, std::move(value)));
      break;
    }
    case Stmt::Kind::kSetBlock: {
      EM_ASSIGN_OR_RETURN(Value text, Capture(stmt.body));
      EM_ASSIGN_OR_RETURN(Value value, ApplyFilters(stmt.expr.get(), std::move(text)));
      EM_RETURN_IF_ERROR(Assign(*stmt.target, std::move(value)));
      break;
    }
    case Stmt::Kind::kMacro:
      scope_->names[stmt.text] =
          Value(std::shared_ptr<const Callable>(std::make_shared<Macro>(stmt, false, scope_)));
      break;
    case Stmt::Kind::kCall:
      EM_RETURN_IF_ERROR(ExecCall(stmt));
      break;
    case Stmt::Kind::kFilterBlock: {
      EM_ASSIGN_OR_RETURN(Value text, Capture(stmt.body));
      EM_ASSIGN_OR_RETURN(const Value value, ApplyFilters(stmt.expr.get(), std::move(text)));
      EM_ASSIGN_OR_RETURN(const std::string printed, ToText(*this, value));
      EM_RETURN_IF_ERROR(Print(printed));
      break;
    }
    case Stmt::Kind::kWith:
      return ExecWith(stmt);
    case Stmt::Kind::kScope: {
      const InScope scope(*this, scope_);
      return Exec(stmt.body);
    }
    case Stmt::Kind::kBreak:
      return Flow::kBreak;
    case Stmt::Kind::kContinue:
      return Flow::kContinue;
  }
  return Flow::kNext;
}

Expected<Flow> Interpreter::ExecIf(const Stmt& stmt) {
  for (const Stmt::Branch& branch : stmt.branches) {
    bool taken = true;
    if (branch.condition) {
      EM_ASSIGN_OR_RETURN(const Value condition, Eval(*branch.condition));
      taken = Truth(condition);
    }
    if (taken) return Exec(branch.body);
  }
  return Flow::kNext;
}

Expected<Flow> Interpreter::ExecFor(const Stmt& stmt, const Value& over, int depth0) {
  EM_ASSIGN_OR_RETURN(auto items, Iterate(*this, over));
  if (stmt.condition) {
    std::vector<Value> kept;
    for (const Value& item : items->items) {
      const InScope scope(*this, scope_);
      EM_RETURN_IF_ERROR(Assign(*stmt.target, item));
      EM_ASSIGN_OR_RETURN(const Value condition, Eval(*stmt.condition));
      if (Truth(condition)) kept.push_back(item);
    }
    auto list = std::make_shared<List>();
    list->items = std::move(kept);
    list->depth = items->depth;
    items = std::move(list);
  }
  if (items->items.empty()) {
    const InScope scope(*this, scope_);
    return Exec(stmt.otherwise);
  }
  auto loop = std::make_shared<Loop>();
  loop->items = items;
  loop->depth0 = depth0;
  loop->statement = stmt.recursive ? &stmt : nullptr;
  for (; loop->index0 < items->items.size(); ++loop->index0) {
    const InScope scope(*this, scope_);
    scope_->names["loop"] = Value(loop);
    EM_RETURN_IF_ERROR(Assign(*stmt.target, items->items[loop->index0]));
    EM_ASSIGN_OR_RETURN(const Flow flow, Exec(stmt.body));
    if (flow == Flow::kBreak) break;
  }
  return Flow::kNext;
}

Expected<Flow> Interpreter::ExecWith(const Stmt& stmt) {
  std::vector<Value> values;  // all in the scope outside
  for (const auto& [target, expr] : stmt.with) {
    EM_ASSIGN_OR_RETURN(Value value, Eval(*expr));
    values.push_back(std::move(value));
  }
  const InScope scope(*this, scope_);
  for (std::size_t i = 0; i < values.size(); ++i)
    EM_RETURN_IF_ERROR(Assign(*stmt.with[i].first, std::move(values[i])));
  return Exec(stmt.body);
}

Status Interpreter::ExecCall(const Stmt& stmt) {
  const Expr& call = *stmt.expr;
  EM_ASSIGN_OR_RETURN(const Value callee, Eval(*call.args[0]));
  EM_ASSIGN_OR_RETURN(Args args, EvalArgs(call));
  args.named.emplace_back(
      "caller", Value(std::shared_ptr<const Callable>(std::make_shared<Macro>(stmt, true, scope_))));
  const Callable* callable = callee.AsCallable();
  if (callable == nullptr) return TypeError(fmt::format("'{}' object is not callable", TypeName(callee)));
  EM_ASSIGN_OR_RETURN(const Value value, callable->Call(*this, std::move(args)));
  EM_ASSIGN_OR_RETURN(const std::string text, ToText(*this, value));
  return Print(text);
}

Status Interpreter::Assign(const Expr& target, Value value) {
  if (target.kind == Expr::Kind::kName) {
    scope_->names[target.name] = std::move(value);
    return {};
  }
  if (target.kind == Expr::Kind::kAttribute) {
    EM_ASSIGN_OR_RETURN(const Value object, Eval(*target.args[0]));
    Namespace* space = object.AsNamespace();
    if (space == nullptr) return TypeError("cannot assign attribute on non-namespace object");
    return space->values.Set(Value(target.name), std::move(value));
  }
  EM_ASSIGN_OR_RETURN(const auto items, Iterate(*this, value));
  if (items->items.size() != target.args.size())
    return TypeError(
        fmt::format("cannot unpack {} values into {} names", items->items.size(), target.args.size()));
  for (std::size_t i = 0; i < target.args.size(); ++i)
    EM_RETURN_IF_ERROR(Assign(*target.args[i], items->items[i]));
  return {};
}

Expected<Value> Interpreter::Capture(const Block& block) {
  std::string outside = std::exchange(out_, {});
  Expected<Flow> flow = Flow::kNext;
  {
    const InScope scope(*this, scope_);
    flow = Exec(block);
  }
  std::string inside = std::exchange(out_, std::move(outside));
  EM_RETURN_IF_ERROR(flow);
  return MakeText(std::move(inside));
}

Expected<Value> Interpreter::CallMacro(const Stmt& macro, bool is_caller, const ScopePtr& defined_in,
                                       Args args) {
  const Frame frame(depth_);
  if (frame.TooDeep()) return TooDeep();
  const std::string_view name = is_caller ? std::string_view("caller") : std::string_view(macro.text);
  const ScopePtr outside = std::exchange(scope_, defined_in);
  std::string out_before = std::exchange(out_, {});
  const auto run = [&]() -> Status {
    const InScope inside(*this, defined_in);
    std::vector<Value> rest;
    for (std::size_t i = macro.parameters.size(); i < args.positional.size(); ++i)
      rest.push_back(args.positional[i]);
    if (!rest.empty() && !macro.takes_rest)
      return TypeError(
          fmt::format("macro '{}' takes not more than {} argument(s)", name, macro.parameters.size()));
    Dict named_rest;
    Value caller = MakeUndefined("No caller defined");
    std::vector<const Value*> by_name(macro.parameters.size(), nullptr);
    for (const auto& [key, value] : args.named) {
      std::size_t i = 0;
      while (i < macro.parameters.size() && macro.parameters[i].name != key) ++i;
      if (i < macro.parameters.size()) {
        if (i < args.positional.size())
          return TypeError(fmt::format("macro '{}' got multiple values for argument '{}'", name, key));
        by_name[i] = &value;
      } else if (key == "caller") {
        caller = value;
      } else if (macro.takes_rest) {
        EM_RETURN_IF_ERROR(named_rest.Set(Value(key), value));
      } else {
        return TypeError(fmt::format("macro '{}' takes no keyword argument '{}'", name, key));
      }
    }
    for (std::size_t i = 0; i < macro.parameters.size(); ++i) {
      const Parameter& parameter = macro.parameters[i];
      Value value;
      if (i < args.positional.size()) {
        value = args.positional[i];
      } else if (by_name[i] != nullptr) {
        value = *by_name[i];
      } else if (parameter.otherwise) {
        EM_ASSIGN_OR_RETURN(value, Eval(*parameter.otherwise));
      } else {
        value = MakeUndefined(fmt::format("parameter '{}' was not provided", parameter.name));
      }
      scope_->names[parameter.name] = std::move(value);
    }
    if (!is_caller) scope_->names["caller"] = std::move(caller);
    if (macro.takes_rest) {
      EM_ASSIGN_OR_RETURN(scope_->names["varargs"], MakeList(std::move(rest), true));
      EM_ASSIGN_OR_RETURN(scope_->names["kwargs"], MakeDict(std::move(named_rest)));
    }
    EM_RETURN_IF_ERROR(Exec(macro.body));
    return {};
  };
  const Status status = run();
  scope_ = outside;
  std::string text = std::exchange(out_, std::move(out_before));
  EM_RETURN_IF_ERROR(status);
  return MakeText(std::move(text));
}

// Runs a recursive loop again, over other items; it sees the names where it is called.
Expected<Value> Interpreter::CallLoop(const Stmt& loop, int depth0, const Args& args) {
  const Frame frame(depth_);
  if (frame.TooDeep()) return TooDeep();
  if (args.positional.size() != 1 || !args.named.empty()) return TypeError("a loop is called with one list");
  std::string out_before = std::exchange(out_, {});
  const auto flow = ExecFor(loop, args.positional[0], depth0);
  std::string text = std::exchange(out_, std::move(out_before));
  EM_RETURN_IF_ERROR(flow);
  return MakeText(std::move(text));
}

}  // namespace

Expected<std::string> Run(const Template& source, const Json& variables, std::int64_t now_unix_s) {
  return Interpreter(now_unix_s).RunAll(source, variables);
}

}  // namespace elasticmoe::model::jinja
