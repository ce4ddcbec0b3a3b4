#include "cpu/gemm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/plan.h"

namespace peft_fast {
namespace {

constexpr int64_t CHUNK_BYTES = 4 << 20;  // of packed B at a time: stays in the last-level cache
constexpr int64_t WHOLE_PANELS = 4;       // of a chunk at the least whose epilogue must find them whole
constexpr int64_t WHOLE = INT64_MAX / 2;
constexpr int64_t LAYER_ROWS = 4096;      // whose accumulators wait between layers at a time

}  // namespace

int64_t packed_bytes(const Engine& e, int64_t K, int64_t N) {
  return ceil_div(N, e.nr) * e.nr * e.padded(K) * e.element();
}

void pack(const Engine& e, int64_t K, int64_t N, const Source& b, void* out) {
  const int64_t bytes = e.padded(K) * e.nr * e.element();
  torch::stable::parallel_for(0, ceil_div(N, e.nr), 1, [&](int64_t p0, int64_t p1) {
    pack_panels(e, 0, K, N, b, p0, p1, (char*)out + p0 * bytes, bytes);
  });
}

void gemm(const Engine& e, int64_t M, const Product& main, const Product* before) {
  if (M == 0) return;
  const bool whole = !main.columns.empty() && main.columns[0].last;
  const Plan plan(e, main, whole ? WHOLE : CHUNK_BYTES);
  const std::vector<Chunk> chunks = plan.chunks(CHUNK_BYTES, whole ? WHOLE_PANELS : CHUNK_PANELS);
  if (chunks.empty()) {
    if (before) gemm(e, M, *before);
    return;
  }
  const int64_t threads = torch::stable::get_num_threads();
  // rows at a time: all, but accumulators that wait between layers must not grow with M
  const int64_t span = plan.in_layers() ? std::min(M, LAYER_ROWS) : M;
  int64_t mc = std::max<int64_t>(e.mr, e.block / (plan.row * e.element()) / e.mr * e.mr);
  // blocks differ by one tile at the most, and every thread gets as many of them
  const int64_t most_tiles = ceil_div(span, e.mr);
  const int64_t most_blocks = std::min(round_up(ceil_div(span, mc), threads), most_tiles);
  mc = ceil_div(most_tiles, most_blocks) * e.mr;
  // few rows: cut the columns too, so that every thread has work; what they all read must then be complete
  const int64_t share = std::max<int64_t>(1, threads / most_blocks);
  if (before && share > 1) {
    gemm(e, M, *before);
    before = nullptr;
  }
  const Product none;
  const Plan first(e, before ? *before : none, WHOLE);
  std::vector<Chunk> skinny = first.chunks(WHOLE);
  if (skinny.empty()) skinny.emplace_back();
  const Chunk& ahead = skinny.front();
  const bool a_ready = plan.passes.size() == 1 && first.passes.size() == 1 && plan.same_lefts(first);

  int64_t most = 0, most_panels = 0;
  for (const Chunk& chunk : chunks) {
    most = std::max(most, round_up(chunk.bytes, 64));
    most_panels = std::max(most_panels, chunk.panels);
  }
  const int64_t ahead_bytes = round_up(ahead.bytes, 64);
  Scratch shared(ahead_bytes + most + (plan.in_layers() ? plan.c_bytes(most_tiles * e.mr, most_panels) : 0) + 64);
  char* panels = shared.data() + ahead_bytes;
  float* waiting = (float*)(panels + most);
  // one layer of one chunk over rows [begin, begin + rows)
  auto run = [&](const Plan::Layer& layer, const Chunk& chunk, int64_t begin, int64_t rows, int64_t also) {
    torch::stable::parallel_for(0, chunk.panels + also, 1, [&](int64_t q0, int64_t q1) {
      plan.pack(layer, chunk, q0, std::min(q1, chunk.panels), panels);
      if (also) first.pack(first.layers[0], ahead, q0 - chunk.panels, q1 - chunk.panels, shared.data());
    });
    const int64_t tiles = ceil_div(rows, e.mr), blocks = std::min(most_blocks, tiles);
    const int64_t cuts = std::min(chunk.panels, share), per_cut = ceil_div(chunk.panels, cuts);
    torch::stable::parallel_for(0, blocks * cuts, 1, [&](int64_t t0, int64_t t1) {
      const int64_t a = std::max(plan.a_bytes(mc), first.a_bytes(mc)), low = plan.low_bytes(mc), z = 64 * 64 * 4;
      const int64_t one = std::max(plan.one_bytes(mc), first.one_bytes(mc));
      const int64_t c = plan.in_layers() ? 0 : plan.c_bytes(mc, per_cut);
      Scratch own(a + low + z + one + std::max(c, first.c_bytes(mc, also)));
      char* at = own.data();
      float* z_at = (float*)(at + a + low);
      Plan::Work w{at, at + a, z_at, z_at + 64 * 64, z_at + 64 * 64 + one / 4, 0};
      const Session session(e);
      for (int64_t t = t0; t < t1; ++t) {
        const int64_t block = t / cuts, i = block * tiles / blocks * e.mr;
        const int64_t m = std::min(rows, (block + 1) * tiles / blocks * e.mr) - i;
        const int64_t q0 = t % cuts * per_cut, q1 = std::min(chunk.panels, q0 + per_cut);
        if (also) {
          w.c_row = also * e.nr;
          first.run(first.layers[0], ahead, shared.data(), begin + i, m, 0, also, w, false);
        }
        if (q0 >= q1) continue;
        Plan::Work main = w;
        main.c_row = (plan.in_layers() ? chunk.panels : q1 - q0) * e.nr;
        if (plan.in_layers()) main.c = waiting + i * main.c_row + q0 * e.nr;
        plan.run(layer, chunk, panels, begin + i, m, q0, q1, main, also && a_ready);
      }
    });
  };
  for (const Chunk& chunk : chunks)
    for (int64_t begin = 0; begin < M; begin += span)
      for (const Plan::Layer& layer : plan.layers) {
        const bool start = &chunk == &chunks.front() && &layer == &plan.layers.front();
        run(layer, chunk, begin, std::min(span, M - begin), start ? ahead.panels : 0);
      }
}

}  // namespace peft_fast
