// A C interface to the methods of an ExecuTorch program, for executorch_graphs.py. It links to the ExecuTorch wheel, which
// lacks the header of `Module`, so data loader and memory are set up here.
#include <executorch/runtime/core/data_loader.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cstring>
#include <memory>
#include <optional>
#include <vector>

namespace executorch::extension::threadpool { // its header includes one that the wheel lacks
struct ThreadPool {
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
} // namespace executorch::extension::threadpool

using namespace executorch::runtime;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;

namespace {

struct MappedFile final : DataLoader {
  const char* data = nullptr;
  size_t length = 0;

  explicit MappedFile(const char* path) {
    int file = ::open(path, O_RDONLY);
    struct stat status;
    if (file < 0 || ::fstat(file, &status) != 0) {
      return;
    }
    void* mapped = ::mmap(nullptr, status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (mapped != MAP_FAILED) {
      data = static_cast<const char*>(mapped);
      length = status.st_size;
    }
  }

  Result<FreeableBuffer> load(size_t offset, size_t size, const SegmentInfo&) const override {
    if (offset + size > length) {
      return Error::InvalidArgument;
    }
    return FreeableBuffer(data + offset, size, nullptr);
  }

  Error load_into(size_t offset, size_t size, const SegmentInfo&, void* buffer) const override {
    std::memcpy(buffer, data + offset, size);
    return Error::Ok;
  }

  Result<size_t> size() const override {
    return length;
  }
};

// Memory that grows as it is allocated, until it is reset: a method's lasts, a call's is reset after each call.
struct Heap final : MemoryAllocator {
  std::vector<std::unique_ptr<char[]>> blocks;

  Heap() : MemoryAllocator(0, nullptr) {}

  void* allocate(size_t size, size_t alignment) override {
    blocks.emplace_back(new char[size + alignment]);
    auto address = reinterpret_cast<uintptr_t>(blocks.back().get());
    return reinterpret_cast<void*>((address + alignment - 1) / alignment * alignment);
  }

  void reset() override {
    blocks.clear();
  }
};

struct Opened {
  std::unique_ptr<MappedFile> file;
  std::optional<Program> program;
};

struct Loaded {
  Heap lasting, passing;
  std::vector<std::vector<uint8_t>> planned;
  std::vector<Span<uint8_t>> spans;
  std::unique_ptr<HierarchicalAllocator> arenas;
  std::unique_ptr<MemoryManager> memory;
  std::optional<Method> method;
};

} // namespace

extern "C" {

// Row-major; `type` is 0 for float32 and 1 for int64.
struct Array {
  void* data;
  int32_t type;
  int32_t rank;
  int32_t shape[4];
};

// Loads a program; returns null and sets `error` if that fails.
void* open_program(const char* path, int threads, int* error) {
  runtime_init();
  executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(threads);
  auto opened = std::make_unique<Opened>();
  opened->file = std::make_unique<MappedFile>(path);
  auto program = Program::load(opened->file.get());
  *error = static_cast<int>(program.error());
  if (!program.ok()) {
    return nullptr;
  }
  opened->program.emplace(std::move(*program));
  return opened.release();
}

// Loads a method of a program, which must outlive it; returns null and sets `error` if that fails.
void* load_method(void* opened, const char* name, int* error) {
  const Program& program = *static_cast<Opened*>(opened)->program;
  auto loaded = std::make_unique<Loaded>();
  auto meta = program.method_meta(name);
  *error = static_cast<int>(meta.error());
  if (!meta.ok()) {
    return nullptr;
  }
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    loaded->planned.emplace_back(*meta->memory_planned_buffer_size(i));
  }
  for (auto& buffer : loaded->planned) {
    loaded->spans.emplace_back(buffer.data(), buffer.size());
  }
  loaded->arenas =
      std::make_unique<HierarchicalAllocator>(Span<Span<uint8_t>>(loaded->spans.data(), loaded->spans.size()));
  loaded->memory = std::make_unique<MemoryManager>(&loaded->lasting, loaded->arenas.get(), &loaded->passing);
  auto method = program.load_method(name, loaded->memory.get());
  *error = static_cast<int>(method.error());
  if (!method.ok()) {
    return nullptr;
  }
  loaded->method.emplace(std::move(*method));
  return loaded.release();
}

// Runs a method on arrays without copying them; `outputs` point into the method's memory until its next call.
int run_method(void* handle, const Array* inputs, int num_inputs, Array* outputs, int num_outputs) {
  Loaded& loaded = *static_cast<Loaded*>(handle);
  static uint8_t row_major[] = {0, 1, 2, 3};
  for (int i = 0; i < num_inputs; ++i) {
    Array array = inputs[i];
    int32_t strides[4];
    for (int d = array.rank - 1, step = 1; d >= 0; step *= array.shape[d--]) {
      strides[d] = step;
    }
    TensorImpl tensor(
        array.type ? ScalarType::Long : ScalarType::Float, array.rank, array.shape, array.data, row_major, strides);
    Error error = loaded.method->set_input(EValue(Tensor(&tensor)), i);
    if (error != Error::Ok) {
      return static_cast<int>(error);
    }
  }
  Error error = loaded.method->execute();
  if (error != Error::Ok) {
    return static_cast<int>(error);
  }
  for (int i = 0; i < num_outputs; ++i) {
    Tensor tensor = loaded.method->get_output(i).toTensor();
    outputs[i].data = tensor.mutable_data_ptr();
    outputs[i].type = tensor.scalar_type() == ScalarType::Long;
    outputs[i].rank = static_cast<int32_t>(tensor.dim());
    std::copy(tensor.sizes().begin(), tensor.sizes().end(), outputs[i].shape);
  }
  return 0;
}

} // extern "C"
