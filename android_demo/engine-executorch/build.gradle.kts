// Runs bundles of backend `executorch`.
plugins {
    alias(libs.plugins.android.library)
    alias(libs.plugins.kotlin.android)
}

android {
    namespace = "gemmamtp.executorch"

    defaultConfig {
        consumerProguardFiles("consumer-rules.pro")
    }
}

dependencies {
    api(project(":core"))
    implementation(libs.executorch.android)
}
