// The products of the tile unit of AMX in portable code, bit for bit. Included by tile_emu.h, inside a
// target's namespace.
//
// TDPBF16PS, for each output: the even and the odd positions of K are summed separately from zero, each step
// fused and rounded to nearest even; the two sums are added, and that is added to C. Denormal inputs count
// as zero and denormal results become zero, whatever the rounding mode says.
//
// A tile has 16 rows of 64 bytes; a row of B holds, for 16 columns, a pair of bf16 or four int8 of K.

inline float flush_denormal(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (bits & 0x7f800000u) ? x : std::bit_cast<float>(bits & 0x80000000u);
}

// fma(a, b, sum) with denormals as the tile unit treats them.
inline float fused_step(float a, float b, float sum) {
  const float product = a * b;
  const float size = std::fabs(product);
  const bool in_range = size > 0x1p-100f && size < 0x1p127f;
  return flush_denormal(in_range || a == 0 || b == 0 ? sum + product : std::fma(a, b, sum));
}

struct TileProduct {
  using Rows = std::byte[16][64];

  static void add_bf16(Rows& c, const Rows& a, const Rows& b, int rows, int pairs) {
    alignas(64) float factors_a[2][16][16];  // [parity of the position in K][row][pair]
    alignas(64) float factors_b[2][16][16];  // [parity of the position in K][pair][column]
    const bool plain = unpack_bf16(a, factors_a) & unpack_bf16(b, factors_b);
    for (int n = 0; n < rows; ++n) {
      alignas(64) float even[16] = {}, odd[16] = {}, sums[16];
      sum_products(even, factors_a[0][n], factors_b[0], pairs, plain);
      sum_products(odd, factors_a[1][n], factors_b[1], pairs, plain);
      std::memcpy(sums, c[n], sizeof sums);
      for (int m = 0; m < 16; ++m)
        sums[m] = flush_denormal(flush_denormal(sums[m]) + flush_denormal(even[m] + odd[m]));
      std::memcpy(c[n], sums, sizeof sums);
    }
  }

  static void add_int8(Rows& c, const Rows& a, const Rows& b, int rows, int quads) {
    // The sum over a tile's 64 positions of K is below 2^24: float32 is exact, and has a vector product on
    // every machine, which int32 has not.
    Lanes factors_b[4][16];  // [position in a quad][quad]
    for (int q = 0; q < quads; ++q)
      for (int i = 0; i < 4; ++i)
        for (int m = 0; m < 16; ++m) factors_b[i][q][m] = static_cast<int8_t>(b[q][4 * m + i]);
    for (int n = 0; n < rows; ++n) {
      Lanes sum = {};
      for (int q = 0; q < quads; ++q)
        for (int i = 0; i < 4; ++i)
          sum += static_cast<float>(static_cast<int8_t>(a[n][4 * q + i])) * factors_b[i][q];
      uint32_t sums[16];  // wraps, as the hardware does
      std::memcpy(sums, c[n], sizeof sums);
      for (int m = 0; m < 16; ++m) sums[m] += static_cast<uint32_t>(static_cast<int32_t>(sum[m]));
      std::memcpy(c[n], sums, sizeof sums);
    }
  }

 private:
  // Vectors of the compiler: amx_emu is compiled without its vectorizer, and for any machine.
  typedef float Lanes __attribute__((vector_size(64)));

  // The pairs of a tile as float32, denormals as zeros. Says whether every number is zero or has an exponent
  // from -50 to 62.
  static bool unpack_bf16(const Rows& tile, float (&parts)[2][16][16]) {
    bool plain = true;
    for (int r = 0; r < 16; ++r)
      for (int i = 0; i < 16; ++i) {
        uint32_t pair;
        std::memcpy(&pair, tile[r] + 4 * i, sizeof pair);
        for (int parity = 0; parity < 2; ++parity) {
          const float x = flush_denormal(std::bit_cast<float>(parity ? pair & 0xffff0000u : pair << 16));
          const uint32_t exponent = std::bit_cast<uint32_t>(x) >> 23 & 255;
          plain &= exponent == 0 || exponent - 77 <= 112;
          parts[parity][r][i] = x;
        }
      }
    return plain;
  }

  // sum[m] += a[k] b[k][m] for all k, step by step, each rounded once. The product of two bf16 has 16
  // significant bits, so that a product and a sum that are not fused round once too; of plain factors, it is
  // a multiple of 2^-114 below 2^126: no sum of such is denormal.
  static void sum_products(float (&sum)[16], const float (&a)[16], const float (&b)[16][16], int pairs,
                           bool plain) {
    if (!plain) {
      for (int k = 0; k < pairs; ++k)
        for (int m = 0; m < 16; ++m) sum[m] = fused_step(a[k], b[k][m], sum[m]);
      return;
    }
    Lanes lanes = {};
    for (int k = 0; k < pairs; ++k) {
      Lanes row;
      std::memcpy(&row, b[k], sizeof row);
      lanes += a[k] * row;
    }
    std::memcpy(sum, &lanes, sizeof lanes);
  }
};
