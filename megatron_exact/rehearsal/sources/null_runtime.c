/* The CUDA runtime and cuBLAS of a device that is not there.
 *
 * Host C without a CUDA compiler: the library defines the functions that PyTorch imports from libcudart and
 * libcublas. It is loaded before PyTorch with global symbols, so that PyTorch's references bind to it.
 *
 * Device memory is host memory that the kernel hands out page by page when something is written to it
 * (MAP_NORESERVE), so a card of 80 GB costs nothing until then. Copies happen unless they are longer than
 * `longest_copy`. Kernels, and matrix products, are counted and do nothing: their values come from
 * emulation.py, which reads and writes this memory as a CPU tensor.
 *
 * A function that PyTorch imports and that is missing here gets a generated one that fails and names itself
 * (build.py), so nothing reaches NVIDIA's own libraries by accident.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <driver_types.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <vector_types.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_SUPPORTED = 801 };

#define ACCEPTS(name) int name(void) { return SUCCESS; }
#define LAUNCHES(name) int name(void) { __sync_add_and_fetch(&launches, 1); return SUCCESS; }

/* ---------------------------------------------------------------------- settings and counters (device.py) */

static int num_devices = 8;
static size_t device_bytes = 0;
static size_t longest_copy = SIZE_MAX;
static unsigned long launches = 0, skipped_copies = 0;
static void (*on_synchronisation)(const char *) = NULL;

void null_device_configure(int devices, size_t bytes, size_t copy_bytes) {
    num_devices = devices;
    device_bytes = bytes;
    longest_copy = copy_bytes;
}
unsigned long null_device_launches(void) { return launches; }
void null_device_launch(void) { __sync_add_and_fetch(&launches, 1); } /* of the driver: null_driver.c */
unsigned long null_device_skipped_copies(void) { return skipped_copies; }
void null_device_on_synchronisation(void (*callback)(const char *)) { on_synchronisation = callback; }

static int synchronises(const char *call) {
    if (on_synchronisation) on_synchronisation(call);
    return SUCCESS;
}

/* ------------------------------------------------------------------------------------------- properties */

static __thread int current_device = 0;

int cudaGetDeviceCount(int *count) { *count = num_devices; return SUCCESS; }
int cudaGetDevice(int *device) { *device = current_device; return SUCCESS; }
int cudaSetDevice(int device) {
    if (device < 0 || device >= num_devices) return 101; /* cudaErrorInvalidDevice */
    current_device = device;
    return SUCCESS;
}
int cudaDriverGetVersion(int *version) { *version = CUDA_VERSION_OF_TORCH; return SUCCESS; }
int cudaRuntimeGetVersion(int *version) { *version = CUDA_VERSION_OF_TORCH; return SUCCESS; }

int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "null device of megatron_exact (computes nothing)");
    p->totalGlobalMem = device_bytes;
    p->major = 9;
    p->minor = 0;
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerMultiprocessor = 233472;
    p->sharedMemPerBlockOptin = 232448;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->l2CacheSize = 52428800;
    p->memoryBusWidth = 5120;
    p->ECCEnabled = 1;
    p->asyncEngineCount = 3;
    p->concurrentKernels = p->cooperativeLaunch = 1;
    p->unifiedAddressing = p->managedMemory = p->concurrentManagedAccess = 1;
    p->textureAlignment = 512;
    p->streamPrioritiesSupported = 1;
    p->pciBusID = device + 1;
    return SUCCESS;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = p.maxThreadsDim[0]; break;
    case cudaDevAttrMaxBlockDimZ: *value = p.maxThreadsDim[2]; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerMultiprocessor; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    default: *value = 0;
    }
    return SUCCESS;
}

int cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:%02x:00.0", device + 1);
    return SUCCESS;
}
int cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 1; return SUCCESS; }
ACCEPTS(cudaDeviceEnablePeerAccess)

/* ----------------------------------------------------------------------------------------------- memory */

struct range { uintptr_t start; size_t bytes; int device; };
static struct range *ranges = NULL;
static size_t num_ranges = 0, room_for_ranges = 0;
static size_t used_bytes[64];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

int null_device_take(int device, size_t bytes) { /* also of physical memory: null_driver.c */
    int fits;
    pthread_mutex_lock(&lock);
    fits = used_bytes[device] + bytes <= device_bytes;
    if (fits) used_bytes[device] += bytes;
    pthread_mutex_unlock(&lock);
    return fits;
}
void null_device_give_back(int device, size_t bytes) {
    pthread_mutex_lock(&lock);
    used_bytes[device] -= bytes;
    pthread_mutex_unlock(&lock);
}
void null_device_enter(void *start, size_t bytes, int device) {
    pthread_mutex_lock(&lock);
    if (num_ranges == room_for_ranges) {
        room_for_ranges = room_for_ranges ? 2 * room_for_ranges : 1024;
        ranges = realloc(ranges, room_for_ranges * sizeof *ranges);
    }
    ranges[num_ranges++] = (struct range){(uintptr_t)start, bytes, device};
    pthread_mutex_unlock(&lock);
}
static struct range leave(void *start) {
    struct range found = {0, 0, 0};
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < num_ranges; i++)
        if (ranges[i].start == (uintptr_t)start) {
            found = ranges[i];
            ranges[i] = ranges[--num_ranges];
            break;
        }
    pthread_mutex_unlock(&lock);
    return found;
}

int cudaMalloc(void **pointer, size_t bytes) {
    *pointer = NULL;
    bytes = (bytes + 511) & ~(size_t)511;
    if (!bytes) return SUCCESS;
    if (!null_device_take(current_device, bytes)) return OUT_OF_MEMORY;
    void *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) {
        null_device_give_back(current_device, bytes);
        return OUT_OF_MEMORY;
    }
    null_device_enter(start, bytes, current_device);
    *pointer = start;
    return SUCCESS;
}
int cudaFree(void *pointer) {
    if (!pointer) return SUCCESS;
    struct range found = leave(pointer);
    if (!found.bytes) return INVALID_VALUE;
    munmap(pointer, found.bytes);
    null_device_give_back(found.device, found.bytes);
    return SUCCESS;
}
int cudaMallocAsync(void **pointer, size_t bytes, void *stream) { return cudaMalloc(pointer, bytes); }
int cudaFreeAsync(void *pointer, void *stream) { return cudaFree(pointer); }
int cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    *pointer = aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095);
    return *pointer ? SUCCESS : OUT_OF_MEMORY;
}
int cudaMallocHost(void **pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, 0); }
int cudaFreeHost(void *pointer) { free(pointer); return SUCCESS; }
ACCEPTS(cudaHostRegister)
ACCEPTS(cudaHostUnregister)

int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = device_bytes;
    *free_bytes = device_bytes - used_bytes[current_device];
    return SUCCESS;
}

int cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    uintptr_t place = (uintptr_t)pointer;
    memset(attributes, 0, sizeof *attributes);
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < num_ranges; i++)
        if (place >= ranges[i].start && place < ranges[i].start + ranges[i].bytes) {
            attributes->type = cudaMemoryTypeDevice;
            attributes->device = ranges[i].device;
            attributes->devicePointer = (void *)pointer;
            break;
        }
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

static void copy(void *to, const void *from, size_t bytes) {
    if (bytes <= longest_copy) memmove(to, from, bytes);
    else __sync_add_and_fetch(&skipped_copies, 1);
}
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
    copy(to, from, bytes);
    return synchronises("cudaMemcpy");
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    copy(to, from, bytes);
    return SUCCESS;
}
int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                      int kind, void *stream) {
    for (size_t row = 0; row < height; row++)
        copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return SUCCESS;
}
int cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes, void *stream) {
    copy(to, from, bytes);
    return SUCCESS;
}
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) {
    if (bytes <= longest_copy) memset(to, value, bytes);
    else __sync_add_and_fetch(&skipped_copies, 1);
    return SUCCESS;
}
int cudaMemset(void *to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, NULL); }
ACCEPTS(cudaMemcpyToSymbol)

static char symbols[1 << 16];
int cudaGetSymbolAddress(void **pointer, const void *symbol) { *pointer = symbols; return SUCCESS; }

/* ----------------------------------------------------------------------------------- streams and events */

static uintptr_t last_handle = 0x1000;
static void *handle(void) { return (void *)__sync_add_and_fetch(&last_handle, 16); }

int cudaStreamCreate(void **stream) { *stream = handle(); return SUCCESS; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return cudaStreamCreate(stream); }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return cudaStreamCreate(stream); }
int cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return SUCCESS; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return SUCCESS; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return SUCCESS; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { *status = 0; return SUCCESS; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { return SUCCESS; }
ACCEPTS(cudaStreamDestroy)
ACCEPTS(cudaStreamQuery)
ACCEPTS(cudaStreamWaitEvent)
int cudaStreamSynchronize(void *stream) { return synchronises("cudaStreamSynchronize"); }
int cudaDeviceSynchronize(void) { return synchronises("cudaDeviceSynchronize"); }

int cudaEventCreate(void **event) { *event = handle(); return SUCCESS; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return cudaEventCreate(event); }
ACCEPTS(cudaEventDestroy)
ACCEPTS(cudaEventQuery)
ACCEPTS(cudaEventRecord)
ACCEPTS(cudaEventRecordWithFlags)
int cudaEventSynchronize(void *event) { return synchronises("cudaEventSynchronize"); }
int cudaEventElapsedTime(float *milliseconds, void *from, void *to) { *milliseconds = 0.01f; return SUCCESS; }

int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) { function(data); return SUCCESS; }
int cudaStreamAddCallback(void *stream, void (*function)(void *, int, void *), void *data, unsigned flags) {
    function(stream, SUCCESS, data);
    return SUCCESS;
}

/* ---------------------------------------------------------------------------------------------- kernels */

LAUNCHES(cudaLaunchKernel)
LAUNCHES(cudaLaunchKernelExC)
LAUNCHES(cudaLaunchCooperativeKernel)
LAUNCHES(__cudaLaunchKernel)

static __thread struct { dim3 grid, block; size_t shared; void *stream; } configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared = shared;
    configuration.stream = stream;
    return SUCCESS;
}
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *stream = configuration.stream;
    return SUCCESS;
}
int __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return SUCCESS; }
static void *fat_binary[2];
void **__cudaRegisterFatBinary(void *binary) { return fat_binary; }
void __cudaRegisterFatBinaryEnd(void **binary) {}
void __cudaUnregisterFatBinary(void **binary) {}
void __cudaRegisterFunction(void) {}
void __cudaRegisterVar(void) {}
char __cudaInitModule(void **binary) { return 1; }

int cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = 90;
    attributes->maxDynamicSharedSizeBytes = 49152;
    return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int size, size_t shared) {
    *blocks = 2;
    return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size,
                                                           size_t shared, unsigned flags) {
    *blocks = 2;
    return SUCCESS;
}
int cudaOccupancyMaxActiveClusters(int *clusters, const void *function, const void *configuration) {
    *clusters = 66;
    return SUCCESS;
}
ACCEPTS(cudaFuncSetAttribute)
ACCEPTS(cudaKernelSetAttributeForDevice)
ACCEPTS(cudaLibraryUnload)
ACCEPTS(cudaProfilerStart)
ACCEPTS(cudaProfilerStop)

/* -------------------------------------------------------------------------------- memory pools and errors */

int cudaDeviceGetDefaultMemPool(void **pool, int device) { *pool = handle(); return SUCCESS; }
ACCEPTS(cudaMemPoolGetAttribute)
ACCEPTS(cudaMemPoolSetAccess)
ACCEPTS(cudaMemPoolSetAttribute)
ACCEPTS(cudaMemPoolTrimTo)

int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                     int *status) {
    static void *driver;
    if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = driver ? dlsym(driver, name) : NULL;
    if (status) *status = *function ? 0 : 1; /* cudaDriverEntryPointSymbolNotFound */
    if (!*function) fprintf(stderr, "null device: the driver has no %s\n", name);
    return *function ? SUCCESS : 500; /* cudaErrorSymbolNotFound */
}

const char *cudaGetErrorName(int error) {
    return error == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : error ? "cudaErrorNotSupported" : "cudaSuccess";
}
const char *cudaGetErrorString(int error) {
    return error == OUT_OF_MEMORY ? "out of memory" : error ? "not on the null device" : "no error";
}
ACCEPTS(cudaGetLastError)
ACCEPTS(cudaPeekAtLastError)
ACCEPTS(cudaGraphDestroy)
ACCEPTS(cudaGraphExecDestroy)

/* ------------------------------------------------------------- kernels that are compiled when they are used */

int nvrtcCreateProgram(void **program, const char *source, const char *name, int headers, void *texts,
                       void *names) {
    *program = handle();
    return SUCCESS;
}
ACCEPTS(nvrtcAddNameExpression)
ACCEPTS(nvrtcCompileProgram)
ACCEPTS(nvrtcDestroyProgram)
int nvrtcGetLoweredName(void *program, const char *expression, const char **name) {
    *name = expression;
    return SUCCESS;
}
static int one_byte(size_t *bytes) { *bytes = 1; return SUCCESS; }
static int nothing(char *code) { *code = 0; return SUCCESS; }
int nvrtcGetCUBINSize(void *program, size_t *bytes) { return one_byte(bytes); }
int nvrtcGetPTXSize(void *program, size_t *bytes) { return one_byte(bytes); }
int nvrtcGetProgramLogSize(void *program, size_t *bytes) { return one_byte(bytes); }
int nvrtcGetCUBIN(void *program, char *code) { return nothing(code); }
int nvrtcGetPTX(void *program, char *code) { return nothing(code); }
int nvrtcGetProgramLog(void *program, char *text) { return nothing(text); }

/* ----------------------------------------------------------------------------------------------- cuBLAS */

int cublasCreate_v2(void **library) { *library = handle(); return SUCCESS; }
ACCEPTS(cublasDestroy_v2)
ACCEPTS(cublasSetStream_v2)
ACCEPTS(cublasSetWorkspace_v2)
ACCEPTS(cublasSetMathMode)
ACCEPTS(cublasSetPointerMode_v2)
ACCEPTS(cublasSetSmCountTarget)
int cublasGetMathMode(void *library, int *mode) { *mode = 0; return SUCCESS; }
int cublasGetPointerMode_v2(void *library, int *mode) { *mode = 0; return SUCCESS; }
int cublasGetVersion_v2(void *library, int *version) { *version = 130000; return SUCCESS; }
size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtCreate(void **library) { *library = handle(); return SUCCESS; }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { *made = handle(); return SUCCESS; }
int cublasLtMatmulPreferenceCreate(void **made) { *made = handle(); return SUCCESS; }
int cublasLtMatrixLayoutCreate(void **made, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    *made = handle();
    return SUCCESS;
}
int cublasLtMatmulAlgoGetHeuristic(void *library, void *operation, void *a, void *b, void *c, void *d,
                                   void *preference, int wanted, void *results, int *found) {
    memset(results, 0, 80); /* cublasLtMatmulHeuristicResult_t: an algorithm that needs no workspace */
    *found = 1;
    return SUCCESS;
}
/* The headers write descriptors into memory of the caller's by these. */
ACCEPTS(cublasLtMatmulDescInit_internal)
ACCEPTS(cublasLtMatmulPreferenceInit_internal)
int cublasLtMatmulAlgoConfigGetAttribute(const void *algorithm, int attribute, void *value, size_t bytes,
                                         size_t *written) {
    memset(value, 0, bytes); /* no split of the sum, no other reduction */
    if (written) *written = bytes;
    return SUCCESS;
}
ACCEPTS(cublasLtMatmulDescDestroy)
ACCEPTS(cublasLtMatmulDescSetAttribute)
ACCEPTS(cublasLtMatmulPreferenceDestroy)
ACCEPTS(cublasLtMatmulPreferenceSetAttribute)
ACCEPTS(cublasLtMatrixLayoutDestroy)
ACCEPTS(cublasLtMatrixLayoutSetAttribute)
LAUNCHES(cublasLtMatmul)
LAUNCHES(cublasSgemm_v2)
LAUNCHES(cublasDgemm_v2)
LAUNCHES(cublasSgemmEx)
LAUNCHES(cublasGemmEx)
LAUNCHES(cublasSgemmStridedBatched)
LAUNCHES(cublasDgemmStridedBatched)
LAUNCHES(cublasGemmStridedBatchedEx)
LAUNCHES(cublasSgemv_v2)
LAUNCHES(cublasDgemv_v2)
LAUNCHES(cublasSdot_v2)
LAUNCHES(cublasDdot_v2)
LAUNCHES(cublasDotEx)
