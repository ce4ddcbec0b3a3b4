#include "cpu/engine.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace peft_fast {
namespace {

#if defined(__x86_64__) && defined(__linux__)
// cpuid leaf 7: subleaf 0 edx bits 22 and 24 = AMX-BF16 and AMX-TILE; the kernel must then grant the tile state
[[maybe_unused]] bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#else
[[maybe_unused]] bool has_amx() { return false; }
bool has_avx512_bf16() { return false; }
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

struct Isa {
  const char* name;
  IsaEngines engines;
};

std::vector<float> integers(int n, int step, int period) {
  std::vector<float> all(n);
  for (int i = 0; i < n; ++i) all[i] = float(i * step % period - period / 2);
  return all;
}

// the same for the products of few tokens with a weight as it lies in memory
bool reads_rows(const Engine& e) {
  constexpr int M = 7, N = 37, K = 150, LD = 160;
  const std::vector<float> a = integers(M * K, 7, 5), b = integers(K * N, 3, 7);
  std::vector<char> x(M * LD * 4), w(N * K * 4);
  std::vector<float> c(M * 256), wide(M * LD);
  const Source sa{a.data(), false, K, 1}, sb{b.data(), false, 1, N};  // b (K, N) as (N, K)
  e.rows(sb, 0, N, 0, K, w.data(), K);
  e.rows(sa, 0, M, 0, K, x.data(), LD);
  bool good = true;
  auto check = [&] {
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) {
        float t = 0;
        for (int k = 0; k < K; ++k) t += a[m * K + k] * b[k * N + n];
        good = good && c[m * 256 + n] == t;
      }
  };
  e.dots(w.data(), e.half, K, N, x.data(), LD, K, M, c.data(), 256, false);
  check();
  for (int m = 0; m < M; ++m) std::copy_n(a.data() + m * K, K, wide.data() + m * LD);
  e.sums(b.data(), false, N, N, wide.data(), LD, K, M, c.data(), 256);
  check();
  return good;
}

// a product of small integers is exact in every engine: one that differs has no business computing
bool works(const Engine& e) {
  constexpr int M = 19, N = 37, K = 70;
  const std::vector<float> a = integers(M * K, 7, 5), b = integers(K * N, 3, 7);
  std::vector<float> c((M + 64) * 64 + 64);
  const int64_t kp = e.padded(K);
  std::vector<char> pa(64 * kp * e.element()), pb(64 * kp * e.element());
  const Source sa{a.data(), false, K, 1}, sb{b.data(), false, N, 1};
  bool good = true;
  alignas(64) char saved[64];
  if (e.enter) e.enter(saved);
  for (int i = 0; i < M && good; i += e.mr) {
    const int m = std::min(e.mr, M - i);
    e.rows(sa, i, m, 0, K, pa.data(), kp);
    for (int j = 0; j < N && good; j += e.nr) {
      const int n = std::min(e.nr, N - j), width = e.width(n);
      e.panel(sb, 0, K, j, n, width, pb.data());
      const Segment whole{kp, pa.data(), kp, pb.data()};
      e.tile(&whole, 1, c.data(), 64, m, width, false);
      for (int r = 0; r < m; ++r)
        for (int s = 0; s < n; ++s) {
          float t = 0;
          for (int k = 0; k < K; ++k) t += a[(i + r) * K + k] * b[k * N + j + s];
          good = good && c[r * 64 + s] == t;
        }
    }
  }
  if (e.leave) e.leave(saved);
  return good && reads_rows(e);
}

std::vector<Isa> live_isas() {
  std::vector<Isa> live{{"portable", portable_engines()}};
  auto add = [&](const char* name, bool has, IsaEngines engines) {
    if (has && engines.f32 && works(*engines.f32) && works(*engines.bf16)) live.push_back({name, engines});
  };
  add("avx2", has_avx2(), avx2_engines());
  add("avx512", has_avx512(), avx512_engines());
  add("avx512_bf16", has_avx512() && has_avx512_bf16(), avx512_bf16_engines());
#if defined(PEFT_FAST_EMULATE_AMX)
  add("amx", has_avx512(), amx_engines());
#else
  add("amx", has_avx512() && has_avx512_bf16() && has_amx(), amx_engines());
#endif
  return live;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> live = live_isas();
  return live;
}

const Isa*& current() {
  static const Isa* isa = &isas().back();
  return isa;
}

}  // namespace

const Engine& engine(bool bf16) { return bf16 ? *current()->engines.bf16 : *current()->engines.f32; }

const char* current_isa() { return current()->name; }

const char* select_isa(const char* name) {
  // weakest first: the choice is a cap, so a name the machine lacks takes the best one below it
  static const char* const order[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
  int cap = 4;
  for (int i = 0; i < 5; ++i)
    if (!std::strcmp(order[i], name)) cap = i;
  for (const Isa& isa : isas())
    for (int i = 0; i <= cap; ++i)
      if (!std::strcmp(order[i], isa.name)) current() = &isa;
  return current()->name;
}

}  // namespace peft_fast
