import org.jetbrains.kotlin.gradle.dsl.JvmTarget

// Loaded graphs on ONNX Runtime and on ExecuTorch, for the decoder in core.
plugins {
    alias(libs.plugins.android.library)
    alias(libs.plugins.kotlin.android)
}

android {
    namespace = "gemmamtp.engines"
    compileSdk = 35

    defaultConfig {
        minSdk = 28
        consumerProguardFiles("consumer-rules.pro")
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_11
        targetCompatibility = JavaVersion.VERSION_11
    }
}

kotlin {
    compilerOptions {
        jvmTarget.set(JvmTarget.JVM_11)
    }
}

dependencies {
    api(project(":core"))
    implementation(libs.executorch.android)
    implementation(libs.onnxruntime.android)
}
