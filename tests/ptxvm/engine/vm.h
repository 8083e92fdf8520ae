// The machine: a warp's 32 lanes execute one instruction at a time under a mask; nothing here knows PTX text.
// A register is an array of 32 lane values at a byte offset of the warp's register file; a predicate is one 32-bit
// mask.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

namespace vm {
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
constexpr u32 FULL = ~0u;
constexpr u32 NO_REG = ~0u;

struct Warp;
struct Op;
enum class Flow { next, jumped, blocked };
using Handler = Flow (*)(Warp&, const Op&, u32 mask);

// Same layout as OP in program.py.
struct Op {
  u32 handler, guard, guard_negated, flags;
  u32 a[16];
  i64 imm[2];
  u32 n;      // operands of a vector
  u32 shape;  // space, matrix shape or comparison, as the handler says
};

// Counters of one op over a launch; same layout as COUNTER in counts.py.
struct OpCount {
  u64 warps, lanes;                   // executions
  u64 bytes, sectors, ideal_sectors;  // global memory
  u64 wavefronts, ideal_wavefronts;   // shared memory
};

// One tensor (or module variable) that the kernel may touch; same layout as RANGE in launch.py.
struct Range {
  u64 begin, end;
  u64 bytes_read, bytes_written, sectors_read, sectors_written;  // counted
  u64 unique_sectors_read, unique_sectors_written;
  u64 region_begin, region_end;  // overlapping ranges share a region, and its shadow
  u32 region, read_only;
};

enum ErrorKind : u32 {
  OUT_OF_BOUNDS = 1,
  MISALIGNED,
  RACE,
  DEADLOCK,
  DIVERGENCE,
  UNINITIALISED,
  ASYNC_HAZARD,
  TRAP,
  LIMIT
};
struct Error {
  ErrorKind kind;
  std::string text;
  u32 op, other_op;
  u32 block[3], thread[3];
};

// Address windows of generic pointers that are not global memory. Host pointers stay below 2^47.
constexpr u64 SHARED_WINDOW = 1ull << 56, LOCAL_WINDOW = 1ull << 57, PARAM_WINDOW = 1ull << 58,
              WINDOW_BITS = 0xffffffffull;
enum Space : u32 { GLOBAL = 0, SHARED = 1, LOCAL = 2, PARAM = 3, GENERIC = 4 };

enum Flag : u32 {
  FTZ = 1,
  SAT = 2,
  RZ = 4,
  RM = 8,
  RP = 16,
  RELU = 32,
  NAN_WINS = 64,
  XORSIGN = 128,
  RNA = 256,
  SATFINITE = 512,
  CC_IN = 1024,
  CC_OUT = 2048,
  ACQUIRE = 4096,
  RELEASE = 8192,
  STRONG = 16384,
  READ_ONLY = 32768,
  RNI = 65536,
  TRANS = 131072,
  NO_RETURN = 262144,
  TO_INTEGRAL = 524288
};

enum class State : u8 { ready, rendezvous, barrier };
struct Group {  // lanes of a warp at one pc
  u32 mask, pc;
  State state;
  u32 barrier_id, barrier_count;
};

struct AsyncCopy {
  u64 source;
  u32 dest;
  u16 bytes, copied;
  u8 lane;
  u32 op;
  u64 group;
};

// Vector time of a warp: seen[v] is the last finished epoch of warp v of the block that this warp is ordered after.
using Clocks = std::vector<u32>;
using Remote = std::unordered_map<u64, Clocks>;  // the same for the warps of other blocks
struct Published {
  u64 block;
  Clocks own;
  Remote remote;
};
using Snapshot = std::shared_ptr<const Published>;

struct Block;
struct Warp {
  u8* regs = nullptr;
  Block* block = nullptr;
  u32 id = 0, lanes = 0, live = 0;  // lanes: threads that exist; live: those that have not exited
  std::vector<Group> groups;
  u32 current = 0, spin = 0, epoch = 1;
  Clocks seen;
  Remote remote;
  Snapshot fenced;                // what a relaxed atomic publishes: the state at the last fence
  std::vector<Snapshot> pending;  // what the next fence will make seen
  std::vector<AsyncCopy> copies;
  u64 committed[32] = {};
  std::vector<u8> local;
  u32 carry = 0;  // condition code CC.CF, one bit per lane
  template <class T>
  T* reg(u32 offset) {
    return reinterpret_cast<T*>(regs + offset);
  }
  u32& pred(u32 offset) { return *reinterpret_cast<u32*>(regs + offset); }
  Group& group() { return groups[current]; }
  bool ready() const {
    for (auto& g : groups)
      if (g.state == State::ready) return true;
    return false;
  }
};

struct Cell {  // shadow of one granule of memory: last write, and the last reads of two different warps
  u32 write_time, write_warp, write_op, read_time[2], read_warp[2], read_op;
  u8 write_lane, read_lane[2], atomic;
};
constexpr u8 MANY_LANES = 0xff;

struct Barrier {
  u32 arrived = 0, warps = 0, pc = NO_REG, count = 0, votes = 0, threads = 0;
  Clocks clock;
  Remote remote;
};

struct Launch;
struct Block {
  Launch* launch = nullptr;
  u32 index[3] = {};
  u64 linear = 0;
  std::vector<Warp> warps;
  std::vector<u8> shared, state;  // state per byte: bit 0 initialised, above it the cp.async copies in flight
  std::vector<Cell> cells;
  std::unordered_map<u64, Snapshot> sync;
  Barrier barriers[16];
  u32 exited = 0;
};

// Same layout as CONFIG in launch.py.
struct Config {
  u32 grid[3], block[3];
  u32 shared_bytes, local_bytes, param_bytes, reg_bytes, const_bytes, n_ops, n_ranges, n_specials;
  u32 seed, resident, check_races, check_global_races, check_uninitialised, late_copies, shared_granule, global_granule;
  u32 dynamic_shared_bytes, word_atomics;
  u64 max_ops;
};

struct Launch {
  const Config* config = nullptr;
  const Op* ops = nullptr;
  std::vector<Handler> handlers;
  OpCount* counts = nullptr;
  Range* ranges = nullptr;
  std::vector<std::vector<Cell>> cells;  // global shadow, per region
  std::vector<std::vector<u8>> touched;  // per region and sector: bit 0 read, bit 1 written
  u32 last_range = 0;
  std::unordered_map<u64, Snapshot> sync;  // per address of an atomic
  const u8* params = nullptr;
  const u8* consts = nullptr;
  const u32* specials = nullptr;
  u32 threads = 0, n_warps = 0;
  u64 executed = 0;
  std::mt19937 random;
};

// Inside a range. 16-bit atomics are compiled to compare-and-swap of the 4-byte word around them, which may reach
// beyond.
inline bool inside(const Launch& l, u32 i, u64 begin, u32 bytes) {
  const Range& r = l.ranges[i];
  const u64 slack = l.config->word_atomics && bytes == 4 ? 3 : 0;
  return begin >= (r.begin & ~slack) && begin + bytes <= ((r.end + slack) & ~slack);
}

[[noreturn]] void fail(ErrorKind kind, const Warp& w, u32 lane, std::string text, u32 op = NO_REG,
                       u32 other_op = NO_REG);
u32 op_index(const Warp& w, const Op& op);
std::string thread_name(const Block& b, u32 warp, u32 lane);

// sync.cpp: who is ordered after whom
Flow rendezvous(Warp& w, const Op& op, u32 mask, u32 wanted, const char* what);
Flow whole_warp(Warp& w, const Op& op, u32 mask, const char* what);
void warp_synced(Warp& w);
void join(Clocks& to, const Clocks& from);
void fence(Warp& w);
void synchronise(Warp& w, std::unordered_map<u64, Snapshot>& map, u64 key, u32 flags, bool reads, bool writes);
bool ordered(const Warp& w, u32 lane, u32 other_warp, u32 time, u8 other_lane);
inline u32 global_id(const Warp& w) { return u32(w.block->linear * w.block->launch->n_warps + w.id); }
// copies.cpp: cp.async
void finish_copies(Warp& w, u32 mask, u64 keep, bool all);
void drop_copies(Warp& w, u32 mask);
// schedule.cpp
void run(Launch& l);

void define(const char* name, Handler h);
struct Define {
  Define(const char* name, Handler h) { define(name, h); }
};
}  // namespace vm
