// The limits of the tile unit. Included inside a target's namespace, after nt_tiles-inl.h.

template <class Product>
inline constexpr double kFlopPerTileDot = 2.0 * kTileRows * kPanelColumns * Product::kStep;

template <class Product>
double limit_dot_tiles(uint64_t iterations) {
  alignas(64) std::byte ones[1024];
  std::memset(ones, 1, sizeof ones);
  TileScope scope;
  scope.use(kPanelColumns, kPanelColumns);
  Tile::zero<0>(), Tile::zero<1>(), Tile::zero<2>(), Tile::zero<3>();
  Tile::load<4>(ones, 64), Tile::load<5>(ones, 64), Tile::load<6>(ones, 64), Tile::load<7>(ones, 64);
  for (uint64_t i = 0; i < iterations; ++i) {
    Product::template dot<0, 4, 6>(), Product::template dot<1, 4, 7>();
    Product::template dot<2, 5, 6>(), Product::template dot<3, 5, 7>();
  }
  return 4 * kFlopPerTileDot<Product> * static_cast<double>(iterations);
}

// The step of nt_tiles-inl.h: four loads from the L1 cache and four products.
template <class Product>
double limit_step_tiles(uint64_t iterations, std::byte* cached_32k) {
  TileScope scope;
  scope.use(kPanelColumns, kPanelColumns);
  Tile::zero<0>(), Tile::zero<1>(), Tile::zero<2>(), Tile::zero<3>();
  for (uint64_t i = 0; i < iterations; ++i) {
    const std::byte* at = cached_32k + i % 8 * 4096;
    Tile::load<6>(at, 64);
    Tile::load<4>(at + 1024, 64);
    Product::template dot<0, 4, 6>();
    Tile::load<7>(at + 2048, 64);
    Product::template dot<1, 4, 7>();
    Tile::load<5>(at + 3072, 64);
    Product::template dot<2, 5, 6>(), Product::template dot<3, 5, 7>();
  }
  return 4 * kFlopPerTileDot<Product> * static_cast<double>(iterations);
}
