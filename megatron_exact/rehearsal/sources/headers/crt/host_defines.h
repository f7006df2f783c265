/* What nvcc's own header of this name would say; the package of the CUDA runtime leaves it out. */
#define __no_return__ __attribute__((noreturn))
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __host__
#define __device__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define __location__(a)
#define __specialization_static
#define __builtin_align__(a) __attribute__((aligned(a)))
