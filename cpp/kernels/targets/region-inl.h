// Included first inside every target's namespace: the inliner's attribute, and the hook that formats fill.
// KT_INLINE functions take on the instruction set of the region they are included into.

#undef KT_INLINE
#undef KT_UNROLL
#undef KT_NO_UNROLL
#define KT_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define KT_UNROLL _Pragma("unroll")
#define KT_NO_UNROLL _Pragma("nounroll")
#else
#define KT_UNROLL _Pragma("GCC unroll 32")
#define KT_NO_UNROLL _Pragma("GCC unroll 1")
#endif

// How a format is decoded in registers: the lower part of a format's header specializes it.
template <class Format>
struct Unpack;
