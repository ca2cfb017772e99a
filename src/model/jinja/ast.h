// A parsed template. Immutable; names point into it while it is rendered.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "model/jinja/builtins.h"
#include "model/jinja/value.h"

namespace elasticmoe::model::jinja {

struct Expr;
using ExprPtr = std::unique_ptr<Expr>;

enum class Op {
  kAdd,
  kSub,
  kMul,
  kDiv,
  kFloorDiv,
  kMod,
  kPow,
  kEqual,
  kNotEqual,
  kLess,
  kLessEqual,
  kGreater,
  kGreaterEqual,
  kIn,
  kNotIn,
};

struct Expr {
  enum class Kind {
    kConst,      // value
    kName,       // name
    kList,       // args
    kTuple,      // args
    kDict,       // args: key, value, key, value ...
    kNot,        // args[0]
    kNegate,     // args[0]
    kPlus,       // args[0]
    kAnd,        // args[0], args[1]
    kOr,         // args[0], args[1]
    kBinary,     // args[0] ops[0] args[1]
    kCompare,    // args[0] ops[0] args[1] ops[1] args[2] ...
    kConcat,     // args joined by ~
    kIf,         // args[1] if args[0] else args[2] (may be null)
    kAttribute,  // args[0].name
    kItem,       // args[0][args[1]]
    kSlice,      // args[0][args[1]:args[2]:args[3]], each of the latter may be null
    kCall,       // args[0](args[1] ..., named)
    kFilter,     // args[0] | name(args[1] ..., named); args[0] may be null in a block
    kTest,       // args[0] is name(args[1] ..., named)
  };
  Kind kind;
  int line = 0;
  int depth = 1;  // of the tree below
  Value value;
  std::string name;
  std::vector<Op> ops;
  std::vector<ExprPtr> args;
  std::vector<std::pair<std::string, ExprPtr>> named;
  FilterFunction filter = nullptr;
  TestFunction test = nullptr;
};

struct Stmt;
using Block = std::vector<Stmt>;

struct Parameter {
  std::string name;
  ExprPtr otherwise;  // null: none
};

struct Stmt {
  enum class Kind {
    kText,         // text
    kPrint,        // expr
    kIf,           // branches; the last has no condition if it is an else
    kFor,          // target in expr if condition: body; otherwise; recursive
    kSet,          // target = expr
    kSetBlock,     // target = body | expr (may be null)
    kMacro,        // text(parameters): body
    kCall,         // expr is a call, body with parameters is its caller
    kFilterBlock,  // body | expr
    kWith,         // targets = values: body
    kScope,        // body in a scope of its own (generation)
    kBreak,
    kContinue,
  };
  struct Branch {
    ExprPtr condition;
    Block body;
  };
  Kind kind;
  int line = 0;
  std::string text;
  ExprPtr target, expr, condition;
  std::vector<Branch> branches;
  std::vector<std::pair<ExprPtr, ExprPtr>> with;
  std::vector<Parameter> parameters;
  Block body, otherwise;
  bool recursive = false;
  bool takes_rest = false;  // of a macro: its body uses varargs or kwargs
};

struct Template {
  Block body;
  bool reads_content_parts = false;
};

}  // namespace elasticmoe::model::jinja
