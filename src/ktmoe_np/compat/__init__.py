"""The names, signatures and defaults of other libraries, on this one's layers: `kt_kernel`, for kt-kernel's.

A program imports from here instead of from the other library, and stays as it is. What that library does with
pointers, tensors do here; what cannot be done is refused, with the reason and what to write instead.
"""
