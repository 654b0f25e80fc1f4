@file:JvmName("Requirements")

package gemmamtp.core

import com.google.gson.JsonElement
import com.google.gson.JsonObject
import java.io.File

internal val HEADS_FIRST = listOf("num_key_value_heads", "rows", "head_dim")

/** Features of this format, and whether a manifest uses them. FORMAT.md, "Features", says what they mean. */
internal val FEATURES = mapOf<String, (JsonObject) -> Boolean>(
    "untied-head" to { it.getAsJsonObject("tables").has("head") },
    "no-per-layer-embeddings" to { !it.getAsJsonObject("tables").has("embed_tokens_per_layer") },
    "split-tables" to { raw -> raw.getAsJsonObject("tables").let { tables -> TABLES.any { tables.has(it) && isSplit(tables.getAsJsonObject(it)) } } },
    "kv-float16" to { raw -> buffers(raw).any { it.get("dtype").asString == "float16" } },
    "kv-layout" to { raw -> buffers(raw).any { buffer -> buffer.getAsJsonArray("layout").map { it.asString } != HEADS_FIRST } },
    "channels" to { raw -> raw.getAsJsonObject("tokens").getAsJsonObject("channels").orEmpty().any { it != THOUGHT } },
)

private fun buffers(raw: JsonObject) = raw.getAsJsonObject("kv").getAsJsonArray("buffers").map { it.asJsonObject }

private fun isSplit(table: JsonObject) =
    listOf("data", "scales").mapNotNull(table::getAsJsonObject).any { it.getAsJsonArray("parts").size() > 1 }

private fun JsonObject?.orEmpty(): Set<String> = this?.keySet() ?: emptySet()

/**
 * Refuse a manifest that requires what this version does not know.
 *
 * @param raw the parsed manifest, of which nothing has been checked.
 * @throws InputError a feature is unknown, or `requires` is no list of features.
 */
internal fun refuseUnknownFeatures(raw: JsonObject, origin: String) {
    val requires = raw.get("requires")
    val entries = if (requires != null && requires.isJsonArray) requires.asJsonArray.toList() else listOf(null)
    for (entry in entries) {
        val (name, since) = listOf("name", "since").map { key -> (entry as? JsonObject)?.get(key).text() }
        if (name == null || since == null) {
            throw InputError("$origin: requires is ${"$requires".take(80)}, expected a list of objects with name and since; export it again")
        }
        if (name !in FEATURES) {
            throw InputError(
                "$origin: needs the feature '${name.take(60)}', which gemma-mtp-export ${since.take(20)} brought and this version does not have;" +
                    " update the app, or export the bundle without that feature",
            )
        }
    }
}

private fun JsonElement?.text() = this?.takeIf { it.isJsonPrimitive && it.asJsonPrimitive.isString }?.asString

/** Throws IllegalArgumentException where a manifest uses a feature that its `requires` does not name. */
internal fun checkFeatures(raw: JsonObject) {
    val named = raw.getAsJsonArray("requires").map { it.asJsonObject.get("name").asString }
    val missing = FEATURES.filter { (name, uses) -> name !in named && uses(raw) }.keys.minOrNull()
    require(missing == null) { "requires does not name $missing, which the manifest uses" }
}

/**
 * Refuse a runtime library that is older than the oldest one that runs a bundle.
 *
 * @param library its name, and [installed] its version.
 * @throws InputError the library is older.
 */
public fun requireRuntime(bundle: File, manifest: Manifest, library: String, installed: String) {
    val oldest = manifest.minRuntime ?: return
    if (isOlder(versionNumbers(installed), versionNumbers(oldest))) {
        throw InputError("$bundle: needs $library $oldest or later, the app has $installed; update the app")
    }
}

/** The numbers that a version begins with, without zeros at the end: 1, 31, 1 for `1.31.1rc2`. */
internal fun versionNumbers(version: String): List<Int> =
    Regex("""\d+(\.\d+)*""").matchAt(version, 0)?.value.orEmpty().split(".").mapNotNull(String::toIntOrNull)
        .dropLastWhile { it == 0 }

private fun isOlder(one: List<Int>, other: List<Int>): Boolean {
    val differing = one.zip(other).firstOrNull { (left, right) -> left != right }
    return differing?.let { (left, right) -> left < right } ?: (one.size < other.size)
}
