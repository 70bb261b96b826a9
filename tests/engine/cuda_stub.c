// A stand-in for libcuda.so.1 over host memory, for tests of engine/cuda.py where there is no GPU.
//
// It is as lazy as a GPU may be: what is queued on a stream is done when somebody waits for it, not before, and host
// memory is read then too. Device addresses cannot be used on the host. What needs a current context fails without one.
// Nobody may wait, allocate, free or reach into host memory on a stream while it is captured: that spoils the capture,
// as most of it does in CUDA. Memory is filled with one pattern when it is allocated and with another when it is freed.
// What cuda-core and cuda-bindings don't call on our paths is CUDA_ERROR_NOT_SUPPORTED.
//
// Environment: STUB_INIT, what cuInit returns; STUB_MEMORY, the device's memory in bytes (default: 1 GiB).
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef uint64_t Pointer;

enum {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  INVALID_DEVICE = 101,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  NOT_SUPPORTED = 801,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
  CAPTURE_WRONG_THREAD = 908,
};

#define DEVICES 2
#define DEVICE_BIT ((Pointer)1 << 56)  // no host address has it

static struct {  // StubCounts in tests/support/device.py
  int64_t to_device, to_host, within;  // bytes copied
  int64_t live, live_bytes;            // allocations
  int64_t streams, graphs;             // handles that are not destroyed
  int64_t spoiled;                     // calls that a capture does not allow
  int64_t waits, launches;
} counts;

void stub_counts(void* out) { memcpy(out, &counts, sizeof counts); }

static pthread_mutex_t mutex;
static void __attribute__((constructor)) start(void) {
  pthread_mutexattr_t recursive;
  pthread_mutexattr_init(&recursive);
  pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
  pthread_mutex_init(&mutex, &recursive);
}
static void unlock(int* unused) {
  (void)unused;
  pthread_mutex_unlock(&mutex);
}
#define LOCKED \
  int locked __attribute__((cleanup(unlock))) = pthread_mutex_lock(&mutex); \
  (void)locked

// ---------------------------------------------------------------------------------------------------------- contexts
typedef struct {
  int device;
} Context;
static Context contexts[DEVICES] = {{0}, {1}};
static _Thread_local Context* stack[16];
static _Thread_local int depth;

static Context* current(void) { return depth ? stack[depth - 1] : NULL; }
#define NEEDS_CONTEXT \
  if (!current()) return INVALID_CONTEXT

static Result stub_init(unsigned flags) {
  (void)flags;
  const char* result = getenv("STUB_INIT");
  return result ? atoi(result) : SUCCESS;
}
static Result driver_version(int* version) { return *version = 13000, SUCCESS; }
static Result device_count(int* count) { return *count = DEVICES, SUCCESS; }
static Result device_get(int* device, int ordinal) {
  return ordinal < 0 || ordinal >= DEVICES ? INVALID_DEVICE : (*device = ordinal, SUCCESS);
}
static Result device_name(char* name, int length, int device) {
  return snprintf(name, length, "Stub GPU %d", device), SUCCESS;
}
static size_t total_memory(void) {
  const char* memory = getenv("STUB_MEMORY");
  return memory ? strtoull(memory, NULL, 10) : (size_t)1 << 30;
}
static Result device_memory(size_t* bytes, int device) { return (void)device, *bytes = total_memory(), SUCCESS; }
static Result device_attribute(int* value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 75: return *value = 8, SUCCESS;   // compute capability 8.9
    case 76: return *value = 9, SUCCESS;
    case 115: return *value = 1, SUCCESS;  // memory pools
    default: return *value = 0, SUCCESS;
  }
}
static Result context_retain(Context** context, int device) {
  if (device < 0 || device >= DEVICES) return INVALID_DEVICE;
  return *context = &contexts[device], SUCCESS;
}
static Result context_release(int device) { return (void)device, SUCCESS; }
static Result context_current(Context** context) { return *context = current(), SUCCESS; }
static Result context_push(Context* context) {
  if (depth == 16) return INVALID_VALUE;
  return stack[depth++] = context, SUCCESS;
}
static Result context_pop(Context** context) {
  NEEDS_CONTEXT;
  Context* top = stack[--depth];
  if (context) *context = top;
  return SUCCESS;
}
static Result context_set(Context* context) {
  if (depth) --depth;
  return context ? context_push(context) : SUCCESS;
}
static Result context_device(int* device) {
  NEEDS_CONTEXT;
  return *device = current()->device, SUCCESS;
}

// ------------------------------------------------------------------------------------------- work: queues and graphs
typedef enum { COPY, FREE, CALL } Kind;
typedef struct Work {
  Kind kind;
  Pointer target, source;
  size_t bytes;
  void (*function)(void*);
  void* argument;
  struct Work* next;
} Work;
typedef struct {
  Work *first, **end;
} Queue;
typedef struct {
  Context* context;
  Queue queue, recorded;
  int capturing, spoiled;
  pthread_t captor;
} Stream;
typedef struct {
  Queue recorded;
} Graph;

static void* host(Pointer address) { return (void*)(uintptr_t)(address & ~DEVICE_BIT); }

static void append(Queue* queue, Work work) {
  Work* item = malloc(sizeof *item);
  *item = work;
  item->next = NULL;
  if (!queue->first) queue->end = &queue->first;
  *queue->end = item;
  queue->end = &item->next;
}
static void append_all(Queue* queue, const Queue* others) {
  for (const Work* work = others->first; work; work = work->next) append(queue, *work);
}
static void discard(Queue* queue) {
  while (queue->first) {
    Work* work = queue->first;
    queue->first = work->next;
    free(work);
  }
}

static Result spoil(Stream* stream) {
  ++counts.spoiled;
  stream->spoiled = 1;
  return CAPTURE_UNSUPPORTED;
}

static Result queue_work(Stream* stream, Work work) {
  NEEDS_CONTEXT;
  if (!stream || stream->context != current()) return INVALID_HANDLE;
  append(stream->capturing ? &stream->recorded : &stream->queue, work);
  return SUCCESS;
}

static void perform(Work* work) {
  switch (work->kind) {
    case COPY: {
      const int up = !(work->source & DEVICE_BIT), down = !(work->target & DEVICE_BIT);
      *(up ? &counts.to_device : down ? &counts.to_host : &counts.within) += work->bytes;
      memcpy(host(work->target), host(work->source), work->bytes);
      break;
    }
    case FREE: {
      size_t* block = (size_t*)host(work->target) - 2;
      --counts.live;
      counts.live_bytes -= *block;
      memset(host(work->target), 0xDD, *block);
      free(block);
      break;
    }
    case CALL: work->function(work->argument);
  }
}

static Result stream_create(Stream** stream, unsigned flags, int priority) {
  (void)flags, (void)priority;
  LOCKED;
  NEEDS_CONTEXT;
  *stream = calloc(1, sizeof **stream);
  (*stream)->context = current();
  ++counts.streams;
  return SUCCESS;
}
static Result stream_wait(Stream* stream) {
  LOCKED;
  if (!stream) return INVALID_HANDLE;
  if (stream->capturing) return spoil(stream);
  ++counts.waits;
  while (stream->queue.first) {
    Work* work = stream->queue.first;
    stream->queue.first = work->next;
    perform(work);
    free(work);
  }
  return SUCCESS;
}
static Result stream_destroy(Stream* stream) {
  LOCKED;
  const Result result = stream_wait(stream);
  if (result) return result;
  free(stream);
  --counts.streams;
  return SUCCESS;
}
static Result priority_range(int* least, int* greatest) { return *least = 0, *greatest = -5, SUCCESS; }

static Result capture_begin(Stream* stream, int mode) {
  LOCKED;
  NEEDS_CONTEXT;
  if (mode != 1 || stream->capturing) return INVALID_VALUE;  // 1: thread-local
  stream->capturing = 1;
  stream->spoiled = 0;
  stream->captor = pthread_self();
  return SUCCESS;
}
static Result capture_end(Stream* stream, Graph** graph) {
  LOCKED;
  if (graph) *graph = NULL;
  if (!stream->capturing) return INVALID_VALUE;
  if (!pthread_equal(stream->captor, pthread_self())) return CAPTURE_WRONG_THREAD;
  stream->capturing = 0;
  if (stream->spoiled) return discard(&stream->recorded), CAPTURE_INVALIDATED;
  *graph = calloc(1, sizeof **graph);
  ++counts.graphs;
  append_all(&(*graph)->recorded, &stream->recorded);
  discard(&stream->recorded);
  return SUCCESS;
}
static Result capture_status(Stream* stream, int* status) {
  return *status = stream->capturing ? 1 + stream->spoiled : 0, SUCCESS;
}
static Result exchange_mode(int* mode) {
  static _Thread_local int own;  // 0: global
  const int before = own;
  return own = *mode, *mode = before, SUCCESS;
}
static Result graph_destroy(Graph* graph) {
  LOCKED;
  discard(&graph->recorded);
  free(graph);
  --counts.graphs;
  return SUCCESS;
}
static Result graph_instantiate(Graph** executable, Graph* graph, uint64_t flags) {
  (void)flags;
  LOCKED;
  *executable = calloc(1, sizeof **executable);
  ++counts.graphs;
  append_all(&(*executable)->recorded, &graph->recorded);
  return SUCCESS;
}
static Result graph_launch(Graph* executable, Stream* stream) {
  LOCKED;
  NEEDS_CONTEXT;
  if (stream->capturing) return spoil(stream);
  ++counts.launches;
  append_all(&stream->queue, &executable->recorded);
  return SUCCESS;
}

// ------------------------------------------------------------------------------------------------------------ memory
static Result pool_of_device(void** pool, int device) { return *pool = &contexts[device], SUCCESS; }
static Result pool_set(void* pool, int attribute, void* value) {
  return (void)pool, (void)attribute, (void)value, SUCCESS;
}
static Result pool_get(void* pool, int attribute, uint64_t* value) {
  return (void)pool, (void)attribute, *value = 0, SUCCESS;
}
static Result allocate(Pointer* address, size_t bytes, Stream* stream) {
  LOCKED;
  NEEDS_CONTEXT;
  if (!bytes) return INVALID_VALUE;
  if (stream->capturing) return spoil(stream);
  if (counts.live_bytes + bytes > total_memory()) return OUT_OF_MEMORY;
  size_t* block = malloc(bytes + 2 * sizeof *block);
  *block = bytes;
  memset(block + 2, 0xA5, bytes);
  ++counts.live;
  counts.live_bytes += bytes;
  *address = (Pointer)(uintptr_t)(block + 2) | DEVICE_BIT;
  return SUCCESS;
}
static Result allocate_from(Pointer* address, size_t bytes, void* pool, Stream* stream) {
  return (void)pool, allocate(address, bytes, stream);
}
static Result release(Pointer address, Stream* stream) {
  LOCKED;
  if (stream->capturing) return spoil(stream);
  return queue_work(stream, (Work){.kind = FREE, .target = address});
}
static Result copy(Pointer target, Pointer source, size_t bytes, Stream* stream) {
  LOCKED;
  if (!(source & target & DEVICE_BIT) && stream->capturing) return spoil(stream);
  return queue_work(stream, (Work){.kind = COPY, .target = target, .source = source, .bytes = bytes});
}
static Result up(Pointer target, const void* source, size_t bytes, Stream* stream) {
  if (!(target & DEVICE_BIT)) return INVALID_VALUE;
  return copy(target, (Pointer)(uintptr_t)source, bytes, stream);
}
static Result down(void* target, Pointer source, size_t bytes, Stream* stream) {
  if (!(source & DEVICE_BIT)) return INVALID_VALUE;
  return copy((Pointer)(uintptr_t)target, source, bytes, stream);
}
static Result within(Pointer target, Pointer source, size_t bytes, Stream* stream) {
  if (!(target & source & DEVICE_BIT)) return INVALID_VALUE;
  return copy(target, source, bytes, stream);
}
static Result call(Stream* stream, void (*function)(void*), void* argument) {
  LOCKED;
  return queue_work(stream, (Work){.kind = CALL, .function = function, .argument = argument});
}

// ------------------------------------------------------------------------------------------------------------ errors
static const struct {
  Result code;
  const char *name, *text;
} errors[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "attempt to terminate a thread-local capture"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};
static Result error_name(Result code, const char** name) {
  for (size_t i = 0; i < sizeof errors / sizeof *errors; ++i) {
    if (errors[i].code == code) return *name = errors[i].name, SUCCESS;
  }
  return INVALID_VALUE;
}
static Result error_string(Result code, const char** text) {
  for (size_t i = 0; i < sizeof errors / sizeof *errors; ++i) {
    if (errors[i].code == code) return *text = errors[i].text, SUCCESS;
  }
  return INVALID_VALUE;
}

// ------------------------------------------------------------------------------------------------------- entry points
static Result unsupported(void) { return NOT_SUPPORTED; }

static const struct {
  const char* name;
  void* function;
} functions[] = {
    {"cuInit", stub_init},
    {"cuDriverGetVersion", driver_version},
    {"cuDeviceGetCount", device_count},
    {"cuDeviceGet", device_get},
    {"cuDeviceGetName", device_name},
    {"cuDeviceTotalMem", device_memory},
    {"cuDeviceGetAttribute", device_attribute},
    {"cuDevicePrimaryCtxRetain", context_retain},
    {"cuDevicePrimaryCtxRelease", context_release},
    {"cuCtxGetCurrent", context_current},
    {"cuCtxSetCurrent", context_set},
    {"cuCtxPushCurrent", context_push},
    {"cuCtxPopCurrent", context_pop},
    {"cuCtxGetDevice", context_device},
    {"cuCtxGetStreamPriorityRange", priority_range},
    {"cuStreamCreateWithPriority", stream_create},
    {"cuStreamSynchronize", stream_wait},
    {"cuStreamDestroy", stream_destroy},
    {"cuStreamBeginCapture", capture_begin},
    {"cuStreamEndCapture", capture_end},
    {"cuStreamIsCapturing", capture_status},
    {"cuThreadExchangeStreamCaptureMode", exchange_mode},
    {"cuGraphDestroy", graph_destroy},
    {"cuGraphInstantiateWithFlags", graph_instantiate},
    {"cuGraphLaunch", graph_launch},
    {"cuGraphExecDestroy", graph_destroy},
    {"cuDeviceGetMemPool", pool_of_device},
    {"cuDeviceGetDefaultMemPool", pool_of_device},
    {"cuMemPoolSetAttribute", pool_set},
    {"cuMemPoolGetAttribute", pool_get},
    {"cuMemAllocFromPoolAsync", allocate_from},
    {"cuMemFreeAsync", release},
    {"cuMemcpyHtoDAsync", up},
    {"cuMemcpyDtoHAsync", down},
    {"cuMemcpyDtoDAsync", within},
    {"cuLaunchHostFunc", call},
    {"cuGetErrorName", error_name},
    {"cuGetErrorString", error_string},
};

Result cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status) {
  (void)version, (void)flags;
  if (status) *status = 0;
  *function = !strcmp(name, "cuGetProcAddress") ? (void*)cuGetProcAddress_v2 : (void*)unsupported;
  for (size_t i = 0; i < sizeof functions / sizeof *functions; ++i) {
    if (!strcmp(name, functions[i].name)) *function = functions[i].function;
  }
  return SUCCESS;
}

// What is looked up by name, without the above.
Result cuInit(unsigned flags) { return stub_init(flags); }
Result cuDriverGetVersion(int* version) { return driver_version(version); }
Result cuDeviceGetCount(int* count) { return device_count(count); }
Result cuDeviceGet(int* device, int ordinal) { return device_get(device, ordinal); }
Result cuDeviceGetName(char* name, int length, int device) { return device_name(name, length, device); }
Result cuDeviceTotalMem_v2(size_t* bytes, int device) { return device_memory(bytes, device); }
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  return device_attribute(value, attribute, device);
}
Result cuLaunchHostFunc(Stream* stream, void (*function)(void*), void* argument) {
  return call(stream, function, argument);
}
Result cuGetErrorName(Result code, const char** name) { return error_name(code, name); }
Result cuGetErrorString(Result code, const char** text) { return error_string(code, text); }
