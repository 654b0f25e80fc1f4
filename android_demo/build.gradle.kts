import com.android.build.api.dsl.LibraryExtension
import org.jetbrains.kotlin.gradle.dsl.JvmTarget
import org.jetbrains.kotlin.gradle.dsl.KotlinAndroidProjectExtension
import org.jetbrains.kotlin.gradle.dsl.KotlinVersion

// The modules apply these plugins; here they get one class path, and the versions of gradle/libs.versions.toml.
plugins {
    alias(libs.plugins.android.application) apply false
    alias(libs.plugins.android.library) apply false
    alias(libs.plugins.kotlin.android) apply false
}

// What the artifacts have in common: ./gradlew publishToMavenLocal publishes each with its sources.
configure(listOf(project(":core"), project(":engine-onnx"), project(":engine-executorch"))) {
    group = "gemmamtp"
    version = "0.2.0"

    plugins.withId("com.android.library") {
        apply(plugin = "maven-publish")
        extensions.configure<LibraryExtension> {
            compileSdk = 35
            defaultConfig {
                minSdk = 28
            }
            compileOptions {
                sourceCompatibility = JavaVersion.VERSION_11
                targetCompatibility = JavaVersion.VERSION_11
            }
            publishing {
                singleVariant("release") {
                    withSourcesJar() // with KDoc, which editors show; AGP's own Dokka does not read Kotlin 2
                }
            }
        }
        extensions.configure<PublishingExtension> {
            publications.register<MavenPublication>("release") {
                afterEvaluate { from(components["release"]) }
                pom {
                    name.set("gemma-mtp ${project.name}")
                    description.set("Runs Gemma 4 bundles with their multi-token-prediction drafter on Android.")
                    licenses {
                        license {
                            name.set("Apache-2.0")
                            url.set("https://www.apache.org/licenses/LICENSE-2.0")
                        }
                    }
                }
            }
        }
    }

    plugins.withId("org.jetbrains.kotlin.android") {
        extensions.configure<KotlinAndroidProjectExtension> {
            explicitApi()
            // Compilers read what the next language version has written: these let apps use Kotlin 2.1 and later.
            coreLibrariesVersion = "2.2.0"
            compilerOptions {
                jvmTarget.set(JvmTarget.JVM_11)
                languageVersion.set(KotlinVersion.KOTLIN_2_2)
                apiVersion.set(KotlinVersion.KOTLIN_2_2)
            }
        }
    }
}
