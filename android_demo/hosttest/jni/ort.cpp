// The native part of the stand-in of ai.onnxruntime, on the C API of libonnxruntime.
#include <jni.h>
#include <onnxruntime_c_api.h>

#include <string>
#include <vector>

#include "text.h"

#define NATIVE(type, name) extern "C" JNIEXPORT type JNICALL Java_ai_onnxruntime_Native_##name

namespace {

// The header may be older than the library, never newer.
const OrtApi* api() {
  static const OrtApi* loaded = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  return loaded;
}

bool failed(JNIEnv* env, OrtStatus* status) {
  if (status == nullptr) return false;
  jclass type = env->FindClass("ai/onnxruntime/OrtException");
  jmethodID make = env->GetMethodID(type, "<init>", "(ILjava/lang/String;)V");
  jstring message = env->NewStringUTF(api()->GetErrorMessage(status));
  env->Throw((jthrowable)env->NewObject(type, make, (jint)api()->GetErrorCode(status), message));
  api()->ReleaseStatus(status);
  return true;
}

std::vector<std::string> texts(JNIEnv* env, jobjectArray from) {
  std::vector<std::string> copies;
  for (jsize i = 0; i < env->GetArrayLength(from); i++) {
    auto item = (jstring)env->GetObjectArrayElement(from, i);
    copies.push_back(text(env, item));
    env->DeleteLocalRef(item);
  }
  return copies;
}

std::vector<const char*> pointers(const std::vector<std::string>& from) {
  std::vector<const char*> result;
  for (const auto& item : from) result.push_back(item.c_str());
  return result;
}

std::vector<jlong> longs(JNIEnv* env, jlongArray from) {
  std::vector<jlong> values(env->GetArrayLength(from));
  env->GetLongArrayRegion(from, 0, values.size(), values.data());
  return values;
}

template <typename T>
T* at(jlong handle) {
  return reinterpret_cast<T*>(handle);
}

template <typename T>
jlong handle(T* pointer) {
  return reinterpret_cast<jlong>(pointer);
}

}  // namespace

NATIVE(jstring, version)(JNIEnv* env, jclass) { return env->NewStringUTF(OrtGetApiBase()->GetVersionString()); }

NATIVE(jlong, createEnvironment)(JNIEnv* env, jclass, jint level, jstring name) {
  OrtEnv* made = nullptr;
  failed(env, api()->CreateEnv((OrtLoggingLevel)level, text(env, name).c_str(), &made));
  return handle(made);
}

NATIVE(jlong, createOptions)(JNIEnv* env, jclass) {
  OrtSessionOptions* made = nullptr;
  failed(env, api()->CreateSessionOptions(&made));
  return handle(made);
}

NATIVE(void, setIntraOpNumThreads)(JNIEnv* env, jclass, jlong options, jint threads) {
  failed(env, api()->SetIntraOpNumThreads(at<OrtSessionOptions>(options), threads));
}

NATIVE(void, setSessionLogLevel)(JNIEnv* env, jclass, jlong options, jint level) {
  failed(env, api()->SetSessionLogSeverityLevel(at<OrtSessionOptions>(options), level));
}

NATIVE(void, addConfigEntry)(JNIEnv* env, jclass, jlong options, jstring key, jstring value) {
  std::string name = text(env, key), setting = text(env, value);
  failed(env, api()->AddSessionConfigEntry(at<OrtSessionOptions>(options), name.c_str(), setting.c_str()));
}

NATIVE(void, closeOptions)(JNIEnv*, jclass, jlong options) {
  api()->ReleaseSessionOptions(at<OrtSessionOptions>(options));
}

NATIVE(jlong, createSession)(JNIEnv* env, jclass, jlong environment, jstring path, jlong options) {
  OrtSession* made = nullptr;
  std::string file = text(env, path);
  failed(env, api()->CreateSession(at<OrtEnv>(environment), file.c_str(), at<OrtSessionOptions>(options), &made));
  return handle(made);
}

NATIVE(jobjectArray, names)(JNIEnv* env, jclass, jlong session, jboolean outputs) {
  auto* from = at<OrtSession>(session);
  OrtAllocator* allocator = nullptr;
  size_t count = 0;
  if (failed(env, api()->GetAllocatorWithDefaultOptions(&allocator))) return nullptr;
  if (failed(env, outputs ? api()->SessionGetOutputCount(from, &count) : api()->SessionGetInputCount(from, &count)))
    return nullptr;
  jobjectArray names = env->NewObjectArray(count, env->FindClass("java/lang/String"), nullptr);
  for (size_t i = 0; i < count; i++) {
    char* name = nullptr;
    if (failed(env, outputs ? api()->SessionGetOutputName(from, i, allocator, &name)
                            : api()->SessionGetInputName(from, i, allocator, &name)))
      return nullptr;
    jstring item = env->NewStringUTF(name);
    env->SetObjectArrayElement(names, i, item);
    env->DeleteLocalRef(item);
    allocator->Free(allocator, name);
  }
  return names;
}

NATIVE(void, closeSession)(JNIEnv*, jclass, jlong session) { api()->ReleaseSession(at<OrtSession>(session)); }

NATIVE(jlong, createTensor)
(JNIEnv* env, jclass, jobject data, jlong offset, jlong bytes, jlongArray shape, jint type) {
  static OrtMemoryInfo* memory = nullptr;
  if (memory == nullptr && failed(env, api()->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory)))
    return 0;
  std::vector<jlong> from = longs(env, shape);
  std::vector<int64_t> dimensions(from.begin(), from.end());
  OrtValue* made = nullptr;
  failed(env, api()->CreateTensorWithDataAsOrtValue(
                  memory, (char*)env->GetDirectBufferAddress(data) + offset, bytes, dimensions.data(),
                  dimensions.size(), (ONNXTensorElementDataType)type, &made));
  return handle(made);
}

NATIVE(jlongArray, tensorInfo)(JNIEnv* env, jclass, jlong tensor) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (failed(env, api()->GetTensorTypeAndShape(at<OrtValue>(tensor), &info))) return nullptr;
  ONNXTensorElementDataType type;
  size_t rank = 0;
  failed(env, api()->GetTensorElementType(info, &type));
  failed(env, api()->GetDimensionsCount(info, &rank));
  std::vector<int64_t> dimensions(rank);
  failed(env, api()->GetDimensions(info, dimensions.data(), rank));
  api()->ReleaseTensorTypeAndShapeInfo(info);
  std::vector<jlong> values = {(jlong)type};
  values.insert(values.end(), dimensions.begin(), dimensions.end());
  jlongArray made = env->NewLongArray(values.size());
  env->SetLongArrayRegion(made, 0, values.size(), values.data());
  return made;
}

NATIVE(jobject, tensorBytes)(JNIEnv* env, jclass, jlong tensor) {
  void* data = nullptr;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ONNXTensorElementDataType type;
  size_t count = 0;
  if (failed(env, api()->GetTensorMutableData(at<OrtValue>(tensor), &data))) return nullptr;
  if (failed(env, api()->GetTensorTypeAndShape(at<OrtValue>(tensor), &info))) return nullptr;
  failed(env, api()->GetTensorElementType(info, &type));
  failed(env, api()->GetTensorShapeElementCount(info, &count));
  api()->ReleaseTensorTypeAndShapeInfo(info);
  return env->NewDirectByteBuffer(data, count * (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 ? 8 : 4));
}

NATIVE(void, closeTensor)(JNIEnv*, jclass, jlong tensor) { api()->ReleaseValue(at<OrtValue>(tensor)); }

NATIVE(void, run)
(JNIEnv* env, jclass, jlong session, jobjectArray inputNames, jlongArray inputs, jobjectArray outputNames,
 jlongArray outputs) {
  std::vector<std::string> inputTexts = texts(env, inputNames), outputTexts = texts(env, outputNames);
  std::vector<jlong> from = longs(env, inputs), to = longs(env, outputs);
  std::vector<const OrtValue*> values;
  std::vector<OrtValue*> results;
  for (jlong each : from) values.push_back(at<OrtValue>(each));
  for (jlong each : to) results.push_back(at<OrtValue>(each));
  if (failed(env, api()->Run(at<OrtSession>(session), nullptr, pointers(inputTexts).data(), values.data(), values.size(),
                             pointers(outputTexts).data(), results.size(), results.data())))
    return;
  for (size_t i = 0; i < to.size(); i++) to[i] = handle(results[i]);
  env->SetLongArrayRegion(outputs, 0, to.size(), to.data());
}
