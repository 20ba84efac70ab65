// Included first inside every target's namespace: the inliner's attribute, and the hook that formats fill.
// KT_INLINE functions take on the instruction set of the region they are included into.

#undef KT_INLINE
#undef KT_UNROLL
#define KT_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define KT_UNROLL _Pragma("unroll")
#else
#define KT_UNROLL _Pragma("GCC unroll 32")
#endif

template <class Format>
struct Unpack;
