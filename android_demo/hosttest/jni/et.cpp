// The native part of the stand-in of org.pytorch.executorch, on the executorch wheel's runtime. As in the real JNI, a
// method gets inputs by the address of their buffer, and outputs are the method's own memory.
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>
#include <fcntl.h>
#include <jni.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "text.h"

#define NATIVE(type, name) extern "C" JNIEXPORT type JNICALL Java_org_pytorch_executorch_Module_##name

// The wheel has this header, but not the one of pthreadpool that it includes.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

using executorch::aten::ScalarType;
using executorch::aten::TensorImpl;
using namespace executorch::runtime;

class File : public DataLoader {
 public:
  explicit File(const char* path) {
    int file = open(path, O_RDONLY);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0) return;
    void* mapped = mmap(nullptr, status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (mapped == MAP_FAILED) return;
    data_ = (const char*)mapped;
    size_ = status.st_size;
  }
  ~File() override {
    if (data_ != nullptr) munmap((void*)data_, size_);
  }
  Result<FreeableBuffer> load(size_t offset, size_t size, const SegmentInfo&) const override {
    if (data_ == nullptr || offset > size_ || size > size_ - offset) return Error::AccessFailed;
    return FreeableBuffer(data_ + offset, size, nullptr);
  }
  Result<size_t> size() const override { return size_; }

 private:
  const char* data_ = nullptr;
  size_t size_ = 0;
};

// Memory that grows as it is allocated, until it is reset.
class Heap : public MemoryAllocator {
 public:
  Heap() : MemoryAllocator(0, nullptr) {}
  ~Heap() override { reset(); }
  void* allocate(size_t size, size_t alignment) override {
    void* made = nullptr;
    if (alignment < sizeof(void*)) alignment = sizeof(void*);
    if (posix_memalign(&made, alignment, size) != 0) return nullptr;
    blocks_.push_back(made);
    return made;
  }
  void reset() override {
    for (void* block : blocks_) free(block);
    blocks_.clear();
  }

 private:
  std::vector<void*> blocks_;
};

struct LoadedMethod {
  Heap heap, scratch;
  std::vector<std::vector<uint8_t>> memory;
  std::vector<Span<uint8_t>> spans;
  std::unique_ptr<HierarchicalAllocator> planned;
  std::unique_ptr<MemoryManager> manager;
  std::unique_ptr<Method> method;
};

struct Module {
  std::unique_ptr<File> file;
  std::unique_ptr<Program> program;
  std::map<std::string, std::unique_ptr<LoadedMethod>> methods;
};

bool failed(JNIEnv* env, Error error, const std::string& what) {
  if (error == Error::Ok) return false;
  jclass type = env->FindClass("org/pytorch/executorch/ExecutorchRuntimeException");
  jmethodID make = env->GetMethodID(type, "<init>", "(ILjava/lang/String;)V");
  env->Throw((jthrowable)env->NewObject(type, make, (jint)error, env->NewStringUTF(what.c_str())));
  return true;
}

// A method, loaded on first use; null, with an exception pending, if it cannot be loaded.
Method* method(JNIEnv* env, jlong handle, const std::string& name) {
  auto* module = reinterpret_cast<Module*>(handle);
  auto& slot = module->methods[name];
  if (slot != nullptr) return slot->method.get();
  const std::string what = "Failed to load method: " + name;
  auto loaded = std::make_unique<LoadedMethod>();
  auto meta = module->program->method_meta(name.c_str());
  if (failed(env, meta.error(), what)) return nullptr;
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); i++)
    loaded->memory.emplace_back(meta->memory_planned_buffer_size(i).get());
  for (auto& each : loaded->memory) loaded->spans.emplace_back(each.data(), each.size());
  loaded->planned =
      std::make_unique<HierarchicalAllocator>(Span<Span<uint8_t>>(loaded->spans.data(), loaded->spans.size()));
  loaded->manager = std::make_unique<MemoryManager>(&loaded->heap, loaded->planned.get(), &loaded->scratch);
  auto result = module->program->load_method(name.c_str(), loaded->manager.get());
  if (failed(env, result.error(), what)) return nullptr;
  loaded->method = std::make_unique<Method>(std::move(result.get()));
  slot = std::move(loaded);
  return slot->method.get();
}

// A tensor and its parts, which must live as long as it does and never move.
struct Input {
  std::vector<executorch::aten::SizesType> sizes;
  std::vector<executorch::aten::DimOrderType> order;
  std::vector<executorch::aten::StridesType> strides;
  std::unique_ptr<TensorImpl> tensor;

  Input(const std::vector<jlong>& shape, ScalarType type, void* data)
      : sizes(shape.begin(), shape.end()), order(shape.size()), strides(shape.size()) {
    executorch::aten::StridesType stride = 1;
    for (size_t i = shape.size(); i-- > 0; stride *= sizes[i]) {
      order[i] = i;
      strides[i] = stride;
    }
    tensor = std::make_unique<TensorImpl>(type, sizes.size(), sizes.data(), data, order.data(), strides.data());
  }
};

}  // namespace

NATIVE(jlong, loadNative)(JNIEnv* env, jclass, jstring path, jint threads) {
  runtime_init();
  if (threads == 0) threads = sysconf(_SC_NPROCESSORS_ONLN) / 2;
  if (threads > 0) executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(threads);
  auto module = std::make_unique<Module>();
  std::string name = text(env, path);
  module->file = std::make_unique<File>(name.c_str());
  auto program = Program::load(module->file.get());
  if (failed(env, program.error(), "Failed to load " + name)) return 0;
  module->program = std::make_unique<Program>(std::move(program.get()));
  return reinterpret_cast<jlong>(module.release());
}

NATIVE(void, loadMethodNative)(JNIEnv* env, jclass, jlong module, jstring name) {
  method(env, module, text(env, name));
}

NATIVE(jobjectArray, executeNative)
(JNIEnv* env, jclass, jlong module, jstring name, jobjectArray data, jobjectArray shapes, jintArray types) {
  const std::string methodName = text(env, name), what = "Execution failed for method: " + methodName;
  Method* run = method(env, module, methodName);
  if (run == nullptr) return nullptr;
  std::vector<jint> codes(env->GetArrayLength(types));
  env->GetIntArrayRegion(types, 0, codes.size(), codes.data());
  if (codes.size() != run->inputs_size()) {
    failed(env, Error::InvalidArgument, what);
    return nullptr;
  }
  std::vector<std::unique_ptr<Input>> inputs;
  for (size_t i = 0; i < codes.size(); i++) {
    jobject buffer = env->GetObjectArrayElement(data, i);
    auto dimensions = (jlongArray)env->GetObjectArrayElement(shapes, i);
    std::vector<jlong> shape(env->GetArrayLength(dimensions));
    env->GetLongArrayRegion(dimensions, 0, shape.size(), shape.data());
    // Java's codes are those of ScalarType.
    inputs.push_back(std::make_unique<Input>(shape, (ScalarType)codes[i], env->GetDirectBufferAddress(buffer)));
    env->DeleteLocalRef(dimensions);
    env->DeleteLocalRef(buffer);
    executorch::aten::Tensor tensor(inputs.back()->tensor.get());
    if (failed(env, run->set_input(EValue(tensor), i), what)) return nullptr;
  }
  if (failed(env, run->execute(), what)) return nullptr;
  jobjectArray outputs = env->NewObjectArray(2 * run->outputs_size(), env->FindClass("java/lang/Object"), nullptr);
  for (size_t i = 0; i < run->outputs_size(); i++) {
    const auto& tensor = run->get_output(i).toTensor();
    std::vector<jlong> info = {(jlong)tensor.scalar_type()};
    info.insert(info.end(), tensor.sizes().begin(), tensor.sizes().end());
    jlongArray typeAndShape = env->NewLongArray(info.size());
    env->SetLongArrayRegion(typeAndShape, 0, info.size(), info.data());
    jobject memory = env->NewDirectByteBuffer(tensor.mutable_data_ptr(), tensor.nbytes());
    env->SetObjectArrayElement(outputs, 2 * i, memory);
    env->SetObjectArrayElement(outputs, 2 * i + 1, typeAndShape);
    env->DeleteLocalRef(memory);
    env->DeleteLocalRef(typeAndShape);
  }
  return outputs;
}

NATIVE(void, destroyNative)(JNIEnv*, jclass, jlong module) { delete reinterpret_cast<Module*>(module); }
