// The decoding loop, tokenizer, downloads and statistics; only gemmamtp.android uses Android's classes.
plugins {
    alias(libs.plugins.android.library)
    alias(libs.plugins.kotlin.android)
}

android {
    namespace = "gemmamtp.core"
}

dependencies {
    api(libs.kotlinx.coroutines.core)
    implementation(libs.gson)
    testImplementation(libs.junit)
    testImplementation(libs.kotlin.test.junit)
}
