// The C interface, used by launch.py through ctypes.
#include <algorithm>
#include <map>

#include "vm.h"

namespace vm {
namespace {
std::vector<std::pair<std::string, Handler>>& table() {
  static std::vector<std::pair<std::string, Handler>> t;
  return t;
}
}  // namespace
void define(const char* name, Handler h) { table().push_back({name, h}); }

[[noreturn]] void fail(ErrorKind kind, const Warp& w, u32 lane, std::string text, u32 op, u32 other_op) {
  const Block& b = *w.block;
  const u32 t = w.id * 32 + lane;
  const auto& n = b.launch->config->block;
  throw Error{kind,
              std::move(text),
              op,
              other_op,
              {b.index[0], b.index[1], b.index[2]},
              {t % n[0], t / n[0] % n[1], t / n[0] / n[1]}};
}
}  // namespace vm

using namespace vm;
struct ErrorOut {
  u32 kind, op, other_op, block[3], thread[3];
  char text[4096];
};  // same layout as ERROR in launch.py

extern "C" {
// Handler names, one a line, in the order of their indices.
const char* ptxvm_handlers() {
  static const std::string names = [] {
    std::string s;
    for (auto& [n, h] : table()) s += n + "\n";
    return s;
  }();
  return names.c_str();
}

// 0, or 1 with `error` filled.
int ptxvm_run(const Config* config, const Op* ops, OpCount* counts, Range* ranges, const u8* params, const u8* consts,
              const u32* specials, ErrorOut* error) {
  Launch l;
  l.config = config;
  l.ops = ops;
  l.counts = counts;
  l.ranges = ranges;
  l.params = params;
  l.consts = consts;
  l.specials = specials;
  l.threads = config->block[0] * config->block[1] * config->block[2];
  l.n_warps = (l.threads + 31) / 32;
  l.random.seed(config->seed);
  for (u32 i = 0; i < config->n_ops; i++) l.handlers.push_back(table()[ops[i].handler].second);
  for (u32 i = 0; i < config->n_ranges; i++) {
    const Range& r = ranges[i];
    if (r.region >= l.cells.size()) {
      l.cells.resize(r.region + 1);
      l.touched.resize(r.region + 1);
    }
    if (!l.touched[r.region].empty()) continue;
    l.touched[r.region].assign(((r.region_end + 31) >> 5) - (r.region_begin >> 5) + 1, 0);
    if (config->check_global_races && !r.read_only)
      l.cells[r.region].assign((r.region_end - r.region_begin) / config->global_granule + 1, Cell());
  }
  try {
    run(l);
    return 0;
  } catch (const Error& e) {
    *error = {e.kind, e.op, e.other_op, {e.block[0], e.block[1], e.block[2]}, {e.thread[0], e.thread[1], e.thread[2]},
              {}};
    std::copy_n(e.text.data(), std::min(e.text.size(), sizeof error->text - 1), error->text);
    return 1;
  }
}
}
