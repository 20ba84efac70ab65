// to[stride j + i] = dword j at row[i] + at, for 16 rows of 16 dwords. Included inside a target's namespace.

inline void transpose_dwords(const std::byte* const* row, size_t at, uint32_t* to, size_t stride = 16) {
  for (int i = 0; i < 16; ++i) {
    uint32_t dwords[16];
    std::memcpy(dwords, row[i] + at, sizeof dwords);
    for (int j = 0; j < 16; ++j) to[stride * static_cast<size_t>(j) + i] = dwords[j];
  }
}
