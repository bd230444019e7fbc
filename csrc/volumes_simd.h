// The loops of triplane_accumulate for one instruction set: volumes.cpp includes this text once
// for each, inside a namespace and a target pragma. No include guard, no includes.

constexpr int kLanes = FASTEMBED_LANES;  // 16 is AVX-512, 8 is AVX2
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));

FASTEMBED_INLINE Floats load(const float* from) {
  Floats value;
  memcpy(&value, from, sizeof value);
  return value;
}

FASTEMBED_INLINE void store(Floats value, float* to) { memcpy(to, &value, sizeof value); }

FASTEMBED_INLINE Floats lerp(Floats low, Floats high, Floats weight) {
  return low + weight * (high - low);
}

FASTEMBED_INLINE Floats pick(Floats from, const int32_t* lanes) {
  Ints at;
  memcpy(&at, lanes, sizeof at);
#if FASTEMBED_LANES == 16
  return (Floats)_mm512_permutexvar_ps((__m512i)at, (__m512)from);
#elif FASTEMBED_LANES == 8
  return (Floats)_mm256_permutevar8x32_ps((__m256)from, (__m256i)at);
#else
  Floats value;
  for (int i = 0; i < kLanes; ++i) value[i] = from[at[i]];
  return value;
#endif
}

// Two vectors. kStream goes past the caches; `to` then is where a vector of its kind may lie.
template <bool kStream>
FASTEMBED_INLINE void store_two(Floats a, Floats b, float* to) {
  if (kStream) {
#if FASTEMBED_LANES == 16
    _mm512_stream_ps(to, (__m512)a);
    _mm512_stream_ps(to + kLanes, (__m512)b);
#elif FASTEMBED_LANES == 8
    _mm256_stream_ps(to, (__m256)a);
    _mm256_stream_ps(to + kLanes, (__m256)b);
#endif
  } else {
    store(a, to);
    store(b, to + kLanes);
  }
}

template <bool kStream>
FASTEMBED_INLINE void store_two(Floats a, Floats b, Float16* to) {
#if FASTEMBED_LANES == 16
  const __m256i halves[2] = {_mm512_cvtps_ph((__m512)a, 0), _mm512_cvtps_ph((__m512)b, 0)};
  const __m512i line = _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
  auto* target = reinterpret_cast<__m512i*>(to);
  if (kStream) {
    _mm512_stream_si512(target, line);
  } else {
    _mm512_storeu_si512(target, line);
  }
#elif FASTEMBED_LANES == 8
  const __m256i line =
      _mm256_set_m128i(_mm256_cvtps_ph((__m256)b, 0), _mm256_cvtps_ph((__m256)a, 0));
  auto* target = reinterpret_cast<__m256i*>(to);
  if (kStream) {
    _mm256_stream_si256(target, line);
  } else {
    _mm256_storeu_si256(target, line);
  }
#else
  float values[2 * kLanes];
  store(a, values);
  store(b, values + kLanes);
  for (int i = 0; i < 2 * kLanes; ++i) narrow(values[i], to[i]);
#endif
}

// A row of the slice after this one: from slice to slice is a step that no processor foresees. Row
// by row, since all of them at once would only queue.
template <class Token>
FASTEMBED_INLINE void prefetch(const Token* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t{sizeof(Token)}) __builtin_prefetch(row + i);
}

template <class Token>
FASTEMBED_INLINE void scaled(const Token* __restrict from, int64_t count, float scale,
                             float* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]) * scale;
}

template <bool kNear>
FASTEMBED_INLINE void expand_as(const float* __restrict tokens, const Columns& columns,
                                float* __restrict out) {
  const int32_t* __restrict base = columns.base;
  const int32_t* __restrict low = columns.low;
  const int32_t* __restrict high = columns.high;
  const float* __restrict weight = columns.weight;
  const int64_t vectors = columns.vectors;
  for (int64_t v = 0; v < vectors; ++v) {
    const float* from = tokens + base[v];
    Floats start, end;
    if (kNear) {
      const Floats near = load(from);
      start = pick(near, low + v * kLanes);
      end = pick(near, high + v * kLanes);
    } else {
      for (int i = 0; i < kLanes; ++i) {
        start[i] = from[low[v * kLanes + i]];
        end[i] = from[high[v * kLanes + i]];
      }
    }
    store(lerp(start, end, load(weight + v * kLanes)), out + v * kLanes);
  }
}

// The rows of a grid times the scale, upsampled along their columns, to rows `out_pitch` apart.
// All rows are scaled before the first is expanded: a vector that is read across two that were
// just written would wait for both to reach the cache.
template <class Token>
FASTEMBED_INLINE void expand(const TokenPlane& plane, Reach rows, const Columns& columns,
                             int64_t slice, int64_t c, float scale, float* tokens, float* out,
                             int64_t out_pitch) {
  const Token* grid =
      static_cast<const Token*>(plane.tokens) + slice * plane.slice_pitch + c * plane.channel_pitch;
  scaled(grid + rows.first * plane.columns, rows.count * plane.columns, scale, tokens);
  tokens += columns.reach.first;
  const Token* next = grid + plane.slice_pitch + rows.first * plane.columns;
  for (int64_t r = 0; r < rows.count; ++r, tokens += plane.columns, out += out_pitch) {
    prefetch(next + r * plane.columns, plane.columns);
    if (columns.near) {
      expand_as<true>(tokens, columns, out);
    } else {
      expand_as<false>(tokens, columns, out);
    }
  }
}

// 8 rows of `count` floats, `pitch` apart, to rows of 8, `out_pitch` apart; count is rounded up
// to 4.
FASTEMBED_INLINE void turn(const float* rows, int64_t pitch, int64_t count, float* out,
                           int64_t out_pitch) {
  using Four = float __attribute__((vector_size(16)));
  using Eight = float __attribute__((vector_size(32)));
  for (int64_t i = 0; i < count; i += 4) {
    Eight in[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      Four upper, lower;
      memcpy(&upper, rows + r * pitch + i, sizeof upper);
      memcpy(&lower, rows + (r + 4) * pitch + i, sizeof lower);
      in[r] = __builtin_shufflevector(upper, lower, 0, 1, 2, 3, 4, 5, 6, 7);
    }
    const Eight a = __builtin_shufflevector(in[0], in[1], 0, 8, 1, 9, 4, 12, 5, 13);
    const Eight b = __builtin_shufflevector(in[0], in[1], 2, 10, 3, 11, 6, 14, 7, 15);
    const Eight c = __builtin_shufflevector(in[2], in[3], 0, 8, 1, 9, 4, 12, 5, 13);
    const Eight d = __builtin_shufflevector(in[2], in[3], 2, 10, 3, 11, 6, 14, 7, 15);
    const Eight turned[4] = {__builtin_shufflevector(a, c, 0, 1, 8, 9, 4, 5, 12, 13),
                             __builtin_shufflevector(a, c, 2, 3, 10, 11, 6, 7, 14, 15),
                             __builtin_shufflevector(b, d, 0, 1, 8, 9, 4, 5, 12, 13),
                             __builtin_shufflevector(b, d, 2, 3, 10, 11, 6, 7, 14, 15)};
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) memcpy(out + (i + r) * out_pitch, &turned[r], sizeof turned[r]);
  }
}

// The tokens of yz, whose slices are x, with x innermost.
template <class Token>
FASTEMBED_INLINE void stage_yz(const TokenPlane& plane, Reach rows, Reach columns, int64_t width,
                               int64_t c, float scale, const Scratch& scratch) {
  const int64_t start = c * plane.channel_pitch + rows.first * plane.columns;
  for (int64_t x = 0; x < width; x += 8) {
    const int64_t slices = std::min<int64_t>(8, width - x);
    const Token* grid = static_cast<const Token*>(plane.tokens) + x * plane.slice_pitch + start;
    for (int64_t r = 0; r < rows.count; ++r) {
      for (int64_t i = 0; i < slices; ++i) {
        const Token* row = grid + i * plane.slice_pitch + r * plane.columns;
        prefetch(row + 8 * plane.slice_pitch, plane.columns);
        scaled(row, plane.columns, scale, scratch.tokens + i * scratch.token_pitch);
      }
      turn(scratch.tokens + columns.first, scratch.token_pitch, columns.count,
           scratch.turned + r * scratch.turned_columns * scratch.pitch + x, scratch.pitch);
    }
  }
}

// Two rows and the weight between them.
struct Between {
  const float* low;
  const float* high;
  float weight;
};

FASTEMBED_INLINE Between between(const Taps& taps, int64_t i, const float* rows, int32_t first,
                                 int64_t pitch) {
  return {rows + (taps.low[i] - first) * pitch, rows + (taps.high[i] - first) * pitch,
          taps.weight[i]};
}

FASTEMBED_INLINE bool same(const Taps& taps, int64_t i, int64_t j) {
  return taps.low[i] == taps.low[j] && taps.high[i] == taps.high[j];
}

// The rows of voxels that lie between the same rows of xy and the same of yz.
struct Run {
  Between xy, xz, yz;
  const float *weight_xy, *weight_yz;  // [count]
  int64_t xz_pitch, count;
};

template <bool kStream, class Value>
FASTEMBED_INLINE void write_run(const Run& run, int64_t width, Value* out) {
  constexpr int kStep = 2 * kLanes;  // of float16 with AVX-512 a line of the cache
  const Floats weight = Floats{} + run.xz.weight;
  for (int64_t x = 0; x < width; x += kStep) {
    Floats xy[2], xy_rise[2], yz[2], yz_rise[2];
    for (int k = 0; k < 2; ++k) {
      const int64_t at = x + k * kLanes;
      xy[k] = load(run.xy.low + at);
      xy_rise[k] = load(run.xy.high + at) - xy[k];
      yz[k] = load(run.yz.low + at);
      yz_rise[k] = load(run.yz.high + at) - yz[k];
    }
    for (int64_t i = 0; i < run.count; ++i) {
      const float* low = run.xz.low + i * run.xz_pitch + x;
      const float* high = run.xz.high + i * run.xz_pitch + x;
      const float weight_xy = run.weight_xy[i], weight_yz = run.weight_yz[i];
      Floats sum[2];
      for (int k = 0; k < 2; ++k) {
        const Floats xz = lerp(load(low + k * kLanes), load(high + k * kLanes), weight);
        sum[k] = ((xy[k] + weight_xy * xy_rise[k]) + xz) + (yz[k] + weight_yz * yz_rise[k]);
      }
      Value* to = out + i * width + x;
      if (x + kStep <= width) {
        store_two<kStream>(sum[0], sum[1], to);
      } else {
        Value rest[kStep];
        store_two<false>(sum[0], sum[1], rest);
        memcpy(to, rest, (width - x) * sizeof(Value));
      }
    }
  }
}

template <class Token, class Value>
FASTEMBED_INLINE void accumulate_as(const TriplaneAccumulate& op, const Columns& columns_xy,
                                    const Columns& columns_xz, const Scratch& scratch, int64_t c) {
  const TokenPlane &xy = op.planes[0], &xz = op.planes[1], &yz = op.planes[2];
  const bool has_xy = xy.tokens != nullptr, has_xz = xz.tokens != nullptr,
             has_yz = yz.tokens != nullptr;
  const Between nothing{scratch.zeros, scratch.zeros, 0};
  const int64_t pitch = scratch.pitch, area = op.height * op.width;
  Value* out = static_cast<Value*>(op.out) + c * op.depth * area;
  Reach rows_yz{}, columns_yz{};
  if (has_yz) {
    rows_yz = reach_of(yz.row, op.depth);
    columns_yz = reach_of(yz.column, op.height);
    stage_yz<Token>(yz, rows_yz, columns_yz, op.width, c, op.scale, scratch);
  }
  for (int64_t y0 = 0; y0 < op.height; y0 += scratch.tile) {
    const int64_t tile = std::min(scratch.tile, op.height - y0);
    Reach rows_xz{}, rows_xy{}, tile_yz{};
    if (has_xz) {
      rows_xz = reach_of(xz.row, op.depth);
      for (int64_t i = 0; i < tile; ++i) {
        expand<Token>(xz, rows_xz, columns_xz, y0 + i, c, op.scale, scratch.tokens,
                      scratch.along_x + i * pitch, scratch.tile * pitch);
      }
    }
    if (has_xy) {
      rows_xy = reach_of({xy.row.low + y0, xy.row.high + y0, nullptr}, tile);
    }
    if (has_yz) {
      tile_yz = reach_of({yz.column.low + y0, yz.column.high + y0, nullptr}, tile);
    }
    for (int64_t z = 0; z < op.depth; ++z) {
      if (has_xy) {
        expand<Token>(xy, rows_xy, columns_xy, z, c, op.scale, scratch.tokens, scratch.from_xy,
                      pitch);
      }
      if (has_yz) {
        const int64_t first = (tile_yz.first - columns_yz.first) * pitch;
        const Between rows = between(yz.row, z, scratch.turned + first, rows_yz.first,
                                     scratch.turned_columns * pitch);
        for (int64_t x = 0; x < tile_yz.count * pitch; x += kLanes) {
          const Floats low = load(rows.low + x), high = load(rows.high + x);
          store(lerp(low, high, Floats{} + rows.weight), scratch.from_yz + x);
        }
      }
      const Between along_x =
          has_xz ? between(xz.row, z, scratch.along_x, rows_xz.first, scratch.tile * pitch)
                 : nothing;
      for (int64_t y = y0, end; y < y0 + tile; y = end) {
        for (end = y + 1; end < y0 + tile && same(xy.row, y, end) && same(yz.column, y, end);)
          ++end;
        const Between row_xy =
            has_xy ? between(xy.row, y, scratch.from_xy, rows_xy.first, pitch) : nothing;
        const Between row_yz =
            has_yz ? between(yz.column, y, scratch.from_yz, tile_yz.first, pitch) : nothing;
        const int64_t xz_pitch = has_xz ? pitch : 0, skip = (y - y0) * xz_pitch;
        const Run run{row_xy,
                      {along_x.low + skip, along_x.high + skip, along_x.weight},
                      row_yz,
                      xy.row.weight + y,
                      yz.column.weight + y,
                      xz_pitch,
                      end - y};
        Value* target = out + z * area + y * op.width;
        if (scratch.stream) {
          write_run<true>(run, op.width, target);
        } else {
          write_run<false>(run, op.width, target);
        }
      }
    }
  }
}

template <class Token>
FASTEMBED_INLINE void accumulate_of(const TriplaneAccumulate& op, const Columns& columns_xy,
                                    const Columns& columns_xz, const Scratch& scratch, int64_t c) {
  if (op.value == Real::kFloat16) {
    return accumulate_as<Token, Float16>(op, columns_xy, columns_xz, scratch, c);
  }
  accumulate_as<Token, float>(op, columns_xy, columns_xz, scratch, c);
}

void accumulate(const TriplaneAccumulate& op, const Columns& columns_xy, const Columns& columns_xz,
                const Scratch& scratch, int64_t c) {
  switch (op.token) {
    case Real::kFloat32:
      return accumulate_of<float>(op, columns_xy, columns_xz, scratch, c);
    case Real::kBFloat16:
      return accumulate_of<BFloat16>(op, columns_xy, columns_xz, scratch, c);
    case Real::kFloat16:
      return accumulate_of<Float16>(op, columns_xy, columns_xz, scratch, c);
  }
}
