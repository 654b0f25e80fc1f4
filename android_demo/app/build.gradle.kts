import org.jetbrains.kotlin.gradle.dsl.JvmTarget

// The demo: Activities of the plain framework.
plugins {
    alias(libs.plugins.android.application)
    alias(libs.plugins.kotlin.android)
}

android {
    namespace = "gemmamtp.demo"
    compileSdk = 35

    defaultConfig {
        applicationId = "gemmamtp.demo"
        minSdk = 28
        targetSdk = 35
        versionCode = 1
        versionName = "1.0"
        testInstrumentationRunner = "androidx.test.runner.AndroidJUnitRunner"
        ndk {
            // The architectures that the runtimes' libraries are published for.
            abiFilters += listOf("arm64-v8a", "x86_64")
        }
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_11
        targetCompatibility = JavaVersion.VERSION_11
    }

    // A small bundle in the APK: `make android-apk` puts it into android_demo/build/assets/bundle.
    sourceSets["main"].assets.srcDir(rootProject.layout.projectDirectory.dir("build/assets"))

    androidResources {
        // The files of a bundle are stored without compression, so that they are only copied.
        noCompress += listOf("json", "onnx", "pte", "table", "weights")
    }
}

kotlin {
    compilerOptions {
        jvmTarget.set(JvmTarget.JVM_11)
    }
}

dependencies {
    // Both, so that any bundle can be tried; an app of one bundle needs the engine of its backend alone.
    implementation(project(":engine-onnx"))
    implementation(project(":engine-executorch"))
    implementation(libs.gson)
    // For downloads alone: work that goes on in the background, and its notification.
    implementation(libs.androidx.work)
    implementation(libs.androidx.core)
    androidTestImplementation(libs.androidx.test.runner)
    androidTestImplementation(libs.androidx.test.junit)
    testImplementation(libs.junit)
    testImplementation(libs.kotlin.test.junit)
}
