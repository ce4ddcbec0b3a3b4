#include "cpu/plan.h"

namespace peft_fast {
namespace {

// pack_panels of a matrix in codes: decoded a strip at a time, which is packed while it is in the first-level cache
void decode_panels(const Engine& e, int64_t r0, int64_t K, int64_t N, const Source& b, int64_t p0, int64_t p1,
                   char* out, int64_t stride) {
  constexpr int64_t DEPTH = 256, ROWS = 32, PANELS = 8;  // of a strip along b's rows and along its columns
  const bool along = b.row == 1;                         // neighbours in memory are a column's
  const int64_t size = e.element(), ld = along ? DEPTH : PANELS * e.nr;
  Scratch own((along ? e.nr : ROWS) * ld * size);
  const Source strip{own.data(), e.half, along ? 1 : ld, along ? ld : 1, b.round && !e.half};
  auto panel = [&](int64_t p, int64_t k0, int64_t k, int64_t j) {
    const int64_t n = std::min<int64_t>(e.nr, N - p * e.nr);
    const int width = e.width(n);
    e.panel(strip, 0, k, j, n, width, out + (p - p0) * stride + k0 * width * size);
  };
  if (along) {
    for (int64_t p = p0; p < p1; ++p)
      for (int64_t k0 = 0; k0 < K; k0 += DEPTH) {
        const int64_t k = std::min(DEPTH, K - k0), n = std::min<int64_t>(e.nr, N - p * e.nr);
        for (int64_t j = 0; j < n; ++j)
          e.decode(*b.codes, (p * e.nr + j) * b.col + r0 + k0, k, e.half, own.data() + j * ld * size);
        panel(p, k0, k, 0);
      }
    return;
  }
  for (int64_t first = p0; first < p1; first += PANELS)
    for (int64_t k0 = 0; k0 < K; k0 += ROWS) {
      const int64_t last = std::min(p1, first + PANELS), k = std::min(ROWS, K - k0);
      const int64_t n = std::min(N, last * e.nr) - first * e.nr;
      for (int64_t i = 0; i < k; ++i)
        e.decode(*b.codes, (r0 + k0 + i) * b.row + first * e.nr, n, e.half, own.data() + i * ld * size);
      for (int64_t p = first; p < last; ++p) panel(p, k0, k, (p - first) * e.nr);
    }
}

}  // namespace

void pack_panels(const Engine& e, int64_t r0, int64_t K, int64_t N, const Source& b, int64_t p0, int64_t p1, char* out,
                 int64_t stride) {
  if (b.codes) return decode_panels(e, r0, K, N, b, p0, p1, out, stride);
  // columns that lie together in memory are read along the rows, a few rows at a time for all panels: a cold weight
  // then streams in, where one panel after another would touch every page of it for a line or two
  constexpr int64_t ROWS = 32;
  const int64_t step = b.col == 1 ? ROWS : std::max<int64_t>(K, 1);
  for (int64_t k0 = 0; k0 < K; k0 += step)
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t j = p * e.nr, n = std::min<int64_t>(e.nr, N - j);
      const int width = e.width(n);
      e.panel(b, r0 + k0, std::min(step, K - k0), j, n, width, out + (p - p0) * stride + k0 * width * e.element());
    }
}

Plan::Plan(const Engine& engine, const Product& p, int64_t most) : e(engine), product(p) {
  const int64_t size = e.element();
  int64_t depth = 0, low = 0;
  // strips begin at whole bytes of a mask
  auto wide = [&](int64_t k) { return round_up(e.padded(k), 8); };
  for (const Left& left : p.lefts) depth += wide(left.k);
  const int64_t count = std::max<int64_t>(1, ceil_div(depth * size, e.pass));
  const int64_t step = std::max<int64_t>(e.kpad, round_up(ceil_div(depth, count), std::max(e.kpad, 8)));
  passes.resize(std::max<int64_t>(1, ceil_div(depth, step)));
  int64_t at = 0;
  for (size_t l = 0; l < p.lefts.size(); ++l)
    for (int64_t k0 = 0; k0 < p.lefts[l].k;) {
      const int64_t k = std::min(p.lefts[l].k - k0, step - at % step);
      passes[at / step].push_back({l, k0, k, at % step});
      k0 += k;
      at += wide(k);
    }
  row = padded_row(e, std::min(step, std::max<int64_t>(depth, e.kpad)));
  int64_t panels = 0, deepest = 0;
  for (const Columns& c : p.columns) {
    Part part{ceil_div(c.N, e.nr), 0, low, passes.size(), 0};
    for (const LowRank& l : c.low) low += e.padded(l.k);
    for (size_t i = 0; i < passes.size(); ++i)
      for (const Strip& s : passes[i])
        if (c.rights[s.left].b.data) part.first = std::min(part.first, i), part.last = i;
    part.first = std::min(part.first, part.last);  // no product at all: still an output
    parts.push_back(part);
    panels += part.panels;
  }
  for (const Packed& packed : layer(0, passes.size()).packed) deepest = std::max(deepest, packed.bytes);
  low_row = padded_row(e, std::max<int64_t>(low, e.kpad));
  const int64_t wanted = std::min(panels, CHUNK_PANELS) * deepest;
  const int64_t n = std::clamp<int64_t>((wanted + most / 2) / most, 1, passes.size());
  for (int64_t i = 0; i < n; ++i) {
    layers.push_back(layer(i * passes.size() / n, (i + 1) * passes.size() / n));
    for (size_t c = 0; c < parts.size(); ++c) parts[c].bytes = std::max(parts[c].bytes, layers[i].packed[c].bytes);
  }
}

std::vector<Chunk> Plan::chunks(int64_t most, int64_t panels) const {
  int64_t total = 0, before = 0;
  for (const Part& part : parts) {
    total += part.panels * part.bytes;
    most = std::max(most, panels * part.bytes);
  }
  const int64_t count = std::max<int64_t>(1, ceil_div(total, most));
  std::vector<Chunk> all(count);
  for (size_t c = 0; c < parts.size(); ++c)
    for (int64_t p = 0; p < parts[c].panels; ++p, before += parts[c].bytes) {
      Chunk& chunk = all[std::min(count - 1, before * count / std::max<int64_t>(total, 1))];
      if (chunk.cuts.empty() || chunk.cuts.back().column != c)
        chunk.cuts.push_back({c, p, p, chunk.panels, chunk.bytes});
      ++chunk.cuts.back().p1;
      ++chunk.panels;
      chunk.bytes += parts[c].bytes;
    }
  std::erase_if(all, [](const Chunk& chunk) { return chunk.panels == 0; });
  return all;
}

void Plan::pack(const Layer& layer, const Chunk& chunk, int64_t q0, int64_t q1, char* data) const {
  chunk.each(q0, q1, [&](const Cut& cut, int64_t p0, int64_t p1) {
    const Columns& c = product.columns[cut.column];
    const Part& part = parts[cut.column];
    const Packed& packed = layer.packed[cut.column];
    char* to = data + cut.data + (p0 - cut.p0) * part.bytes;
    for (size_t l = 0; l < c.rights.size(); ++l)
      if (c.rights[l].b.data && !c.rights[l].packed)
        pack_panels(e, packed.k0[l], packed.k[l], c.N, c.rights[l].b, p0, p1, to + packed.at[l], part.bytes);
    to += packed.low_b;
    for (const LowRank& l : c.low) {
      if (!layer.holds(part.last)) break;
      pack_panels(e, 0, l.k, c.N, l.b, p0, p1, to, part.bytes);
      to += e.padded(l.k) * e.nr * e.element();
    }
  });
}

void Plan::finish(const Columns& c, int64_t p, std::vector<Segment>& apart, const char* panel, const Packed& packed,
            const Work& w, float* to, int64_t ldc, int m, int n, int width, int64_t i0) const {
  const int64_t size = e.element(), j0 = p * e.nr;
  auto product_of = [&](Segment& s) {
    e.tile(&s, 1, w.z, e.nr, m, width, false);
    s.a = (const char*)s.a + e.mr * s.lda * size;
  };
  if (c.last) {
    product_of(apart[0]);
    const char* right = (const char*)c.rights[0].packed;
    right = right ? right + p * e.padded(product.lefts[0].k) * e.nr * size : panel + packed.at[0];
    return c.last->tile(to, ldc, w.z, e.nr, m, n, width, i0, j0, right);
  }
  size_t next = 0;
  for (const LowRank& l : c.low) {
    if (!l.mask.mask) continue;
    product_of(apart[next++]);
    e.add_masked(to, ldc, w.z, e.nr, m, n, l.mask, i0, j0, l.mask_scale);
  }
  e.finish(to, ldc, m, n, i0, j0, c.y);
}

void Plan::run(const Layer& layer, const Chunk& chunk, const char* data, int64_t i0, int64_t m, int64_t q0, int64_t q1,
         const Work& w, bool a_ready) const {
  const int64_t size = e.element();
  chunk.each(q0, q1, [&](const Cut& cut, int64_t, int64_t) {
    if (!layer.holds(parts[cut.column].last)) return;
    int64_t at = parts[cut.column].low_a;
    for (const LowRank& l : product.columns[cut.column].low) {
      e.rows(l.a, i0, m, 0, l.k, w.low_a + at * size, low_row);
      at += e.padded(l.k);
    }
  });
  std::vector<Segment> segments, apart;
  for (size_t pass = layer.begin; pass < layer.end; ++pass) {
    if (!a_ready)
      for (const Strip& s : passes[pass])
        e.rows(product.lefts[s.left].a, i0, m, s.k0, s.k, w.a + s.at * size, row);
    chunk.each(q0, q1, [&](const Cut& cut, int64_t p0, int64_t p1) {
      const Columns& c = product.columns[cut.column];
      const Part& part = parts[cut.column];
      const Packed& packed = layer.packed[cut.column];
      if (pass < part.first || pass > part.last) return;
      for (int64_t p = p0; p < p1; ++p) {
        const int64_t j0 = p * e.nr;
        const int n = int(std::min<int64_t>(e.nr, c.N - j0)), width = e.width(n);
        const char* panel = data + cut.data + (p - cut.p0) * part.bytes;
        segments.clear();
        apart.clear();
        for (const Strip& s : passes[pass]) {
          const Right& right = c.rights[s.left];
          if (!right.b.data) continue;
          const int64_t whole = e.padded(product.lefts[s.left].k) * e.nr * size;
          const char* b = right.packed ? (const char*)right.packed + p * whole + s.k0 * width * size
                                       : panel + packed.at[s.left] + (s.k0 - packed.k0[s.left]) * width * size;
          const int64_t k = e.padded(s.k);
          for (int64_t d = 0; d < k; d += e.depth)
            segments.push_back({std::min(e.depth, k - d), w.a + (s.at + d) * size, row, b + d * width * size});
        }
        const size_t deep = segments.size();
        if (pass == part.last) {
          const char *a = w.low_a + part.low_a * size, *b = panel + packed.low_b;
          for (const LowRank& l : c.low) {
            const int64_t k = e.padded(l.k);
            (l.mask.mask || c.last ? apart : segments).push_back({k, a, low_row, b});
            a += k * size;
            b += k * e.nr * size;
          }
        }
        const bool split = part.first < part.last;
        // a stretch of k at a time; with the last goes all that is low-rank, so that a row of A no longer than a
        // stretch takes one, as one_bytes() has it
        for (size_t begin = 0, end = 0; begin == 0 || begin < segments.size(); begin = end) {
          for (int64_t k = 0; end < deep && (end == begin || k + segments[end].k <= e.depth);) k += segments[end++].k;
          if (end == deep) end = segments.size();
          const bool start = pass == part.first && begin == 0, last = pass == part.last && end == segments.size();
          const int64_t ldc = split ? w.c_row : e.nr, step = split || !start || !last ? e.mr * ldc : 0;
          float* to = split ? w.c + (cut.q0 + p - cut.p0 - q0) * e.nr : w.one;
          for (int64_t i = 0; i < m; i += e.mr, to += step) {
            const int mi = int(std::min<int64_t>(e.mr, m - i));
            e.tile(segments.data() + begin, int(end - begin), to, ldc, mi, width, !start);
            for (size_t s = begin; s < end; ++s)
              segments[s].a = (const char*)segments[s].a + e.mr * segments[s].lda * size;
            if (last) finish(c, p, apart, panel, packed, w, to, ldc, mi, n, width, i0 + i);
          }
          if (end == 0) break;
        }
      }
    });
  }
}

Plan::Layer Plan::layer(size_t begin, size_t end) const {
  Layer layer{begin, end, {}};
  for (size_t i = 0; i < parts.size(); ++i) {
    const Columns& c = product.columns[i];
    const size_t n = c.rights.size();
    Packed packed{std::vector<int64_t>(n), std::vector<int64_t>(n), std::vector<int64_t>(n), 0, 0};
    for (size_t pass = begin; pass < end; ++pass)
      for (const Strip& s : passes[pass]) {
        if (packed.k[s.left] == 0) packed.k0[s.left] = s.k0;
        packed.k[s.left] += s.k;
      }
    const int64_t line = e.nr * e.element();
    for (size_t l = 0; l < n; ++l) {
      packed.at[l] = packed.low_b;
      if (c.rights[l].b.data && !c.rights[l].packed) packed.low_b += e.padded(packed.k[l]) * line;
    }
    packed.bytes = packed.low_b;
    for (const LowRank& l : c.low)
      if (layer.holds(parts[i].last)) packed.bytes += e.padded(l.k) * line;
    layer.packed.push_back(std::move(packed));
  }
  return layer;
}

}  // namespace peft_fast
