// Bounds, alignment and counters of memory accesses.
#include "memory.h"

#include <algorithm>

namespace vm {
namespace {
std::string number(u64 x) { return std::to_string(x); }

Range& find_range(Warp& w, const Op& op, const Access& a, u32 lane, Kind kind) {
  Launch& l = *w.block->launch;
  const u64 begin = a.addr[lane], end = begin + a.bytes;
  Range* r = l.ranges;
  const u32 n = l.config->n_ranges;
  auto holds = [&](u32 i) { return inside(l, i, begin, a.bytes); };
  if (l.last_range < n && holds(l.last_range)) return r[l.last_range];
  for (u32 i = 0; i < n; i++)
    if (holds(i)) {
      l.last_range = i;
      return r[i];
    }
  u32 near = NO_REG;
  u64 distance = ~0ull;
  for (u32 i = 0; i < n; i++) {
    const u64 d = begin < r[i].begin ? r[i].begin - begin : end > r[i].end ? end - r[i].end : 0;
    if (d < distance) {
      distance = d;
      near = i;
    }
  }
  std::string where = near == NO_REG ? "no tensor was passed"
                      : begin < r[near].begin
                          ? number(r[near].begin - begin) + " bytes before the start of @range(" + number(near) + ")"
                          : "at byte " + number(begin - r[near].begin) + " of @range(" + number(near) + ") with its " +
                                number(r[near].end - r[near].begin) + " bytes";
  fail(OUT_OF_BOUNDS, w, lane,
       std::string("global ") +
           (kind == Kind::read    ? "read"
            : kind == Kind::write ? "write"
                                  : "atomic") +
           " of " + number(a.bytes) + " bytes " + where,
       op_index(w, op));
}

void count_global(Warp& w, const Op& op, const Access& a, Kind kind) {
  Launch& l = *w.block->launch;
  OpCount& c = l.counts[op_index(w, op)];
  u64 seen[64];
  u32 n = 0;
  u64 last = ~0ull;
  each(a.mask, [&](u32 i) {
    Range& r = find_range(w, op, a, i, kind);
    if (kind != Kind::read && r.read_only)
      fail(OUT_OF_BOUNDS, w, i, "write to constant memory @range(" + number(&r - l.ranges) + ")", op_index(w, op));
    if (kind != Kind::write) r.bytes_read += a.bytes;
    if (kind != Kind::read) r.bytes_written += a.bytes;
    for (u64 s = a.addr[i] >> 5; s <= (a.addr[i] + a.bytes - 1) >> 5; s++) {
      if (s == last) continue;
      last = s;
      bool known = false;
      for (u32 k = 0; k < n && !known; k++) known = seen[k] == s;
      if (known) continue;
      seen[n++] = s;
      u8& t = l.touched[r.region][s - (r.region_begin >> 5)];
      if (kind != Kind::write) {
        r.sectors_read++;
        r.unique_sectors_read += !(t & 1);
        t |= 1;
      }
      if (kind != Kind::read) {
        r.sectors_written++;
        r.unique_sectors_written += !(t & 2);
        t |= 2;
      }
    }
  });
  // The least number of sectors for these bytes: distinct addresses only.
  u64 sorted[32];
  u32 m = 0;
  each(a.mask, [&](u32 i) { sorted[m++] = a.addr[i]; });
  u64 distinct = m ? a.bytes : 0;
  bool rising = true;
  for (u32 i = 1; i < m; i++) rising &= sorted[i - 1] <= sorted[i];
  if (!rising) std::sort(sorted, sorted + m);
  for (u32 i = 1; i < m; i++) distinct += std::min<u64>(a.bytes, sorted[i] - sorted[i - 1]);
  c.bytes += u64(m) * a.bytes;
  c.sectors += n;
  c.ideal_sectors += (distinct + 31) / 32;
}

// Wavefronts: 32 banks of 4 bytes; 8-byte lanes go by half warps, 16-byte lanes by quarters. The same word is broadcast
// to all who read it, except to an atomic.
void count_shared(Warp& w, const Op& op, const Access& a, Kind kind) {
  OpCount& c = w.block->launch->counts[op_index(w, op)];
  const u32 group = a.bytes <= 4 ? 32 : a.bytes == 8 ? 16 : 8, words = a.bytes < 4 ? 1 : a.bytes / 4;
  for (u32 first = 0; first < 32; first += group) {
    u32 bank_words[32][32];
    u8 used[32] = {};
    u32 worst = 0;
    for (u32 i = first; i < first + group; i++) {
      if (!((a.mask >> i) & 1)) continue;
      for (u32 k = 0; k < words; k++) {
        const u32 word = u32(a.addr[i] >> 2) + k, bank = word & 31;
        bool known = false;
        for (u32 j = 0; j < used[bank] && !known; j++) known = bank_words[bank][j] == word;
        if (known && kind != Kind::atomic) continue;
        if (used[bank] < 32) bank_words[bank][used[bank]++] = word;
        worst = std::max<u32>(worst, used[bank]);
      }
    }
    c.wavefronts += worst;
    c.ideal_wavefronts += worst > 0;
  }
}

void check_window(Warp& w, const Op& op, Access& a, u8* base, u64 size, const char* what, u64 per_lane) {
  each(a.mask, [&](u32 i) {
    if (a.addr[i] + a.bytes > size || a.addr[i] > size)
      fail(OUT_OF_BOUNDS, w, i,
           std::string(what) + " access of " + number(a.bytes) + " bytes at offset " + number(a.addr[i]) + " of " +
               number(size),
           op_index(w, op));
    a.host[i] = base + a.addr[i] + i * per_lane;
  });
}
bool shadowed(const Warp& w, const Access& a) {
  const Config& c = *w.block->launch->config;
  return a.space == SHARED ? c.check_races : a.space == GLOBAL && c.check_global_races;
}
}  // namespace

void addresses(Warp& w, const Op& op, u32 mask, u64 (&addr)[32]) {
  const i64 offset = op.imm[0];
  if (op.a[0] == NO_REG) {
    for (auto& x : addr) x = u64(offset);
    return;
  }
  if (op.shape & ADDRESS_32) {
    const u32* p = w.reg<u32>(op.a[0]);
    for (int i = 0; i < 32; i++) addr[i] = u32(p[i] + u32(offset));
  } else {
    const u64* p = w.reg<u64>(op.a[0]);
    for (int i = 0; i < 32; i++) addr[i] = p[i] + u64(offset);
  }
  if ((op.shape & 7) != GLOBAL && (op.shape & 7) != GENERIC)
    for (auto& x : addr) x &= WINDOW_BITS;
  (void)mask;
}

void open(Warp& w, const Op& op, Access& a, Kind kind) {
  Block& b = *w.block;
  Launch& l = *b.launch;
  each(a.mask, [&](u32 i) {
    if (a.addr[i] & (a.align - 1))
      fail(MISALIGNED, w, i,
           "access aligned to " + number(a.align) + " bytes at address " + number(a.addr[i]) +
               ", which is no multiple of that",
           op_index(w, op));
  });
  switch (a.space) {
    case GLOBAL:
      count_global(w, op, a, kind);
      each(a.mask, [&](u32 i) { a.host[i] = reinterpret_cast<u8*>(a.addr[i]); });
      break;
    case SHARED:
      check_window(w, op, a, b.shared.data(), b.shared.size(), "shared", 0);
      count_shared(w, op, a, kind);
      each(a.mask, [&](u32 i) { check_shared_state(w, op, i, u32(a.addr[i]), a.bytes, kind != Kind::write); });
      break;
    case LOCAL:
      check_window(w, op, a, w.local.data(), l.config->local_bytes, "local", l.config->local_bytes);
      return;
    default:
      check_window(w, op, a, const_cast<u8*>(l.params), l.config->param_bytes, "parameter", 0);
      return;
  }
  if (kind == Kind::write) return;
  if (shadowed(w, a)) each(a.mask, [&](u32 i) { note(w, op, i, a, kind, false); });
}

void store(Warp& w, const Op& op, Access& a, const u8* data) {
  const bool shadow = shadowed(w, a);
  auto same_value = [&](u32 i) { return std::memcmp(a.host[i], data + i * a.bytes, a.bytes) == 0; };
  // Against the readers before any lane has written: the second of two lanes that write one value finds it there.
  if (shadow)
    each(a.mask, [&](u32 i) {
      if (!same_value(i)) note(w, op, i, a, Kind::intent, false);
    });
  each(a.mask, [&](u32 i) {
    const u8* from = data + i * a.bytes;
    if (shadow) note(w, op, i, a, Kind::write, same_value(i));
    std::memcpy(a.host[i], from, a.bytes);
    if (a.space == SHARED) std::memset(w.block->state.data() + a.addr[i], 1, a.bytes);
  });
}
}  // namespace vm
