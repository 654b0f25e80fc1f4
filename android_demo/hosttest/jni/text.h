// A copy of a Java string.
#pragma once
#include <jni.h>

#include <string>

inline std::string text(JNIEnv* env, jstring from) {
  const char* chars = env->GetStringUTFChars(from, nullptr);
  std::string copy(chars);
  env->ReleaseStringUTFChars(from, chars);
  return copy;
}
